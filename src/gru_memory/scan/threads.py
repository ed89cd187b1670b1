"""Python threads for compiled code that releases the GIL, as many as torch would use.

numba's own threads are not used: their `workqueue` layer ends the process when two Python threads enter it at once,
as those of a server do, and their OpenMP layer ends a forked child, such as the worker of a DataLoader.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

_pool: ThreadPoolExecutor | None = None


def _forget_pool() -> None:
    global _pool
    _pool = None  # a forked child has the object but not its threads


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)


def share(work: Callable[[int, int], None], items: int, min_items: int = 1) -> None:
    """Call `work(first, last)` on parts of range(items), in up to `torch.get_num_threads()` threads.

    A thread gets at least `min_items` of them; a single part runs in the calling thread.
    """
    global _pool
    threads = min(torch.get_num_threads(), items // max(1, min_items))
    if threads <= 1:
        _without_denormals(work, 0, items)
        return
    if _pool is None:
        _pool = ThreadPoolExecutor(max_workers=os.cpu_count() or 1, thread_name_prefix="gru-memory")
    borders = [items * i // threads for i in range(threads + 1)]
    others = [_pool.submit(_without_denormals, work, *part) for part in zip(borders[1:-1], borders[2:])]
    try:
        _without_denormals(work, 0, borders[1])
    finally:
        for other in others:
            other.result()


def _without_denormals(work: Callable[[int, int], None], first: int, last: int) -> None:
    """Numbers below 1e-38 count as 0 while `work` runs: some processors compute them a hundred times slower."""
    flushed = sys.float_info.min * 0.5 == 0.0  # the mode is one of the thread, and torch has no way to ask for it
    if not flushed:
        torch.set_flush_denormal(True)
    try:
        work(first, last)
    finally:
        if not flushed:
            torch.set_flush_denormal(False)
