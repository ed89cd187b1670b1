"""Plain texts in a folder, as tokens."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from ..data.books import text_paths

SKIPPED = 0.05  # of a book, at its start: title pages and licences


def book_paths(folder: str | None) -> list[Path]:
    """The books of a folder that has to be named. Raises ValueError if it is not, FileNotFoundError if it has none."""
    if folder is None:
        raise ValueError("there is nothing to read: name a folder of plain-text books with --books")
    return text_paths(folder)


def text_tokens(path: Path, tokenizer: Any, count: int, skipped: float = SKIPPED) -> Tensor:
    """(count,) tokens of a text after its first `skipped` share; fewer if the text ends."""
    text = path.read_text(encoding="utf-8", errors="replace")
    start = int(len(text) * skipped)
    ids = tokenizer(text[start : start + 12 * count], add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids[:count], dtype=torch.long)


def stream(folder: str, tokenizer: Any, count: int, seed: int) -> tuple[Tensor, list[str]]:
    """`count` tokens of one book after the other, in an order drawn with `seed`; and the names of those that it took.

    Raises:
        ValueError: the books are shorter than that.
    """
    paths = book_paths(folder)
    Random(f"books {seed}").shuffle(paths)
    parts: list[Tensor] = []
    names: list[str] = []
    missing = count
    for path in paths:
        if missing <= 0:
            break
        parts.append(text_tokens(path, tokenizer, missing))
        names.append(path.name)
        missing -= len(parts[-1])
    if missing > 0:
        raise ValueError(
            f"the books in {folder} have {count - missing:,} tokens, not {count:,}: ask for fewer with --tokens"
        )
    return torch.cat(parts), names


def window_of(model: Any, window: int) -> int:
    """`window`, or as many positions as the model has."""
    return min(window, getattr(model.config.get_text_config(), "max_position_embeddings", None) or window)
