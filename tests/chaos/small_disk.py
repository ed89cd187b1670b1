"""A disk of a few megabytes that only this process and its children see: a tmpfs in a mount namespace of their own."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

_NEW_USERS, _NEW_MOUNTS = 0x10000000, 0x00020000  # CLONE_NEWUSER, CLONE_NEWNS of sched.h
_RECURSIVE, _PRIVATE = 0x4000, 1 << 18  # MS_REC, MS_PRIVATE of sys/mount.h


def mount(folder: str, size: int) -> None:
    """Put a disk of `size` bytes in the place of `folder`, for this process alone. Needs one thread, and Linux.

    Raises:
        OSError: this system does not let its users do so.
    """
    libc = ctypes.CDLL(None, use_errno=True)

    def call(function: str, *arguments: object) -> None:
        if getattr(libc, function)(*arguments):
            number = ctypes.get_errno()
            raise OSError(number, f"{function}: {os.strerror(number)}")

    user, group = os.geteuid(), os.getegid()
    if user == 0:
        call("unshare", _NEW_MOUNTS)
    else:
        call("unshare", _NEW_USERS | _NEW_MOUNTS)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    call("mount", b"none", b"/", None, ctypes.c_ulong(_RECURSIVE | _PRIVATE), None)
    call("mount", b"tmpfs", folder.encode(), b"tmpfs", ctypes.c_ulong(0), f"size={size}".encode())


class SeenFromOutside:
    """The folder that a process sees in the place of `folder`, for another process.

    It can be reached until `close`, even when that process is gone.
    """

    def __init__(self, process_id: int, folder: str) -> None:
        self._folder = os.open(f"/proc/{process_id}/root/{folder.lstrip('/')}", os.O_RDONLY | os.O_DIRECTORY)
        self.path = Path(f"/proc/self/fd/{self._folder}")

    def close(self) -> None:
        os.close(self._folder)

    def fill(self) -> Path:
        """Write until nothing more fits. Returns the file, which gives the room back when it is removed."""
        filler = self.path / "filler"
        with filler.open("ab", buffering=0) as file:
            for size in (1 << 16, 1 << 12, 1):
                try:
                    while True:
                        file.write(b"x" * size)
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise
        return filler
