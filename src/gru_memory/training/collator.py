"""Sessions as rows for `transformers.Trainer`: attention sees one turn at a time, memory sees the whole row.

A row is a session, its turns one after the other. Positions restart at every turn, and with no attention mask and no cache
transformers builds the block-diagonal attention mask from them by itself. So one forward pass trains what a conversation
does in many, and gradients flow through the memory from a question back to where the answer was told.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..conversation import TurnTooLong
from ..data.sessions import Session, Turn
from ..rendering import RenderedTurn, TurnRenderer

IGNORED = -100
PAD_POSITION = 1  # of padding: no turn begins there, and no table of positions is too short for it
ROW = ("input_ids", "position_ids", "labels", "memory_mask")
Row = dict[str, list[int]]


class SessionCollator:
    """A `data_collator`: sessions in, a batch out. Every session is one row, padded on the right.

    What is learned is the text of the turns marked `learn="answer"`: the reply, or all of a turn that is plain text. In
    each turn attention sees the system prompt and the turn; memory takes the prompt in once, with the first turn, as in a
    `Conversation`.

    Args:
        tokenizer: a Hugging Face tokenizer.
        system: system prompt; None leaves the default of the chat template.

    The batch holds `input_ids`, `position_ids`, `labels` (the token itself, the model shifts them; -100 where nothing is
    to be learned) and `memory_mask` (False where memory looks away), each (B, T).
    """

    def __init__(self, tokenizer: Any, system: str | None = None) -> None:
        self.renderer = TurnRenderer(tokenizer, system)
        known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self.pad_id: int = next(token for token in known if token is not None)
        self.longest: int | None = getattr(tokenizer, "model_max_length", None)  # tokens of a turn

    def __call__(self, features: Sequence[Session | Mapping[str, Any]]) -> dict[str, Tensor]:
        return pad_rows([self.row(feature) for feature in features], self.pad_id)

    def row(self, session: Session | Mapping[str, Any]) -> Row:
        """One session without padding; what is a row already stays as it is.

        Raises:
            ValueError: neither a session, nor the JSON form of one, nor a row.
            TurnTooLong: a turn is longer than the tokenizer's `model_max_length`.
        """
        if isinstance(session, Mapping):
            if "input_ids" in session:
                if missing := [name for name in ROW if session.get(name) is None]:
                    raise ValueError(
                        f"a training example has input_ids, but no {', '.join(missing)}: give sessions, or rows that "
                        "SessionCollator.row made, for it has to be known where turns begin"
                    )
                return {name: list(session[name]) for name in ROW}
            if "messages" not in session:
                raise ValueError(
                    f"a training example has the columns {sorted(session)}: give Session objects or their JSON form, and set "
                    "remove_unused_columns=False in the TrainingArguments, or the Trainer takes 'messages' away"
                )
            session = Session.from_json(dict(session))
        row: Row = {name: [] for name in ROW}
        greeted = False  # memory has seen the system prompt
        for turn in session.turns:
            prefix = self.renderer.prefix_ids if turn.user is not None else []
            rendered = self._render(turn)
            ids = rendered.ids
            if not ids:
                continue
            if self.longest is not None and len(prefix) + len(ids) > self.longest:
                raise TurnTooLong(
                    f"a turn needs {len(prefix) + len(ids)} positions, the tokenizer's model_max_length is {self.longest}: make it "
                    "several turns, or set model_max_length if the model has more positions"
                )
            first = max(rendered.reply_start, 1)  # nothing comes before the first token of a turn
            learned = ids[first:] if turn.learn == "answer" else []
            row["input_ids"] += prefix + ids
            row["position_ids"] += range(len(prefix) + len(ids))
            row["labels"] += [IGNORED] * (len(prefix) + len(ids) - len(learned)) + learned
            row["memory_mask"] += [not greeted] * len(prefix) + [True] * len(ids)
            greeted = greeted or bool(prefix)
        if not row["input_ids"]:
            raise ValueError("a session has no text: give it at least one turn")
        return row

    def _render(self, turn: Turn) -> RenderedTurn:
        if turn.user is not None:
            return self.renderer.turn(turn.user, turn.assistant)
        return RenderedTurn(self.renderer.tokenizer(turn.assistant, add_special_tokens=False)["input_ids"], 0)


def pad_rows(rows: Sequence[Row], pad_id: int) -> dict[str, Tensor]:
    """Rows as (B, T) tensors. Memory looks away from padding, and no turn begins there."""
    filler = {"input_ids": pad_id, "position_ids": PAD_POSITION, "labels": IGNORED, "memory_mask": False}
    length = max(len(row["input_ids"]) for row in rows)
    return {
        name: torch.tensor([row[name] + [value] * (length - len(row[name])) for row in rows])
        for name, value in filler.items()
    }
