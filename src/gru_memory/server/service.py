"""What a request means: which conversation it goes on with, what it adds, and what is kept of it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ..conversation import Conversation
from ..evaluation.full_history import kv_bytes_per_token
from ..store import Session, SessionNotFound, SessionStore
from ..store.sessions import new_id
from .engine import Delta, Done, Engine, Event, Failed, Job, TimedOut
from .errors import ApiError
from .metrics import Metrics
from .recognition import where_to_go_on
from .sampling import Sampling

Result = TypeVar("Result")


@dataclass(frozen=True)
class Address:
    """Where a request says its memory is; at most one of these counts, the first that is given.

    Attributes:
        conversation: a session to which only new messages are sent.
        response: id of the response to go on from, likewise.
        chat: a session of one chat, whose history the client may send again.
        user: one memory for all chats of a user.
    """

    conversation: str | None = None
    response: str | None = None
    chat: str | None = None
    user: str | None = None


@dataclass(frozen=True)
class Turns:
    """What a request says."""

    system: str | None
    history: list[tuple[str, str | None]]
    message: str
    sampling: Sampling
    max_new_tokens: int | None


@dataclass
class _Plan:
    session: Session | None  # None: nothing is kept
    parent: str | None
    branch: bool
    conversation: Conversation
    read: list[tuple[str, str | None]]
    committing: asyncio.Future | None = None  # goes on after a client has left


class Service:
    """Turns requests into jobs of the engine, and their results into snapshots of the store.

    Args:
        engine: runs the model.
        store: keeps the sessions.
        metrics: is told what happens.
        context_turns: turns that attention sees.
        default_new_tokens: longest reply where a request does not say.
        most_new_tokens: longest reply a request may ask for.
        keep_text: whether new sessions keep messages.
    """

    def __init__(
        self,
        engine: Engine,
        store: SessionStore,
        metrics: Metrics,
        context_turns: int = 1,
        default_new_tokens: int = 256,
        most_new_tokens: int = 2048,
        keep_text: bool = True,
    ) -> None:
        self.engine, self.store, self.metrics = engine, store, metrics
        self.context_turns, self.keep_text = context_turns, keep_text
        self.default_new_tokens, self.most_new_tokens = default_new_tokens, most_new_tokens
        self._kv_bytes: int | None = None
        self._busy: set[tuple[str, str]] = set()  # owner and name: a session that is only begun has no id
        self._lock = threading.Lock()

    async def reply(
        self,
        owner: str,
        address: Address,
        turns: Turns,
        response_id: str,
        keep: bool = False,
        about: Callable[[Done], dict[str, Any]] | None = None,
    ) -> AsyncIterator[Event]:
        """The events of one turn. Whatever is wrong with the request is raised before the first one.

        `Done` comes after the turn was kept; `Failed` never comes, it is raised.

        Args:
            owner: whose sessions these are.
            address: where the memory is.
            turns: what is said.
            response_id: of the snapshot to be made.
            keep: make a session even if `address` names none.
            about: what to keep with the snapshot.
        """
        if turns.max_new_tokens is not None and turns.max_new_tokens > self.most_new_tokens:
            raise ApiError(400, f"at most {self.most_new_tokens} new tokens are given out at once", "invalid_value")
        began = time.monotonic()
        plan = await in_thread(self._plan, owner, address, turns, response_id, keep)
        reserved = None if plan.session is None or plan.branch else self._reserve(owner, plan.session.name)
        events: asyncio.Queue[Event] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        job = Job(
            plan.conversation, turns.message, lambda event: _hand_over(loop, events, event), list(plan.read),
            turns.max_new_tokens, self.default_new_tokens, turns.sampling,
        )  # fmt: skip
        try:
            self.engine.submit(job)
            first = True
            while True:
                event = await events.get()
                if isinstance(event, Failed):
                    raise event.error
                if isinstance(event, Done):
                    await self._keep(plan, turns, event, response_id, about)
                if first and isinstance(event, (Delta, Done)):
                    self.metrics.first_token.observe(time.monotonic() - began)
                    first = False
                yield event
                if isinstance(event, Done):
                    return
        finally:
            job.cancelled = True
            if plan.committing is None or plan.committing.done():
                self._release(reserved)
            else:
                plan.committing.add_done_callback(lambda _: self._release(reserved))

    def _plan(self, owner: str, address: Address, turns: Turns, response_id: str, keep: bool) -> _Plan:
        """In a thread: everything that has to be read from the store."""
        conversation = self.new_conversation(turns.system)
        read = list(turns.history)
        name = address.conversation or address.chat or (address.user and f"user:{address.user}")
        branch = False
        if address.conversation is None and address.response is not None:
            snapshot = self.store.snapshot(address.response, owner)
            session, parent, branch = snapshot.session, snapshot.id, True
        elif name is not None:
            check_path_name(name)
            session = self.store.get_or_begin(name, owner, self.keep_text)
            parent = session.head
            if address.conversation is None and (read or parent):
                linear = address.chat is None
                records = self.store.turns(session)
                parent, read = where_to_go_on(records, parent, session.salt, read, turns.message, linear)
            snapshot = self.store.snapshot(parent, owner) if parent else None
        else:
            only = {"only_responses": True}
            session = self.store.get_or_begin(response_id, owner, self.keep_text, only) if keep else None
            parent = snapshot = None
        if snapshot is not None:
            try:
                conversation.load(snapshot.state)
            except ValueError as error:
                raise ApiError(409, f"this conversation cannot go on: {error}", "memory_changed") from error
            if turns.system is not None or branch:  # as with OpenAI, a response's instructions are those of no other
                conversation.use_system(turns.system)
        return _Plan(session, parent, branch, conversation, read)

    async def _keep(
        self,
        plan: _Plan,
        turns: Turns,
        done: Done,
        response_id: str,
        about: Callable[[Done], dict[str, Any]] | None,
    ) -> None:
        self.metrics.tokens.labels("prompt").inc(done.prompt_tokens)
        self.metrics.tokens.labels("generated").inc(done.completion_tokens)
        self.metrics.turns.labels("yes" if plan.session else "no").inc()
        if plan.session is None:
            return

        def commit() -> None:
            session = plan.session
            said = [*plan.read, (turns.message, done.reply)]
            state = plan.conversation.to_bytes(session.keep_text)
            known = about(done) if about else None
            if known is not None and not session.keep_text:
                known["instructions"] = None  # that is text too
            self.store.commit(session, said, state, plan.parent, response_id, plan.branch, known)

        # Once the model has spoken, a client that leaves must not leave half of a commit behind.
        plan.committing = asyncio.ensure_future(in_thread(commit))
        await asyncio.shield(plan.committing)

    @contextlib.contextmanager
    def reserved(self, owner: str, name: str) -> Iterator[None]:
        """Nobody else changes the session meanwhile. Raises `ApiError` 409 where somebody does already."""
        reserved = self._reserve(owner, name)
        try:
            yield
        finally:
            self._release(reserved)

    def _reserve(self, owner: str, name: str) -> tuple[str, str]:
        """One change at a time for each session: a second writer is told before the model works in vain."""
        with self._lock:
            if (owner, name) in self._busy:
                raise ApiError(409, "this conversation is busy with another request", "conversation_locked")
            self._busy.add((owner, name))
        return owner, name

    def _release(self, reserved: tuple[str, str] | None) -> None:
        with self._lock:
            self._busy.discard(reserved)

    async def with_model(self, function: Callable[[], Result], until: float | None = None) -> Result:
        """Run something that needs the model, between two of its steps; what does not come to its turn in time never runs."""
        seconds = self.engine.limits.request_seconds if until is None else until - time.monotonic()
        try:
            waiting = asyncio.wrap_future(self.engine.call(function))
            return await asyncio.wait_for(waiting, seconds)
        except (TimeoutError, asyncio.TimeoutError) as error:
            raise TimedOut("the model did not come to this in time: try again later") from error

    async def read(self, conversation: Conversation, turns: Sequence[tuple[str, str | None]]) -> None:
        """Take turns into a conversation. Between two of them others come to their turn, and who stops waiting ends it."""
        until = time.monotonic() + self.engine.limits.request_seconds
        for turn in turns:
            await self.with_model(functools.partial(conversation.read, *turn), until)

    async def kv_bytes_per_token(self) -> int:
        """What a token would cost in a KV cache; measured once."""
        if self._kv_bytes is None:
            self._kv_bytes = await self.with_model(lambda: kv_bytes_per_token(self.engine.model))
        return self._kv_bytes

    def new_conversation(self, system: str | None = None) -> Conversation:
        """One in which nothing was said yet."""
        return Conversation(self.engine.model, self.engine.tokenizer, system, self.context_turns)

    def head_of(self, name: str, owner: str) -> tuple[Session, Conversation]:
        """A session and its conversation as it is now. Raises `SessionNotFound`, also before the first turn."""
        session = self.store.get(name, owner)
        if session.head is None:
            raise SessionNotFound("nothing was said yet")
        conversation = self.new_conversation()
        try:
            conversation.load(self.store.head(session).state)
        except ValueError as error:
            raise ApiError(409, f"this conversation cannot be looked into: {error}", "memory_changed") from error
        return session, conversation


def check_path_name(name: str) -> None:
    """Raise `ApiError` for a name that could be no part of a path, so that its session would be out of reach."""
    if "/" in name:
        raise ApiError(400, f"a session's name has no '/' here, and {name[:40]!r} has", "invalid_value")
    if name in (".", ".."):
        raise ApiError(400, f"{name!r} is no name for a session: in a path it stands for a folder", "invalid_value")


async def in_thread(function: Callable[..., Result], *arguments: Any) -> Result:
    """Run something that waits, for the database mostly, without holding up other requests."""
    return await asyncio.get_running_loop().run_in_executor(None, functools.partial(function, *arguments))


def response_id(kind: str) -> str:
    return new_id(kind)


def _hand_over(loop: asyncio.AbstractEventLoop, events: asyncio.Queue, event: Event) -> None:
    """From the engine's thread to the event loop, which may be gone by now."""
    if not loop.is_closed():
        try:
            loop.call_soon_threadsafe(events.put_nowait, event)
        except RuntimeError:  # closed in between
            return
