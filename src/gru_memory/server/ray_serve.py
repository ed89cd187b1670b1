"""The same server on many machines: replicas in a Ray cluster, with no state but what is in a PostgreSQL they share."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from typing import Any

from ..store import SessionStore
from .app import create_app
from .http import JsonLines
from .settings import ServerSettings

APPLICATION, DEPLOYMENT = "gru-memory", "Replica"
REPLICA_HEADER = b"x-gru-memory-replica"  # of every answer: which replica gave it


@dataclass(frozen=True)
class ReplicaSpec:
    """What every replica is made from. It travels to the machines of the cluster, keys included.

    Attributes:
        model, memory: as for `load_with_memory`; folders must be there on every machine.
        store: URL of a PostgreSQL that every machine can reach.
        settings: of each server.
        threads: of torch in each replica; None leaves its own choice.
        device: as for the other commands; None is a GPU where a replica was given one.
    """

    model: str
    memory: str | None
    store: str
    settings: ServerSettings
    threads: int | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        if not self.store.startswith("postgresql"):
            raise ValueError("replicas share a PostgreSQL: give --store postgresql://USER@HOST/DATABASE with --ray")


@dataclass(frozen=True)
class Scaling:
    """How many replicas there are, and what each one takes."""

    min_replicas: int = field(default=1, metadata={"help": "replicas that there are at least"})
    max_replicas: int = field(default=4, metadata={"help": "replicas that there are at most"})
    target_chats: float = field(
        default=16.0, metadata={"help": "requests at once for which a replica is meant: with more, replicas are added"}
    )
    cpus: float = field(default=1.0, metadata={"help": "processors that a replica asks the cluster for"})
    gpus: float = field(default=0.0, metadata={"help": "GPUs that a replica asks the cluster for"})

    def __post_init__(self) -> None:
        if not 1 <= self.min_replicas <= self.max_replicas:
            raise ValueError(f"{self.min_replicas} to {self.max_replicas} replicas: it must be 1 <= least <= most")


def start(spec: ReplicaSpec, scaling: Scaling, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Serve in the cluster of $RAY_ADDRESS, or in one of this machine alone; returns when the replicas answer.

    Stop it with `stop`. Nothing is reported to Ray's makers.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray import serve

    SessionStore(spec.store, spec.settings.limits).close()  # one makes the tables, before the others look for them
    if not ray.is_initialized():
        ray.init(include_dashboard=False if "RAY_ADDRESS" not in os.environ else None, log_to_driver=False)
    quiet = {"enable_access_log": False}  # Ray's would hold paths, and with them names of sessions
    serve.start(proxy_location="EveryNode", http_options={"host": host, "port": port}, logging_config=quiet)
    limits = spec.settings.engine
    deployment = serve.deployment(
        name=DEPLOYMENT,
        autoscaling_config={
            "min_replicas": scaling.min_replicas, "initial_replicas": scaling.min_replicas,
            "max_replicas": scaling.max_replicas, "target_ongoing_requests": scaling.target_chats,
        },
        # The server itself refuses what is too much, with 429 and in OpenAI's words; Ray's limit is only the next one.
        max_ongoing_requests=2 * (limits.max_batch + limits.max_waiting),
        ray_actor_options={"num_cpus": scaling.cpus, "num_gpus": scaling.gpus},
        graceful_shutdown_timeout_s=spec.settings.grace_seconds,
        logging_config=quiet,
    )(serve.ingress()(Replica))  # fmt: skip
    serve.run(deployment.bind(spec), name=APPLICATION, route_prefix="/")


def stop() -> None:
    """Let replies end, and stop the replicas; of a cluster that `start` has made, nothing is left."""
    import ray
    from ray import serve

    serve.shutdown()
    ray.shutdown()


class Replica:
    """One server of many. Ray makes it, asks how it is, and passes requests to its application."""

    def __init__(self, spec: ReplicaSpec) -> None:
        self.spec, self.engine = spec, None

    def __serve_build_asgi_app__(self) -> Any:
        import torch
        from ray import serve

        from ..placement import device_for
        from ..shipped import load_with_memory

        _log_as_json()
        if self.spec.threads is not None:
            torch.set_num_threads(self.spec.threads)
        store = SessionStore(self.spec.store, self.spec.settings.limits)
        loaded = load_with_memory(self.spec.model, self.spec.memory, device_for(self.spec.device))
        app = create_app(*loaded, store, self.spec.settings)
        self.engine = app.state.engine
        return _Named(app, store, serve.get_replica_context().replica_id.unique_id)

    def check_health(self) -> None:
        """Ray replaces a replica that raises here."""
        if self.engine is not None and not self.engine.alive:
            raise RuntimeError("the model does not run")


class _Named:
    """An application that says in every answer which replica it is, and closes its store in the end."""

    def __init__(self, app: Any, store: SessionStore, name: str) -> None:
        self.app, self.store, self.header = app, store, (REPLICA_HEADER, name.encode())

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def named(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), self.header]
            await send(message)

        await self.app(scope, receive, named)
        if scope["type"] == "lifespan":
            self.store.close()


def _log_as_json() -> None:
    logger, handler = logging.getLogger("gru_memory"), logging.StreamHandler()
    handler.setFormatter(JsonLines())
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(os.environ.get("GRU_MEMORY_LOG", "INFO").upper())
