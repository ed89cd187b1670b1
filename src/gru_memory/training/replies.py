"""What the frozen model itself would answer: memory meets these replies in real chats, so it trains on some."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..rendering import TurnRenderer
from ..whole_files import write_whole
from .features import in_eval_mode, template_ids

_ROWS = 64


@torch.no_grad()
def own_replies(
    folder: str | Path,
    model: Any,
    renderer: TurnRenderer,
    users: Sequence[str],
    max_new_tokens: int = 40,
    fingerprint: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Greedy replies of `model` to each message on its own, kept in a file under `folder`; an interrupted run goes on.

    Replies are cut after `max_new_tokens` tokens, as a chat with that limit would cut them.
    """
    tokenizer = renderer.tokenizer
    description = json.dumps([fingerprint, renderer.prefix_text, template_ids(renderer), max_new_tokens, list(users)])
    path = Path(folder) / f"replies-{hashlib.sha256(description.encode()).hexdigest()[:16]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    replies: list[str] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    while len(replies) < len(users):
        prompts = [renderer.prefix_ids + renderer.prompt(user) for user in users[len(replies) : len(replies) + _ROWS]]
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=model.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
        with in_eval_mode(model):
            out = model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=tokenizer.eos_token_id,
            )
        replies += [
            text.strip() or "Okay." for text in tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)
        ]
        write_whole(path, json.dumps(replies).encode())
        if progress:
            progress(len(replies), len(users))
    return replies
