"""Responses and conversations by their ids, through OpenAI's own client."""

import pytest

pytest.importorskip("openai")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

import openai
from serving import KEYS, MODEL, running
from talking import talking_model, talking_tokenizer
from tiny import assert_same_state

from gru_memory import Conversation, MemoryState
from gru_memory.server.settings import owner_of

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


@pytest.fixture
def bob(server):
    with server.client(KEYS[1]) as client:
        yield client


def say(client, text, **fields):
    return client.responses.create(model=MODEL, input=text, **fields)


def not_found(call):
    with pytest.raises(openai.NotFoundError) as refused:
        call()
    return refused.value.body


def test_a_response_is_shown_as_it_was(client):
    first = say(client, BOAT, metadata={"for": "test"}, instructions="Be brief.", max_output_tokens=5, top_p=0.5)
    second = say(client, HOME, previous_response_id=first.id)
    say(client, WHERE, previous_response_id=second.id)
    third = say(client, BOAT, conversation="shown")
    streamed = list(say(client, HOME, conversation="shown", stream=True))[-1].response
    for response in (first, second, third, streamed):
        assert client.responses.retrieve(response.id).model_dump() == response.model_dump()
    assert first.metadata == {"for": "test"} and third.conversation.id == "shown"


def test_without_text_a_response_is_shown_without_it(loaded, tmp_path):
    with running(tmp_path / "s", loaded, keep_text=False) as server, server.client() as client:
        made = say(client, BOAT, instructions="Never tell anybody.")
        shown = client.responses.retrieve(made.id)
        assert (shown.output, shown.instructions, shown.usage) == ([], None, made.usage)


def test_only_responses_are_responses(server, client):
    chat = client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": BOAT}], user="ada")
    made = say(client, BOAT, conversation="edited")
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(chat.id)
    for parameters in ({"include": ["usage"]}, {"stream": True}):
        with pytest.raises(openai.BadRequestError, match="not supported"):
            client.responses.retrieve(made.id, **parameters)
    session = server.store.get("edited", ADA)
    edited = server.store.replace_state(session, server.store.head(session).state)
    fork = server.store.fork(edited, "copy of edited")
    for head in (edited.head, fork.head):
        not_found(lambda head=head: client.responses.retrieve(head))
    assert client.responses.retrieve(made.id).output_text == made.output_text


def test_a_deleted_response_is_gone_and_its_conversation_goes_on(server, client, loaded):
    made = [say(client, text, conversation="thinned") for text in (BOAT, HOME)]
    for response in made:
        client.responses.delete(response.id)
        wanted = not_found(lambda: client.responses.retrieve("resp_never"))
        assert not_found(lambda r=response: client.responses.retrieve(r.id)) == wanted
        assert not_found(lambda r=response: client.responses.delete(r.id)) == wanted
        assert not_found(lambda r=response: say(client, WHERE, previous_response_id=r.id)) == wanted
    alone = Conversation(*loaded, max_new_tokens=8)
    replies = [alone.say(text) for text in (BOAT, HOME, WHERE)]
    last = say(client, WHERE, conversation="thinned")
    assert [*(response.output_text for response in made), last.output_text] == replies
    session = server.store.get("thinned", ADA)
    assert_same_state(MemoryState.from_bytes(server.store.head(session).state), alone.state)
    turns = server.store.transcript(session)
    assert [turn.user for turn in turns] == [None, None, WHERE]
    assert [turn.has_state for turn in turns] == [False, True, True]


def test_what_nothing_can_reach_any_more_is_removed(server, client):
    first = say(client, BOAT)
    second = say(client, HOME, previous_response_id=first.id)
    client.responses.delete(first.id)
    assert client.responses.retrieve(second.id).output_text == second.output_text
    assert first.id in [session.name for session in server.store.list(ADA)]
    client.responses.delete(second.id)
    assert first.id not in [session.name for session in server.store.list(ADA)]


def test_whoever_writes_after_a_deleted_response_is_told(server, client):
    from gru_memory.store import SessionConflict

    made = say(client, BOAT, conversation="raced")
    session = server.store.get("raced", ADA)
    state = server.store.head(session).state
    client.responses.delete(made.id)
    with pytest.raises(SessionConflict):
        server.store.commit(session, [(HOME, None)], state, session.head)


def test_conversations_are_made_shown_changed_and_deleted(server, client, loaded):
    made = client.conversations.create(metadata={"topic": "boats"})
    assert made.id.startswith("conv_") and made.metadata == {"topic": "boats"}
    assert client.conversations.retrieve(made.id) == made
    reply = say(client, BOAT, conversation=made.id)
    assert reply.output_text == Conversation(*loaded, max_new_tokens=8).say(BOAT)
    changed = client.conversations.update(made.id, metadata={"topic": "homes"})
    assert changed.metadata == client.conversations.retrieve(made.id).metadata == {"topic": "homes"}
    assert server.store.get(made.id, ADA).turns == 1
    gone = client.conversations.delete(made.id)
    assert (gone.id, gone.deleted) == (made.id, True)
    not_found(lambda: client.conversations.retrieve(made.id))
    not_found(lambda: client.conversations.delete(made.id))
    not_found(lambda: client.responses.retrieve(reply.id))


def test_a_conversation_can_begin_with_items(client, loaded):
    items = [
        {"type": "message", "role": "system", "content": "Be brief."},
        {"type": "message", "role": "user", "content": BOAT},
        {"type": "message", "role": "assistant", "content": "Lovely."},
        {"type": "message", "role": "user", "content": HOME},
    ]
    made = client.conversations.create(items=items)
    alone = Conversation(*loaded, system="Be brief.", max_new_tokens=8)
    alone.read(BOAT, "Lovely.")
    alone.read(HOME)
    assert say(client, WHERE, conversation=made.id).output_text == alone.say(WHERE)


@pytest.mark.parametrize(
    "fields",
    [
        {"metadata": {"k": "v" * 513}},
        {"metadata": {"k" * 65: "v"}},
        {"metadata": {str(number): "v" for number in range(17)}},
        {"items": [{"type": "message", "role": "user", "content": BOAT}] * 21},
        {"items": [{"type": "message", "role": "assistant", "content": BOAT}]},
        {"items": [{"type": "function_call", "call_id": "1", "name": "f", "arguments": ""}]},
    ],
)
def test_what_no_conversation_can_begin_with_is_refused(server, client, fields):
    before = server.store.list(ADA)
    with pytest.raises(openai.BadRequestError):
        client.conversations.create(**fields)
    assert server.store.list(ADA) == before


def test_another_tenant_s_are_as_those_that_never_were(client, bob):
    hers, conversation = say(client, BOAT, conversation="hers"), client.conversations.create()
    for theirs, nobodys in ((hers.id, "resp_" + "0" * 32),):
        for call in (bob.responses.retrieve, bob.responses.delete):
            assert not_found(lambda c=call, i=theirs: c(i)) == not_found(lambda c=call, i=nobodys: c(i))
    for call in (
        bob.conversations.retrieve,
        bob.conversations.delete,
        lambda identity: bob.conversations.update(identity, metadata={}),
    ):
        assert not_found(lambda c=call: c(conversation.id)) == not_found(lambda c=call: c("conv_" + "0" * 32))
    assert client.responses.retrieve(hers.id).output_text == hers.output_text
    assert client.conversations.retrieve(conversation.id) == conversation
