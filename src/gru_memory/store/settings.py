"""What a session's settings may hold: plain values, with strings that every database keeps."""

from __future__ import annotations

from typing import Any

MAX_METADATA = 16  # pairs
MAX_METADATA_KEY = 64  # characters
MAX_METADATA_VALUE = 512  # characters


def check_metadata(metadata: dict[str, str]) -> dict[str, str]:
    """Raise ValueError unless this is what users may tell of a session: a few short strings, by name."""
    if not isinstance(metadata, dict) or len(metadata) > MAX_METADATA:
        raise ValueError(f"metadata is a mapping of at most {MAX_METADATA} pairs")
    for key, value in metadata.items():
        for text, most in ((key, MAX_METADATA_KEY), (value, MAX_METADATA_VALUE)):
            if not isinstance(text, str) or len(text) > most:
                raise ValueError(
                    f"metadata has keys of at most {MAX_METADATA_KEY} characters and values of at most {MAX_METADATA_VALUE}"
                )
    check_strings(metadata, "metadata")
    return metadata


def check_strings(value: Any, what: str) -> None:
    """Raise ValueError if a string in these plain values, however deep, is one that no database keeps."""
    if isinstance(value, str):
        if "\0" in value:
            raise ValueError(f"{what} holds a NUL character, which no database keeps: leave it out")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{what} is no valid Unicode text") from error
    elif isinstance(value, dict):
        for pair in value.items():
            check_strings(pair, what)
    elif isinstance(value, (list, tuple)):
        for item in value:
            check_strings(item, what)
