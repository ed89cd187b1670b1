"""The web application: OpenAI's routes, the memory's own, and health."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any, TypeVar

from fastapi import Depends, FastAPI, Header, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from fastapi.security import HTTPBearer
from jinja2 import TemplateError
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import BaseRoute, Match
from starlette.types import Scope

from .. import __version__
from ..store import SessionStore, StoreError
from .engine import Done, Engine, Event, Overloaded, ShuttingDown, TimedOut
from .errors import ApiError, as_api_error
from .http import BodyLimit, Keys, Observed, OwnNames, as_answer, only_known_parameters, while_there
from .item_routes import item_router
from .kept_routes import kept_router
from .memory_routes import memory_router
from .metrics import Metrics
from .openai_format import chat_chunks, chat_completion, response_about, response_events, response_object, sse
from .page_routes import add_page
from .protocol import ChatRequest, ResponseRequest, split
from .sampling import Sampling
from .service import Address, Service, Turns, in_thread, response_id
from .settings import ServerSettings, owner_of

logger = logging.getLogger("gru_memory.server")

Result = TypeVar("Result")


def create_app(model: Any, tokenizer: Any, store: SessionStore, settings: ServerSettings | None = None) -> FastAPI:
    """A server for this model, with its sessions in this store. It closes neither.

    Args:
        model: a causal LM with memory.
        tokenizer: its tokenizer.
        store: where sessions are kept.
        settings: see `ServerSettings`.
    """
    settings = settings or ServerSettings()
    metrics = Metrics()
    engine = Engine(model, tokenizer, settings.engine, metrics.on_step)
    service = Service(
        engine, store, metrics, settings.context_turns, settings.default_new_tokens, settings.most_new_tokens,
        settings.keep_text,
    )  # fmt: skip
    keys = Keys(settings.api_keys, owner_of)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        purging = asyncio.create_task(_purge(store, settings.purge_seconds))
        try:
            yield
        finally:
            purging.cancel()
            await asyncio.to_thread(engine.close, settings.grace_seconds)

    about = {"title": "gru-memory", "version": __version__, "docs_url": None, "redoc_url": None}
    app = FastAPI(**about, lifespan=lifespan, dependencies=[Depends(only_known_parameters)])
    app.state.engine, app.state.service, app.state.metrics = engine, service, metrics

    bearer = Depends(HTTPBearer(auto_error=False))  # says in the schema that there are keys; `Keys` looks at them

    async def owner(request: Request, _: Any = bearer) -> str:
        found = keys.owner(request.headers.get("authorization"))
        request.state.owner = found[:8]  # enough to tell tenants apart in a log
        return found

    Owner = Depends(owner)
    _add_error_handlers(app)
    app.include_router(memory_router(service, owner))
    app.include_router(kept_router(service, owner))
    app.include_router(item_router(service, owner))
    add_page(app)

    def known(name: str) -> None:
        if name != settings.model_name:
            message = f"there is no model {name[:200]!r} here: this is {settings.model_name!r}"
            raise ApiError(404, message, "model_not_found", "model")

    @app.get("/v1/models", tags=["openai"])
    async def models(owner: str = Owner) -> dict[str, Any]:
        return {"object": "list", "data": [_model(settings.model_name)]}

    @app.get("/v1/models/{name:path}", tags=["openai"])
    async def one_model(name: str, owner: str = Owner) -> dict[str, Any]:
        known(name)
        return _model(name)

    @app.post("/v1/chat/completions", tags=["openai"])
    async def chat(
        request: Request,
        body: ChatRequest,
        owner: str = Owner,
        x_session_id: str | None = Header(None),
        x_openwebui_chat_id: str | None = Header(None),
    ) -> Response:
        """A reply to the last message. Which memory: session_id, X-Session-Id, X-OpenWebUI-Chat-Id, user, or none."""
        known(body.model)
        system, history, message = split(body.messages)
        sampling = Sampling(body.heat, body.top_p, body.frequency_penalty, body.presence_penalty, body.seed, body.stops)
        turns = Turns(system, history, message, sampling, body.longest)
        address = Address(chat=body.session_id or _name(x_session_id) or _name(x_openwebui_chat_id), user=body.user)
        new, created = response_id("chatcmpl"), int(time.time())
        events = await _begun(service.reply(owner, address, turns, new), request)
        if body.stream:
            return _stream(chat_chunks(body, new, created, events), events, _chat_error)
        return JSONResponse(chat_completion(body, new, created, await _last(events, request)))

    @app.post("/v1/responses", tags=["openai"])
    async def responses(
        request: Request,
        body: ResponseRequest,
        owner: str = Owner,
        x_session_id: str | None = Header(None),
        x_openwebui_chat_id: str | None = Header(None),
    ) -> Response:
        """A reply. Which memory: conversation, previous_response_id, then as for chat completions.

        With none of them and `store`, which is on unless it is turned off, the response can be gone on from by its id.
        """
        known(body.model)
        goes_on = body.conversation_name is not None or body.previous_response_id is not None
        system, history, message = split(body.messages, history=not goes_on)
        turns = Turns(system, history, message, Sampling(body.heat, body.top_p), body.max_output_tokens)
        address = Address(
            body.conversation_name, body.previous_response_id,
            body.session_id or _name(x_session_id) or _name(x_openwebui_chat_id), body.user,
        )  # fmt: skip
        if not body.store and address != Address():
            raise ApiError(
                400, "store is false, so there can be no memory: name none, or leave store out", "invalid_value"
            )
        new, created = response_id("resp"), int(time.time())

        def about(done: Done) -> dict[str, Any]:
            return response_about(body, new, created, done)

        events = await _begun(service.reply(owner, address, turns, new, body.store, about), request)
        if body.stream:
            return _stream(response_events(body, new, created, events), events, _response_error)
        return JSONResponse(response_object(body, new, created, await _last(events, request)))

    @app.get("/healthz", tags=["health"])
    async def healthz() -> PlainTextResponse:
        """The process answers."""
        return PlainTextResponse("ok\n")

    @app.get("/readyz", tags=["health"])
    async def readyz() -> PlainTextResponse:
        """The model runs and the store answers."""
        try:
            await asyncio.wait_for(in_thread(store.check), 10)
        except (StoreError, TimeoutError, asyncio.TimeoutError):
            return PlainTextResponse("the session store does not answer\n", 503)
        if not engine.alive:
            return PlainTextResponse("the model does not run\n", 503)
        return PlainTextResponse("ready\n")

    @app.get("/metrics", tags=["health"])
    async def show_metrics() -> Response:
        """For Prometheus."""
        metrics.waiting.set(engine.waiting)
        metrics.active.set(engine.active)
        return Response(metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    def most_bytes(path: str) -> int:
        return settings.max_import_bytes if path == "/v1/memory/import" else settings.max_body_bytes

    def refusal(scope: Scope) -> ApiError | None:
        """A wrong key, before anything of the body is kept."""
        if scope["path"].startswith("/v1/"):
            try:
                keys.owner(Headers(scope=scope).get("authorization"))
            except ApiError as error:
                scope["route"] = _route_of(scope, app.routes)  # for the log, as nobody looks for it any more
                return error
        return None

    if not settings.api_keys:
        app.add_middleware(OwnNames, names=settings.hosts, origins=settings.cors_origins)
    app.add_middleware(BodyLimit, limit=most_bytes, seconds=settings.body_seconds, refusal=refusal)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(settings.cors_origins), allow_methods=["*"], allow_headers=["*"]
        )
    app.add_middleware(Observed, metrics=metrics)
    return app


def _route_of(scope: Scope, routes: Iterable[BaseRoute]) -> BaseRoute | None:
    """The route that answers this request, of an included router, too, which is a single route in newer versions of FastAPI."""
    for route in routes:
        if route.matches(scope)[0] is Match.FULL:
            included = getattr(route, "original_router", None)
            return route if included is None else _route_of(scope, included.routes)
    return None


def _name(header: str | None) -> str | None:
    """What a client wrote into a header: as UTF-8, where it is that, and not as Latin-1, which is how it is read."""
    try:
        return header and header.encode("latin-1").decode("utf-8")
    except UnicodeError:
        return header


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "gru-memory"}


async def _begun(events: AsyncIterator[Event], request: Request) -> AsyncIterator[Event]:
    """Wait for the first event, so that what is wrong with a request has a status of its own."""
    try:
        await while_there(request, anext(events))
    except Exception as error:
        _note(error)
        raise as_api_error(error) from error
    return events


async def _last(events: AsyncIterator[Event], request: Request) -> Any:
    """The last event. When the client leaves before it, the turn is dropped."""

    async def last() -> Any:
        event = None
        async with contextlib.aclosing(events):
            async for happened in events:
                event = happened
        return event

    try:
        return await while_there(request, last())
    except Exception as error:
        _note(error)
        raise as_api_error(error) from error


def _stream(
    chunks: AsyncIterator[bytes], events: AsyncIterator[Event], as_chunk: Callable[[ApiError, int], bytes]
) -> StreamingResponse:
    """Server-sent events; an error in the middle is the last of them. When the client leaves, the turn is dropped."""

    async def guarded() -> AsyncIterator[bytes]:
        sent = 0
        async with contextlib.aclosing(events):
            try:
                async for chunk in chunks:
                    yield chunk
                    sent += 1
            except Exception as error:
                _note(error)
                yield as_chunk(as_api_error(error), sent)

    headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
    return StreamingResponse(guarded(), media_type="text/event-stream", headers=headers)


def _note(error: Exception) -> None:
    if as_api_error(error).status >= 500:
        logger.error("a reply failed", exc_info=error)


def _chat_error(error: ApiError, sent: int) -> bytes:
    return sse(error.body)


def _response_error(error: ApiError, sent: int) -> bytes:
    values = {"type": "error", "code": error.code, "message": error.message, "param": error.param}
    return sse({**values, "sequence_number": sent}, "error")


async def _purge(store: SessionStore, seconds: float) -> None:
    while True:
        await asyncio.sleep(seconds)
        try:
            if removed := await in_thread(store.purge_expired):
                logger.info("expired sessions removed", extra={"sessions": removed})
        except StoreError:
            logger.warning("expired sessions were not removed: the store does not answer")


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def known_error(request: Request, error: ApiError) -> JSONResponse:
        return as_answer(error)

    @app.exception_handler(RequestValidationError)
    async def wrong_request(request: Request, error: RequestValidationError) -> JSONResponse:
        found = error.errors()
        # Where a field may be text or a list, what is wrong with the list says more.
        of_it = [other for other in found if other["loc"][:2] == found[0]["loc"][:2]]
        first = next((other for other in of_it if other["type"] != "string_type"), found[0])
        names = (part for part in first["loc"] if isinstance(part, int) or part.isidentifier())  # not those of types
        where = ".".join(str(name) for name in names if name != "body")[:200]
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            message = "this field is not supported here"
        elif first["type"] == "json_invalid":
            where, message = "", f"the body is no JSON: {first.get('ctx', {}).get('error', 'it cannot be read')}"
        elif first["loc"] == ("body",) and "json" not in (sent_as := request.headers.get("content-type", "")):
            came = f"as {sent_as}" if sent_as else "without one"
            message = f"send the body with the header Content-Type: application/json; it came {came}"
        return as_answer(ApiError(400, f"{where}: {message}" if where else message, "invalid_value", where or None))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        message = "this server has no such route" if error.status_code == 404 else str(error.detail)
        known = as_answer(ApiError(error.status_code, message, f"http_{error.status_code}"))
        known.headers.update(error.headers or {})  # 405 names the methods that there are
        return known

    async def ours(request: Request, error: Exception) -> JSONResponse:
        return as_answer(as_api_error(error))

    for kind in (StoreError, ValueError, TemplateError, Overloaded, ShuttingDown, TimedOut):
        app.exception_handler(kind)(ours)
