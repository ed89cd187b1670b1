"""What surrounds every request: its size, its time, its id, its line in the log, and errors in one shape."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import json
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError, as_api_error
from .metrics import Metrics

logger = logging.getLogger("gru_memory.server")

Result = TypeVar("Result")


# Bytes read and dropped of a request that is refused: many clients hear nothing while they send.
_DRAINED = 128 << 20
_SLOWEST = 64 << 10  # bytes a second of a body, once the seconds that any may take are over


class BodyLimit:
    """Reads the body before anything else does: never more than allowed, and not for ever.

    Args:
        app: what gets the requests whose body is whole.
        limit: bytes of a body, by the request's path.
        seconds: how long a body may take, and how long nothing of it may come.
        refusal: what is wrong with a request whatever its body says, of which none is kept then.
    """

    def __init__(
        self,
        app: ASGIApp,
        limit: Callable[[str], int],
        seconds: float,
        refusal: Callable[[Scope], ApiError | None] = lambda scope: None,
    ) -> None:
        self.app, self.limit, self.seconds, self.refusal = app, limit, seconds, refusal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        refused, body, size, more = self.refusal(scope), bytearray(), 0, True
        most = self.limit(scope["path"])
        began = time.monotonic()
        try:
            while more:
                more_time = 0 if refused else size / _SLOWEST
                left = began + self.seconds + more_time - time.monotonic()
                message = await asyncio.wait_for(receive(), min(left, self.seconds))
                if message["type"] == "http.disconnect":
                    return
                size += len(message.get("body", b""))
                more = message.get("more_body", False)
                if refused is None and size <= most:
                    body += message.get("body", b"")
                elif size > (_DRAINED if refused is None else most):
                    break
            if refused is None and size > most:
                refused = ApiError(413, f"the request is larger than {most} bytes", "too_large")
            if refused is not None:
                await as_answer(refused, {"connection": "close"} if more else {})(scope, receive, send)
                return
        except (TimeoutError, asyncio.TimeoutError):
            error = refused or ApiError(408, "the request did not arrive in time", "timed_out")
            await as_answer(error, {"connection": "close"})(scope, receive, send)
            return
        whole: Message | None = {"type": "http.request", "body": bytes(body), "more_body": False}

        async def replay() -> Message:
            nonlocal whole
            if whole is not None:
                message, whole = whole, None
                return message
            return await receive()

        await self.app(scope, replay, send)


def as_answer(error: ApiError, headers: dict[str, str] | None = None) -> JSONResponse:
    """The response that says so."""
    headers = dict(headers or {})
    if error.status in (429, 503):
        headers["retry-after"] = "1"
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(error.body, error.status, headers)


def only_known_parameters(request: Request) -> None:
    """A dependency of every route: a parameter of the address that the route does not know is refused, never ignored."""
    route = request.scope["route"]
    if route.path.startswith("/v1/"):
        known = {parameter.alias for parameter in route.dependant.query_params}
        for name in request.query_params:
            if name not in known:
                raise ApiError(400, f"{name[:200]}: this parameter is not supported here", "invalid_value", name[:200])


class OwnNames:
    """Answers only under names that are the server's own, and no page but its own and those of `origins`.

    For servers without keys: a page from elsewhere, in the browser of whoever runs the server, could otherwise read and write
    every session, under a name of its own that it lets point here (DNS rebinding), or by a form.

    Args:
        app: what answers.
        names: host names besides those of the loopback; "*" for any, which leaves origins to browsers, too.
        origins: of pages from elsewhere that may ask.
    """

    def __init__(self, app: ASGIApp, names: Sequence[str] = (), origins: Sequence[str] = ()) -> None:
        self.app, self.names, self.origins = app, {name.lower() for name in names}, set(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refused = None if scope["type"] != "http" or "*" in self.names else self._refusal(Headers(scope=scope))
        await (self.app if refused is None else as_answer(refused))(scope, receive, send)

    def _refusal(self, headers: Headers) -> ApiError | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:  # no host at all, such as "["
            name = ""
        if not is_loopback(name) and name not in self.names:
            message = "this server has no API keys, so it answers only under its own names, and this is none of them"
            return ApiError(403, f"{message}: --allow-host lets another one in", "host_not_allowed")
        if origin is not None and origin not in self.origins and origin.partition("://")[2] != host:
            message = "this server has no API keys, so it answers no page from elsewhere: --cors-origin lets one in"
            return ApiError(403, message, "origin_not_allowed")
        return None


def is_loopback(host: str) -> bool:
    """Whether this is an address or a name of the machine itself, which no other can reach."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Observed:
    """Gives each request an id, counts it, writes one line about it, and turns what nobody expected into a plain 500."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id, began, status = f"req_{secrets.token_hex(8)}", time.monotonic(), 0
        headers_after = 0.0
        scope.setdefault("state", {})["request_id"] = request_id

        async def note(message: Message) -> None:
            nonlocal status, headers_after
            if message["type"] == "http.response.start":
                status, headers_after = message["status"], time.monotonic() - began
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self.app(scope, receive, note)
        except Exception as error:
            logger.exception("request failed", extra={"request_id": request_id})
            if not status:
                await JSONResponse(as_api_error(error).body, 500)(scope, receive, note)
        finally:
            # The route's pattern: a path may hold the name of a session.
            route = getattr(scope.get("route"), "path", "none")
            self.metrics.requests.labels(route, status).inc()
            self.metrics.seconds.labels(route).observe(headers_after)
            fields = {
                "request_id": request_id,
                "method": scope["method"],
                "route": route,
                "status": status,
                "seconds": round(time.monotonic() - began, 4),
                "owner": scope["state"].get("owner", ""),
            }
            logger.info("request", extra=fields)


class Keys:
    """The API keys there are. A comparison takes as long whichever key is right, and whether any is."""

    def __init__(self, keys: tuple[str, ...], owner_of: Callable[[str], str]) -> None:
        self._known = [(_digest(key), owner_of(key)) for key in keys]

    def owner(self, authorization: str | None) -> str:
        """Whose key this header holds; "" where there are no keys. Raises `ApiError` 401."""
        if not self._known:
            return ""
        kind, _, key = (authorization or "").partition(" ")
        given, found = _digest(key.strip()), None
        for digest, owner in self._known:
            if hmac.compare_digest(digest, given):
                found = owner
        if found is None or kind.lower() != "bearer":
            raise ApiError(401, "this needs a valid API key: Authorization: Bearer KEY", "invalid_api_key")
        return found


class JsonLines(logging.Formatter):
    """One JSON object a line. Nothing that clients wrote is in it."""

    _STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message", "taskName"}

    def format(self, record: logging.LogRecord) -> str:
        values: dict[str, Any] = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        values |= {k: v for k, v in vars(record).items() if k not in self._STANDARD}
        if record.exc_info:
            kind, error, trace = record.exc_info
            where = []
            while trace is not None:
                where.append(f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}")
                trace = trace.tb_next
            # Not the text of the exception, which may quote a message.
            values |= {"exception": getattr(kind, "__name__", str(kind)), "where": where[-12:]}
        return json.dumps(values, default=str)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


async def while_there(request: Request, work: Awaitable[Result]) -> Result:
    """What comes of `work`, or `ApiError` 499, with `work` cancelled, as soon as the client leaves."""

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(left())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done() and leaving.exception() is None:
            raise ApiError(499, "the client has left", "client_left")
        return await working
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)
