"""A server in a process of its own, which can be killed: forked from one that has imported everything already."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import socket
from collections.abc import Iterator
from typing import Any

import torch
import uvicorn
from talking import talking_model, talking_tokenizer

from gru_memory import Conversation
from gru_memory.server import ServerSettings, create_app
from gru_memory.store import SessionStore, database

from . import small_disk

MODEL = "tiny"
NEW_TOKENS = 4

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["chaos.prepared"])


def tiny() -> tuple[Any, Any]:
    """The model that every trial runs where the model does not matter, and its tokenizer."""
    return talking_model("llama"), talking_tokenizer("llama")


def _serve(store_url: str, started: Any, disk_bytes: int | None, sqlite_wait_seconds: float | None) -> None:
    if disk_bytes is not None:
        small_disk.mount(os.path.dirname(store_url), disk_bytes)
    if sqlite_wait_seconds is not None:
        database.SQLITE_WAIT_SECONDS = sqlite_wait_seconds
    from .prepared import LOADED

    torch.set_num_threads(1)
    logging.getLogger().addHandler(logging.NullHandler())  # what goes wrong here is meant to
    Conversation.kept_in = None  # so that states can be compared to the last bit
    settings = ServerSettings(model_name=MODEL, default_new_tokens=NEW_TOKENS)
    with SessionStore(store_url, settings.limits) as store, socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        app = create_app(*LOADED, store, settings)
        listening.listen(128)
        started.send(listening.getsockname()[1])
        uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False)).run(sockets=[listening])


@contextlib.contextmanager
def victim(
    store_url: str | os.PathLike, disk_bytes: int | None = None, sqlite_wait_seconds: float | None = None
) -> Iterator[tuple[Any, str]]:
    """The process of a server and its URL. It is killed with the end of the block, if it was not before.

    Args:
        store_url: of its sessions; None of the other arguments changes what a store does by default.
        disk_bytes: put the folder of a SQLite store on a disk of this size, which is gone with the process.
        sqlite_wait_seconds: how long to wait for a lock.
    """
    ours, theirs = _processes.Pipe()
    process = _processes.Process(
        target=_serve, args=(str(store_url), theirs, disk_bytes, sqlite_wait_seconds), daemon=True
    )
    process.start()
    theirs.close()
    try:
        if not ours.poll(120):
            raise TimeoutError("the server did not start")
        yield process, f"http://127.0.0.1:{ours.recv()}"
    finally:
        process.kill()
        process.join(30)
