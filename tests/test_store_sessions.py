"""Sessions in the store, their turns and their snapshots, on SQLite and on a real PostgreSQL."""

import pytest

pytest.importorskip("sqlalchemy")
pytest.importorskip("alembic")

from stored import (
    TURNS,
    clock_of_the_store,  # noqa: F401 (a fixture)
    states_of_a_conversation,  # noqa: F401 (a fixture)
    store_on_either_database,  # noqa: F401 (a fixture)
    talk,
    url_of_a_new_store,  # noqa: F401 (a fixture)
)
from talking import talking_model, talking_tokenizer

from gru_memory import Conversation
from gru_memory.store import LimitExceeded, Limits, SessionConflict, SessionExists, SessionNotFound, SessionStore
from gru_memory.store.database import transaction
from gru_memory.store.digests import turn_digest, user_digest

# Sessions


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


# Turns and snapshots


def test_snapshots_never_change_and_can_be_branched_from(store, states):
    session, ids = talk(store, states)
    branch = store.commit(session, [("Other.", "Yes.")], states[2], ids[0])
    for number, snapshot_id in enumerate(ids, start=1):
        assert store.snapshot(snapshot_id).state == states[number]
    assert store.get("boat").head == branch.id
    assert [turn.user for turn in store.transcript(branch.session)] == [TURNS[0][0], "Other."]
    assert len(store.turns(session)) == 4


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


# Names


@pytest.mark.parametrize(
    "name",
    [
        "",
        " ",
        "x" * 201,
        "a\nb",
        "nul\0",
        None,
        "\ud800",
        "a\u202eb",
        "a\ufeffb",
        "\u200da",
        "a\u200c",
        "\u200d",
        " \u200d ",
    ],
)
def test_what_cannot_be_a_name(store, name):
    with pytest.raises(ValueError, match="printable"):
        store.create(name)


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "Ü ✓", "'; DROP TABLE sessions; --", "x" * 200, "👩\u200d🚀", "می\u200cخواهم"]
)
def test_names_are_only_names(store, name):
    assert store.create(name) == store.get(name)


def test_names_that_cannot_be_are_not_found(store):
    for name in ("nul\0", "x" * 10_000):
        with pytest.raises(SessionNotFound):
            store.get(name)


def test_ids_that_cannot_be_are_not_found(store):
    for find in (store.snapshot, store.find_turn, store.forget_turn):
        with pytest.raises(SessionNotFound):
            find("nul\0")
