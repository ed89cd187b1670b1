"""A server for all tests of a file, clients for it, and what the library itself would say to them."""

import pytest
from serving import KEYS, MODEL, running
from talking import talking_model, talking_tokenizer

from gru_memory import Conversation, MemoryState
from gru_memory.server.settings import owner_of

ADA = owner_of(KEYS[0])
BOAT, HOME, WHERE = "My boat is called Marigold.", "I live in Porto.", "Where do I live?"


@pytest.fixture(scope="module", name="loaded")
def model_and_tokenizer():
    return talking_model("llama"), talking_tokenizer("llama")


@pytest.fixture(scope="module", name="server")
def shared_server(loaded, tmp_path_factory):
    with running(tmp_path_factory.mktemp("server") / "sessions.sqlite3", loaded) as server:
        yield server


@pytest.fixture(name="client")
def client_of_ada(server):
    with server.client() as client:
        yield client


@pytest.fixture(name="bob")
def client_of_bob(server):
    with server.client(KEYS[1]) as client:
        yield client


@pytest.fixture(scope="module", name="http")
def plain_http(server):
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
