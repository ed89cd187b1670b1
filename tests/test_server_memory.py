"""The routes of memory: looking into a session, changing it, and taking it elsewhere."""

import re

import pytest

pytest.importorskip("openai")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

import openai
from clients import (
    ADA,
    BOAT,
    HOME,
    WHERE,
    assistant,
    chat,
    client_of_ada,  # noqa: F401 (a fixture)
    expected,
    in_session,
    model_and_tokenizer,  # noqa: F401 (a fixture)
    plain_http,  # noqa: F401 (a fixture)
    shared_server,  # noqa: F401 (a fixture)
    state_of,
    text_of,
    user,
)
from serving import KEYS, running
from talking import talking_model, talking_tokenizer
from tiny import assert_same_state

from gru_memory import Conversation
from gru_memory.editing import forget, kept_share
from gru_memory.evaluation.full_history import kv_bytes_per_token


def test_looking_into_a_session_and_changing_it(server, client, http, loaded):
    for text in (BOAT, HOME):
        chat(client, text, **in_session("look"))
    seen = http.get("/v1/memory/look", params={"top": 2}).json()
    assert (seen["id"], seen["turns"]) == ("look", 2)
    assert seen["slots"] and all(len(slot["words"]) == 2 for slot in seen["slots"])
    per_token = kv_bytes_per_token(loaded[0])
    assert seen["kv_cache_bytes"] == seen["tokens"] * per_token > seen["bytes"] > 0
    strengths = [slot["strength"] for slot in seen["slots"]]
    assert strengths == sorted(strengths, reverse=True)
    assert "look" in [session["id"] for session in http.get("/v1/memory").json()["data"]]
    turns = http.get("/v1/memory/look/transcript").json()["data"]
    assert [turn["user"] for turn in turns] == [BOAT, HOME]

    traced = http.get("/v1/memory/look/trace").json()
    assert "".join(traced["tokens"]).find(HOME) >= 0
    heads, slots = loaded[0].memory_config.num_heads, loaded[0].memory_config.num_slots
    assert traced["slots"] == [[head, slot] for head in range(heads) for slot in range(slots)]
    for name in ("write", "read"):
        assert {len(row) for row in traced[name]} == {heads * slots}
        assert len(traced[name]) == len(traced["tokens"]) == len(traced["strength"])
    assert sum(traced["read"][-1]) == pytest.approx(heads, abs=0.01)
    few = http.get("/v1/memory/look/trace", params={"slots": 2}).json()
    shown = [traced["slots"].index(slot) for slot in few["slots"]]
    assert 2 <= len(shown) <= 4
    assert few["read"] == [[row[slot] for slot in shown] for row in traced["read"]]
    for name in ("write", "read"):
        assert max(map(max, few[name])) == max(map(max, traced[name]))
    asked = http.post("/v1/memory/look/trace", json={"text": WHERE}).json()
    assert WHERE in "".join(asked["tokens"])

    before = state_of(server, "look")
    fork = http.post("/v1/memory/look/fork", json={"name": "look here", "at": turns[0]["id"]}).json()
    assert (fork["id"], fork["turns"]) == ("look here", 1)
    assert http.post("/v1/memory/look/fork", json={"name": "look here"}).status_code == 409

    assert http.post("/v1/memory/look/forget", json={"text": HOME}).status_code == 200
    after = state_of(server, "look")
    assert (after.sites["top"]["slots"] - before.sites["top"]["slots"]).abs().max() > 1e-3
    top = http.get("/v1/memory/look").json()["slots"][0]
    http.post("/v1/memory/look/forget", json={"head": top["head"], "slot": top["slot"]})
    left = [(slot["head"], slot["slot"]) for slot in http.get("/v1/memory/look").json()["slots"]]
    assert (top["head"], top["slot"]) not in left
    for wrong in (
        {},
        {"head": 0},
        {"text": " "},
        {"text": "never said"},
        {"reply": "a"},
        {"head": 0, "slot": 0, "reply": "a"},
        {"text": "a", "head": 0, "slot": 0},
        {"head": 99, "slot": 0},
    ):
        assert http.post("/v1/memory/look/forget", json=wrong).status_code == 400

    before = state_of(server, "look")
    assert http.post("/v1/memory/look/decay", json={"ticks": 3}).status_code == 200
    assert_same_state(state_of(server, "look"), before.decay(3))
    assert http.post("/v1/memory/look/decay", json={"ticks": -1}).status_code == 400

    assert http.post("/v1/memory/look/remember", json={"text": "I play the oboe."}).json()["turns"] == 3
    assert http.post("/v1/memory/told/remember", json={"text": HOME}).json()["turns"] == 1
    assert_same_state(state_of(server, "told"), expected(loaded, (HOME, None))[1].state)

    file = http.get("/v1/memory/look/export").content
    assert http.post("/v1/memory/import", params={"name": "copy"}, content=file).json()["turns"] == 3
    assert_same_state(state_of(server, "copy"), state_of(server, "look"), tolerance=0)
    timeless = re.sub(rb'(created_at": )([\d.]+)', lambda found: found[1] + b"NaN".ljust(len(found[2])), file)
    for damaged in (file[:-1], b"", b"junk", timeless):
        answer = http.post("/v1/memory/import", params={"name": "damaged"}, content=damaged)
        assert (answer.status_code, "damaged" in answer.text) == (400, True)
        assert "\n" not in answer.json()["error"]["message"]

    assert http.delete("/v1/memory/look").json()["deleted"] is True
    assert http.get("/v1/memory/look").status_code == 404
    assert http.get("/v1/memory/copy").status_code == 200


def test_what_was_replied_is_forgotten_with_the_message(server, client, http, loaded):
    """As the terminal does: a reply repeats what it was told."""
    reply = text_of(chat(client, BOAT, **in_session("replied")))
    before = state_of(server, "replied")
    answer = http.post("/v1/memory/replied/forget", json={"text": BOAT, "reply": reply})
    assert answer.status_code == 200, answer.text
    assert_same_state(state_of(server, "replied"), forget(*loaded, before, BOAT, reply))
    assert (
        kept_share(*loaded, state_of(server, "replied"), BOAT, reply) < 0.01 < kept_share(*loaded, before, BOAT, reply)
    )


def test_a_server_without_text_imports_none(server, client, loaded, tmp_path):
    chat(client, BOAT, **in_session("to be told elsewhere"))
    data = server.store.export(server.store.get("to be told elsewhere", ADA))
    httpx = pytest.importorskip("httpx2", reason="comes with openai")
    with running(tmp_path / "s", loaded, keep_text=False) as other:
        headers = {"authorization": f"Bearer {KEYS[0]}"}
        answer = httpx.post(f"{other.url}/v1/memory/import", content=data, headers=headers, timeout=60)
        assert answer.json()["turns"] == 1
        copy = other.store.get("to be told elsewhere", ADA)
        assert copy.keep_text is False
        assert [turn.user for turn in other.store.transcript(copy)] == [None]


def test_a_last_turn_whose_beginning_is_not_kept_is_not_traced(client, http):
    """A history that is taken in has one state, that after its last turn."""
    chat(client, user(BOAT), assistant("Lovely."), WHERE, **in_session("begun elsewhere"))
    answer = http.get("/v1/memory/begun elsewhere/trace")
    assert (answer.status_code, "before the last turn" in answer.text) == (409, True)
    assert http.post("/v1/memory/begun elsewhere/trace", json={"text": WHERE}).status_code == 200


def test_a_state_of_another_memory_is_refused_with_its_reason(server, http, client):
    session = server.store.create("foreign", ADA)
    other = Conversation(talking_model("llama", num_slots=5), talking_tokenizer("llama"))
    other.read(BOAT)
    server.store.commit(session, [(BOAT, None)], other.to_bytes(), None)
    with pytest.raises(openai.ConflictError, match="another model or memory"):
        chat(client, HOME, **in_session("foreign"))
    assert http.get("/v1/memory/foreign").status_code == 409
