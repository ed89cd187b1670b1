"""`gru-memory serve`."""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from ..embedded import EMBEDDED_NAME
from ..store import Limits, SessionStore
from ..store.database import default_url
from .output import DEVICE_HELP, MEMORY_HELP, MODEL_HELP, STORE_HELP, load, one_line_errors, set_threads

DAY = 86_400
_FOR_REPLICAS = ("min_replicas", "max_replicas", "target_chats", "replica_cpus", "replica_gpus")


@one_line_errors
def serve_command(
    context: typer.Context,
    host: Annotated[
        str, typer.Option(help="address to listen on; other than the loopback needs API keys")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port to listen on", min=1, max=65_535)] = 8000,
    model: Annotated[str, typer.Option(help=MODEL_HELP)] = EMBEDDED_NAME,
    memory: Annotated[Optional[str], typer.Option(help=MEMORY_HELP)] = None,  # noqa: UP045 (typer on Python 3.10)
    model_name: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="name of the model for clients; that of --model if not given"),
    ] = None,
    store: Annotated[Optional[str], typer.Option(help=STORE_HELP)] = None,  # noqa: UP045
    api_keys: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="file with API keys, one a line; each has sessions of its own"),
    ] = None,
    no_auth: Annotated[bool, typer.Option("--no-auth", help="let everybody in who can reach the address")] = False,
    cors_origin: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="a web page's origin that may call from a browser; none if not given"),
    ] = None,
    allow_host: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="without API keys: a name under which the server answers, besides the loopback's own"),
    ] = None,
    text: Annotated[bool, typer.Option(help="keep the messages of new sessions, not their memory alone")] = True,
    ttl_days: Annotated[float, typer.Option(help="days a session lives after its last turn")] = 30.0,
    max_sessions: Annotated[int, typer.Option(help="sessions a key may have")] = 100_000,
    max_states: Annotated[
        int,
        typer.Option(
            help="responses of a session that can be gone on from; beyond that, those that were continued go first"
        ),
    ] = Limits.max_states,
    max_turns: Annotated[int, typer.Option(help="turns of which a session remembers the text")] = Limits.max_turns,
    max_batch: Annotated[int, typer.Option(help="conversations in one forward pass")] = 32,
    max_waiting: Annotated[int, typer.Option(help="requests that may wait; further ones get status 429")] = 64,
    guessed_tokens: Annotated[
        int,
        typer.Option(
            min=0,
            help="tokens guessed ahead of a conversation that decodes alone; more than 2 seldom pay on a CPU",
        ),
    ] = 2,
    context_turns: Annotated[int, typer.Option(help="turns that attention sees, the current one included")] = 1,
    max_new_tokens: Annotated[int, typer.Option(help="longest reply where a request does not say, in tokens")] = 256,
    grace: Annotated[float, typer.Option(help="seconds that replies have to end when the server is stopped")] = 30.0,
    device: Annotated[Optional[str], typer.Option(help=DEVICE_HELP)] = None,  # noqa: UP045
    threads: Annotated[Optional[int], typer.Option(help="threads of torch")] = None,  # noqa: UP045
    ray: Annotated[
        bool, typer.Option("--ray", help="serve with replicas in a Ray cluster, over a PostgreSQL that they share")
    ] = False,
    min_replicas: Annotated[int, typer.Option(help="with --ray: replicas that there are at least")] = 1,
    max_replicas: Annotated[int, typer.Option(help="with --ray: replicas that there are at most")] = 4,
    target_chats: Annotated[
        float,
        typer.Option(help="with --ray: requests at once for which a replica is meant; with more, replicas are added"),
    ] = 16.0,
    replica_cpus: Annotated[
        float, typer.Option(help="with --ray: processors that a replica asks the cluster for")
    ] = 1.0,
    replica_gpus: Annotated[float, typer.Option(help="with --ray: GPUs that a replica asks the cluster for")] = 0.0,
) -> None:
    """Serve OpenAI's interface, with a memory for every conversation."""
    try:
        from ..server import ServerSettings, create_app
        from ..server.engine import EngineLimits
        from ..server.http import JsonLines, is_loopback
        from ..server.settings import read_keys
        from ..server.stopping import GracefulServer
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the server needs {error.name}, which is not installed: pip install 'gru-memory[serve]'"
        ) from error
    if api_keys and no_auth:
        raise ValueError("--api-keys and --no-auth say two different things: give one of them")
    for name in _FOR_REPLICAS:
        if not ray and context.get_parameter_source(name).name != "DEFAULT":
            raise ValueError(f"--{name.replace('_', '-')} is for replicas: give --ray as well, or leave it out")
    keys = read_keys(api_keys) if api_keys else ()
    if not keys and not no_auth and not is_loopback(host):
        raise ValueError(
            f"{host} can be reached from elsewhere: give --api-keys FILE, or --no-auth if everybody may come in"
        )
    if not 0 < ttl_days < math.inf:
        raise ValueError(f"ttl_days is {ttl_days}: it must be a finite number above 0")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}: it must be a number above 0")
    set_threads(threads)
    limits = Limits(max_sessions=max_sessions, ttl_seconds=ttl_days * DAY, max_states=max_states, max_turns=max_turns)
    settings = ServerSettings(
        model_name=model_name or model, api_keys=keys, cors_origins=tuple(cors_origin or ()), context_turns=context_turns,
        default_new_tokens=max_new_tokens, keep_text=text, grace_seconds=grace,
        limits=limits, hosts=("*",) if no_auth else tuple(allow_host or ()),
        engine=EngineLimits(max_batch=max_batch, max_waiting=max_waiting, guessed_tokens=guessed_tokens),
    )  # fmt: skip
    _log_to_stderr(JsonLines())
    if ray:
        spec = (model, memory, default_url() if store is None else store, settings, threads, device)
        _serve_with_ray(spec, (min_replicas, max_replicas, target_chats, replica_cpus, replica_gpus), host, port)
        return
    _check_port(host, port)
    with SessionStore(store, limits) as opened:
        app = create_app(*load(model, memory, device), opened, settings)
        server = GracefulServer(app, grace, host=host, port=port, timeout_keep_alive=30)
        # When all replies have ended, uvicorn raises the signal again that it was stopped with.
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
        server.run()
        if not server.started:
            raise OSError(f"cannot listen on {host}, port {port}: the log says why")


def _check_port(host: str, port: int) -> None:
    """Raise OSError if nobody can listen there, before a model is loaded for it."""
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        raise OSError(f"cannot listen on {host}, port {port}: {error.strerror or error}") from error


def _serve_with_ray(spec: tuple, scaling: tuple, host: str, port: int) -> None:
    from ..server import ray_serve

    made = ray_serve.ReplicaSpec(*spec), ray_serve.Scaling(*scaling)
    try:
        ray_serve.start(*made, host, port)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"--ray needs {error.name}, which is not installed: pip install 'gru-memory[ray]'"
        ) from error
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    ended.wait()
    ray_serve.stop()


def _log_to_stderr(formatter: Any) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    logging.basicConfig(level=os.environ.get("GRU_MEMORY_LOG", "INFO").upper(), handlers=[handler], force=True)
    for chatty in ("httpx", "alembic", "sqlalchemy.engine"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
