"""`StoredConversation`: a `Conversation` whose every turn is kept before it counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from ..conversation import Conversation
from ..state import MemoryState
from . import files
from .errors import SessionNotFound
from .records import Session, TurnRecord
from .sessions import SessionStore

Reply = TypeVar("Reply", bound="str | None")


class StoredConversation:
    """One session of a store, and the conversation it holds.

    After each method the store and `conversation` say the same; on any error, Ctrl-C included, both are as before.

    Args:
        model: a causal LM with memory.
        tokenizer: its tokenizer.
        store: where sessions are.
        session: which of them to go on with; None is a conversation that is kept nowhere.
        system: system prompt of a conversation that is new; one that goes on keeps its own.
        keep_text: of a conversation that is kept nowhere, whether `export` writes its messages; a session says so itself.
        **settings: of the `Conversation` (context_turns, max_new_tokens, ...).

    Raises:
        ValueError: the session belongs to another model or memory.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        store: SessionStore | None,
        session: Session | None,
        system: str | None = None,
        keep_text: bool = True,
        **settings: Any,
    ) -> None:
        self.conversation = Conversation(model, tokenizer, system, **settings)
        self.store, self.session = store, session
        self._keep_text = keep_text
        self._told: list[tuple[str | None, str | None]] = []  # where nothing is kept; None is a text that was not kept
        if session is not None and (head := store.head(session)) is not None:
            self.conversation.load(head.state)

    @property
    def ephemeral(self) -> bool:
        return self.session is None

    def say(self, text: str, **generation: Any) -> str:
        """`Conversation.say`, kept."""
        return self._keep(text, lambda: self.conversation.say(text, **generation))

    def read(self, text: str, reply: str | None = None) -> None:
        """`Conversation.read`, kept."""

        def take_in() -> str | None:
            self.conversation.read(text, reply)
            return reply

        self._keep(text, take_in)

    def edit(self, state: MemoryState) -> None:
        """Go on from an edited state, and let attention see no turn from before. Their text stays what it was."""
        before = self._now()
        self.conversation.state = state
        self.conversation.leave_context()
        if self.session is not None:
            try:
                self.session = self.store.replace_state(self.session, self.conversation.to_bytes())
            except BaseException:
                self._restore(before)
                raise

    def fork(self, name: str) -> None:
        """Go on in a new session that begins as this conversation is now."""
        if not self.session.id:
            raise SessionNotFound("nothing was said in this session yet, so there is nothing to fork")
        self.session = self.store.fork(self.session, name)

    def make_ephemeral(self) -> None:
        """Keep nothing from here on. The session stays as it is now."""
        if self.session is None:
            return
        self._told = [(turn.user, turn.reply) for turn in self.transcript()]
        self._keep_text, self.session = self.session.keep_text, None

    def export(self, name: str) -> bytes:
        """The session as one file that `SessionStore.import_file` takes in; one that is kept nowhere is called `name` there.

        Of a session that is what the store holds; of a conversation that is kept nowhere, its turns and its memory now.

        Raises:
            SessionNotFound: nothing was said yet.
        """
        if self.session is not None and self.session.id:
            return self.store.export(self.session)
        if self.session is not None or not self._told:
            raise SessionNotFound("nothing was said yet, so there is nothing to save")
        state = self.conversation.to_bytes(self._keep_text)
        return files.pack_turns(name, self._told, state, self._keep_text)

    def refresh(self) -> None:
        """Go on from what the store holds now, where somebody else wrote to the session or made it anew."""
        if self.session is None:
            return
        was = self.session
        if was.id:
            now = self.store.get(was.name, was.owner)
        else:  # begun, unless somebody else made it
            now = self.store.get_or_begin(was.name, was.owner, was.keep_text, was.settings)
        if now.head is None:
            self.conversation.reset()
        elif now.head != self.session.head:
            self.conversation.load(self.store.head(now).state)
        self.session = now

    def transcript(self) -> list[TurnRecord]:
        """The turns that led here, oldest first; without text where the session keeps none."""
        if self.session is not None:
            return self.store.transcript(self.session)
        numbered = enumerate(self._told, start=1)
        return [TurnRecord("", None, n, 0.0, b"", b"", False, user, reply) for n, (user, reply) in numbered]

    def _now(self) -> bytes:
        return self.conversation.to_bytes()

    def _restore(self, before: bytes) -> None:
        self.conversation.load(before)

    def _keep(self, text: str, take_in: Callable[[], Reply]) -> Reply:
        before = self._now()
        try:
            reply = take_in()
            if self.session is None:
                self._told.append((text, reply))
            else:
                after = self.conversation.to_bytes(self.session.keep_text)
                self.session = self.store.commit(self.session, [(text, reply)], after, self.session.head).session
        except BaseException:
            self._restore(before)
            raise
        return reply
