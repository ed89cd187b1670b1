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

from gru_memory.store import LimitExceeded, Limits, SessionConflict, SessionNotFound, SessionStore, StateNotKept
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


def test_many_sessions_are_removed_some_at_a_time(url, clock, monkeypatch):
    """So that other writers get in between."""
    from sqlalchemy import event

    monkeypatch.setattr("gru_memory.store.sessions.PURGED_AT_ONCE", 2)
    with SessionStore(url, Limits(ttl_seconds=100), clock) as store:
        for number in range(5):
            store.create(f"short {number}")
        clock.now += 60
        store.create("long")
        clock.now += 60
        commits = []
        event.listen(store.engine, "commit", commits.append)
        assert store.purge_expired() == 5
        assert len(commits) == 3
        assert [kept.name for kept in store.list()] == ["long"]
        assert store.purge_expired() == 0


def test_old_snapshots_lose_their_states_and_then_go(url, states):
    with SessionStore(url, Limits(max_states=2, max_turns=4)) as store:
        session, ids = talk(store, states, turns=1)
        for number in range(4):
            ids.append(store.commit(store.get("boat"), [(f"turn {number}", None)], states[2], ids[-1]).id)
        turns = store.turns(session)
        assert [turn.id for turn in turns] == ids[1:]
        assert [turn.has_state for turn in turns] == [False, False, True, True]
        for call in (lambda: store.snapshot(ids[2]), lambda: store.fork(store.get("boat"), "copy", ids[2])):
            with pytest.raises(StateNotKept, match="not any more"):
                call()
        # The head stays, however old it is.
        session = store.get("boat")
        parent = ids[-2]
        for number in range(6):
            parent = store.commit(session, [(f"branch {number}", None)], states[2], parent, branch=True).id
        assert store.head(store.get("boat")).id == ids[-1]


def stated(store, session):
    """What the turns said that can be gone on from."""
    return [turn.user for turn in store.turns(session) if turn.has_state]


def go_on(store, states, parent, *texts):
    """Turns after `parent`, one after the other, as answers to `previous_response_id` are kept; the id of the last."""
    session = store.get("boat")
    for text in texts:
        parent = store.commit(session, [(text, None)], states[2], parent, branch=True).id
    return parent


def test_ends_of_branches_outlive_what_was_continued(url, states):
    with SessionStore(url, Limits(max_states=8)) as store:
        session, (root,) = talk(store, states, turns=1)
        go_on(store, states, root, "busy")
        quiet = [go_on(store, states, root, f"before {n}", f"quiet {n}") for n in range(3)]
        busy = go_on(store, states, root, *(f"turn {n}" for n in range(30)))
        ends = ["busy", "quiet 0", "quiet 1", "quiet 2"]
        assert stated(store, session) == [*ends, "turn 26", "turn 27", "turn 28", "turn 29"]
        assert [store.snapshot(id).id for id in (*quiet, busy)] == [*quiet, busy]
        # Gone on from, it is no end any more, and goes when its turn comes.
        go_on(store, states, quiet[0], "again")
        go_on(store, states, busy, *(f"turn {n}" for n in range(30, 34)))
        assert stated(store, session) == ["busy", *ends[2:], "again", *(f"turn {n}" for n in range(30, 34))]


def test_of_more_ends_than_states_the_oldest_goes_but_never_the_head_nor_the_newest(url, states):
    with SessionStore(url, Limits(max_states=8)) as store:
        session, (root,) = talk(store, states, turns=1)
        go_on(store, states, root, "head")
        for number in range(12):
            go_on(store, states, root, f"end {number}")
        assert stated(store, session) == ["head", *(f"end {n}" for n in range(5, 12))]
        # A client that has not got the last answer asks again.
        last = go_on(store, states, store.turns(session)[-1].id, "asked")
        assert go_on(store, states, store.find_turn(last).parent, "asked") != last
        assert stated(store, session) == ["head", *(f"end {n}" for n in range(6, 11)), "asked", "asked"]


def test_two_states_are_kept_where_one_is_not_enough(url, states):
    """The head's, and that of a response that was just given in another branch."""
    with SessionStore(url, Limits(max_states=1)) as store:
        session, (root,) = talk(store, states, turns=1)
        go_on(store, states, root, "head")
        assert stated(store, session) == ["head"]
        other = go_on(store, states, root, "other")
        assert stated(store, session) == ["head", "other"]
        go_on(store, states, other, "next")
        assert stated(store, session) == ["head", "next"]
        session = store.get("boat")
        store.commit(session, [("last", None)], states[2], session.head)
        assert stated(store, session) == ["last"]


def test_states_that_were_edited_again_are_no_ends_of_branches(url, states):
    with SessionStore(url, Limits(max_states=8)) as store:
        session, (root,) = talk(store, states, turns=1)
        go_on(store, states, root, "edited")
        quiet = go_on(store, states, root, "quiet")
        for _ in range(30):
            store.replace_state(store.get("boat"), states[3])
        assert store.snapshot(quiet).state == states[2]
        assert stated(store, session) == ["quiet", *["edited"] * 7]
        # Which of two equal answers was edited is not known: both stay.
        go_on(store, states, quiet, "same")
        twins = [store.commit(store.get("boat"), [("same", None)], states[2], quiet).id for _ in range(2)]
        for _ in range(30):
            store.replace_state(store.get("boat"), states[3])
        assert [store.snapshot(id).id for id in twins] == twins


def test_what_only_deleted_responses_followed_is_the_end_of_its_branch_again(url, states):
    with SessionStore(url, Limits(max_states=8)) as store:
        session, (root,) = talk(store, states, turns=1)
        go_on(store, states, root, "busy")
        end = go_on(store, states, root, "end")
        deleted = store.commit(store.get("boat"), [("deleted", None)], states[2], end, branch=True, about={"n": 1}).id
        store.forget_turn(deleted)
        read = store.commit(store.get("boat"), [("a", None), ("b", None)], states[2], root, branch=True).id
        go_on(store, states, root, *(f"turn {n}" for n in range(30)))
        assert store.snapshot(end).id == end
        assert store.snapshot(read).id == read  # after a turn that has no state of its own
        assert len(stated(store, session)) == 8


def test_ends_of_branches_outlive_turns_that_are_too_many(url, states):
    with SessionStore(url, Limits(max_states=4, max_turns=6)) as store:
        session, (root,) = talk(store, states, turns=1)
        go_on(store, states, root, "busy")
        quiet = go_on(store, states, root, "before", "quiet")
        deleted = store.commit(store.get("boat"), [("deleted", None)], states[2], quiet, branch=True, about={"n": 1}).id
        store.forget_turn(deleted)
        for number in range(10):
            root = go_on(store, states, root, f"turn {number}")
            copy = store.import_file(store.export(store.get("boat")), name=f"copy {number}")
            assert [turn.user for turn in store.turns(copy)] == [turn.user for turn in store.turns(session)]
            assert stated(store, copy) == stated(store, session)
        assert [turn.user for turn in store.turns(session)] == ["busy", "quiet", *(f"turn {n}" for n in range(4, 10))]
        assert stated(store, session) == ["busy", "quiet", "turn 8", "turn 9"]
        go_on(store, states, quiet, "again")
        assert "quiet" not in [turn.user for turn in store.turns(session)]


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
