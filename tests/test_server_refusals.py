"""What the server does not do is refused, in OpenAI's words."""

import asyncio
import contextlib
import json
import socket

import pytest

pytest.importorskip("openai")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

import openai
from clients import (
    ADA,
    BOAT,
    HOME,
    assistant,
    client_of_ada,  # noqa: F401 (a fixture)
    model_and_tokenizer,  # noqa: F401 (a fixture)
    plain_http,  # noqa: F401 (a fixture)
    shared_server,  # noqa: F401 (a fixture)
    user,
)
from serving import KEYS, MODEL, running

from gru_memory.server.errors import ApiError
from gru_memory.server.http import BodyLimit

# Fields


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
        {"messages": [user(" ")]},
        {"messages": [user(" "), assistant("b"), user("c")]},
        {"messages": [{"role": "tool", "content": "a"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        {"messages": [user("boat " * 500)]},
        {"messages": "hello"},
        {"messages": [user("a\0b")]},
        {"messages": [user("a"), assistant("b\0"), user("c")]},
        {"max_tokens": 4, "max_completion_tokens": 5},
        {"max_tokens": True},
        {"n": True},
        {"temperature": True},
        {"temperature": "0"},
        {"stream": "no"},
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


def test_half_a_character_is_refused(http):
    body = json.dumps({"model": MODEL, "messages": [user("a\ud800")]}).encode()
    answer = http.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and "unicode" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/chat/completions?stream=true"),
        ("POST", "/v1/responses?x=1"),
        ("GET", "/v1/memory?limt=5"),
        ("GET", "/v1/memory/whole?slot=3"),
        ("GET", "/v1/models?x=1"),
        ("GET", "/v1/conversations/whole?include=x"),
        ("GET", "/v1/conversations/whole/items?include=x"),
    ],
)
def test_parameters_that_nobody_knows_are_refused(http, method, path):
    body = {"model": MODEL, "messages": [user(BOAT)]} if "chat" in path else {"model": MODEL, "input": BOAT}
    answer = http.request(method, path, json=body if method == "POST" else None)
    assert (answer.status_code, "not supported here" in answer.text) == (400, True), answer.text


def test_those_that_are_known_are_not(http):
    http.post("/v1/memory/known/remember", json={"text": HOME})
    for path in (
        "memory?limit=5&offset=0",
        "memory/known?top=1&slots=2",
        "conversations/known/items?order=asc&limit=3",
    ):
        assert http.get(f"/v1/{path}").status_code == 200
    http.delete("/v1/memory/known")


def test_fields_that_ask_for_nothing_are_accepted(http):
    body = {"model": MODEL, "messages": [user(BOAT)], "store": False}
    assert http.post("/v1/chat/completions", json=body).status_code == 200
    body = {"model": MODEL, "input": BOAT, "include": [], "metadata": {"a": "b"}}
    assert http.post("/v1/responses", json=body).json()["metadata"] == {"a": "b"}


def test_null_is_as_if_not_given(http):
    body = {"model": MODEL, "messages": [user(BOAT)], "tools": None, "temperature": None, "user": None}
    assert http.post("/v1/chat/completions", json=body).status_code == 200


def test_what_asks_for_nothing_is_let_pass(http):
    nothing = {"tools": [], "logit_bias": {}, "parallel_tool_calls": True, "tool_choice": "auto"}
    body = {"model": MODEL, "messages": [user(BOAT)], "max_tokens": 2}
    assert http.post("/v1/chat/completions", json={**body, **nothing}).status_code == 200
    assert http.post("/v1/chat/completions", json={**body, "tools": [{"type": "function"}]}).status_code == 400


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


def test_what_is_wrong_is_said_in_words(http):
    answer = http.post("/v1/chat/completions", content=b"{", headers={"content-type": "application/json"})
    assert answer.status_code == 400 and "the body is no JSON" in answer.json()["error"]["message"]
    for kind, named in (("text/plain", "as text/plain"), ("", "without one")):
        body = json.dumps({"model": MODEL, "messages": [user(BOAT)]}).encode()
        answer = http.post("/v1/chat/completions", content=body, headers={"content-type": kind} if kind else {})
        said = answer.json()["error"]
        assert answer.status_code == 400 and said["param"] is None
        assert f"Content-Type: application/json; it came {named}" in said["message"]
    answer = http.post("/v1/chat/completions", json={"model": MODEL, "messages": [user(BOAT * 500)]})
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "context_length_exceeded"
    answer = http.post("/v1/embeddings", json={})
    assert answer.status_code == 404 and "no such route" in answer.json()["error"]["message"]


# Names


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
    answer = http.post("/v1/memory/%2e%2e/remember", json={"text": HOME})
    assert (answer.status_code, "stands for a folder" in answer.text) == (400, True), answer.text
    http.delete("/v1/memory/whole")
    assert server.store.list(ADA) == before


def test_a_user_whose_name_is_too_long_is_told_so(http):
    body = {"model": MODEL, "messages": [user(BOAT)], "user": "x" * 196}
    error = http.post("/v1/chat/completions", json=body).json()["error"]
    assert error["param"] == "user" and "195 characters" in error["message"]
    assert http.post("/v1/chat/completions", json={**body, "user": "x" * 195}).status_code == 200


# Bodies


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


@pytest.mark.parametrize(("key", "status"), [(KEYS[0], 408), ("wrong", 401)])
def test_a_body_that_comes_byte_by_byte_is_not_waited_for_for_ever(loaded, tmp_path, key, status):
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\ncontent-length: 1000\r\n\r\n"
    )
    with (
        running(tmp_path / "s", loaded, body_seconds=0.5) as server,
        socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1]))) as connection,
    ):
        connection.sendall(head.encode())
        connection.settimeout(0.05)
        for _ in range(200):
            connection.sendall(b" ")
            with contextlib.suppress(TimeoutError):
                assert connection.recv(100).startswith(f"HTTP/1.1 {status} ".encode())
                return
        pytest.fail("it is still waited for")


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
