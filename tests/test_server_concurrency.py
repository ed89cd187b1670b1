"""Many clients at once, clients that leave, and a store that fails under them."""

import asyncio
import concurrent.futures
import contextlib
import json
import socket
import threading
import time

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
from serving import KEYS, MODEL, running
from tiny import assert_same_state

from gru_memory.server.engine import Engine, EngineLimits, TimedOut
from gru_memory.server.errors import ApiError
from gru_memory.server.http import while_there

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


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("memory/busy/remember", {"text": HOME}),
        ("memory/busy/decay", {"ticks": 1}),
        ("memory/busy/forget", {"text": BOAT}),
        ("conversations/busy/items", {"items": [user(HOME)]}),
    ],
)
def test_a_session_in_which_a_reply_comes_is_changed_by_nobody_else(server, client, http, path, body):
    chat(client, BOAT, **in_session("busy"))
    before, held = server.store.get("busy", ADA), threading.Event()
    server.engine.call(held.wait)
    try:
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            reply = pool.submit(chat, client, WHERE, **in_session("busy"))
            until(lambda: server.app.state.service._busy)
            refused = http.post(f"/v1/{path}", json=body, timeout=10)
            held.set()
            assert text_of(reply.result(30))
    finally:
        held.set()
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "conversation_locked")
    assert server.store.get("busy", ADA).turns == before.turns + 1
    assert http.post(f"/v1/{path}", json=body).status_code == 200


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


# Clients that leave


def until(happened):
    deadline = time.monotonic() + 30
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@contextlib.contextmanager
def asking(server, **settings):
    """A connection that has sent a request, and is closed in the end whether or not it was answered."""
    body = json.dumps({"model": MODEL, "messages": [user(HOME)], **settings}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {KEYS[0]}\r\n"
    head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1]))) as connection:
        connection.sendall(head.encode() + body)
        yield


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


# Stores that fail, servers that stop


def test_a_session_is_busy_until_what_a_client_left_behind_is_kept(server, client, monkeypatch):
    chat(client, BOAT, **in_session("left"))
    busy, begun, held, commit = (
        server.app.state.service._busy,
        threading.Event(),
        threading.Event(),
        server.store.commit,
    )

    def slow(*arguments, **settings):
        begun.set()
        assert held.wait(30)
        return commit(*arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(server.store, "commit", slow)
        with asking(server, session_id="left", max_tokens=4):
            assert begun.wait(30)
        time.sleep(0.3)  # the server has noticed by now
        with pytest.raises(openai.ConflictError):
            chat(client, WHERE, **in_session("left"))
        held.set()
        until(lambda: not busy)
    assert server.store.get("left", ADA).turns == 2
    assert text_of(chat(client, WHERE, **in_session("left")))


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


def test_replies_that_do_not_end_when_the_server_stops_are_told_so(loaded, tmp_path, monkeypatch):
    step = Engine._decode_step
    monkeypatch.setattr(Engine, "_decode_step", lambda *arguments: (time.sleep(0.05), step(*arguments)))
    with (
        running(tmp_path / "s", loaded, grace_seconds=0.5, default_new_tokens=200) as server,
        server.client() as client,
    ):
        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            whole = pool.submit(chat, client, BOAT)
            streams = [
                pool.submit(list, chat(client, BOAT, stream=True)),
                pool.submit(list, client.responses.create(model=MODEL, input=BOAT, stream=True)),
            ]
            until(lambda: server.engine.active == 3)
            server.server.should_exit = True
            with pytest.raises(openai.InternalServerError) as refused:
                whole.result(30)
            assert (refused.value.status_code, refused.value.code) == (503, "shutting_down")
            with pytest.raises(openai.APIError, match="the server is shutting down"):
                streams[0].result(30)
            last = streams[1].result(30)[-1]
            assert (last.type, last.code) == ("error", "shutting_down")
        server.thread.join(10)
        assert not server.thread.is_alive()


@pytest.mark.parametrize(("says", "status"), [({"type": "http.disconnect"}, 499), (OSError("gone"), None)])
def test_what_is_being_done_goes_on_unless_the_client_has_left(says, status):
    """A connection that cannot be asked is not one that is gone."""

    class Asked:
        async def receive(self):
            if isinstance(says, Exception):
                raise says
            return says

    async def run():
        ended = []

        async def work():
            try:
                await asyncio.sleep(0.05)
                return "done"
            finally:
                ended.append(True)

        try:
            return await while_there(Asked(), work()), ended
        except ApiError as error:
            return error.status, ended

    assert asyncio.run(run()) == (status or "done", [True])


def test_what_waits_for_the_model_too_long_is_told_so_and_never_runs(loaded, tmp_path):
    with running(tmp_path / "s", loaded, engine=EngineLimits(request_seconds=0.3)) as server:
        service, ran = server.app.state.service, []

        async def both():
            first = asyncio.ensure_future(service.with_model(lambda: time.sleep(1)))
            second = asyncio.ensure_future(service.with_model(lambda: ran.append(True)))
            return await asyncio.gather(first, second, return_exceptions=True)

        assert [type(found) for found in asyncio.run(both())] == [TimedOut, TimedOut]
        time.sleep(1)
        assert not ran and asyncio.run(service.with_model(lambda: "well")) == "well"


class Heard:
    """Takes turns in, slowly, and remembers which."""

    def __init__(self, seconds=0.0):
        self.turns, self.seconds = [], seconds

    def read(self, text, reply):
        time.sleep(self.seconds)
        self.turns.append(text)


def test_between_the_turns_of_a_request_others_come_to_theirs(server):
    service, heard = server.app.state.service, Heard()

    async def both():
        other = service.with_model(lambda: heard.turns.append("other"))
        await asyncio.gather(service.read(heard, [("one", None), ("two", None)]), other)

    asyncio.run(both())
    assert heard.turns == ["one", "other", "two"]


def test_turns_that_take_too_long_together_end_between_two(loaded, tmp_path):
    with running(tmp_path / "s", loaded, engine=EngineLimits(request_seconds=0.3)) as server:
        service, heard = server.app.state.service, Heard(0.2)
        with pytest.raises(TimedOut):
            asyncio.run(service.read(heard, [(str(number), None) for number in range(5)]))
        asyncio.run(service.with_model(lambda: None))
        assert heard.turns == ["0", "1"]


@pytest.mark.parametrize("path", ["conversations", "conversations/left-early/items"])
def test_who_leaves_while_turns_are_read_has_none_of_them_kept(server, client, http, monkeypatch, path):
    chat(client, BOAT, **in_session("left-early"))
    before, heard = [(s.name, s.turns) for s in server.store.list(ADA)], Heard(0.2)
    monkeypatch.setattr("gru_memory.conversation.Conversation.read", lambda self, *turn: heard.read(*turn))
    with pytest.raises(Exception, match="timed out"):
        http.post(f"/v1/{path}", json={"items": [user(str(number)) for number in range(8)]}, timeout=0.5)
    until(lambda: not server.app.state.service._busy)
    time.sleep(0.4)
    assert 1 <= len(heard.turns) < 6
    assert [(s.name, s.turns) for s in server.store.list(ADA)] == before
