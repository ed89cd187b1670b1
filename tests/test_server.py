"""The server, through OpenAI's own client and through plain HTTP."""

import asyncio
import concurrent.futures
import contextlib
import json
import logging
import re
import socket
import subprocess
import sys
import threading
import time
from copy import deepcopy

import pytest

pytest.importorskip("openai")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

import openai
from serving import KEYS, MODEL, running
from talking import talking_model, talking_tokenizer
from tiny import assert_same_state

from gru_memory import Conversation, MemoryState
from gru_memory.evaluation.full_history import kv_bytes_per_token
from gru_memory.server.engine import EngineLimits
from gru_memory.server.errors import ApiError
from gru_memory.server.http import BodyLimit, JsonLines, Keys
from gru_memory.server.protocol import Message, split
from gru_memory.server.recognition import where_to_go_on
from gru_memory.server.settings import ServerSettings, owner_of, read_keys
from gru_memory.store import Limits, TurnRecord
from gru_memory.store.digests import turn_digest, user_digest

ADA = owner_of(KEYS[0])
BOAT, HOME, WHERE = "My boat is called Marigold.", "I live in Porto.", "Where do I live?"


@pytest.fixture(scope="module")
def loaded():
    return talking_model("llama"), talking_tokenizer("llama")


@pytest.fixture(scope="module")
def server(loaded, tmp_path_factory):
    with running(tmp_path_factory.mktemp("server") / "sessions.sqlite3", loaded) as server:
        yield server


@pytest.fixture
def client(server):
    with server.client() as client:
        yield client


@pytest.fixture(scope="module")
def http(server):
    """Plain HTTP, with Ada's key."""
    httpx = pytest.importorskip("httpx2", reason="comes with openai")
    with httpx.Client(base_url=server.url, timeout=60, headers={"authorization": f"Bearer {KEYS[0]}"}) as http:
        yield http


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def chat(client, *messages, **settings):
    """The reply to the last of these messages."""
    messages = [user(m) if isinstance(m, str) else m for m in messages]
    return client.chat.completions.create(model=MODEL, messages=messages, **settings)


def text_of(completion):
    return completion.choices[0].message.content


def expected(loaded, *turns, system=None):
    """What a conversation of the library answers: the reply to each turn that is a text; pairs are read."""
    conversation = Conversation(*loaded, system=system, max_new_tokens=8)
    replies = []
    for turn in turns:
        if isinstance(turn, str):
            replies.append(conversation.say(turn))
        else:
            conversation.read(*turn)
    return replies, conversation


def state_of(server, name):
    return MemoryState.from_bytes(server.store.head(server.store.get(name, ADA)).state)


def in_session(name):
    return {"extra_body": {"session_id": name}}


# Chat completions


def test_a_chat_completion_is_what_the_library_says(server, client, loaded):
    completion = chat(client, BOAT)
    (reply,), conversation = expected(loaded, BOAT)
    assert text_of(completion) == reply
    assert completion.id.startswith("chatcmpl_") and completion.model == MODEL
    assert completion.choices[0].finish_reason in ("stop", "length")
    usage = completion.usage
    assert usage.prompt_tokens == Conversation(*loaded).prompt(BOAT)["input_ids"].shape[1]
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert 0 < usage.completion_tokens <= 8


def test_without_a_session_nothing_is_kept(server, client):
    before = server.store.list(ADA)
    chat(client, BOAT)
    assert server.store.list(ADA) == before


def test_a_stream_says_the_same(client, loaded):
    chunks = list(chat(client, BOAT, stream=True, stream_options={"include_usage": True}))
    (reply,), _ = expected(loaded, BOAT)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == reply
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] in ("stop", "length")
    assert chunks[-1].usage.completion_tokens > 0
    assert len({c.id for c in chunks}) == 1
    assert all(c.usage is None for c in chunks[:-1])
    assert list(chat(client, BOAT, stream=True))[-1].choices


@pytest.mark.parametrize("where", ["session_id", "X-Session-Id", "X-OpenWebUI-Chat-Id", "user"])
def test_a_session_remembers_and_is_found_by_each_name(server, client, loaded, where):
    name = f"chat by {where}"
    header = where.startswith("X-")
    settings = {"extra_headers": {where: name}} if header else {"extra_body": {where: name}}
    replies = [text_of(chat(client, text, **settings)) for text in (BOAT, HOME, WHERE)]
    wanted, conversation = expected(loaded, BOAT, HOME, WHERE)
    assert replies == wanted
    assert_same_state(state_of(server, f"user:{name}" if where == "user" else name), conversation.state)


def test_the_first_name_counts(server, client):
    chat(client, BOAT, user="last", extra_body={"session_id": "first"}, extra_headers={"X-Session-Id": "second"})
    names = [session.name for session in server.store.list(ADA)]
    assert "first" in names and "second" not in names and "user:last" not in names


def test_a_history_that_is_sent_again_is_not_written_twice(server, client, loaded):
    messages, settings = [], in_session("resender")
    for text in (BOAT, HOME, WHERE):
        reply = text_of(chat(client, *messages, text, **settings))
        messages += [user(text), assistant(f" {reply}\n")]  # clients trim as they like
    wanted, conversation = expected(loaded, BOAT, HOME, WHERE)
    assert [m["content"].strip() for m in messages[1::2]] == wanted
    assert_same_state(state_of(server, "resender"), conversation.state)


def test_regenerating_replaces_the_turn_and_editing_branches(server, client, loaded):
    settings = in_session("editor")
    first = text_of(chat(client, BOAT, **settings))
    history = [user(BOAT), assistant(first)]
    second = text_of(chat(client, *history, HOME, **settings))
    assert text_of(chat(client, *history, HOME, **settings)) == second
    _, conversation = expected(loaded, BOAT, HOME)
    assert_same_state(state_of(server, "editor"), conversation.state)
    chat(client, *history, WHERE, **settings)
    _, conversation = expected(loaded, BOAT, WHERE)
    assert_same_state(state_of(server, "editor"), conversation.state)
    session = server.store.get("editor", ADA)
    assert [turn.user for turn in server.store.transcript(session)] == [BOAT, WHERE]
    assert len(server.store.turns(session)) == 4


def test_a_history_that_is_new_is_taken_in(server, client, loaded):
    history = [user(BOAT), assistant("Lovely."), user("Hm."), user(HOME), assistant("Nice.")]
    reply = text_of(chat(client, *history, WHERE, **in_session("import")))
    (wanted,), conversation = expected(loaded, (BOAT, "Lovely."), ("Hm.", None), (HOME, "Nice."), WHERE)
    assert reply == wanted == text_of(chat(client, *history, WHERE))
    assert_same_state(state_of(server, "import"), conversation.state)


def test_an_empty_reply_is_a_reply_and_is_recognised(server, client, loaded):
    """As the model itself may answer nothing."""
    nothing = {"extra_body": {"session_id": "silent"}, "stop": [text_of(chat(client, BOAT))[:1]]}
    assert text_of(chat(client, BOAT, **nothing)) == ""
    history = [user(BOAT), assistant("")]
    chat(client, *history, HOME, **in_session("silent"))
    assert [turn.reply for turn in server.store.transcript(server.store.get("silent", ADA))][:1] == [""]
    _, conversation = expected(loaded, (BOAT, None), HOME)
    assert_same_state(state_of(server, "silent"), conversation.state)
    assert server.store.get("silent", ADA).turns == 2
    (wanted,), _ = expected(loaded, (BOAT, ""), HOME)
    assert text_of(chat(client, *history, HOME)) == wanted


@pytest.mark.parametrize("keep_text", [True, False])
def test_what_memory_was_told_between_stays_when_the_history_is_sent_again(loaded, tmp_path, keep_text):
    settings = in_session("told")
    with running(tmp_path / "s", loaded, keep_text=keep_text) as server, server.client() as client:
        history = [user(BOAT), assistant(text_of(chat(client, BOAT, **settings)))]
        client.post("../v1/memory/told/remember", body={"text": HOME}, cast_to=object)
        for text in (WHERE, "Hm."):
            history += [user(text), assistant(text_of(chat(client, *history, text, **settings)))]
        _, conversation = expected(loaded, BOAT, (HOME, None), WHERE, "Hm.")
        assert_same_state(state_of(server, "told"), conversation.state)


def test_a_history_that_was_read_in_is_not_written_twice(server, client, loaded):
    history, settings = [user(BOAT), assistant("Lovely.")], in_session("reader")
    for text in (HOME, HOME, WHERE):  # regenerated, then edited
        chat(client, *history, text, **settings)
        _, conversation = expected(loaded, (BOAT, "Lovely."), text)
        assert_same_state(state_of(server, "reader"), conversation.state)
        session = server.store.get("reader", ADA)
        assert [turn.user for turn in server.store.transcript(session)] == [BOAT, text]


def test_a_request_that_is_refused_leaves_no_session_behind(server, client, http):
    before = server.store.list(ADA)
    with pytest.raises(openai.BadRequestError):
        chat(client, BOAT * 500, **in_session("refused"))
    assert http.post("/v1/memory/refused/remember", json={"text": " "}).status_code == 400
    assert server.store.list(ADA) == before


def test_a_system_prompt_is_that_of_the_request(client, loaded):
    system = {"role": "system", "content": "Be brief."}
    assert text_of(chat(client, system, BOAT)) == expected(loaded, BOAT, system="Be brief.")[0][0]
    settings = in_session("system")
    first = text_of(chat(client, system, BOAT, **settings))
    second = text_of(
        chat(client, {"role": "developer", "content": "Be kind."}, user(BOAT), assistant(first), HOME, **settings)
    )
    conversation = Conversation(*loaded, system="Be brief.", max_new_tokens=8)
    assert conversation.say(BOAT) == first
    conversation.use_system("Be kind.")
    assert conversation.say(HOME) == second


def test_a_chat_template_that_refuses_is_quoted(loaded, tmp_path, http):
    model, tokenizer = loaded[0], deepcopy(loaded[1])
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    tokenizer.chat_template = refuses + tokenizer.chat_template
    with running(tmp_path / "s", (model, tokenizer)) as server:
        system = {"role": "system", "content": "Be brief."}
        for path, body in (
            ("chat/completions", {"model": MODEL, "messages": [system, user(BOAT)]}),
            ("responses", {"model": MODEL, "input": BOAT, "instructions": "Be brief."}),
            ("conversations", {"items": [system, user(BOAT)]}),
        ):
            answer = http.post(f"{server.url}/v1/{path}", json=body)
            assert (answer.status_code, answer.json()["error"]["message"]) == (400, "System role not supported")


def test_sampling_parameters_arrive(client):
    def sampled(**settings):
        return text_of(chat(client, BOAT, max_tokens=8, temperature=2.0, **settings))

    assert sampled(seed=1) == sampled(seed=1) != sampled(seed=2)
    assert sampled(seed=1, top_p=1e-9) == text_of(chat(client, BOAT))
    assert chat(client, BOAT, max_completion_tokens=2).usage.completion_tokens <= 2
    whole = text_of(chat(client, BOAT, max_tokens=20))
    assert text_of(chat(client, BOAT, max_tokens=20, stop=[whole[3:6]])) == whole[: whole.index(whole[3:6])].strip()
    assert text_of(chat(client, BOAT, max_tokens=20, frequency_penalty=2.0)) != whole


# Responses


def test_a_response_can_be_gone_on_from_by_its_id_and_branched(server, client, loaded):
    first = client.responses.create(model=MODEL, input=BOAT)
    second = client.responses.create(model=MODEL, input=HOME, previous_response_id=first.id)
    again = client.responses.create(model=MODEL, input=HOME, previous_response_id=first.id)
    third = client.responses.create(model=MODEL, input=[user(WHERE)], previous_response_id=second.id)
    wanted, conversation = expected(loaded, BOAT, HOME, WHERE)
    assert [r.output_text for r in (first, second, third)] == wanted
    assert again.output_text == second.output_text and again.id != second.id
    snapshot = server.store.snapshot(third.id, ADA)
    assert_same_state(MemoryState.from_bytes(snapshot.state), conversation.state)
    assert (first.status, third.previous_response_id) in (("completed", second.id), ("incomplete", second.id))
    assert first.usage.total_tokens == first.usage.input_tokens + first.usage.output_tokens > 0


def test_a_conversation_goes_on_by_its_name(server, client, loaded):
    texts = (BOAT, HOME, WHERE)
    replies = [client.responses.create(model=MODEL, input=t, conversation="talk").output_text for t in texts]
    wanted, conversation = expected(loaded, *texts)
    assert replies == wanted
    assert_same_state(state_of(server, "talk"), conversation.state)


def test_a_response_that_is_not_stored_leaves_nothing(server, client, loaded):
    before = server.store.list(ADA)
    response = client.responses.create(model=MODEL, input=BOAT, store=False, instructions="Be brief.")
    assert response.output_text == expected(loaded, BOAT, system="Be brief.")[0][0]
    assert server.store.list(ADA) == before
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model=MODEL, input=BOAT, previous_response_id=response.id)


def test_a_streamed_response_has_openai_s_events(client, loaded):
    events = list(client.responses.create(model=MODEL, input=BOAT, stream=True))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
    ]  # fmt: skip
    assert kinds[-4:-1] == ["response.output_text.done", "response.content_part.done", "response.output_item.done"]
    assert kinds[-1] in ("response.completed", "response.incomplete")
    assert [event.sequence_number for event in events] == list(range(len(events)))
    (reply,), _ = expected(loaded, BOAT)
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == reply
    assert events[-1].response.output_text == reply
    again = client.responses.create(model=MODEL, input=HOME, previous_response_id=events[-1].response.id)
    assert again.output_text == expected(loaded, BOAT, HOME)[0][1]


def test_the_client_s_own_stream_helper_works(client):
    with client.responses.stream(model=MODEL, input=BOAT) as stream:
        kinds = [event.type for event in stream]
    assert "response.output_text.delta" in kinds


# What is refused


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"n": 2},
        {"logprobs": True},
        {"response_format": {"type": "json_object"}},
        {"logit_bias": {"5": 1}},
        {"temperature": 3},
        {"top_p": 0},
        {"stop": ["a"] * 5},
        {"max_tokens": 0},
        {"max_tokens": 1_000_000},
        {"surprise": 1},
        {"stream_options": {"include_obfuscation": True}, "stream": True},
        {"stream_options": {"include_usage": True}},
        {"metadata": {"a": "b"}},
        {"store": True},
        {"session_id": ""},
        {"session_id": "x" * 201},
        {"session_id": "a/b"},
        {"user": "a/b"},
        {"session_id": "a\nb"},
        {"session_id": "nul\0"},
        {"messages": []},
        {"messages": [assistant("Hi.")]},
        {"messages": [user("a"), assistant("b")]},
        {"messages": [assistant("a"), user("b")]},
        {"messages": [user(" ")]},
        {"messages": [user(" "), assistant("b"), user("c")]},
        {"messages": [{"role": "tool", "content": "a"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        {"messages": [user("boat " * 500)]},
        {"messages": "hello"},
    ],
)
def test_what_is_not_supported_is_refused_in_openai_s_words(http, fields):
    body = {"model": MODEL, "messages": [user(BOAT)], **fields}
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["message"] and error["type"] == "invalid_request_error"
    assert "Marigold" not in answer.text
    assert answer.headers["x-request-id"].startswith("req_")


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [{"type": "web_search"}]},
        {"include": ["x"]},
        {"reasoning": {"effort": "low"}},
        {"text": {"format": {"type": "json_object"}}},
        {"truncation": "auto"},
        {"background": True},
        {"conversation": "a", "previous_response_id": "b"},
        {"store": False, "conversation": "a"},
        {"input": []},
        {"input": [{"type": "function_call_output", "call_id": "1", "output": "2"}]},
    ],
)
def test_responses_refuse_too(http, fields):
    answer = http.post("/v1/responses", json={"model": MODEL, "input": BOAT, **fields})
    assert answer.status_code == 400, answer.text


def test_fields_that_ask_for_nothing_are_accepted(http):
    body = {"model": MODEL, "messages": [user(BOAT)], "store": False}
    assert http.post("/v1/chat/completions", json=body).status_code == 200
    body = {"model": MODEL, "input": BOAT, "include": [], "metadata": {"a": "b"}}
    assert http.post("/v1/responses", json=body).json()["metadata"] == {"a": "b"}


def test_null_is_as_if_not_given(http):
    body = {"model": MODEL, "messages": [user(BOAT)], "tools": None, "temperature": None, "user": None}
    assert http.post("/v1/chat/completions", json=body).status_code == 200


def test_other_models_and_pages_are_not_found(client, http):
    assert [model.id for model in client.models.list()] == [MODEL] == [client.models.retrieve(MODEL).id]
    for call in (
        lambda: client.models.retrieve("gpt-5"),
        lambda: client.chat.completions.create(model="gpt-5", messages=[user("a")]),
    ):
        with pytest.raises(openai.NotFoundError, match="no model"):
            call()
    for path in ("/v1/nothing", "/docs", "/v1/memory/nothing", "/v1/memory/%2e%2e%2fetc"):
        answer = http.get(path)
        assert (answer.status_code, answer.json()["error"]["type"]) == (404, "invalid_request_error")
    assert len(http.get(f"/v1/models/{'x' * 10_000}").text) < 500  # an answer does not grow with the question
    answer = http.put("/v1/models")
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET")


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[" * 100_000, 400),
        (b'{"model": "' + b"x" * 3_000_000 + b'"}', 413),
        (b'{"model": MODEL, "messages": [{"role": "user", "content": "\xff"}]}', 400),
        (b'{"model": MODEL, "messages": [{"role": "user", "content": "\\ud800"}]}', 400),
        (b'{"model": MODEL, "temperature": NaN, "messages": [{"role": "user", "content": "a"}]}', 400),
    ],
)
def test_bodies_that_are_no_requests(http, body, status):
    answer = http.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == status, answer.text
    assert len(answer.text) < 1_000


def test_a_body_that_comes_byte_by_byte_is_not_waited_for_for_ever(loaded, tmp_path):
    with (
        running(tmp_path / "s", loaded, body_seconds=0.5) as server,
        socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1]))) as connection,
    ):
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n")
        connection.settimeout(0.05)
        for _ in range(200):
            connection.sendall(b" ")
            with contextlib.suppress(TimeoutError):
                assert b" 408 " in connection.recv(100)
                return
        pytest.fail("it is still waited for")


# Tenants


def test_a_wrong_key_opens_nothing(server, http):
    for headers in ({"authorization": "Bearer wrong"}, {"authorization": ""}, {"authorization": f"Basic {KEYS[0]}"}):
        for path in ("/v1/models", "/v1/memory", "/v1/memory/talk"):
            answer = http.get(path, headers=headers)
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
    with server.client("wrong") as client, pytest.raises(openai.AuthenticationError):
        chat(client, BOAT)


@pytest.mark.parametrize("size", [10, 3_000_000, 9_000_000])
def test_a_wrong_key_is_said_whatever_the_size_of_the_body(http, size):
    answer = http.post("/v1/chat/completions", content=b"x" * size, headers={"authorization": "Bearer wrong"})
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")


def test_every_key_has_its_owner():
    keys = Keys(KEYS, owner_of)
    assert [keys.owner(f"Bearer {key}") for key in KEYS] == [owner_of(key) for key in KEYS]
    assert keys.owner(f"bearer  {KEYS[1]} ") == owner_of(KEYS[1])
    assert Keys((), owner_of).owner(None) == ""
    assert KEYS[0] not in owner_of(KEYS[0])


def test_a_key_takes_as_long_as_any_other_right_or_wrong(monkeypatch):
    """Every known key is compared, by digests of one length, wherever the right one stands and if there is none."""
    compared = []

    def compare(known, given):
        compared.append((len(known), len(given)))
        return known == given

    monkeypatch.setattr("gru_memory.server.http.hmac.compare_digest", compare)
    keys = Keys((*KEYS, "yet another key"), owner_of)
    for key, known in (
        (KEYS[0], True),
        ("yet another key", True),
        ("wrong", False),
        ("", False),
        ("k" * 10_000, False),
    ):
        compared.clear()
        if known:
            assert keys.owner(f"Bearer {key}") == owner_of(key)
        else:
            with pytest.raises(ApiError, match="valid API key"):
                keys.owner(f"Bearer {key}")
        assert compared == [(32, 32)] * (len(KEYS) + 1)


def test_nobody_sees_another_s_sessions(server, client, http):
    first = client.responses.create(model=MODEL, input=BOAT, conversation="private")
    with server.client(KEYS[1]) as bob:
        with pytest.raises(openai.NotFoundError) as replayed:
            bob.responses.create(model=MODEL, input=WHERE, previous_response_id=first.id)
        with pytest.raises(openai.NotFoundError) as made_up:
            bob.responses.create(model=MODEL, input=WHERE, previous_response_id="resp_0")
        assert replayed.value.body == made_up.value.body
        bob.responses.create(model=MODEL, input=HOME, conversation="private")  # one of his own
    headers = {"authorization": f"Bearer {KEYS[1]}"}
    texts = http.get("/v1/memory/private/transcript", headers=headers).json()["data"]
    assert [turn["user"] for turn in texts] == [HOME]
    there, nowhere = (http.get(f"/v1/memory/{name}", headers=headers) for name in ("talk", "nothing at all"))
    assert (there.status_code, there.json()) == (nowhere.status_code, nowhere.json())
    assert http.delete("/v1/memory/talk", headers=headers).status_code == 404


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"stop": list("abcde")}, "stop", "at most 4"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages.0.content.0.type",
            "input_text",
        ),
        ({"temperature": "hot"}, "temperature", "number"),
    ],
)
def test_a_wrong_field_is_named_as_the_client_knows_it(http, fields, param, message):
    body = {"model": MODEL, "messages": [user(BOAT)], **fields}
    error = http.post("/v1/chat/completions", json=body).json()["error"]
    assert error["param"] == param and message in error["message"] and "constrained" not in error["message"]


def test_what_asks_for_nothing_is_let_pass(http):
    nothing = {"tools": [], "logit_bias": {}, "parallel_tool_calls": True, "tool_choice": "auto"}
    body = {"model": MODEL, "messages": [user(BOAT)], "max_tokens": 2}
    assert http.post("/v1/chat/completions", json={**body, **nothing}).status_code == 200
    assert http.post("/v1/chat/completions", json={**body, "tools": [{"type": "function"}]}).status_code == 400


def test_what_is_wrong_is_said_in_words(http):
    answer = http.post("/v1/chat/completions", content=b"{", headers={"content-type": "application/json"})
    assert answer.status_code == 400 and "the body is no JSON" in answer.json()["error"]["message"]
    answer = http.post("/v1/chat/completions", json={"model": MODEL, "messages": [user(BOAT * 500)]})
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "context_length_exceeded"
    answer = http.post("/v1/embeddings", json={})
    assert answer.status_code == 404 and "no such route" in answer.json()["error"]["message"]


def test_a_name_that_no_path_could_hold_is_refused_wherever_it_is_given(server, http):
    """A session of such a name could neither be looked at nor removed."""
    post = {"model": MODEL, "messages": [user(BOAT)]}
    asked = {"model": MODEL, "input": BOAT}
    kept = server.store.create("kept a/b", owner="elsewhere")
    file, before = server.store.export(kept), server.store.list(ADA)
    http.post("/v1/memory/whole/remember", json={"text": HOME})
    answers = [
        http.post("/v1/chat/completions", json={**post, "session_id": "a/b"}),
        http.post("/v1/chat/completions", json={**post, "user": "a/b"}),
        http.post("/v1/chat/completions", json=post, headers={"x-session-id": "a/b"}),
        http.post("/v1/chat/completions", json=post, headers={"x-openwebui-chat-id": "a/b"}),
        http.post("/v1/responses", json={**asked, "conversation": "a/b"}),
        http.post("/v1/responses", json={**asked, "conversation": {"id": "a/b"}}),
        http.post("/v1/memory/whole/fork", json={"name": "a/b"}),
        http.post("/v1/memory/import", content=file),
        http.post("/v1/memory/import", params={"name": "a/b"}, content=file),
    ]
    for answer in answers:
        assert (answer.status_code, "has no '/'" in answer.text) == (400, True), answer.text
    assert http.post("/v1/memory/a%2Fb/remember", json={"text": HOME}).status_code == 404
    for name in (".", ".."):  # what a path leaves out
        answer = http.post("/v1/chat/completions", json={**post, "session_id": name})
        assert (answer.status_code, "stands for a folder" in answer.text) == (400, True), answer.text
    http.delete("/v1/memory/whole")
    assert server.store.list(ADA) == before


def test_a_user_whose_name_is_too_long_is_told_so(http):
    body = {"model": MODEL, "messages": [user(BOAT)], "user": "x" * 196}
    error = http.post("/v1/chat/completions", json=body).json()["error"]
    assert error["param"] == "user" and "195 characters" in error["message"]
    assert http.post("/v1/chat/completions", json={**body, "user": "x" * 195}).status_code == 200


# Memory


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
    for wrong in ({}, {"head": 0}, {"text": " "}, {"text": "a", "head": 0, "slot": 0}, {"head": 99, "slot": 0}):
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
    timeless = re.sub(rb'(created_at\\": )([\d.]+)', lambda found: found[1] + b"NaN".ljust(len(found[2])), file)
    for damaged in (file[:-1], b"", b"junk", timeless):
        answer = http.post("/v1/memory/import", params={"name": "damaged"}, content=damaged)
        assert (answer.status_code, "damaged" in answer.text) == (400, True)
        assert "\n" not in answer.json()["error"]["message"]

    assert http.delete("/v1/memory/look").json()["deleted"] is True
    assert http.get("/v1/memory/look").status_code == 404
    assert http.get("/v1/memory/copy").status_code == 200


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


# Many at once


def test_many_conversations_at_once_share_forward_passes_and_nothing_else(server, client, loaded):
    texts = [
        f"My boat is called {name}." for name in ("Marigold", "Porto", "Is", "You live", "Where", "do", "in", "User")
    ]

    def talk(number):
        settings = in_session(f"many {number}")
        return [text_of(chat(client, text, **settings)) for text in (texts[number], WHERE)]

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(talk, range(8)))
    for number in range(8):
        wanted, conversation = expected(loaded, texts[number], WHERE)
        assert replies[number] == wanted
        assert_same_state(state_of(server, f"many {number}"), conversation.state)


def test_two_at_once_in_one_session_one_wins_and_the_other_is_told(server, client, loaded):
    held = threading.Event()
    server.engine.call(held.wait)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        calls = [pool.submit(chat, client, text, **in_session("contested")) for text in (BOAT, HOME)]
        done, _ = concurrent.futures.wait(calls, return_when="FIRST_COMPLETED", timeout=30)
        assert isinstance(next(iter(done)).exception(), openai.ConflictError)
        held.set()
        replies = [call for call in calls if call.exception() is None]
    assert len(replies) == 1
    assert server.store.get("contested", ADA).turns == 1


def test_a_full_server_says_429_and_goes_on(loaded, tmp_path):
    limits = EngineLimits(max_batch=1, max_waiting=1)
    with running(tmp_path / "s", loaded, engine=limits) as server, server.client() as client:
        held = threading.Event()
        server.engine.call(held.wait)
        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            calls = [pool.submit(chat, client, BOAT) for _ in range(3)]
            deadline = time.monotonic() + 30
            while sum(call.done() for call in calls) < 2 and time.monotonic() < deadline:
                time.sleep(0.01)
            for refused in (call.exception() for call in calls if call.done()):
                assert isinstance(refused, openai.RateLimitError)
                assert refused.response.headers["retry-after"] == "1"
            held.set()
            assert [type(call.exception()) for call in calls].count(type(None)) == 1
        assert text_of(chat(client, BOAT))


def until(happened):
    deadline = time.monotonic() + 30
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_client_that_leaves_takes_its_turn_back(server, client, monkeypatch):
    chat(client, BOAT, **in_session("leaver"))
    before, busy = server.store.get("leaver", ADA), server.app.state.service._busy
    left, steps = threading.Event(), []

    def step(rows, tokens):
        steps.append(tokens)
        assert left.wait(30)

    with monkeypatch.context() as patch:
        patch.setattr(server.engine, "on_step", step)
        stream = chat(client, HOME, stream=True, max_tokens=200, temperature=2, seed=1, **in_session("leaver"))
        next(iter(stream))
        until(lambda: steps)
        stream.close()
        until(lambda: not busy)
        left.set()
        until(lambda: server.engine.active == 0)
    assert len(steps) <= 2  # the prompt and a token: the round that was being made
    assert server.store.get("leaver", ADA) == before
    assert text_of(chat(client, WHERE, **in_session("leaver")))


def test_a_client_that_leaves_without_a_stream_takes_its_turn_back_too(server, client, http, monkeypatch):
    chat(client, BOAT, **in_session("impatient"))
    before, begun = server.store.get("impatient", ADA), threading.Event()

    def step(rows, tokens):
        begun.set()
        time.sleep(0.02)

    monkeypatch.setattr(server.engine, "on_step", step)
    with asking(server, session_id="impatient", max_tokens=300, temperature=2, seed=1):
        assert begun.wait(30)
    until(lambda: server.engine.active == 0 and not server.app.state.service._busy)
    assert server.store.get("impatient", ADA) == before


@contextlib.contextmanager
def asking(server, **settings):
    """A connection that has sent a request, and is closed in the end whether or not it was answered."""
    body = json.dumps({"model": MODEL, "messages": [user(HOME)], **settings}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEYS[0]}\r\n"
    head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1]))) as connection:
        connection.sendall(head.encode() + body)
        yield


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_while_it_waits_is_not_worked_for(server, client, stream):
    chat(client, BOAT, **in_session("waiting"))
    before, busy, held = server.store.get("waiting", ADA), server.app.state.service._busy, threading.Event()
    server.engine.call(held.wait)
    with asking(server, session_id="waiting", stream=stream):
        until(lambda: busy)
    until(lambda: not busy)  # the engine still does something else
    held.set()
    until(lambda: server.engine.active == server.engine.waiting == 0)
    assert server.store.get("waiting", ADA) == before


def test_when_the_store_fails_the_client_is_told_and_nothing_is_kept(loaded, tmp_path, monkeypatch):
    from gru_memory.store import StoreUnavailable

    with running(tmp_path / "s", loaded) as server, server.client() as client:
        chat(client, BOAT, **in_session("a"))

        def full(*arguments, **settings):
            raise StoreUnavailable("disk full at /secret/place")

        with monkeypatch.context() as patch:
            patch.setattr(server.store, "commit", full)
            with pytest.raises(openai.InternalServerError, match="store cannot be reached") as refused:
                chat(client, HOME, **in_session("a"))
            assert refused.value.status_code == 503
            assert "secret" not in str(refused.value)
            with pytest.raises(openai.APIError, match="store cannot be reached"):
                list(chat(client, HOME, stream=True, **in_session("a")))
            events = list(client.responses.create(model=MODEL, input=HOME, conversation="a", stream=True))
            assert (events[-1].type, events[-1].code) == ("error", "store_unavailable")
            assert [event.sequence_number for event in events] == list(range(len(events)))
        assert server.store.get("a", ADA).turns == 1
        assert text_of(chat(client, HOME, **in_session("a"))) == expected(loaded, BOAT, HOME)[0][1]


def test_stopping_lets_replies_end(loaded, tmp_path):
    with running(tmp_path / "s", loaded, grace_seconds=20.0) as server, server.client() as client:
        stream = chat(client, BOAT, stream=True, max_tokens=60, **in_session("last"))
        chunks = [next(iter(stream))]
        server.server.should_exit = True
        chunks += list(stream)
        assert chunks[-1].choices[0].finish_reason
        server.thread.join(30)
        assert server.store.get("last", ADA).turns == 1


def test_expired_sessions_are_removed(loaded, tmp_path):
    with running(tmp_path / "s", loaded, limits=Limits(ttl_seconds=0.2), purge_seconds=0.1) as server:
        server.store.create("short", ADA)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            with server.store.engine.connect() as connection:
                if connection.exec_driver_sql("SELECT count(*) FROM sessions").scalar() == 0:
                    return
            time.sleep(0.05)
        pytest.fail("the session is still there")


# Health and logs


def test_health_and_metrics_hold_no_names(server, client, http):
    chat(client, BOAT, **in_session("secret name"))
    for path, text in (("/healthz", "ok"), ("/readyz", "ready")):
        assert http.get(path, headers={"authorization": ""}).text == f"{text}\n"
    shown = http.get("/metrics").text
    assert 'gru_memory_requests_total{route="/v1/chat/completions",status="200"}' in shown
    assert "gru_memory_first_token_seconds_count" in shown
    assert "secret" not in shown


def test_a_server_whose_store_is_away_is_not_ready(loaded, tmp_path, monkeypatch, http):
    from gru_memory.store import StoreUnavailable

    def away():
        raise StoreUnavailable("away")

    with running(tmp_path / "s", loaded) as server:
        monkeypatch.setattr(server.store, "check", away)
        assert http.get(f"{server.url}/readyz").status_code == 503
        assert http.get(f"{server.url}/healthz").status_code == 200


def test_cors_is_off_unless_it_is_asked_for(http, loaded, tmp_path):
    asked = {"origin": "https://page.example", "access-control-request-method": "POST"}
    assert "access-control-allow-origin" not in http.options("/v1/models", headers=asked).headers
    with running(tmp_path / "s", loaded, cors_origins=("https://page.example",)) as server:
        allowed = http.options(f"{server.url}/v1/models", headers=asked).headers
        assert allowed["access-control-allow-origin"] == "https://page.example"


def test_what_goes_wrong_before_a_reply_begins_is_in_the_log(server, http, monkeypatch, caplog):
    def broken(*arguments):
        raise RuntimeError("nobody expected this")

    monkeypatch.setattr(server.app.state.service, "_plan", broken)
    body = {"model": MODEL, "messages": [user(BOAT)]}
    assert http.post("/v1/chat/completions", json=body).status_code == 500
    assert "nobody expected this" in caplog.text


def test_logs_are_json_without_text(server, client, caplog, http):
    with caplog.at_level(logging.INFO):
        chat(client, "The password is swordfish.", **in_session("hush hush"))
        http.get("/v1/memory/hush hush")
        # A line is written after the answer was sent.
        deadline = time.monotonic() + 10
        while sum(record.getMessage() == "request" for record in caplog.records) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    lines = [JsonLines().format(record) for record in caplog.records if record.name.startswith("gru_memory")]
    requests = [json.loads(line) for line in lines if json.loads(line)["message"] == "request"]
    assert {request["route"] for request in requests} >= {"/v1/chat/completions", "/v1/memory/{session}"}
    assert all(request["status"] == 200 and request["request_id"] and request["seconds"] >= 0 for request in requests)
    assert not any(word in line for line in lines for word in ("swordfish", "hush", KEYS[0]))
    try:
        raise ValueError("swordfish")
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, "f", 1, "failed", (), __import__("sys").exc_info())
    assert "ValueError" in JsonLines().format(record) and "swordfish" not in JsonLines().format(record)


# Parts


def test_a_large_body_may_take_longer_than_a_small_one():
    """A second more for every 64 KB that came."""
    sent, app_saw = [], []

    async def app(scope, receive, send):
        app_saw.append(await receive())

    async def receive():
        await asyncio.sleep(0.3)
        sent.append(b"x" * (64 << 10))
        return {"type": "http.request", "body": sent[-1], "more_body": len(sent) < 5}

    asyncio.run(BodyLimit(app, lambda path: 1 << 20, 1.0)({"type": "http", "path": "/"}, receive, None))
    assert len(app_saw[0]["body"]) == 5 * (64 << 10)


def test_nothing_is_kept_of_a_body_that_is_refused_whatever_it_says():
    """It is read, up to what is allowed, since many clients hear nothing while they send."""
    sent, answers = [], []

    async def app(scope, receive, send):
        pytest.fail("it was refused")

    async def receive():
        sent.append(bytearray(64 << 10))
        return {"type": "http.request", "body": sent[-1], "more_body": True}

    async def send(message):
        answers.append(message)

    limit = BodyLimit(app, lambda path: 1 << 20, 1.0, lambda scope: ApiError(401, "no", "invalid_api_key"))
    asyncio.run(limit({"type": "http", "path": "/"}, receive, send))
    assert len(sent) == 17 and answers[0]["status"] == 401
    assert (b"connection", b"close") in answers[0]["headers"]


def test_messages_become_turns():
    def parts(*pairs):
        return split([Message(role=role, content=text) for role, text in pairs])

    assert parts(("user", "a")) == (None, [], "a")
    assert parts(("system", "s"), ("user", "a"), ("user", "b"), ("assistant", "c"), ("user", "d")) == (
        "s", [("a", None), ("b", "c")], "d",
    )  # fmt: skip
    assert parts(("user", "a"), ("assistant", ""), ("user", "b")) == (None, [("a", "")], "b")


SALT = b"0123456789abcdef"


def tree(*rows):
    """Records from (id, parent, user, reply); ids in capitals have lost their state."""
    return [
        TurnRecord(i, parent, n, 0.0, turn_digest(SALT, u, r), user_digest(SALT, u), i.islower(), u, r)
        for n, (i, parent, u, r) in enumerate(rows, start=1)
    ]


LINE = tree(("a", None, "A", "1"), ("b", "a", "B", "2"), ("c", "b", "C", "3"))
READ_IN = tree(("A", None, "A", "1"), ("B", "A", "B", "2"), ("c", "B", "C", "3"))
TOLD = tree(("a", None, "A", "1"), ("r", "a", "R", None))
TOLD_BETWEEN = tree(("a", None, "A", "1"), ("r", "a", "R", None), ("b", "r", "B", "2"))
A, B, C = ("A", "1"), ("B", "2"), ("C", "3")


@pytest.mark.parametrize(
    ("records", "head", "history", "message", "linear", "wanted"),
    [
        ([], None, [], "X", False, (None, [])),
        ([], None, [A], "X", False, (None, [A])),
        (LINE, "c", [], "X", False, ("c", [])),  # a client that sends no history
        (LINE, "c", [A, B, C], "X", False, ("c", [])),
        (LINE, "c", [B, C], "X", False, ("c", [])),  # its beginning cut off
        (LINE, "c", [A, B], "X", False, ("b", [])),  # edited
        (LINE, "c", [A, B], "C", False, ("b", [])),  # regenerated
        (LINE, "c", [B], "C", False, ("b", [])),
        (LINE, "c", [], "C", False, ("c", [])),  # the same words again, no history: a new turn
        (LINE[:1], "a", [], "A", False, (None, [])),  # the first message regenerated
        (LINE, "c", [A, ("B", "other")], "X", False, ("a", [("B", "other")])),
        (LINE, "c", [("Z", "9")], "X", False, ("c", [("Z", "9")])),
        (LINE, "c", [A, B, C, ("D", None)], "X", False, ("c", [("D", None)])),
        (LINE, "c", [A, B], "X", True, ("c", [])),  # another chat of the same user
        (LINE, "c", [("Z", "9"), B], "X", True, ("c", [("Z", "9")])),
        (LINE, "c", [A, B], "C", True, ("b", [])),
        (tree(("a", None, "A", "1"), ("B", "a", "B", "2"), ("c", "B", "C", "3")), "c", [A, B], "X", False, ("a", [B])),
        (tree(("a", None, "A", "1"), ("B", "a", "B", "2"), ("c", "B", "C", "3")), "c", [A, B], "C", False, ("a", [B])),
        (tree(("a", None, "A", "1"), ("b", "a", "A", "1")), "b", [A], "X", False, ("b", [])),  # the head before others
        (TOLD, "r", [A], "X", False, ("r", [])),  # memory was told something that the chat does not know
        (TOLD_BETWEEN, "b", [A, B], "X", False, ("b", [])),
        (TOLD_BETWEEN, "b", [A], "X", False, ("r", [])),  # edited
        (TOLD_BETWEEN, "b", [A], "B", False, ("r", [])),  # regenerated
        (tree(("r", None, "R", None), ("a", "r", "A", "1")), "a", [], "A", False, ("r", [])),
        (READ_IN, "c", [A, B], "C", False, (None, [A, B])),  # regenerated, with no state between
        (READ_IN, "c", [A, B], "C", True, (None, [A, B])),
        (READ_IN, "c", [A, B], "X", False, (None, [A, B])),  # edited, with no state between
        (READ_IN, "c", [A], "X", False, (None, [A])),
        (READ_IN, "c", [B], "X", False, (None, [A, B])),  # its beginning cut off: what the store has of it
        (READ_IN[1:], "c", [B], "X", False, ("c", [])),  # nor has the store its beginning
        (READ_IN[2:], "c", [], "C", False, ("c", [])),
        (READ_IN, "c", [("Z", "9"), B], "X", False, ("c", [("Z", "9")])),
    ],
)
def test_which_part_of_a_history_is_known(records, head, history, message, linear, wanted):
    assert where_to_go_on(records, head, SALT, history, message, linear) == wanted


@pytest.mark.parametrize("keys", [("short",), ("has a space in it 123",), (KEYS[0], KEYS[0]), ("ü" * 20,)])
def test_keys_that_are_none(keys):
    with pytest.raises(ValueError, match="API key"):
        ServerSettings(api_keys=keys)


def test_keys_from_a_file(tmp_path):
    (tmp_path / "keys").write_text(f"# ours\n{KEYS[0]}  # Ada\n\n{KEYS[1]}\n")
    assert read_keys(tmp_path / "keys") == KEYS
    (tmp_path / "none").write_text("# nothing\n")
    with pytest.raises(ValueError, match="no API key"):
        read_keys(tmp_path / "none")


@pytest.mark.slow
@pytest.mark.needs_model
def test_the_command_serves_what_it_was_told_after_a_restart_too(tmp_path):
    """`gru-memory serve` as a process of its own, with the model and memory that ship."""
    keys = tmp_path / "keys"
    keys.write_text(KEYS[0])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-c", "from gru_memory.cli import main; main()", "serve", "--port", str(port)]
    command += ["--store", str(tmp_path / "sessions.sqlite3"), "--api-keys", str(keys)]

    def served(*texts):
        with (tmp_path / "log").open("ab") as log:
            process = subprocess.Popen(command, stderr=log, stdout=log)
        try:
            client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEYS[0], timeout=120)
            deadline = time.monotonic() + 240
            while True:
                try:
                    assert process.poll() is None, (tmp_path / "log").read_text()
                    client.models.list()
                    break
                except openai.APIConnectionError:
                    assert time.monotonic() < deadline, (tmp_path / "log").read_text()
                    time.sleep(0.5)
            made = [
                client.responses.create(model="smollm2", input=text, conversation="boat", max_output_tokens=16)
                for text in texts
            ]
            return [response.output_text for response in made]
        finally:
            process.terminate()
            assert process.wait(60) == 0, (tmp_path / "log").read_text()

    served("My boat is called Marigold.")
    assert "Marigold" in served("What is my boat called?")[0]
    log = (tmp_path / "log").read_text()
    assert '"route": "/v1/responses"' in log
    assert "Marigold" not in log
