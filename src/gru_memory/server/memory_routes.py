"""`/v1/memory`: looking into sessions, and changing them by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import JSONResponse

from ..editing import forget, forget_slot
from ..inspection import said_tokens, slot_words, trace
from ..store import Session, SessionNotFound
from ..store.digests import user_digest
from .errors import ApiError
from .http import while_there
from .protocol import DecayRequest, ForgetRequest, ForkRequest, TextRequest
from .service import Service, check_path_name, in_thread

MOST_TRACED = 4_000  # characters: while a trace is made, there are heads x slots numbers a token
Most = Annotated[int, Query(ge=1, le=1_000)]


def memory_router(service: Service, owner: Callable[..., str]) -> APIRouter:
    """The routes, for sessions of whoever `owner` says a request is from."""
    router = APIRouter(prefix="/v1/memory", tags=["memory"])
    store, model, tokenizer = service.store, service.engine.model, service.engine.tokenizer
    Owner = Depends(owner)

    @router.get("")
    async def sessions(owner: str = Owner, limit: int = 100, offset: int = 0) -> dict[str, Any]:
        """Sessions, the last one used first."""
        if not (1 <= limit <= 1000 and 0 <= offset < 1 << 31):
            raise ApiError(400, "limit is 1 to 1000, offset at least 0", "invalid_value")
        found = await in_thread(store.list, owner, limit, offset)
        return {"object": "list", "data": [_session(session) for session in found]}

    @router.post("/import")
    async def import_session(request: Request, name: str | None = None, owner: str = Owner) -> dict[str, Any]:
        """Take in a file that `export` gave; the body is the file."""
        data = await request.body()
        return _session(await in_thread(store.import_file, data, owner, name, check_path_name, service.keep_text))

    @router.get("/{session}")
    async def read(
        session: str, owner: str = Owner, top: Annotated[int, Query(ge=1, le=20)] = 3, slots: Most = 64
    ) -> dict[str, Any]:
        """The session and its strongest slots, each as the words it looks as if it had been written with.

        Where text is kept these are words that were said; where none is, of all those that the model knows.
        """
        found = await in_thread(store.get, session, owner)
        if found.head is None:
            return {**_session(found), "kv_cache_bytes": 0, "slots": []}

        def look() -> tuple[Session, Any, list[int]]:
            found, conversation = service.head_of(session, owner)
            turns = [(turn.user, turn.reply) for turn in store.transcript(found)]
            return found, conversation.state, said_tokens(tokenizer, turns)

        found, state, said = await in_thread(look)
        strongest = await service.with_model(
            lambda: slot_words(model, tokenizer, state, top=top, among=said, strongest=slots)
        )
        shown = [
            {
                "head": slot.head,
                "slot": slot.slot,
                "strength": round(slot.norm, 5),
                "words": [{"text": text, "score": round(score, 4)} for text, score in slot.words],
            }
            for slot in strongest
        ]
        kv_cache = found.tokens * await service.kv_bytes_per_token()
        return {**_session(found), "kv_cache_bytes": kv_cache, "slots": shown}

    @router.get("/{session}/transcript")
    async def transcript(session: str, owner: str = Owner) -> dict[str, Any]:
        """What was said, where text is kept."""

        def turns() -> list[Any]:
            return store.transcript(store.get(session, owner))

        data = [
            {"id": t.id, "created_at": int(t.created_at), "user": t.user, "reply": t.reply}
            for t in await in_thread(turns)
        ]
        return {"object": "list", "data": data}

    async def traced(turn: tuple[str, str | None], state: Any, system: str | None, slots: int) -> Response:
        # Not a dict, of which every number would be looked at once more.
        return JSONResponse(await service.with_model(lambda: _trace(model, tokenizer, turn, state, system, slots)))

    @router.get("/{session}/trace")
    async def last_trace(session: str, owner: str = Owner, slots: Most = 128) -> Response:
        """Where the last turn was written to and read from, token by token: the slots it was most strongly."""

        def before_and_last() -> tuple[Any, Any, str | None]:
            found, conversation = service.head_of(session, owner)
            last = store.transcript(found)[-1]
            if last.user is None:
                raise ApiError(409, "the text of this session is not kept, so there is nothing to trace", "no_text")
            _check_length(last.user, last.reply or "")
            system = conversation.system
            conversation.reset()
            if last.parent is not None:
                try:
                    conversation.load(store.snapshot(last.parent, owner).state)
                except SessionNotFound as error:
                    message = "the state from before the last turn is not kept, so there is nothing to trace it from"
                    raise ApiError(409, message, "no_state") from error
            return conversation.state, last, system

        state, last, system = await in_thread(before_and_last)
        return await traced((last.user, last.reply), state, system, slots)

    @router.post("/{session}/trace")
    async def trace_text(session: str, body: TextRequest, owner: str = Owner, slots: Most = 128) -> Response:
        """Where a message would be written to and read from. The session stays as it is."""
        _check_length(body.text)
        _, conversation = await in_thread(service.head_of, session, owner)
        state, system = conversation.state, conversation.system
        return await traced((body.text, None), state, system, slots)

    @router.post("/{session}/fork")
    async def fork(session: str, body: ForkRequest, owner: str = Owner) -> dict[str, Any]:
        """A session of its own that begins as this one is now, or was after the response `at`."""
        check_path_name(body.name)

        def forked() -> Session:
            return store.fork(store.get(session, owner), body.name, body.at)

        return _session(await in_thread(forked))

    @router.post("/{session}/forget")
    async def forget_text(session: str, body: ForgetRequest, owner: str = Owner) -> dict[str, Any]:
        """Take a message out of memory, word for word as it was told, and what was replied to it, or empty a slot."""
        with service.reserved(owner, session):
            found, conversation = await in_thread(service.head_of, session, owner)
            state, system = conversation.state, conversation.system
            if body.text is None:
                state = forget_slot(state, body.head, body.slot)
            else:
                said = user_digest(found.salt, body.text)
                if all(turn.user_digest != said for turn in await in_thread(store.transcript, found)):
                    message = "no message of this conversation reads so, word for word, so nothing was changed"
                    raise ApiError(400, message, "invalid_value", "text")
                state = await service.with_model(lambda: forget(model, tokenizer, state, body.text, body.reply, system))
            conversation.state = state
            return _session(await in_thread(store.replace_state, found, conversation.to_bytes(context=False)))

    @router.post("/{session}/decay")
    async def decay(session: str, body: DecayRequest, owner: str = Owner) -> dict[str, Any]:
        """Let ticks of the memory's clock pass without a word."""
        with service.reserved(owner, session):
            found, conversation = await in_thread(service.head_of, session, owner)
            conversation.state = conversation.state.decay(body.ticks)
            return _session(await in_thread(store.replace_state, found, conversation.to_bytes(found.keep_text)))

    @router.post("/{session}/remember")
    async def remember(request: Request, session: str, body: TextRequest, owner: str = Owner) -> dict[str, Any]:
        """Tell the memory something; nothing is answered."""
        check_path_name(session)

        def begin() -> Any:
            return store.get_or_begin(session, owner, service.keep_text)

        with service.reserved(owner, session):
            found = await in_thread(begin)
            if found.head is None:
                conversation = service.new_conversation()
            else:
                found, conversation = await in_thread(service.head_of, session, owner)
            turns = [(body.text, None)]
            await while_there(request, service.read(conversation, turns))
            kept = await in_thread(store.commit, found, turns, conversation.to_bytes(found.keep_text), found.head)
            return _session(kept.session)

    @router.get("/{session}/export")
    async def export(session: str, owner: str = Owner) -> Response:
        """The whole session as one file."""

        def data() -> bytes:
            return store.export(store.get(session, owner))

        return Response(await in_thread(data), media_type="application/octet-stream")

    @router.delete("/{session}")
    async def delete(session: str, owner: str = Owner) -> dict[str, Any]:
        """Remove the session with all that is kept of it."""
        await in_thread(store.delete, session, owner)
        return {"id": session, "object": "memory.deleted", "deleted": True}

    return router


def _session(session: Session) -> dict[str, Any]:
    return {
        "id": session.name,
        "object": "memory",
        "created_at": int(session.created_at),
        "updated_at": int(session.updated_at),
        "expires_at": None if session.expires_at is None else int(session.expires_at),
        "turns": session.turns,
        "tokens": session.tokens,
        "bytes": session.state_bytes,
        "last_response_id": session.head,
    }


def _check_length(*texts: str) -> None:
    if sum(map(len, texts)) > MOST_TRACED:
        raise ApiError(413, f"at most {MOST_TRACED} characters are traced at once", "too_large")


def _trace(
    model: Any, tokenizer: Any, turn: tuple[str, str | None], state: Any, system: str | None, slots: int
) -> dict[str, Any]:
    """`slots` is how many are shown of those written, and of those read; a memory may have thousands."""
    seen = trace(model, tokenizer, [turn], state, system)
    write = (seen.address * seen.strength.unsqueeze(-1)).flatten(1)  # (T, N S)
    read = seen.read_address.flatten(1)  # (T, N S)
    shown = sorted({slot for part in (write, read) for slot in part.amax(0).argsort(descending=True)[:slots].tolist()})

    def rounded(tensor: Any) -> list[Any]:
        return (tensor * 1000).round().div(1000).tolist()

    return {
        "object": "memory.trace",
        "tokens": seen.tokens,
        "strength": rounded(seen.strength),  # (tokens, heads)
        "slots": [divmod(slot, seen.address.shape[-1]) for slot in shown],  # (head, slot) of each
        "write": rounded(write[:, shown]),  # (tokens, slots shown)
        "read": rounded(read[:, shown]),  # (tokens, slots shown)
    }
