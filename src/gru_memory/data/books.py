"""Plain texts in a folder."""

from __future__ import annotations

from pathlib import Path


def text_paths(folder: str | Path, pattern: str = "*.txt", what: str = "plain-text books") -> list[Path]:
    """The files, in the order of their names. Raises FileNotFoundError if there is none."""
    paths = sorted(path for path in Path(folder).glob(pattern) if path.is_file())
    if not paths:
        raise FileNotFoundError(f"no {pattern.removeprefix('*')} file in {folder}: name a folder of {what}")
    return paths


def read_books(folder: str | Path) -> list[str]:
    """What is in them; bytes that are no UTF-8 become U+FFFD. Raises FileNotFoundError if there is none."""
    return [path.read_text(encoding="utf-8", errors="replace") for path in text_paths(folder)]
