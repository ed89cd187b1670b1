"""Responses and conversations by their ids, through OpenAI's own client."""

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
    client_of_ada,  # noqa: F401 (a fixture)
    client_of_bob,  # noqa: F401 (a fixture)
    model_and_tokenizer,  # noqa: F401 (a fixture)
    shared_server,  # noqa: F401 (a fixture)
)
from serving import KEYS, MODEL, running
from tiny import assert_same_state

from gru_memory import Conversation, MemoryState


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


def test_without_text_no_state_holds_a_message(loaded, tmp_path):
    path = tmp_path / "s"
    with running(path, loaded, keep_text=False, context_turns=2) as server, server.client() as client:
        name = client.conversations.create(items=[{"role": "user", "content": BOAT}]).id
        client.conversations.items.create(name, items=[{"role": "user", "content": BOAT}])
        say(client, BOAT, conversation=name)
        client.post(f"../v1/memory/{name}/remember", body={"text": BOAT}, cast_to=object)
        client.post(f"../v1/memory/{name}/decay", body={"ticks": 1}, cast_to=object)
        assert server.store.get(name, ADA).turns == 4
        assert not any(BOAT.encode() in file.read_bytes() for file in tmp_path.iterdir())


def test_attention_sees_no_message_that_was_forgotten(loaded, tmp_path):
    with running(tmp_path / "s", loaded, context_turns=2) as server, server.client() as client:
        say(client, BOAT, conversation="boat")
        assert BOAT.encode() in server.store.head(server.store.get("boat", ADA)).state
        client.post("../v1/memory/boat/forget", body={"text": BOAT}, cast_to=object)
        assert BOAT.encode() not in server.store.head(server.store.get("boat", ADA)).state


def test_attention_sees_no_turn_whose_response_was_deleted(loaded, tmp_path):
    with running(tmp_path / "s", loaded, context_turns=3) as server, server.client() as client:
        made = [say(client, text, conversation="boat") for text in (BOAT, HOME)]
        before = server.store.head(server.store.get("boat", ADA)).state
        client.post("../v1/memory/boat/decay", body={"ticks": 1}, cast_to=object)
        client.responses.delete(made[0].id)
        assert not any(BOAT.encode() in file.read_bytes() for file in tmp_path.iterdir())
        after = server.store.snapshot(made[1].id, ADA).state
        assert_same_state(MemoryState.from_bytes(after), MemoryState.from_bytes(before), tolerance=0)
        conversation = Conversation(*loaded, context_turns=3, max_new_tokens=8)
        conversation.load(after)
        assert HOME.encode() in conversation.to_bytes()
        assert say(client, WHERE, previous_response_id=made[1].id).output_text == conversation.say(WHERE)
        client.responses.delete(made[1].id)
        session = server.store.get("boat", ADA)
        state = server.store.head(session).state
        assert HOME.encode() not in state and len(state) == session.state_bytes


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


def test_a_response_whose_state_is_not_kept_is_told_from_one_that_never_was(loaded, tmp_path):
    from gru_memory.store import Limits

    with running(tmp_path / "s", loaded, limits=Limits(max_states=4)) as server, server.client() as client:
        first = last = say(client, BOAT)
        quiet = say(client, HOME, previous_response_id=first.id)
        for _ in range(6):
            last = say(client, HOME, previous_response_id=last.id)
        session, extra = server.store.list(ADA)[0].name, {"at": first.id, "name": "copy"}
        for call in (
            lambda: say(client, WHERE, previous_response_id=first.id),
            lambda: client.post(f"/memory/{session}/fork", body=extra, cast_to=object),
        ):
            told = not_found(call)
            assert told["code"] == "state_not_kept" and "go on from a later response" in told["message"]
        assert client.responses.retrieve(first.id).output_text == first.output_text
        assert say(client, WHERE, previous_response_id=quiet.id).output_text
        with server.client(KEYS[1]) as bob:
            never = not_found(lambda: say(bob, WHERE, previous_response_id="resp_never"))
            assert not_found(lambda: say(bob, WHERE, previous_response_id=first.id)) == never


def test_where_there_is_no_room_nothing_is_removed_to_make_some(loaded, tmp_path):
    from gru_memory.store import Limits

    with running(tmp_path / "s", loaded, limits=Limits(max_sessions=2)) as server, server.client() as client:
        once, named = say(client, BOAT), say(client, BOAT, conversation="named")
        kept = [session.name for session in server.store.list(ADA)]
        for fields in ({}, {"conversation": "new"}, {"user": "new"}, {"stream": True}):
            with pytest.raises(openai.APIStatusError) as refused:
                say(client, HOME, **fields)
            assert (refused.value.status_code, refused.value.code) == (413, "too_many_sessions")
            assert "`store` is false" in refused.value.message and "DELETE /v1/memory" in refused.value.message
        assert say(client, HOME, store=False).output_text
        assert [session.name for session in server.store.list(ADA)] == kept
        # What there is goes on, whoever made it.
        assert say(client, HOME, previous_response_id=once.id).previous_response_id == once.id
        assert say(client, HOME, conversation="named").id != named.id
        with server.client(KEYS[1]) as bob:
            say(bob, BOAT)
        client.delete(f"/memory/{once.id}", cast_to=object)
        assert say(client, HOME).output_text


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
        {"metadata": {"k": "nul\0"}},
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


def message(role, content):
    return {"type": "message", "role": role, "content": content}


def texts(items):
    return [(item.role, item.content[0].text) for item in items]


def test_the_items_of_a_conversation_are_what_was_said_in_it(client):
    made = client.conversations.create(items=[message("user", BOAT), message("assistant", "Lovely.")])
    reply = say(client, HOME, conversation=made.id, max_output_tokens=3)
    streamed = list(say(client, WHERE, conversation=made.id, stream=True))[-1].response
    wanted = [
        ("user", BOAT), ("assistant", "Lovely."), ("user", HOME), ("assistant", reply.output_text), ("user", WHERE),
        ("assistant", streamed.output_text),
    ]  # fmt: skip
    items = client.conversations.items.list(made.id, order="asc").data
    assert texts(items) == wanted
    assert texts(client.conversations.items.list(made.id).data) == wanted[::-1]
    assert [items[3].model_dump(), items[5].model_dump()] == [
        {**response.output[0].model_dump()} for response in (reply, streamed)
    ]
    assert {item.type for item in items} == {"message"} and len({item.id for item in items}) == 6
    assert items[0].content[0].type == "input_text" and items[1].content[0].type == "output_text"
    for item in items:
        assert client.conversations.items.retrieve(item.id, conversation_id=made.id) == item


def test_items_come_in_pages(client):
    made = client.conversations.create(items=[message("user", f"This is {number}.") for number in range(7)])
    first = client.conversations.items.list(made.id, limit=3, order="asc")
    assert (len(first.data), first.has_more, first.last_id) == (3, True, first.data[-1].id)
    for order in ("asc", "desc"):
        numbers = [
            int(item.content[0].text[8]) for item in client.conversations.items.list(made.id, limit=3, order=order)
        ]
        assert numbers == sorted(range(7), reverse=order == "desc")
    assert client.conversations.items.list(made.id, after=first.data[0].id, order="desc").data == []
    assert not client.conversations.items.list(made.id, limit=7).has_more
    client.conversations.items.create(made.id, items=[message("user", "And more.")] * 15)
    page = client.conversations.items.list(made.id)
    assert (len(page.data), page.has_more, len(list(page))) == (20, True, 22)
    for limit in (0, 101):
        with pytest.raises(openai.BadRequestError, match="limit"):
            client.conversations.items.list(made.id, limit=limit)
    with pytest.raises(openai.BadRequestError, match="not supported"):
        client.conversations.items.list(made.id, include=["message.output_text.logprobs"])
    not_found(lambda: client.conversations.items.list(made.id, after="msg_never"))


def test_items_that_are_added_are_in_memory(server, client, loaded):
    made = client.conversations.create()
    alone = Conversation(*loaded, system="Be brief.", max_new_tokens=8)
    given = [message("system", "Be brief."), message("user", BOAT), message("assistant", "Lovely.")]
    added = client.conversations.items.create(made.id, items=given)
    assert texts(added.data) == [("user", BOAT), ("assistant", "Lovely.")]
    assert (added.first_id, added.last_id, added.has_more) == (added.data[0].id, added.data[1].id, False)
    alone.read(BOAT, "Lovely.")
    reply = say(client, HOME, conversation=made.id)
    assert reply.output_text == alone.say(HOME)
    again = client.conversations.items.create(made.id, items=[message("user", "I row.")])
    alone.read("I row.")
    assert say(client, WHERE, conversation=made.id).output_text == alone.say(WHERE)
    assert_same_state(MemoryState.from_bytes(server.store.head(server.store.get(made.id, ADA)).state), alone.state)
    listed = client.conversations.items.list(made.id, order="asc").data
    assert listed[:2] == added.data and listed[4:5] == again.data


@pytest.mark.parametrize(
    "items",
    [
        [],
        [message("user", BOAT)] * 21,
        [message("assistant", BOAT)],
        [message("system", "Be brief.")],
        [{"type": "function_call", "call_id": "1", "name": "f", "arguments": ""}],
    ],
)
def test_items_that_memory_cannot_take_in_are_refused(server, client, items):
    made = client.conversations.create(items=[message("user", BOAT)])
    before = server.store.get(made.id, ADA)
    with pytest.raises(openai.BadRequestError):
        client.conversations.items.create(made.id, items=items)
    assert server.store.get(made.id, ADA) == before


def test_a_system_prompt_among_added_items_is_seen_from_there_on(server, client, loaded):
    made = client.conversations.create(items=[message("user", BOAT)])
    client.conversations.items.create(made.id, items=[message("system", "Be brief."), message("user", HOME)])
    alone = Conversation(*loaded, max_new_tokens=8)
    alone.read(BOAT)
    alone.use_system("Be brief.")
    alone.read(HOME)
    assert_same_state(MemoryState.from_bytes(server.store.head(server.store.get(made.id, ADA)).state), alone.state)


def test_parameters_that_do_nothing_are_refused(server, client):
    made = client.conversations.create(items=[message("user", BOAT)])
    (item,) = client.conversations.items.list(made.id).data
    before = server.store.get(made.id, ADA)
    items, odd = client.conversations.items, {"extra_query": {"include": "all"}}
    for call in (
        lambda: items.create(made.id, items=[message("user", HOME)], **odd),
        lambda: items.retrieve(item.id, conversation_id=made.id, **odd),
        lambda: items.delete(item.id, conversation_id=made.id, **odd),
    ):
        with pytest.raises(openai.BadRequestError, match="not supported"):
            call()
    assert server.store.get(made.id, ADA) == before


def test_a_system_prompt_alone_begins_no_conversation(server, client):
    before = server.store.list(ADA)
    with pytest.raises(openai.BadRequestError, match="instructions"):
        client.conversations.create(items=[message("system", "Be brief.")])
    assert server.store.list(ADA) == before


def test_an_item_that_memory_has_taken_in_is_not_deleted(server, client):
    made = client.conversations.create(items=[message("user", BOAT)])
    before = server.store.get(made.id, ADA)
    (item,) = client.conversations.items.list(made.id).data
    with pytest.raises(openai.ConflictError, match="/forget") as refused:
        client.conversations.items.delete(item.id, conversation_id=made.id)
    assert refused.value.code == "taken_in"
    assert server.store.get(made.id, ADA) == before
    assert client.conversations.items.list(made.id).data == [item]
    not_found(lambda: client.conversations.items.delete("msg_never", conversation_id=made.id))


def test_what_has_no_text_has_no_items(client, loaded, tmp_path):
    made = say(client, BOAT, conversation="half gone")
    kept = say(client, HOME, conversation="half gone")
    client.responses.delete(made.id)
    assert texts(client.conversations.items.list("half gone", order="asc").data) == [
        ("user", HOME), ("assistant", kept.output_text)
    ]  # fmt: skip
    with running(tmp_path / "s", loaded, keep_text=False) as server, server.client() as other:
        conversation = other.conversations.create()
        added = other.conversations.items.create(conversation.id, items=[message("user", BOAT)])
        assert texts(added.data) == [("user", BOAT)]
        assert other.conversations.items.list(conversation.id).data == []
        not_found(lambda: other.conversations.items.retrieve(added.first_id, conversation_id=conversation.id))


def test_items_of_another_tenant_are_as_those_that_never_were(client, bob):
    hers = client.conversations.create(items=[message("user", BOAT)])
    (item,) = client.conversations.items.list(hers.id).data
    his = bob.conversations.create(items=[message("user", HOME)])
    items, never = bob.conversations.items, "conv_" + "0" * 32
    for call in (
        lambda identity: items.list(identity),
        lambda identity: items.create(identity, items=[message("user", HOME)]),
        lambda identity: items.retrieve(item.id, conversation_id=identity),
        lambda identity: items.delete(item.id, conversation_id=identity),
    ):
        assert not_found(lambda c=call: c(hers.id)) == not_found(lambda c=call: c(never))
    not_found(lambda: items.retrieve(item.id, conversation_id=his.id))
    assert client.conversations.items.list(hers.id).data == [item]
