"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Another name to write a large file under, which takes the place of `path` at the end: on any error what was there before is
    still there. Two that write the same file at once do not meet; the later one stays."""
    part = beside(path)
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def beside(path: str | Path) -> Path:
    """A name in the same folder that is nobody else's, and short whatever the name of the file."""
    return Path(path).with_name(f".{secrets.token_hex(8)}.part")


def write_whole(path: str | Path, data: bytes, private: bool = False, new: bool = False) -> None:
    """Write a file in one step: on any error what was there before is still there.

    Args:
        path: of the file.
        data: what it will hold.
        private: for the owner's eyes alone, as what people say to a model is.
        new: raise FileExistsError if there is a file already.
    """
    part = beside(path)
    made = False
    try:
        handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o666)
        made = True
        with open(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if new:
            _put_new(part, path)
        else:
            os.replace(part, path)
    except OSError as error:
        if error.filename == str(part):
            error.filename = str(path)  # which is the one that the caller knows
        raise
    finally:
        if made:
            part.unlink(missing_ok=True)


def _put_new(part: Path, path: str | Path) -> None:
    try:
        os.link(part, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        os.replace(part, path)
