"""Clients send a whole history again with each message: what is known of it is not written twice."""

import pytest

pytest.importorskip("openai")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

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

from gru_memory import Conversation
from gru_memory.server.protocol import Message, split
from gru_memory.server.recognition import where_to_go_on
from gru_memory.store import TurnRecord
from gru_memory.store.digests import turn_digest, user_digest

# Through OpenAI's own client


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


def test_what_was_forgotten_stays_so_when_a_message_is_sent_again(server, client, loaded):
    history, settings = (
        [user(BOAT), assistant(text_of(chat(client, BOAT, **in_session("forgetful"))))],
        in_session("forgetful"),
    )
    chat(client, *history, HOME, **settings)
    client.post("../v1/memory/forgetful/forget", body={"text": BOAT}, cast_to=object)
    conversation = Conversation(*loaded, max_new_tokens=8)
    conversation.load(server.store.head(server.store.get("forgetful", ADA)).state)
    conversation.say(HOME)
    for _ in range(2):
        chat(client, *history, HOME, **settings)
        assert_same_state(state_of(server, "forgetful"), conversation.state)
    session = server.store.get("forgetful", ADA)
    assert [turn.user for turn in server.store.transcript(session)] == [BOAT, HOME, HOME]


def test_a_history_that_was_read_in_is_not_written_twice(server, client, loaded):
    history, settings = [user(BOAT), assistant("Lovely.")], in_session("reader")
    for text in (HOME, HOME, WHERE):  # regenerated, then edited
        chat(client, *history, text, **settings)
        _, conversation = expected(loaded, (BOAT, "Lovely."), text)
        assert_same_state(state_of(server, "reader"), conversation.state)
        session = server.store.get("reader", ADA)
        assert [turn.user for turn in server.store.transcript(session)] == [BOAT, text]


# Which turn it goes on from


def test_messages_become_turns():
    def parts(*pairs):
        return split([Message(role=role, content=text) for role, text in pairs])

    assert parts(("user", "a")) == (None, [], "a")
    assert parts(("system", "s"), ("user", "a"), ("user", "b"), ("assistant", "c"), ("user", "d")) == (
        "s", [("a", None), ("b", "c")], "d",
    )  # fmt: skip
    assert parts(("user", "a"), ("assistant", ""), ("user", "b")) == (None, [("a", "")], "b")
    cut = (("system", "s"), ("assistant", "z"), ("assistant", "y"), ("user", "a"), ("assistant", "b"), ("user", "c"))
    assert parts(*cut) == ("s", [("a", "b")], "c")
    with pytest.raises(ValueError, match="the last message must be the user's"):
        parts(("assistant", "z"))


def test_a_window_that_begins_with_a_reply_goes_on(server, client):
    messages = [assistant("Welcome.")]
    for text in (BOAT, HOME, WHERE, "Where is my boat?"):
        messages.append(user(text))
        messages.append(assistant(text_of(chat(client, *messages[-4:], **in_session("window")))))
    told = server.store.transcript(server.store.get("window", ADA))
    assert [turn.user for turn in told] == [BOAT, HOME, WHERE, "Where is my boat?"]


def test_what_is_new_does_not_begin_with_a_reply(http):
    body = {"model": MODEL, "input": [assistant("Welcome."), user(BOAT)], "max_output_tokens": 2}
    assert http.post("/v1/responses", json=body).status_code == 200
    assert http.post("/v1/responses", json={**body, "conversation": "window-2"}).status_code == 400


SALT = b"0123456789abcdef"


def tree(*rows):
    """Records from (id, parent, user, reply); ids in capitals have lost their state."""
    return [
        TurnRecord(i, parent, n, 0.0, turn_digest(SALT, u, r), user_digest(SALT, u), i.islower(), u, r)
        for n, (i, parent, u, r) in enumerate(rows, start=1)
    ]


LINE = tree(("a", None, "A", "1"), ("b", "a", "B", "2"), ("c", "b", "C", "3"))
READ_IN = tree(("A", None, "A", "1"), ("B", "A", "B", "2"), ("c", "B", "C", "3"))
EDITED = tree(("a", None, "A", "1"), ("b", "a", "B", "2"), ("edit_b", "a", "B", "2"))
ONCE_MORE = [*EDITED, *tree(("d", "edit_b", "B", "2"))]
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
        (LINE[:1], "a", [], "A", True, ("a", [])),  # another chat of the same user begins with the same words
        (TOLD, "r", [], "R", True, ("r", [])),
        (EDITED, "edit_b", [A, B], "X", False, ("edit_b", [])),
        (EDITED, "edit_b", [A], "B", False, ("edit_b", [])),  # regenerated, after an edit by hand, which stays
        (EDITED, "edit_b", [A], "X", False, ("edit_b", [])),
        (ONCE_MORE, "d", [A], "B", False, ("edit_b", [])),  # and again: in place of what was said once more
        (ONCE_MORE, "d", [A, B], "X", False, ("d", [])),
        (ONCE_MORE, "d", [], "B", False, ("d", [])),
        ([*EDITED, *LINE[2:]], "c", [A, B], "C", False, ("b", [])),  # an edit that did not lead here
        ([*EDITED, *tree(("c", "edit_b", "C", "3"))], "c", [A, B], "C", False, ("edit_b", [])),
    ],
)
def test_which_part_of_a_history_is_known(records, head, history, message, linear, wanted):
    assert where_to_go_on(records, head, SALT, history, message, linear) == wanted
