"""The session store, on SQLite and on a real PostgreSQL."""

import contextlib
import json
import sqlite3
import stat
import threading
from pathlib import Path

import pytest

pytest.importorskip("sqlalchemy")
pytest.importorskip("alembic")

import torch
from safetensors.torch import load, save
from talking import talking_model, talking_tokenizer

from gru_memory import Conversation, MemoryState
from gru_memory.store import (
    LimitExceeded,
    Limits,
    SessionConflict,
    SessionExists,
    SessionNotFound,
    SessionStore,
    StoreError,
    StoreUnavailable,
    database,
    default_url,
)
from gru_memory.store.database import connect, transaction
from gru_memory.store.digests import turn_digest, user_digest

TURNS = [("My boat is called Marigold.", "Lovely."), ("I live in Porto.", None), ("Where do I live?", "In Porto.")]


class Clock:
    now = 1_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def states():
    """The bytes of one conversation, from before the first turn to after the last."""
    conversation = Conversation(talking_model("llama"), talking_tokenizer("llama"))
    found = [conversation.to_bytes()]
    for turn in TURNS:
        conversation.read(*turn)
        found.append(conversation.to_bytes())
    return found


@pytest.fixture(params=["sqlite", "postgres"])
def url(request, tmp_path):
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'folder' / 'sessions.sqlite3'}"
    return request.getfixturevalue("postgres").empty()


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def store(url, clock):
    with SessionStore(url, clock=clock) as store:
        yield store


def talk(store, states, name="boat", turns=3, **settings):
    """A session with the first turns taken in, one snapshot each; returns it and the ids."""
    session = store.get_or_create(name, **settings)
    ids = []
    for number in range(turns):
        parent = ids[-1] if ids else session.head
        snapshot = store.commit(session, [TURNS[number]], states[number + 1], parent)
        session, ids = snapshot.session, [*ids, snapshot.id]
    return session, ids


def test_a_session_goes_on_after_a_restart(url, states):
    with SessionStore(url) as store:
        session, ids = talk(store, states, settings={"system": "Be kind."})
    with SessionStore(url) as store:
        again = store.get("boat")
        assert again == session
        assert (again.turns, again.head, again.version) == (3, ids[-1], 3)
        assert again.settings == {"system": "Be kind."}
        head = store.head(again)
        assert (head.state, head.parent, head.session) == (states[3], ids[1], again)
        conversation = Conversation(talking_model("llama"), talking_tokenizer("llama"))
        conversation.load(head.state)
        assert conversation.turns == 3
        assert again.fingerprint == conversation.model.memory_fingerprint()
        assert again.tokens == conversation.state.tokens.item()
        assert [(turn.user, turn.reply) for turn in store.transcript(again)] == TURNS


def test_a_new_session_is_empty(store):
    session = store.create("new")
    assert (session.head, session.turns, session.version) == (None, 0, 0)
    assert store.head(session) is None
    assert store.transcript(session) == store.turns(session) == []
    with pytest.raises(SessionExists, match="'new' already"):
        store.create("new")


def test_a_session_that_is_begun_is_made_with_its_first_turn(url, states):
    with SessionStore(url, Limits(max_sessions=1)) as store:
        first, second = (store.get_or_begin("new", settings={"a": 1}) for _ in range(2))
        assert (first.id, first.head, store.list()) == ("", None, [])
        with pytest.raises(ValueError, match="the message"):
            store.commit(first, [("nul\0", None)], states[1], None)
        assert store.list() == []
        made = store.commit(first, [TURNS[0]], states[1], None).session
        assert [made] == store.list() == [store.get_or_begin("new")]
        assert (made.turns, made.settings) == (1, {"a": 1})
        assert store.turns(made)[0].turn_digest == turn_digest(made.salt, *TURNS[0])
        with pytest.raises(LimitExceeded):
            store.get_or_begin("other")
    with SessionStore(url) as store:
        with pytest.raises(SessionConflict):
            store.commit(second, [TURNS[1]], states[2], None)
        assert store.list() == [made]


def test_snapshots_never_change_and_can_be_branched_from(store, states):
    session, ids = talk(store, states)
    branch = store.commit(session, [("Other.", "Yes.")], states[2], ids[0])
    for number, snapshot_id in enumerate(ids, start=1):
        assert store.snapshot(snapshot_id).state == states[number]
    assert store.get("boat").head == branch.id
    assert [turn.user for turn in store.transcript(branch.session)] == [TURNS[0][0], "Other."]
    assert len(store.turns(session)) == 4


def test_of_two_writers_one_wins_and_the_other_is_told(store, states):
    session, ids = talk(store, states, turns=1)
    first, second = store.get("boat"), store.get("boat")
    won = store.commit(first, [TURNS[1]], states[2], ids[0])
    with pytest.raises(SessionConflict, match="'boat' in the meantime"):
        store.commit(second, [("Other.", None)], states[3], ids[0])
    assert store.get("boat") == won.session
    assert len(store.turns(session)) == 2


def test_branches_from_snapshots_do_not_conflict_and_the_head_follows_the_first(store, states):
    session, ids = talk(store, states, turns=1)
    first = store.commit(session, [TURNS[1]], states[2], ids[0], branch=True)
    second = store.commit(session, [("Other.", None)], states[3], ids[0], branch=True)
    after = store.get("boat")
    assert (after.head, after.turns) == (first.id, 2)
    assert second.session == after
    assert store.snapshot(second.id).state == states[3]


def test_many_threads_count_every_turn_once(url, states):
    with SessionStore(url) as store:
        store.create("busy")
        won = []

        def write(worker: int) -> None:
            done = 0
            while done < 5:
                session = store.get("busy")
                try:
                    store.commit(session, [(f"{worker}/{done}", None)], states[1], session.head)
                except SessionConflict:
                    continue
                done += 1
                won.append((worker, done))

        threads = [threading.Thread(target=write, args=(worker,)) for worker in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 20
        texts = [turn.user for turn in store.transcript(store.get("busy"))]
        assert sorted(texts) == sorted(f"{worker}/{done}" for worker in range(4) for done in range(5))


def test_sessions_made_at_once_are_no_more_than_allowed(url):
    with SessionStore(url, Limits(max_sessions=3)) as store:
        together, made = threading.Barrier(8), []

        def make(number: int) -> None:
            together.wait()
            with contextlib.suppress(LimitExceeded):
                made.append(store.create(f"session {number}"))

        threads = [threading.Thread(target=make, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(made) == len(store.list()) == 3


def test_all_who_open_a_new_store_at_once_get_it(url):
    """Migrations run once: each thread has connections of its own, as another process would."""
    failed = []

    def open_and_create(name: str) -> None:
        try:
            with SessionStore(url) as store:
                store.create(name)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=open_and_create, args=(f"worker {n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    with SessionStore(url) as store:
        assert len(store.list()) == 4


def test_delete_removes_exactly_one(store, states):
    talk(store, states, "first")
    second, _ = talk(store, states, "second")
    other, _ = talk(store, states, "first", owner="other")
    store.delete("first")
    with pytest.raises(SessionNotFound, match="'first'"):
        store.get("first")
    assert store.get("second") == second
    assert store.get("first", owner="other") == other
    assert len(store.turns(second)) == len(store.turns(other)) == 3
    with transaction(store.engine) as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM snapshots").scalar() == 6
    with pytest.raises(SessionNotFound):
        store.delete("first")


@pytest.mark.parametrize("how", ["delete", "forget_turn", "purge_expired"])
def test_what_was_deleted_is_in_no_file_any_more(tmp_path, states, clock, how):
    """Neither in freed pages nor in SQLite's log, while the store stays open."""
    with SessionStore(str(tmp_path / "s"), Limits(ttl_seconds=100), clock) as store:
        _, ids = talk(store, states)

        def files():
            return b"".join(path.read_bytes() for path in tmp_path.iterdir())

        assert b"Marigold" in files()
        if how == "delete":
            store.delete("boat")
        elif how == "forget_turn":
            store.forget_turn(ids[0])
        else:
            clock.now += 200
            assert store.purge_expired() == 1
        assert b"Marigold" not in files()
        assert (b"Porto" in files()) == (how == "forget_turn")
        talk(store, states, "next")


def test_a_reader_in_the_way_holds_up_no_deletion(tmp_path, states):
    with SessionStore(str(tmp_path / "s")) as store, SessionStore(str(tmp_path / "s")) as other:
        talk(store, states)
        with transaction(other.engine, read_only=True) as connection:
            assert connection.exec_driver_sql("SELECT count(*) FROM sessions").scalar() == 1
            store.delete("boat")
        with pytest.raises(SessionNotFound):
            other.get("boat")
        store.purge_expired()  # the next try
        assert not any(b"Marigold" in path.read_bytes() for path in tmp_path.iterdir())


def test_owners_do_not_see_each_other(store, states):
    session, ids = talk(store, states, owner="ada")
    for call in (
        lambda: store.get("boat", owner="bob"),
        lambda: store.delete("boat", owner="bob"),
        lambda: store.snapshot(ids[0], owner="bob"),
    ):
        with pytest.raises(SessionNotFound):
            call()
    assert store.list("bob") == []
    assert store.list("ada") == [session]


def test_lists_the_last_used_first(store, states, clock):
    for name in ("one", "two", "three"):
        store.create(name)
        clock.now += 1
    talk(store, states, "one")
    assert [session.name for session in store.list()] == ["one", "three", "two"]
    assert [session.name for session in store.list(limit=1, offset=1)] == ["three"]


def test_sessions_live_as_long_after_their_last_turn_as_they_may(url, states, clock):
    with SessionStore(url, Limits(ttl_seconds=100), clock) as store:
        session, ids = talk(store, states, turns=1)
        store.create("idle")
        clock.now += 60
        store.commit(session, [TURNS[1]], states[2], ids[0])
        clock.now += 60
        assert [kept.name for kept in store.list()] == ["boat"]
        clock.now += 60
        for call in (lambda: store.get("boat"), lambda: store.snapshot(ids[0])):
            with pytest.raises(SessionNotFound):
                call()
        with pytest.raises(SessionNotFound):
            store.commit(session, [TURNS[1]], states[2], ids[0])
        assert store.create("idle").turns == 0  # in the place of the one whose time is over
        assert store.purge_expired() == 1
        assert [kept.name for kept in store.list()] == ["idle"]


def test_old_snapshots_lose_their_states_and_then_go(url, states):
    with SessionStore(url, Limits(max_states=2, max_turns=4)) as store:
        session, ids = talk(store, states, turns=1)
        for number in range(4):
            ids.append(store.commit(store.get("boat"), [(f"turn {number}", None)], states[2], ids[-1]).id)
        turns = store.turns(session)
        assert [turn.id for turn in turns] == ids[1:]
        assert [turn.has_state for turn in turns] == [False, False, True, True]
        with pytest.raises(SessionNotFound, match="not any more"):
            store.snapshot(ids[2])
        # The head stays, however old it is.
        session = store.get("boat")
        parent = ids[-2]
        for number in range(6):
            parent = store.commit(session, [(f"branch {number}", None)], states[2], parent, branch=True).id
        assert store.head(store.get("boat")).id == ids[-1]


def test_bounds(url, states):
    limits = Limits(max_state_bytes=len(states[1]), max_text_bytes=10, max_sessions=1)
    with SessionStore(url, limits) as store:
        session = store.create("one")
        with pytest.raises(LimitExceeded, match="1 sessions"):
            store.create("two")
        store.create("two", owner="other")
        with pytest.raises(LimitExceeded, match="at most 10 are kept"):
            store.commit(session, [("12345678901", None)], states[1], None)
        with pytest.raises(LimitExceeded, match="the state has"):
            store.commit(session, [("short", None)], states[1] + b"x", None)
        with pytest.raises(LimitExceeded, match="settings"):
            store.create("three", owner="third", settings={"system": "x" * 100_000})
        assert store.get("one") == session
    for wrong in ({"max_states": 0}, {"ttl_seconds": -1}, {"max_turns": None}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Limits(**wrong)


@pytest.mark.parametrize("name", ["", " ", "x" * 201, "a\nb", "nul\0", None])
def test_what_cannot_be_a_name(store, name):
    with pytest.raises(ValueError, match="printable"):
        store.create(name)


@pytest.mark.parametrize("name", ["../../etc/passwd", "Ü ✓", "'; DROP TABLE sessions; --", "x" * 200])
def test_names_are_only_names(store, name):
    assert store.create(name) == store.get(name)


def test_names_that_cannot_be_are_not_found(store):
    for name in ("nul\0", "x" * 10_000):
        with pytest.raises(SessionNotFound):
            store.get(name)


def test_only_what_can_be_read_again_is_kept(store, states):
    session = store.create("boat")
    model = talking_model("llama")
    for bad, message in (
        (states[1][:-1], "damaged"),
        (b"", "damaged"),
        (model.initial_memory_state(2).to_bytes(), "holds 2"),
    ):
        with pytest.raises(ValueError, match=message):
            store.commit(session, [TURNS[0]], bad, None)
    for text in ("nul\0", "\ud800"):
        with pytest.raises(ValueError, match="the message"):
            store.commit(session, [(text, None)], states[1], None)
    with pytest.raises(ValueError, match="at least one turn"):
        store.commit(session, [], states[1], None)
    assert store.get("boat") == session


def test_without_text_only_digests_are_kept(store, states):
    session, _ = talk(store, states, keep_text=False)
    turns = store.turns(session)
    assert [(turn.user, turn.reply) for turn in turns] == [(None, None)] * 3
    assert [turn.turn_digest for turn in turns] == [turn_digest(session.salt, *turn) for turn in TURNS]
    assert turns[0].user_digest == user_digest(session.salt, f" {TURNS[0][0]}\n")
    with transaction(store.engine) as connection:
        dump = repr(connection.exec_driver_sql("SELECT * FROM snapshots").all())
    assert "Marigold" not in dump
    assert turn_digest(session.salt, "a", None) != turn_digest(session.salt, "a", "")
    assert turn_digest(session.salt, "a", "b") != turn_digest(store.create("other").salt, "a", "b")


def test_several_turns_at_once_are_one_snapshot(store, states):
    session = store.create("boat")
    snapshot = store.commit(session, TURNS, states[3], None, snapshot_id="resp_1")
    turns = store.transcript(snapshot.session)
    assert [turn.user for turn in turns] == [user for user, _ in TURNS]
    assert [turn.has_state for turn in turns] == [False, False, True]
    assert snapshot.id == turns[-1].id == "resp_1"


def test_an_edited_state_takes_the_place_of_the_head(store, states):
    session, ids = talk(store, states)
    edited = store.replace_state(session, states[1])
    assert store.head(edited).state == states[1]
    assert store.snapshot(ids[-1]).state == states[3]
    assert [turn.user for turn in store.transcript(edited)] == [user for user, _ in TURNS]
    with pytest.raises(SessionConflict):
        store.replace_state(session, states[1])
    with pytest.raises(SessionNotFound, match="nothing to edit"):
        store.replace_state(store.create("new"), states[1])


def test_a_turn_that_is_forgotten_leaves_no_text_in_edited_states(store, states):
    session = store.create("boat")
    first = store.commit(session, [TURNS[0]], states[1], None, "resp_1", about={"n": 1})
    again = store.commit(first.session, [TURNS[0]], states[1], None, "resp_2", about={"n": 2})
    edited = store.replace_state(store.replace_state(again.session, states[2]), states[3])
    store.forget_turn("resp_2")
    assert [turn.user for turn in store.transcript(edited)] == [None]
    assert store.find_turn("resp_1").user == TURNS[0][0]


def test_no_turn_follows_one_that_is_gone(store, states):
    session, ids = talk(store, states, turns=2)
    store.forget_turn(ids[-1])
    with pytest.raises(SessionConflict):
        store.commit(session, [TURNS[2]], states[3], ids[-1], branch=True)
    assert len(store.turns(session)) == 2


def test_what_was_given_a_name_outlives_its_responses(store, states):
    session = store.create("resp_1", settings={"only_responses": True, "metadata": {"a": "b"}})
    session = store.commit(session, [TURNS[0]], states[1], None, "resp_1", about={"n": 1}).session
    copies = [store.fork(session, "mine"), store.import_file(store.export(session), name="imported")]
    for copy in copies:
        assert copy.settings == {"metadata": {"a": "b"}}
        answer = store.commit(copy, [TURNS[1]], states[2], copy.head, about={"n": 2})
        store.forget_turn(answer.id)
        assert store.get(copy.name).turns == 2


@pytest.mark.parametrize("at", [None, 0])
def test_a_fork_shares_nothing(store, states, at):
    session, ids = talk(store, states)
    fork = store.fork(session, "fork", at=None if at is None else ids[at])
    length = 3 if at is None else 1
    assert store.head(fork).state == states[length]
    assert (fork.turns, fork.fingerprint) == (length, session.fingerprint)
    assert [turn.user for turn in store.transcript(fork)] == [user for user, _ in TURNS[:length]]
    assert not {turn.id for turn in store.turns(fork)} & set(ids)
    store.delete("boat")
    assert store.head(fork).state == states[length]
    store.commit(fork, [("More.", None)], states[2], fork.head)


def test_forks_that_cannot_be(store, states):
    session, _ = talk(store, states)
    with pytest.raises(SessionExists):
        store.fork(session, "boat")
    with pytest.raises(SessionNotFound):
        store.fork(session, "fork", at="snap_elsewhere")
    assert [kept.name for kept in store.list()] == ["boat"]
    assert store.fork(store.create("empty"), "empty too").head is None


@pytest.mark.parametrize("keep_text", [True, False])
def test_export_and_import_carry_the_whole_tree(store, states, keep_text):
    session, ids = talk(store, states, keep_text=keep_text, settings={"system": None})
    store.commit(session, [("Other.", "Yes.")], states[2], ids[0], branch=True)
    data = store.export(session)
    with pytest.raises(SessionExists):
        store.import_file(data)
    copy = store.import_file(data, owner="ada", name="copy")
    assert (copy.name, copy.owner, copy.settings) == ("copy", "ada", {"system": None})
    assert copy.keep_text is keep_text
    assert (copy.turns, copy.tokens, copy.fingerprint) == (session.turns, session.tokens, session.fingerprint)
    assert store.head(copy).state == states[3]
    before, after = store.turns(session), store.turns(copy)
    assert [(t.user, t.reply, t.turn_digest) for t in before] == [(t.user, t.reply, t.turn_digest) for t in after]
    assert {t.id for t in before}.isdisjoint(t.id for t in after)
    assert len(store.transcript(copy)) == 3
    assert (b"Marigold" in data) is keep_text
    empty = store.import_file(store.export(store.create("empty")), name="empty too")
    assert empty.head is None


def _changed(data: bytes, change) -> bytes:
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    about, tensors = json.loads(header["session"]), load(data)
    change(header, about, tensors)
    return save(tensors, {**header, "session": header.get("raw") or json.dumps(about)})


def _counts_too_much(header, about, tensors):
    state = bytes(tensors["state/0"].numpy())
    fields, content = MemoryState.read_metadata(state), load(state)
    changed = save({**content, "tokens": torch.tensor([1 << 40])}, fields)
    tensors["state/0"] = torch.frombuffer(bytearray(changed), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, a, t: h.update(kind="else"), "no session"),
        (lambda h, a, t: h.update(version="2"), "newer version"),
        (lambda h, a, t: h.update(raw="[" * 100_000), "damaged"),
        (lambda h, a, t: h.update(raw="[]"), "damaged"),
        (lambda h, a, t: a.pop("salt"), "damaged"),
        (lambda h, a, t: a.update(salt="zz"), "damaged"),
        (lambda h, a, t: a.update(head=7), "damaged"),
        (lambda h, a, t: a.update(head=None), "missing"),
        (lambda h, a, t: a.update(name=3), "damaged"),
        (lambda h, a, t: a.update(name="a\nb"), "printable"),
        (lambda h, a, t: a.update(settings=[]), "damaged"),
        (lambda h, a, t: a.update(fingerprint="other"), "not of one memory"),
        (lambda h, a, t: a["rows"][0].update(parent=1), "damaged"),
        (lambda h, a, t: a["rows"][0].update(user=3), "damaged"),
        (lambda h, a, t: a["rows"][0].update(user="nul\0"), "damaged"),
        (lambda h, a, t: a["rows"][0].update(turns=-1), "damaged"),
        (lambda h, a, t: a["rows"][0].update(created_at="now"), "damaged"),
        *(
            (lambda h, a, t, when=when: a["rows"][0].update(created_at=when), "a time is out of range")
            for when in (float("nan"), float("inf"), -1.0, 1e300)
        ),
        (_counts_too_much, "more tokens or turns"),
        (lambda h, a, t: t.pop("state/2"), "missing"),
        (lambda h, a, t: t.update({"state/9": t["state/0"].clone()}), "not a state of it"),
        (lambda h, a, t: t.update({"state/0": t["state/0"].float()}), "not a state of it"),
        (lambda h, a, t: t.update({"state/0": t["state/0"][:-1].clone()}), "damaged"),
        (lambda h, a, t: t.update({"state/0": torch.zeros(5_000_000, dtype=torch.uint8)}), "at most"),
    ],
)
def test_a_file_that_is_no_session_is_refused(tmp_path, states, change, message):
    with SessionStore(str(tmp_path / "sessions.sqlite3")) as store:
        session, _ = talk(store, states)
        data = store.export(session)
        with pytest.raises((ValueError, LimitExceeded), match=message):
            store.import_file(_changed(data, change), owner="ada")
        for cut in (0, 7, 100, len(data) - 1):
            with pytest.raises(ValueError, match="damaged"):
                store.import_file(data[:cut], owner="ada")
        assert store.list("ada") == []


def test_migrations_make_the_tables_that_the_code_expects(store):
    from alembic.autogenerate import compare_metadata
    from alembic.runtime.migration import MigrationContext

    from gru_memory.store.schema import metadata

    with store.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []


def test_a_store_of_the_first_version_goes_on(url, states):
    """What was kept before there was anything to know about snapshots."""
    from alembic import command
    from alembic.config import Config

    with SessionStore(url) as store:
        _, ids = talk(store, states)
        config = Config()
        config.set_main_option("script_location", str(Path(database.__file__).parent / "migrations"))
        with transaction(store.engine) as connection:
            config.attributes["connection"] = connection
            command.downgrade(config, "0001")
    with SessionStore(url) as store:
        assert store.head(store.get("boat")).state == states[3]
        assert store.find_turn(ids[0]).about is None
        store.commit(store.get("boat"), [TURNS[0]], states[1], ids[-1], about={"n": 1})
        assert store.find_turn(store.get("boat").head).about == {"n": 1}


def test_ids_that_cannot_be_are_not_found(store):
    for find in (store.snapshot, store.find_turn, store.forget_turn):
        with pytest.raises(SessionNotFound):
            find("nul\0")


def test_a_store_of_a_newer_version_is_left_alone(url, store):
    with transaction(store.engine) as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(StoreError, match="newer version"):
        SessionStore(url)


def test_the_file_is_for_its_owner_alone_and_durable(tmp_path):
    path = tmp_path / "folder" / "sessions.sqlite3"
    with SessionStore(str(path)) as store, store.engine.connect() as connection:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2  # every commit reaches the disk
        assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"


def test_a_locked_or_broken_file_is_one_clear_error(tmp_path, states, monkeypatch):
    monkeypatch.setattr("gru_memory.store.database.SQLITE_WAIT_SECONDS", 0.1)
    path = tmp_path / "sessions.sqlite3"
    with SessionStore(str(path)) as store:
        session, ids = talk(store, states, turns=1)
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreUnavailable, match="database is locked"):
            store.commit(session, [TURNS[1]], states[2], ids[0])
        assert store.get("boat") == session  # reading goes on
        other.execute("ROLLBACK")
        other.close()
        store.commit(session, [TURNS[1]], states[2], ids[0])
    (tmp_path / "junk").write_bytes(b"no database at all" * 100)
    with pytest.raises(StoreUnavailable, match="not a database"):
        SessionStore(str(tmp_path / "junk"))
    with pytest.raises(StoreUnavailable, match="cannot be made"):
        SessionStore(str(path / "below a file" / "sessions"))


def test_a_postgres_that_restarts_is_found_again(postgres, states):
    with SessionStore(postgres.empty()) as store:
        session, ids = talk(store, states, turns=1)
        postgres.stop()
        with pytest.raises(StoreUnavailable, match="cannot be used"):
            store.get("boat")
        postgres.start()
        assert store.get("boat") == session
        store.commit(session, [TURNS[1]], states[2], ids[0])


def test_where_a_store_is(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.delenv("GRU_MEMORY_STORE", raising=False)
    assert default_url().endswith("gru-memory/sessions.sqlite3")
    monkeypatch.setenv("GRU_MEMORY_STORE", f"sqlite:///{tmp_path}/own")
    assert default_url() == f"sqlite:///{tmp_path}/own"
    SessionStore().close()
    assert (tmp_path / "own").exists()
    for wrong in ("mysql://host/db", "no such://thing", "sqlite://", "postgres:///x"):
        with pytest.raises(ValueError, match="this is no store|is a file") as refused:
            connect(wrong)
        assert "host" not in str(refused.value)
