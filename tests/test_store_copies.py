"""Forks of a session, and sessions as files."""

import json
import os

import pytest

pytest.importorskip("sqlalchemy")
pytest.importorskip("alembic")

import torch
from safetensors.torch import load, save
from stored import (
    TURNS,
    clock_of_the_store,  # noqa: F401 (a fixture)
    states_of_a_conversation,  # noqa: F401 (a fixture)
    store_on_either_database,  # noqa: F401 (a fixture)
    talk,
    url_of_a_new_store,  # noqa: F401 (a fixture)
)
from talking import talking_model, talking_tokenizer

from gru_memory import Conversation, MemoryState
from gru_memory.store import LimitExceeded, Limits, SessionExists, SessionNotFound, SessionStore
from gru_memory.store.digests import turn_digest

# Forks


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


# Files


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


def test_what_was_edited_by_hand_is_known_as_such_in_every_copy(store, states):
    session, _ = talk(store, states)
    edited = store.replace_state(session, states[1])
    copies = [edited, store.fork(edited, "fork"), store.import_file(store.export(edited), name="import")]
    assert [[turn.is_edit for turn in store.transcript(copy)] for copy in copies] == [[False, False, True]] * 3


@pytest.mark.parametrize("whose", ["the file", "the caller"])
def test_an_import_without_text_keeps_none(tmp_path, whose):
    """Neither in rows nor in states, of which attention would see the last turns again."""
    conversation = Conversation(talking_model("llama"), talking_tokenizer("llama"), context_turns=3)
    with SessionStore(str(tmp_path / "s")) as store:
        session = store.create("boat")
        for turn in TURNS:
            conversation.read(*turn)
            session = store.commit(session, [turn], conversation.to_bytes(), session.head).session
        data = store.export(session)
        if whose == "the file":
            data = _changed(data, lambda header, about, tensors: about.update(keep_text=False))
    with SessionStore(str(tmp_path / "other" / "s")) as store:
        copy = store.import_file(data, keep_text=whose == "the file")
        assert (copy.keep_text, copy.turns) == (False, 3)
        assert [turn.user for turn in store.transcript(copy)] == [None] * 3
        assert store.turns(copy)[0].turn_digest == turn_digest(copy.salt, *TURNS[0])
        conversation.load(store.head(copy).state)
        assert conversation.turns == 3
    kept = b"".join(path.read_bytes() for path in (tmp_path / "other").iterdir())
    assert b"Marigold" in data and b"Marigold" not in kept


def test_what_a_store_can_hold_can_be_imported(tmp_path, states):
    """The head survives newer branches, however many: there is one turn more than is kept otherwise."""
    with SessionStore(str(tmp_path / "s"), Limits(max_turns=3)) as store:
        session, ids = talk(store, states, turns=2)
        parent = ids[0]
        for number in range(4):
            parent = store.commit(session, [(f"branch {number}", None)], states[2], parent, branch=True).id
        session = store.get("boat")
        assert (session.head, len(store.turns(session))) == (ids[1], 4)
        copy = store.import_file(store.export(session), name="copy")
        assert [turn.user for turn in store.turns(copy)] == [turn.user for turn in store.turns(session)]
        assert store.head(copy).state == states[2]
        assert store.transcript(copy)[-1].user == TURNS[1][0]
        more = _changed(store.export(session), lambda h, about, t: about["rows"].append(about["rows"][-1]))
        with pytest.raises(LimitExceeded, match="5 turns"):
            store.import_file(more, name="more")


def _header(data: bytes) -> dict:
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]


def _tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _changed(data: bytes, change) -> bytes:
    header, tensors = _header(data), load(data)
    about = json.loads(bytes(tensors.pop("session").numpy()))
    change(header, about, tensors)
    raw = header.pop("raw", None) or json.dumps(about)
    return save({"session": _tensor(raw.encode()), **tensors}, header)


def _in_format_1(data: bytes) -> bytes:
    """The same file as it was written when the JSON was in the header."""
    tensors = load(data)
    header = {**_header(data), "version": "1", "session": bytes(tensors.pop("session").numpy()).decode()}
    return save(tensors or {"state/none": torch.zeros(1, dtype=torch.uint8)}, header)


def test_files_of_format_1_can_be_read(store, states):
    session, _ = talk(store, states)
    copy = store.import_file(_in_format_1(store.export(session)), name="copy")
    assert store.head(copy).state == states[3]
    assert [(turn.user, turn.reply) for turn in store.transcript(copy)] == TURNS
    assert store.import_file(_in_format_1(store.export(store.create("empty"))), name="empty too").head is None


def test_a_session_with_more_text_than_a_header_can_hold(tmp_path, states):
    """The header of a safetensors file is 100 MB at most."""
    with SessionStore(str(tmp_path / "s"), Limits(max_text_bytes=60 << 20)) as store:
        session = store.create("long")
        for number in range(2):
            turn = (f"{number}" + "x" * (55 << 20), None)
            session = store.commit(session, [turn], states[1], session.head).session
        copy = store.import_file(store.export(session), name="copy")
        assert [len(turn.user) for turn in store.transcript(copy)] == [1 + (55 << 20)] * 2


def test_nothing_is_exported_that_could_not_be_imported(tmp_path, states, monkeypatch):
    monkeypatch.setattr("gru_memory.store.files.MAX_FILE_BYTES", 1_000)
    with SessionStore(str(tmp_path / "s")) as store:
        session, _ = talk(store, states)
        with pytest.raises(LimitExceeded, match="a file at most 1000"):
            store.export(session)


def _counts_too_much(header, about, tensors):
    state = bytes(tensors["state/0"].numpy())
    fields, content = MemoryState.read_metadata(state), load(state)
    changed = save({**content, "tokens": torch.tensor([1 << 40])}, fields)
    tensors["state/0"] = torch.frombuffer(bytearray(changed), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, a, t: h.update(kind="else"), "no session"),
        (lambda h, a, t: h.update(version="3"), "newer version"),
        (lambda h, a, t: h.update(raw="[" * 100_000), "damaged"),
        (lambda h, a, t: h.update(raw="[]"), "damaged"),
        (lambda h, a, t: h.update(version="1"), "damaged"),
        (lambda h, a, t: a.pop("salt"), "damaged"),
        (lambda h, a, t: a.update(salt="zz"), "damaged"),
        (lambda h, a, t: a.update(head=7), "damaged"),
        (lambda h, a, t: a.update(head=None), "missing"),
        (lambda h, a, t: a.update(name=3), "damaged"),
        (lambda h, a, t: a.update(name="a\nb"), "printable"),
        (lambda h, a, t: a.update(settings=[]), "damaged"),
        (lambda h, a, t: a["settings"].update(metadata="text"), "damaged.*a mapping of at most 16"),
        (lambda h, a, t: a["settings"].update(metadata={str(n): "" for n in range(17)}), "a mapping of at most 16"),
        (lambda h, a, t: a["settings"].update(metadata={"k" * 65: ""}), "keys of at most 64"),
        (lambda h, a, t: a["settings"].update(metadata={"k": "v" * 513}), "values of at most 512"),
        (lambda h, a, t: a["settings"].update(metadata={"k": 1}), "values of at most 512"),
        (lambda h, a, t: a["settings"].update(metadata={"k": "nul\0"}), "NUL"),
        (lambda h, a, t: a["settings"].update(deep=[{"nul\0": 1}]), "the settings holds a NUL"),
        (lambda h, a, t: a["settings"].update(deep=["\ud800"]), "no valid Unicode"),
        (lambda h, a, t: a.update(fingerprint="other"), "not of one memory"),
        (lambda h, a, t: a.update(fingerprint="nul\0"), "the fingerprint holds a NUL"),
        (lambda h, a, t: a.update(fingerprint="\ud800"), "the fingerprint is no valid Unicode"),
        (lambda h, a, t: a["rows"][0].update(reply="\ud800"), "damaged.*no valid Unicode"),
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


def test_a_pipe_is_not_read(tmp_path):
    """It would not say how much it holds."""
    os.mkfifo(tmp_path / "pipe")
    with SessionStore(str(tmp_path / "sessions.sqlite3")) as store:
        for path in (tmp_path / "pipe", "/dev/zero", tmp_path):
            with pytest.raises(ValueError, match="no regular file"):
                store.import_path(path)
