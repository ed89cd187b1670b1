"""uvicorn's server, with time for replies to end, and a word to those that do not."""

from __future__ import annotations

import math
import threading
from typing import Any

import uvicorn

_TO_SAY_SO = 5  # seconds after the grace: whoever uvicorn cancels by itself is told nothing


class GracefulServer(uvicorn.Server):
    """Serves an application; once it is to stop, nothing new begins, and what has not ended in time fails as such.

    Args:
        app: of `create_app`.
        grace_seconds: that replies have to end.
        **settings: of `uvicorn.Config`.
    """

    def __init__(self, app: Any, grace_seconds: float, **settings: Any) -> None:
        waits = math.ceil(grace_seconds) + _TO_SAY_SO
        super().__init__(
            uvicorn.Config(
                app, log_config=None, access_log=False, server_header=False, timeout_graceful_shutdown=waits, **settings
            )
        )
        self._engine, self._grace = app.state.engine, grace_seconds

    async def shutdown(self, sockets: list[Any] | None = None) -> None:
        """Let the engine stop while uvicorn waits for the requests: the application's own end comes only after them."""
        threading.Thread(target=self._engine.close, args=(self._grace,), daemon=True).start()
        await super().shutdown(sockets)
