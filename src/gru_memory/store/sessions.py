"""`SessionStore`: named conversations in a database. Every method is one transaction, but for `purge_expired`."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Row, and_, case, delete, func, insert, or_, select, update
from sqlalchemy.exc import IntegrityError

from ..conversation import without_turns
from ..state import MemoryState, regular_size
from . import files
from .database import connect, migrate, scrub, transaction
from .digests import turn_digest, user_digest
from .errors import LimitExceeded, SessionConflict, SessionExists, SessionNotFound, StateNotKept, TooManySessions
from .names import check_name
from .queries import path_to, rows_of, session_of, turn_of, turns_in, turns_where
from .records import EDIT, Limits, Session, Snapshot, TurnRecord, is_edit
from .retention import let_go
from .schema import sessions, snapshots
from .settings import check_strings

Turn = tuple[str, "str | None"]  # user message, reply

MAX_SETTINGS_BYTES = 64 << 10
PURGED_AT_ONCE = 100  # sessions in one transaction, for which other writers wait


class SessionStore:
    """Conversations that survive restarts.

    Args:
        url: sqlite:///FILE or the path of a file, or postgresql://...; None is `default_url()`.
        limits: bounds on what is kept.
        clock: seconds since 1970.

    A session has a name, unique among those of its owner, and a tree of snapshots, one for every response. `head` says
    which of them the conversation goes on from. The store knows nothing of models: a state is what
    `Conversation.to_bytes` returned.

    All methods raise `StoreUnavailable` when the database cannot be used. A store may be shared by threads, and a
    database by processes.
    """

    def __init__(
        self, url: str | None = None, limits: Limits | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        self.limits, self.clock = limits or Limits(), clock
        self.engine = connect(url)
        try:
            migrate(self.engine)
        except BaseException:
            self.engine.dispose()
            raise

    def close(self) -> None:
        self.engine.dispose()

    def __enter__(self) -> SessionStore:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def check(self) -> None:
        """Raise `StoreUnavailable` unless the database answers."""
        with transaction(self.engine, read_only=True) as connection:
            connection.execute(select(sessions.c.id).limit(1)).all()

    # Sessions

    def create(
        self, name: str, owner: str = "", keep_text: bool = True, settings: dict[str, Any] | None = None
    ) -> Session:
        """A new session in which nothing was said yet.

        Raises:
            ValueError: not a name.
            SessionExists: the owner has one of this name.
            TooManySessions: the owner has as many as allowed.
        """
        check_name(name)
        with transaction(self.engine) as connection:
            return self._create(connection, name, owner, keep_text, settings or {})

    def get(self, name: str, owner: str = "") -> Session:
        """The session as it is now. Raises `SessionNotFound`."""
        with transaction(self.engine, read_only=True) as connection:
            return self._get(connection, name, owner)

    def get_or_create(
        self, name: str, owner: str = "", keep_text: bool = True, settings: dict[str, Any] | None = None
    ) -> Session:
        """`get`, or `create` where there is none."""
        check_name(name)
        for _ in range(3):  # two may find none at once, and one of them is second to make it
            try:
                return self.get(name, owner)
            except SessionNotFound:
                try:
                    return self.create(name, owner, keep_text, settings)
                except SessionExists:
                    continue
        return self.get(name, owner)

    def get_or_begin(
        self, name: str, owner: str = "", keep_text: bool = True, settings: dict[str, Any] | None = None
    ) -> Session:
        """`get`, or a session that its first `commit` makes: until then it is not in the store, and has no id.

        Raises as `create` does, but `SessionExists`.
        """
        check_name(name)
        with transaction(self.engine, read_only=True) as connection:
            try:
                return self._get(connection, name, owner)
            except SessionNotFound:
                self._check_room(connection, owner)
        now, salt = self.clock(), secrets.token_bytes(16)
        return Session(
            "", owner, name, 0, None, keep_text, settings or {}, 0, 0, 0, None, now, now, self._expiry(now), salt
        )

    def list(self, owner: str = "", limit: int | None = None, offset: int = 0) -> list[Session]:
        """The owner's sessions, the last one used first."""
        query = select(sessions).where(sessions.c.owner == owner, self._alive()).limit(limit).offset(offset)
        with transaction(self.engine, read_only=True) as connection:
            rows = connection.execute(query.order_by(sessions.c.updated_at.desc(), sessions.c.name)).all()
        return [session_of(row) for row in rows]

    def delete(self, name: str, owner: str = "") -> None:
        """Remove this session with all its snapshots, and nothing else. Raises `SessionNotFound`."""
        with transaction(self.engine) as connection:
            session = self._get(connection, name, owner)
            connection.execute(delete(sessions).where(sessions.c.id == session.id))
        scrub(self.engine)

    def purge_expired(self) -> int:
        """Remove the sessions whose time is over, some at a time, so that nobody waits long; returns how many there were."""
        over = select(sessions.c.id).where(sessions.c.expires_at <= self.clock()).limit(PURGED_AT_ONCE)
        removed, more = 0, True
        while more:
            with transaction(self.engine) as connection:
                gone = connection.execute(delete(sessions).where(sessions.c.id.in_(over))).rowcount
            removed, more = removed + gone, gone == PURGED_AT_ONCE
        scrub(self.engine)
        return removed

    # Snapshots

    def commit(
        self,
        session: Session,
        turns: Sequence[Turn],
        state: bytes,
        parent: str | None,
        snapshot_id: str | None = None,
        branch: bool = False,
        about: dict[str, Any] | None = None,
    ) -> Snapshot:
        """Keep what the conversation is after these turns as a new snapshot, and go on from there.

        Args:
            session: as it was when the turns began; one that was only begun is made.
            turns: what was said since `parent`, at least one turn.
            state: `Conversation.to_bytes` after the last of them.
            parent: the snapshot these turns followed; None for an empty memory.
            snapshot_id: None makes one up.
            branch: let another writer go first without complaint; the session then only goes on from here if it still
                stood at `parent`.
            about: plain values to keep with the snapshot; `find_turn` gives them back.

        Raises:
            SessionConflict: without `branch`, if somebody else wrote since `session` was read; and if `parent` is gone.
                Nothing was changed.
            SessionNotFound: it was deleted since.
            LimitExceeded: a state or text is too large.
            ValueError: `state` is no state, or a text cannot be kept.
        """
        if not turns:
            raise ValueError("a snapshot follows at least one turn")
        held = self._check_state(state)
        for turn in turns:
            self._check_turn(turn)
        now, last = self.clock(), snapshot_id or new_id("snap")
        rows = []
        for turn in turns:
            rows.append(self._row(session, turn, parent if not rows else rows[-1]["id"], now, held))
        rows[-1] |= {"id": last, "state": state, "about": self._written(about)}
        with transaction(self.engine) as connection:
            if not session.id:
                session = self._create_begun(connection, session)
            self._advance(connection, session, parent, last, held, len(state), now, branch)
            self._append(connection, session.id, rows)
            after = self._by_id(connection, session.id)
        return Snapshot(last, after, rows[-1]["parent"], now, held["turns"], held["tokens"], state)

    def snapshot(self, snapshot_id: str, owner: str = "") -> Snapshot:
        """What the conversation was after one response. Raises `SessionNotFound`; `StateNotKept` if its state was dropped."""
        query = (
            select(snapshots, sessions)
            .join(sessions, sessions.c.id == snapshots.c.session_id)
            .where(snapshots.c.id == snapshot_id, sessions.c.owner == owner, self._alive())
        )
        with transaction(self.engine, read_only=True) as connection:
            row = None if "\0" in snapshot_id else connection.execute(query).one_or_none()
        if row is None:
            raise SessionNotFound(f"there is no snapshot {snapshot_id!r}, or not any more")
        found, values = row._mapping, {c.name: row._mapping[c] for c in sessions.c}
        if found[snapshots.c.state] is None:
            raise _no_state(snapshot_id)
        return Snapshot(
            snapshot_id, session_of(values), found[snapshots.c.parent], found[snapshots.c.created_at],
            found[snapshots.c.turns], found[snapshots.c.tokens], found[snapshots.c.state],
        )  # fmt: skip

    def find_turn(self, snapshot_id: str, owner: str = "") -> TurnRecord:
        """The turn of one snapshot, also if its state was dropped. Raises `SessionNotFound`."""
        with transaction(self.engine, read_only=True) as connection:
            return turn_of(self._find(connection, snapshot_id, owner))

    def forget_turn(self, snapshot_id: str, owner: str = "") -> None:
        """Let go of a snapshot's id, its text and what was kept about it. Raises `SessionNotFound`.

        Its state goes too, unless the session goes on from there: memory is as it was, also that of later snapshots, but
        attention does not see the turn any more. A session whose settings say `{"only_responses": true}` is removed with
        the last turn that has an `about`.
        """
        with transaction(self.engine) as connection:
            self._forget_turn(connection, self._find(connection, snapshot_id, owner))
        scrub(self.engine)

    def use_settings(self, session: Session, settings: dict[str, Any]) -> Session:
        """Give a session other settings; whoever writes to it meanwhile is not disturbed. Raises `SessionNotFound`."""
        with transaction(self.engine) as connection:
            self._by_id(connection, session.id)
            change = update(sessions).where(sessions.c.id == session.id)
            connection.execute(change.values(settings=self._settings(settings)))
            return self._by_id(connection, session.id)

    def head(self, session: Session) -> Snapshot | None:
        """The snapshot that `session` goes on from; None before its first turn."""
        return None if session.head is None else self.snapshot(session.head, session.owner)

    def turns(self, session: Session) -> list[TurnRecord]:
        """Every turn of the session's tree, in the order of writing."""
        with transaction(self.engine, read_only=True) as connection:
            rows = connection.execute(turns_in(session.id)).all()
        return [turn_of(row) for row in rows]

    def transcript(self, session: Session, at: str | None = None) -> list[TurnRecord]:
        """The turns that led to a snapshot, oldest first; to the head, if none is given."""
        return path_to(self.turns(session), at or session.head)

    def replace_state(self, session: Session, state: bytes) -> Session:
        """Put an edited state in the place of the head's, as a snapshot of its own without a turn of its own.

        The snapshot before stays as it is. Raises as `commit` does.
        """
        held = self._check_state(state)
        now, last = self.clock(), new_id(EDIT)
        with transaction(self.engine) as connection:
            head = connection.execute(select(snapshots).where(snapshots.c.id == session.head)).one_or_none()
            if head is None:
                raise SessionNotFound("there is nothing to edit: nothing was said in this session yet")
            self._advance(connection, session, session.head, last, held, len(state), now, branch=False)
            row = {**head._mapping, "id": last, "created_at": now, "state": state, "about": None}
            self._append(connection, session.id, [row | {"turns": held["turns"], "tokens": held["tokens"]}])
            return self._by_id(connection, session.id)

    def fork(self, session: Session, name: str, at: str | None = None) -> Session:
        """A new session that goes on from a snapshot of this one (its head, if none is given). The two share nothing.

        Raises:
            SessionExists: the name is taken.
            SessionNotFound: no such snapshot in this session; `StateNotKept` if its state was dropped.
        """
        check_name(name)
        at = at or session.head
        with transaction(self.engine) as connection:
            self._by_id(connection, session.id)
            rows = [row._mapping for row in connection.execute(rows_of(session.id)).all()]
            chain = path_to(rows, at) if at else []
            if at and not chain:
                raise SessionNotFound(f"session {session.name!r} has no snapshot {at!r}, or not any more")
            if at and chain[-1]["state"] is None:
                raise _no_state(at)
            settings = _of_a_copy(session.settings)
            new = self._create(connection, name, session.owner, session.keep_text, settings, session.salt)
            return self._fill(connection, new, chain, session.fingerprint)

    # Files

    def export(self, session: Session) -> bytes:
        """The whole session, text and snapshots, as one safetensors file."""
        with transaction(self.engine, read_only=True) as connection:
            current = self._by_id(connection, session.id)
            rows = [row._mapping for row in connection.execute(rows_of(session.id)).all()]
        return files.pack(current, rows)

    def import_file(
        self,
        data: bytes,
        owner: str = "",
        name: str | None = None,
        check: Callable[[str], None] = lambda name: None,
        keep_text: bool = True,
    ) -> Session:
        """Take in what `export` wrote, as a new session. Its snapshots get new ids.

        Args:
            name: instead of the one it was exported under.
            check: raises an error if the name, wherever it is from, is none that the caller can use.
            keep_text: False leaves the messages out, and the session keeps none; it keeps none either if it kept none before.

        Raises:
            ValueError: not such a file, or damaged. Nothing was changed.
            SessionExists: the name is taken; give another one.
            LimitExceeded: something in it is too large.
        """
        about, rows = files.unpack(data, self._check_state, self.limits)
        check_name(name := name if name is not None else about["name"])
        check(name)
        if not (keep_text := keep_text and about["keep_text"]):
            rows = [_without_text(row) for row in rows]
        with transaction(self.engine) as connection:
            settings = _of_a_copy(about["settings"])
            new = self._create(connection, name, owner, keep_text, settings, about["salt"])
            return self._fill(connection, new, rows, about["fingerprint"], about["head"])

    def import_path(
        self, path: str | Path, owner: str = "", name: str | None = None, keep_text: bool = True
    ) -> Session:
        """`import_file` from a regular file; another kind, or one that is too large, is not read."""
        path = Path(path)
        if (size := regular_size(path)) > files.MAX_FILE_BYTES:
            raise LimitExceeded(f"{path} has {size} bytes: no session is that large, nothing was read")
        return self.import_file(path.read_bytes(), owner, name, keep_text=keep_text)

    # Within a transaction

    def _alive(self) -> Any:
        return or_(sessions.c.expires_at.is_(None), sessions.c.expires_at > self.clock())

    def _expiry(self, now: float) -> float | None:
        return None if self.limits.ttl_seconds is None else now + self.limits.ttl_seconds

    def _get(self, connection: Connection, name: str, owner: str) -> Session:
        query = select(sessions).where(sessions.c.owner == owner, sessions.c.name == name, self._alive())
        row = None if "\0" in name else connection.execute(query).one_or_none()
        if row is None:
            raise SessionNotFound(f"there is no session {name!r}")
        return session_of(row)

    def _by_id(self, connection: Connection, session_id: str) -> Session:
        row = connection.execute(select(sessions).where(sessions.c.id == session_id, self._alive())).one_or_none()
        if row is None:
            raise SessionNotFound("this session is no longer there")
        return session_of(row)

    def _create(
        self,
        connection: Connection,
        name: str,
        owner: str,
        keep_text: bool,
        settings: dict[str, Any],
        salt: bytes | None = None,
    ) -> Session:
        written = self._settings(settings)
        same = and_(sessions.c.owner == owner, sessions.c.name == name)
        connection.execute(delete(sessions).where(same, sessions.c.expires_at <= self.clock()))
        if self.limits.max_sessions is not None and connection.dialect.name == "postgresql":
            # SQLite has one writer at a time; here those who count the same sessions wait for each other.
            connection.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(owner, 0))))
        self._check_room(connection, owner)
        now = self.clock()
        values = {
            "id": secrets.token_hex(16), "owner": owner, "name": name, "version": 0, "head": None,
            "salt": salt or secrets.token_bytes(16), "keep_text": keep_text, "settings": written, "turns": 0,
            "tokens": 0, "state_bytes": 0, "fingerprint": None, "created_at": now, "updated_at": now,
            "expires_at": self._expiry(now),
        }  # fmt: skip
        try:
            connection.execute(insert(sessions).values(**values))
        except IntegrityError as error:
            raise SessionExists(f"there is a session {name!r} already: choose another name, or delete it") from error
        return session_of(values)

    def _create_begun(self, connection: Connection, begun: Session) -> Session:
        try:
            return self._create(connection, begun.name, begun.owner, begun.keep_text, begun.settings, begun.salt)
        except SessionExists as error:
            raise _conflict(begun) from error

    def _check_room(self, connection: Connection, owner: str) -> None:
        if (most := self.limits.max_sessions) is not None:
            query = select(func.count()).select_from(sessions).where(sessions.c.owner == owner, self._alive())
            if connection.execute(query).scalar() >= most:
                raise TooManySessions(f"there are {most} sessions already, as many as may be: delete one first")

    def _advance(
        self,
        connection: Connection,
        session: Session,
        parent: str | None,
        head: str,
        held: dict[str, Any],
        size: int,
        now: float,
        branch: bool,
    ) -> None:
        """Move the head and the version; from here on until the end no one else writes to this session."""
        values = {"head": head, **held, "state_bytes": size}
        if branch:
            at_parent = sessions.c.head == parent if parent is not None else sessions.c.head.is_(None)
            values = {name: case((at_parent, value), else_=sessions.c[name]) for name, value in values.items()}
        change = update(sessions).where(sessions.c.id == session.id, self._alive())
        if not branch:
            change = change.where(sessions.c.version == session.version)
        always = {"version": sessions.c.version + 1, "updated_at": now, "expires_at": self._expiry(now)}
        moved = connection.execute(change.values(**values, **always)).rowcount == 1
        if moved and parent is not None:
            there = select(snapshots.c.id).where(snapshots.c.session_id == session.id, snapshots.c.id == parent)
            moved = connection.execute(there).first() is not None
        if not moved:
            self._by_id(connection, session.id)
            raise _conflict(session)

    def _append(self, connection: Connection, session_id: str, rows: Sequence[dict[str, Any]]) -> None:
        mine = snapshots.c.session_id == session_id
        number = connection.execute(select(func.max(snapshots.c.number)).where(mine)).scalar() or 0
        for row in rows:
            number += 1
            connection.execute(insert(snapshots).values(**{**row, "session_id": session_id, "number": number}))
        let_go(connection, session_id, number, self.limits)

    def _fill(
        self,
        connection: Connection,
        session: Session,
        rows: Sequence[Any],
        fingerprint: str | None,
        head: str | None = None,
    ) -> Session:
        """Give a new session the rows of another one, under new ids."""
        if not rows:
            return session
        renamed = {row["id"]: new_id(EDIT if row.get("edited", is_edit(row["id"])) else "snap") for row in rows}
        copies = [
            {**row, "id": renamed[row["id"]], "parent": renamed.get(row["parent"]), "about": None} for row in rows
        ]
        for copy in copies:
            copy.pop("edited", None)  # its id says so
        at = next(row for row in copies if row["id"] == renamed[rows[-1]["id"] if head is None else head])
        now = self.clock()
        held = {"turns": at["turns"], "tokens": at["tokens"], "fingerprint": fingerprint}
        self._advance(connection, session, None, at["id"], held, len(at["state"]), now, branch=False)
        self._append(connection, session.id, copies)
        return self._by_id(connection, session.id)

    def _row(self, session: Session, turn: Turn, parent: str | None, now: float, held: dict[str, Any]) -> dict:
        user, reply = turn if session.keep_text else (None, None)
        return {
            "id": new_id("snap"),
            "parent": parent,
            "created_at": now,
            "turn_digest": turn_digest(session.salt, *turn),
            "user_digest": user_digest(session.salt, turn[0]),
            "user_text": user,
            "reply_text": reply,
            "turns": held["turns"],
            "tokens": held["tokens"],
            "state": None,
            "about": None,
        }

    def _find(self, connection: Connection, snapshot_id: str, owner: str) -> Row:
        query = turns_where(sessions.c.owner == owner, self._alive(), snapshots.c.id == snapshot_id)
        row = None if "\0" in snapshot_id else connection.execute(query).one_or_none()
        if row is None:
            raise SessionNotFound(f"there is no snapshot {snapshot_id!r}, or not any more")
        return row

    def _forget_turn(self, connection: Connection, row: Row) -> None:
        # Whoever is about to write after this turn knows it by an id that will be gone.
        change = update(sessions).where(sessions.c.id == row.session_id)
        connection.execute(change.values(version=sessions.c.version + 1))
        session, mine = self._by_id(connection, row.session_id), snapshots.c.session_id == row.session_id
        others = and_(mine, snapshots.c.about.is_not(None), snapshots.c.id != row.id)
        count = connection.execute(select(func.count()).select_from(snapshots).where(others)).scalar()
        if session.settings.get("only_responses") and not count:
            connection.execute(delete(sessions).where(sessions.c.id == session.id))
            return
        new = {"id": new_id("snap"), "about": None, "user_text": None, "reply_text": None}
        if session.head == row.id:
            connection.execute(change.values(head=new["id"]))
        else:
            new["state"] = None
        connection.execute(update(snapshots).where(snapshots.c.id == row.id).values(**new))
        # What `replace_state` made of it; a response with the same words has an `about`, and keeps its text.
        edited = and_(mine, snapshots.c.parent == row.parent, snapshots.c.turn_digest == row.turn_digest)
        edited = and_(edited, snapshots.c.about.is_(None))
        connection.execute(update(snapshots).where(edited).values(user_text=None, reply_text=None))
        if row.user_text is not None:
            later = select(snapshots.c.id, snapshots.c.state).where(mine, snapshots.c.number >= row.number)
            for later_id, state in connection.execute(later.where(snapshots.c.state.is_not(None))).all():
                if (kept := without_turns(state, row.user_text)) != state:
                    connection.execute(update(snapshots).where(snapshots.c.id == later_id).values(state=kept))
                    connection.execute(change.where(sessions.c.head == later_id).values(state_bytes=len(kept)))
        children = update(snapshots).where(mine, snapshots.c.parent == row.id)
        connection.execute(children.values(parent=new["id"]))

    def _settings(self, settings: dict[str, Any]) -> str:
        written = json.dumps(settings)
        if len(written) > MAX_SETTINGS_BYTES:
            raise LimitExceeded(f"settings of {len(written)} bytes: at most {MAX_SETTINGS_BYTES} are kept")
        return written

    def _written(self, about: dict[str, Any] | None) -> str | None:
        written = None if about is None else json.dumps(about)
        if written is not None and len(written) > self.limits.max_text_bytes:
            raise LimitExceeded(
                f"what is to be known of a response has {len(written)} bytes: at most {self.limits.max_text_bytes} are kept"
            )
        return written

    def _check_state(self, state: bytes) -> dict[str, Any]:
        """What the bytes say of themselves. Nothing that could not be read again is ever kept."""
        if len(state) > self.limits.max_state_bytes:
            raise LimitExceeded(f"the state has {len(state)} bytes: at most {self.limits.max_state_bytes} are kept")
        read = MemoryState.from_bytes(state)
        if read.batch_size != 1:
            raise ValueError(f"a session is one conversation, this state holds {read.batch_size}")
        held = {"turns": int(read.turns), "tokens": int(read.tokens)}
        if not all(0 <= count < 1 << 31 for count in held.values()):
            raise ValueError("the state counts more tokens or turns than anybody ever said: it is damaged")
        return {**held, "fingerprint": read.fingerprint}

    def _check_turn(self, turn: Turn) -> None:
        for text in turn:
            if text is None:
                continue
            check_strings(text, "the message")
            if (size := len(text.encode())) > self.limits.max_text_bytes:
                raise LimitExceeded(f"a message has {size} bytes: at most {self.limits.max_text_bytes} are kept")


def new_id(kind: str) -> str:
    """An id that cannot be guessed, such as snap_..., 37 characters or so."""
    return f"{kind}_{secrets.token_hex(16)}"


def _conflict(session: Session) -> SessionConflict:
    return SessionConflict(
        f"somebody else wrote to session {session.name!r} in the meantime: read it again and repeat the turn"
    )


def _no_state(snapshot_id: str) -> StateNotKept:
    return StateNotKept(
        f"no state is kept after {snapshot_id}, or not any more, so nothing can go on from there: go on from a later response, "
        "or from where the conversation is"
    )


def _of_a_copy(settings: dict[str, Any]) -> dict[str, Any]:
    """A session that was given a name stays, whatever becomes of its responses."""
    return {name: value for name, value in settings.items() if name != "only_responses"}


def _without_text(row: dict[str, Any]) -> dict[str, Any]:
    """A row with its digests alone."""
    state = None if row["state"] is None else without_turns(row["state"])
    return {**row, "user_text": None, "reply_text": None, "state": state}
