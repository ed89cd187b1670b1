"""What the store forgets: what is deleted, what is too old, and what is more than may be kept."""

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

from gru_memory.store import LimitExceeded, Limits, SessionConflict, SessionNotFound, SessionStore
from gru_memory.store.database import transaction

# Deleted


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


# Too old, too many, too large


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
    for wrong in (
        {"max_states": 0},
        {"ttl_seconds": -1},
        {"max_turns": None},
        {"ttl_seconds": float("nan")},
        {"ttl_seconds": float("inf")},
        {"max_sessions": float("nan")},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Limits(**wrong)
