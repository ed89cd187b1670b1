"""What tests of the session store share: a store on either database, and a conversation to keep in it."""

import pytest
from talking import talking_model, talking_tokenizer

from gru_memory import Conversation
from gru_memory.store import SessionStore

TURNS = [("My boat is called Marigold.", "Lovely."), ("I live in Porto.", None), ("Where do I live?", "In Porto.")]


class Clock:
    now = 1_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module", name="states")
def states_of_a_conversation():
    """The bytes of one conversation, from before the first turn to after the last."""
    conversation = Conversation(talking_model("llama"), talking_tokenizer("llama"))
    found = [conversation.to_bytes()]
    for turn in TURNS:
        conversation.read(*turn)
        found.append(conversation.to_bytes())
    return found


@pytest.fixture(params=["sqlite", "postgres"], name="url")
def url_of_a_new_store(request, tmp_path):
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'folder' / 'sessions.sqlite3'}"
    return request.getfixturevalue("postgres").empty()


@pytest.fixture(name="clock")
def clock_of_the_store():
    return Clock()


@pytest.fixture(name="store")
def store_on_either_database(url, clock):
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
