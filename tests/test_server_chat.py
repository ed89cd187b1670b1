"""Chat completions and responses are what the library says, through OpenAI's own client."""

from copy import deepcopy

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
from serving import MODEL, running
from tiny import assert_same_state

from gru_memory import Conversation, MemoryState

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


def test_a_request_that_is_refused_leaves_no_session_behind(server, client, http):
    before = server.store.list(ADA)
    with pytest.raises(openai.BadRequestError):
        chat(client, BOAT * 500, **in_session("refused"))
    assert http.post("/v1/memory/refused/remember", json={"text": " "}).status_code == 400
    assert server.store.list(ADA) == before


def test_a_top_p_asks_for_a_draw(client, loaded):
    greedy = expected(loaded, BOAT)[0][0]
    settings = {"model": MODEL, "messages": [{"role": "user", "content": BOAT}], "seed": 3}
    drawn = {
        client.chat.completions.create(**settings, top_p=top_p).choices[0].message.content for top_p in (0.99, 0.98)
    }
    assert greedy not in drawn
    assert client.chat.completions.create(**settings, top_p=1).choices[0].message.content == greedy
    assert client.responses.create(model=MODEL, input=BOAT, top_p=0.5).temperature == 1
    assert client.responses.create(model=MODEL, input=BOAT, top_p=0.5, temperature=0).temperature == 0


def test_a_header_may_name_a_session_in_any_script(http, server):
    body = {"model": MODEL, "messages": [{"role": "user", "content": BOAT}]}
    for name, written in (
        ("caf\u00e9", "latin-1"),
        ("caf\u00e8", "utf-8"),
        ("\u043b\u043e\u0434\u043a\u0430", "utf-8"),
    ):
        answer = http.post("/v1/chat/completions", json=body, headers={"x-session-id": name.encode(written)})
        assert answer.status_code == 200, answer.text
        assert server.store.get(name, ADA).turns == 1


def test_instructions_are_those_of_one_response(client, loaded):
    first = client.responses.create(model=MODEL, input=BOAT, instructions="Be brief.")
    second = client.responses.create(model=MODEL, input=WHERE, previous_response_id=first.id)
    conversation = Conversation(*loaded, system="Be brief.", max_new_tokens=8)
    conversation.say(BOAT)
    conversation.use_system(None)
    assert second.output_text == conversation.say(WHERE)


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
