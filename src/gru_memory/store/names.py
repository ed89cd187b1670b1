"""What a session may be called."""

from __future__ import annotations

MAX_NAME = 200  # characters
_JOINERS = {0x200C: None, 0x200D: None}  # ZERO WIDTH NON-JOINER and JOINER


def check_name(name: str) -> None:
    """Raise ValueError unless this can be the name of a session."""
    if not isinstance(name, str) or len(name) > MAX_NAME or not _is_printable(name):
        raise ValueError(f"a session's name is 1 to {MAX_NAME} printable characters, and {str(name)[:40]!r} is not")


def _is_printable(name: str) -> bool:
    """Joiners, which emoji and Persian words have within them, count where something is on either side."""
    bare = name.translate(_JOINERS)
    return bool(bare.strip()) and bare.isprintable() and name == name.strip("".join(map(chr, _JOINERS)))
