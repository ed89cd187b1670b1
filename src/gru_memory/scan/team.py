"""The threads of torch's own OpenMP, for compiled code that runs for a tenth of a millisecond.

Between two products these threads wait for the next, some of them by spinning. Whoever wants a part of a token done on
another core had better ask them: a thread of one's own, as in `threads`, is woken up in 60 µs, and then shares its core
with one that spins. What runs for milliseconds gains nothing here.
"""

from __future__ import annotations

import ctypes
import functools
import os
from typing import NamedTuple

import torch

FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

_forked = False


def _note_fork() -> None:
    global _forked
    # A child has OpenMP's notes on its threads, but not the threads, and would wait for them for ever. (So do torch's own
    # products there, unless the child has set one thread, as workers of a DataLoader do.)
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


class OpenMP(NamedTuple):
    """Functions of the OpenMP runtime that torch uses, each as an address."""

    parallel: ctypes._CFuncPtr
    thread_num: int
    num_threads: int
    barrier: int


@functools.cache
def openmp() -> OpenMP | None:
    """The runtime, if torch has one with GCC's entry points: GCC's own, or LLVM's where it has them."""
    # First among all that is loaded, as torch's own calls are bound (another runtime may be preloaded), then in what torch needs.
    for name in (None, torch._C.__file__):
        try:
            library = ctypes.CDLL(name)
            parallel = library.GOMP_parallel
            others = (library.omp_get_thread_num, library.omp_get_num_threads, library.GOMP_barrier)
        except (OSError, TypeError, AttributeError):
            continue
        parallel.restype, parallel.argtypes = None, [FUNCTION, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        return OpenMP(parallel, *(ctypes.cast(function, ctypes.c_void_p).value for function in others))
    return None


def team_size() -> int:
    """How many threads a team has: as many as torch uses, or 1 where they cannot be asked.

    A team is always as large as torch's own: OpenMP ends threads that a smaller one leaves out.
    """
    threads = torch.get_num_threads()
    return 1 if threads == 1 or _forked or openmp() is None else threads


def run_in_team(function: ctypes._CFuncPtr, data: int, threads: int) -> None:
    """Call the C function `void f(void *data)` once in every thread of a team of that size, and wait for all of them."""
    if threads == 1:
        function(data)
    else:
        openmp().parallel(function, data, threads, 0)
