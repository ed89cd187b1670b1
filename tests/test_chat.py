"""`gru-memory chat` and `gru-memory sessions`: through a pipe, at a terminal, and with what the store holds after it."""

import re
import sys

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("sqlalchemy")

import torch
from talking import talking_model, talking_tokenizer
from tiny import assert_differ, assert_same_state
from typer.testing import CliRunner

from gru_memory import Conversation, MemoryState, shipped
from gru_memory.cli.app import app
from gru_memory.cli.chat import Chat
from gru_memory.cli.output import harmless
from gru_memory.cli.reference import reference
from gru_memory.editing import forget, forget_slot, kept_share
from gru_memory.evaluation.full_history import kv_bytes_per_token
from gru_memory.store import Limits, SessionConflict, SessionStore, StoredConversation, StoreUnavailable


@pytest.fixture(scope="module")
def loaded():
    return talking_model("llama"), talking_tokenizer("llama")


@pytest.fixture
def run(monkeypatch, tmp_path, loaded):
    """A command with a tiny model and a store of its own."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("GRU_MEMORY_STORE", str(tmp_path / "sessions.sqlite3"))
    monkeypatch.setattr(shipped, "load_with_memory", lambda model, memory, device: loaded)
    monkeypatch.chdir(tmp_path)
    return lambda *args, lines=(): CliRunner().invoke(app, list(map(str, args)), input="".join(f"{x}\n" for x in lines))


def chat(run, *lines, options=()):
    return run("chat", "--max-new-tokens", 5, *options, lines=lines)


def kept(name="default"):
    with SessionStore() as store:
        return [(turn.user, turn.reply) for turn in store.transcript(store.get(name))]


def test_in_a_pipe_each_line_is_a_turn_and_only_replies_are_printed(run, loaded):
    result = chat(run, "My boat is called Marigold.", "", "Where do I live?")
    assert result.exit_code == 0, result.output
    wanted = Conversation(*loaded, max_new_tokens=5)
    replies = [wanted.say("My boat is called Marigold."), wanted.say("Where do I live?")]
    assert result.stdout == "".join(f"{harmless(reply)}\n" for reply in replies)
    assert kept() == [("My boat is called Marigold.", replies[0]), ("Where do I live?", replies[1])]


def test_a_session_goes_on_and_others_are_others(run, loaded):
    chat(run, "My boat is called Marigold.")
    other = chat(run, "Where do I live?", options=["--session", "other"])
    again = chat(run, "Where do I live?")
    wanted = Conversation(*loaded, max_new_tokens=5)
    wanted.say("My boat is called Marigold.")
    assert again.stdout == harmless(wanted.say("Where do I live?")) + "\n"
    assert other.stdout == harmless(Conversation(*loaded, max_new_tokens=5).say("Where do I live?")) + "\n"
    with SessionStore() as store:
        assert_same_state(MemoryState.from_bytes(store.head(store.get("default")).state), wanted.state)
        assert sorted(session.name for session in store.list()) == ["default", "other"]


def test_an_ephemeral_chat_leaves_nothing(run, tmp_path):
    result = chat(run, "Hello.", options=["--ephemeral"])
    assert result.exit_code == 0
    assert result.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [(), ("--ephemeral",)])
def test_what_is_ephemeral_already_goes_on(run, options):
    result = chat(run, "Hello.", "/ephemeral", "/ephemeral", "Still here?", options=options)
    assert result.exit_code == 0, result.output
    assert result.stderr.count("Nothing is kept already.") == 1 + bool(options)
    assert result.stdout == chat(run, "Hello.", "Still here?", options=["--ephemeral"]).stdout


def test_commands(run, tmp_path, loaded):
    result = chat(
        run, "My boat is called Marigold.", "/remember I live in Porto.", "/memory 3", "/facts", "/stats", "/history",
        "/save talk.safetensors", "/fork copy", "/forget marigold", "/memory", "/ephemeral", "Gone.", "/history", "/help",
        "/quit", "Never said.",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    out = result.stdout
    facts = _facts(out)
    assert 0 < facts["My boat is called Marigold."] < facts["I live in Porto."] <= 100
    with SessionStore() as store:
        saved = store.import_path("talk.safetensors", name="saved")
        assert f"tokens   {saved.tokens}\n" in out
        assert [turn.user for turn in store.transcript(saved)] == ["My boat is called Marigold.", "I live in Porto."]
    assert "> I live in Porto." in out and "> Gone." in out
    assert "/ephemeral" in out and "Never said." not in out
    assert "1 message(s)" in result.stderr
    assert [user for user, _ in kept()] == [user for user, _ in kept("copy")]
    assert [user for user, _ in kept()] == ["My boat is called Marigold.", "I live in Porto."]
    with SessionStore() as store:
        names = ("default", "copy", "saved")
        before, after, saved = (MemoryState.from_bytes(store.head(store.get(name)).state) for name in names)
    assert_same_state(before, saved, tolerance=0)
    assert_differ(after, before)  # forgotten there alone


@pytest.mark.parametrize("text", [True, False])
def test_what_was_kept_nowhere_can_be_saved_and_gone_on_with(run, loaded, text):
    options = ["--ephemeral", "--text" if text else "--no-text"]
    result = chat(run, "My boat is called Marigold.", "/remember I live in Porto.", "/save boat.x", options=options)
    assert result.exit_code == 0, result.output
    assert "session 'boat', 2 turns" in run("sessions", "import", "boat.x").stdout
    users = [user for user, _ in kept("boat")]
    assert users == (["My boat is called Marigold.", "I live in Porto."] if text else [None, None])
    wanted = Conversation(*loaded, max_new_tokens=5)
    wanted.say("My boat is called Marigold.")
    wanted.read("I live in Porto.")
    with SessionStore() as store:
        state = store.head(store.get("boat")).state
        assert_same_state(MemoryState.from_bytes(state), MemoryState.from_bytes(wanted.to_bytes()), tolerance=0)
    assert chat(run, "Where do I live?", options=["--session", "boat"]).exit_code == 0


def test_a_session_without_text_has_none_in_its_file_when_it_is_ephemeral(run, tmp_path):
    lines = ("My boat is called Marigold.", "/ephemeral", "I live in Porto.", "/history", "/save x")
    result = chat(run, *lines, options=["--no-text"])
    assert result.exit_code == 0, result.output
    assert "> (not kept)\n" in result.stdout
    assert "session 'x', 2 turns" in run("sessions", "import", "x").stdout
    assert kept("x") == [(None, None)] * 2
    assert b"Porto" not in (tmp_path / "x").read_bytes()


def test_save_writes_over_no_file(run, tmp_path):
    (tmp_path / "there").write_text("mine")
    result = chat(run, "Hello.", "/save there")
    assert (result.exit_code, "there is there already: choose another name" in result.stderr) == (1, True)
    assert (tmp_path / "there").read_text() == "mine"


@pytest.mark.parametrize("options", [[], ["--ephemeral"]])
@pytest.mark.parametrize("line", ["/save x", "/fork x"])
def test_there_is_nothing_to_save_or_fork_before_the_first_turn(run, tmp_path, options, line):
    result = chat(run, line, options=options)
    assert (result.exit_code, "error:" in result.stderr, "Traceback" in result.output) == (1, True, False)
    assert not (tmp_path / "x").exists()
    with SessionStore() as store:
        assert store.list() == []


def test_a_chat_without_a_turn_leaves_no_session(run, monkeypatch):
    assert chat(run, "/stats", "/history", "/memory", "/facts", options=["--session", "empty"]).exit_code == 0

    def fail(*_):
        raise ValueError("no such model")

    monkeypatch.setattr("gru_memory.cli.chat.load", fail)
    assert chat(run, "Hello.", options=["--session", "other"]).exit_code == 1
    assert "no sessions" in run("sessions", "list").stdout


def test_a_session_that_somebody_else_made_meanwhile_is_gone_on_with(loaded, tmp_path):
    with SessionStore(str(tmp_path / "s")) as store:
        talks = [StoredConversation(*loaded, store, store.get_or_begin("boat"), max_new_tokens=5) for _ in range(2)]
        talks[0].refresh()
        talks[0].read("My boat.")
        with pytest.raises(SessionConflict):
            talks[1].read("I live in Porto.")
        talks[1].refresh()
        talks[1].read("I live in Porto.")
        assert [turn.user for turn in talks[1].transcript()] == ["My boat.", "I live in Porto."]


@pytest.mark.parametrize("line", ["Caf\xe9.", "/remember Caf\xe9.", "/history Caf\xe9."])
def test_a_line_that_is_no_utf_8_ends_a_pipe_after_those_before_it(run, line):
    data = b"Hello.\n" + line.encode("latin-1") + b"\nNever said.\n"
    result = CliRunner().invoke(app, ["chat", "--max-new-tokens", "5"], input=data)
    assert result.exit_code == 1
    assert result.stderr == "error: this line is no valid UTF-8: convert it, with iconv for example\n"
    assert [user for user, _ in kept()] == ["Hello."]


def test_a_line_that_is_no_utf_8_is_refused_at_a_terminal(run, monkeypatch):
    at_a_terminal(monkeypatch, ["Caf\udce9.", "Where?"])
    result = chat(run)
    assert result.exit_code == 0, result.output
    assert "error: this line is no valid UTF-8" in result.stderr
    assert [user for user, _ in kept()] == ["Where?"]


def test_two_slashes_say_one(run):
    result = chat(run, "//quit is a command.", "/help")
    assert result.exit_code == 0, result.output
    assert [user for user, _ in kept()] == ["/quit is a command."]
    assert "//TEXT" in result.stdout


def test_what_a_session_holds_is_no_command_to_a_terminal(run, loaded):
    evil, safe = "My boat\x1b]0;title\x07 is\x9b2J called\x7f.\ttab", r"My boat\x1b]0;title\x07 is\x9b2J called\x7f."
    conversation = Conversation(*loaded)
    conversation.read("My boat.", "Lovely.")
    with SessionStore() as store:
        store.commit(store.create("default"), [(evil, evil)], conversation.to_bytes(), None)
    for result in (run("sessions", "show", "default"), chat(run, "/history", "/facts")):
        assert result.exit_code == 0, result.output
        assert result.stdout.count(safe) == (3 if "%" in result.stdout else 2)
        assert not set(result.output) & {*map(chr, range(9)), *"\x0b\x0c\r\x1b\x7f", *map(chr, range(0x80, 0xA0))}


def test_a_reply_is_no_command_to_a_terminal(run, monkeypatch):
    monkeypatch.setattr(StoredConversation, "say", lambda self, text, **settings: "\x1b[2J")
    assert chat(run, "Hello.").stdout == "\\x1b[2J\n"


def _facts(out):
    """Percentages by message, of the lines that /facts prints."""
    return {text.strip(): int(share) for share, text in re.findall(r"(\d+)%\s+(.+)", out)}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/nothing", "there is no command /nothing"),
        ("/stats please", "/stats takes no argument: type /stats alone"),
        ("/quit now", "/quit takes no argument"),
        ("/fork", "/fork needs more: /fork NAME"),
        ("/memory all", "takes a number of slots"),
        ("/memory 0", "at least 1, not '0'"),
        ("/forget 9:9", "there is no slot 9 of head 9"),
        ("/forget zebra", "no message of yours contains 'zebra'"),
        ("/save nowhere/x", "nowhere/x: No such file"),
        ("/fork default", "there is a session 'default' already"),
    ],
)
def test_a_wrong_command_ends_a_pipe_with_one_line(run, line, message):
    result = chat(run, "Hello.", line, "Never said.")
    assert result.exit_code == 1
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert [user for user, _ in kept()] == ["Hello."]


def at_a_terminal(monkeypatch, lines):
    """Lines typed at a terminal; an exception among them is what the key raises."""
    typed = iter(lines)

    def type_line(prompt):
        line = next(typed, EOFError)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", type_line)
    monkeypatch.setattr("gru_memory.cli.chat._at_a_terminal", lambda: True)


def test_without_text_only_what_was_said_is_forgotten(loaded, tmp_path, monkeypatch):
    said = []
    with SessionStore(str(tmp_path / "sessions")) as store:
        session = store.get_or_begin("boat", keep_text=False)
        talk = StoredConversation(*loaded, store, session, max_new_tokens=4)
        here = Chat(talk, *loaded)
        monkeypatch.setattr(here, "_done", said.append)
        talk.say("My boat is called Marigold.")
        before, version = talk.conversation.state, store.get("boat").version
        with pytest.raises(ValueError, match="reads 'My boat', word for word, so nothing was changed"):
            here._command("forget My boat")
        assert (talk.conversation.state is before, store.get("boat").version) == (True, version)
        here._command("forget My boat is called Marigold.")
        assert store.get("boat").version > version
        assert said[0].startswith("Forgotten: 1 message(s).")


def test_without_text_a_message_is_forgotten_by_its_words(run):
    result = chat(run, "My boat is called Marigold.", "/forget My boat is called Marigold.", options=["--no-text"])
    assert result.exit_code == 0, result.output
    assert "Forgotten: 1 message(s)." in result.stderr
    assert "goes on as it began" not in chat(run, "Hello.").stderr


def test_what_is_for_new_conversations_is_not_dropped_without_a_word(run):
    chat(run, "Hello.", options=["--system", "Be brief."])
    again = chat(run, "Hello.", options=["--system", "Be a pirate."])
    assert again.exit_code == 0
    assert "session 'default' goes on as it began" in again.stderr
    assert "goes on as it began" not in chat(run, "Hello.").stderr


def test_a_terminal_streams_and_survives_mistakes(run, monkeypatch, loaded):
    at_a_terminal(monkeypatch, ["My boat.", "/nothing", "Where?"])
    result = chat(run)
    assert result.exit_code == 0, result.output
    assert "session 'default', 0 turns so far" in result.stdout
    assert "error: there is no command /nothing" in result.stderr
    (first, reply), (second, _) = kept()
    assert (first, second) == ("My boat.", "Where?")
    assert harmless(reply) in result.stdout


def test_a_terminal_goes_on_where_even_the_store_is_away(run, monkeypatch):
    at_a_terminal(monkeypatch, ["My boat.", "/nothing", "Where?"])

    def away(self):
        raise StoreUnavailable("the store cannot be used")

    monkeypatch.setattr(StoredConversation, "refresh", away)
    result = chat(run)
    assert result.exit_code == 0, result.output
    assert [user for user, _ in kept()] == ["My boat.", "Where?"]


def test_ctrl_c_while_the_model_speaks_keeps_the_turns_before_and_nothing_of_this_one(run, monkeypatch, loaded):
    at_a_terminal(monkeypatch, ["My boat.", "Stop!", "Where?"])
    put = __import__("transformers").TextStreamer.put
    calls = []

    def interrupted(self, value):
        calls.append(value)
        if len(calls) == 10:  # in the middle of the second reply
            raise KeyboardInterrupt
        put(self, value)

    monkeypatch.setattr("transformers.TextStreamer.put", interrupted)
    result = chat(run)
    assert result.exit_code == 0, result.output
    assert "this turn was not kept" in result.stderr
    wanted = Conversation(*loaded, max_new_tokens=5)
    replies = [wanted.say(text) for text in ("My boat.", "Where?")]
    assert kept() == [("My boat.", replies[0]), ("Where?", replies[1])]


def test_ctrl_c_at_the_prompt_drops_the_line_and_goes_on(run, monkeypatch):
    at_a_terminal(monkeypatch, ["My boat.", KeyboardInterrupt, "Where?"])
    result = chat(run)
    assert result.exit_code == 0, result.output
    assert [user for user, _ in kept()] == ["My boat.", "Where?"]


def test_ctrl_c_in_a_pipe_ends_it_with_what_was_acknowledged(run, monkeypatch):
    say = StoredConversation.say

    def interrupted(self, text, **generation):
        if text == "Stop!":
            raise KeyboardInterrupt
        return say(self, text, **generation)

    monkeypatch.setattr(StoredConversation, "say", interrupted)
    result = chat(run, "My boat.", "Stop!", "Never said.")
    assert result.exit_code == 130
    assert [user for user, _ in kept()] == ["My boat."]


def test_when_the_store_fails_nothing_has_happened(loaded, tmp_path, monkeypatch):
    with SessionStore(str(tmp_path / "s")) as store:
        talk = StoredConversation(*loaded, store, store.create("boat"), max_new_tokens=5)
        talk.say("My boat.")
        before, session = talk.conversation.state, talk.session
        other = StoredConversation(*loaded, store, session, max_new_tokens=5)
        other.read("I was faster.")
        for call in (
            lambda: talk.say("Where?"),
            lambda: talk.read("Where?"),
            lambda: talk.edit(talk.conversation.model.initial_memory_state(1)),
        ):
            with pytest.raises(SessionConflict):
                call()
            assert_same_state(talk.conversation.state, before, tolerance=0)
            assert (talk.session, talk.conversation.turns) == (session, 1)
        talk.refresh()
        assert_same_state(talk.conversation.state, other.conversation.state, tolerance=0)
        assert talk.say("Where?") == other.conversation.say("Where?")


def test_attention_sees_no_turn_from_before_an_edit(loaded, tmp_path):
    with SessionStore(str(tmp_path / "s")) as store:
        talk = StoredConversation(*loaded, store, store.create("boat"), context_turns=2, max_new_tokens=5)
        talk.say("My boat.")
        talk.edit(talk.conversation.state)
        assert b"My boat." not in talk.conversation.to_bytes()


def test_without_text_attention_sees_turns_only_while_the_conversation_lives(loaded, tmp_path):
    with SessionStore(str(tmp_path / "s")) as store:
        session = store.create("boat", keep_text=False)
        talk = StoredConversation(*loaded, store, session, context_turns=2, max_new_tokens=5)
        talk.say("My boat.")
        assert b"My boat." in talk.conversation.to_bytes()
        assert b"My boat." not in store.head(talk.session).state


@pytest.mark.parametrize("kept", [True, False])
def test_ctrl_c_once_memory_has_taken_a_turn_in_takes_it_back(loaded, tmp_path, monkeypatch, kept):
    with SessionStore(str(tmp_path / "s")) as store:
        talk = StoredConversation(*loaded, store, store.create("boat") if kept else None, max_new_tokens=5)
        talk.say("My boat.")
        before, commit = talk.conversation.state, Conversation.commit

        def interrupted(self, *turn):
            commit(self, *turn)
            raise KeyboardInterrupt

        monkeypatch.setattr(Conversation, "commit", interrupted)
        for call in (talk.say, talk.read):
            with pytest.raises(KeyboardInterrupt):
                call("Where?")
            assert_same_state(talk.conversation.state, before, tolerance=0)
            assert (talk.conversation.turns, len(talk.transcript())) == (1, 1)


def test_a_session_that_is_made_anew_has_nothing_of_the_old_one(loaded, tmp_path):
    with SessionStore(str(tmp_path / "s")) as store:
        talk = StoredConversation(*loaded, store, store.create("boat"), max_new_tokens=5)
        talk.say("My boat.")
        store.delete("boat")
        session = store.create("boat")
        talk.refresh()
        assert (talk.session, talk.conversation.turns) == (session, 0)
        talk.read("I live in Porto.")
        wanted = Conversation(*loaded)
        wanted.read("I live in Porto.")
        assert_same_state(talk.conversation.state, wanted.state, tolerance=0)


@pytest.mark.parametrize("command", [["list"], ["show", "default"], ["rm", "default"], ["export", "default", "x"]])
def test_looking_makes_no_store(run, tmp_path, command):
    result = run("sessions", *command)
    assert result.exit_code == 1
    assert "there is no store" in result.stderr and "give $GRU_MEMORY_STORE as it was" in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_session_that_lives_longer_than_calendars_is_shown(run):
    with SessionStore(limits=Limits(ttl_seconds=1e13)) as store:
        store.create("default")
    result = run("sessions", "show", "default")
    assert result.exit_code == 0, result.output
    assert re.search(r"expires +after the year 9999", result.stdout)


def test_sessions_list_show_export_import_rm(run, tmp_path):
    SessionStore().close()
    assert "no sessions yet" in run("sessions", "list").stdout
    chat(run, "My boat is called Marigold.")
    chat(run, "Hello.", options=["--session", "other", "--no-text"])
    listed = run("sessions", "list").stdout
    assert "default" in listed and "other" in listed
    shown = run("sessions", "show", "default").stdout
    assert "> My boat is called Marigold." in shown
    assert "(not kept)" in run("sessions", "show", "other").stdout
    assert run("sessions", "export", "default", "boat.safetensors").exit_code == 0
    again = run("sessions", "export", "default", "boat.safetensors")
    assert (again.exit_code, "is there already" in again.stderr) == (1, True)
    assert "already" in run("sessions", "import", "boat.safetensors").stderr
    assert "session 'copy', 1 turns" in run("sessions", "import", "boat.safetensors", "--name", "copy").stdout
    assert run("sessions", "rm", "default").exit_code == 0
    assert kept("copy") and kept("other")
    for command in (["show", "default"], ["rm", "default"], ["export", "default", "x"]):
        result = run("sessions", *command)
        assert (result.exit_code, result.stderr) == (1, "error: there is no session 'default'\n")
    (tmp_path / "junk").write_bytes(b"junk")
    assert "error: this file is no session" in run("sessions", "import", "junk").stderr


@pytest.mark.skipif(sys.version_info < (3, 11), reason="an older typer, with a help of its own")
def test_the_help_in_the_documents_is_the_help(repository):
    message = "docs/cli.md is out of date: python -m gru_memory.cli.reference > docs/cli.md"
    assert (repository / "docs" / "cli.md").read_text() == reference(), message


# Editing


def told(loaded, *turns):
    conversation = Conversation(*loaded)
    for turn in turns:
        conversation.read(turn)
    return conversation.state


def test_a_turn_just_read_is_all_there_and_fades_under_others(loaded):
    texts = ["My boat is called Marigold.", "I live in Porto.", "Where do you live?"]
    shares = [kept_share(*loaded, told(loaded, *texts[:n]), texts[0]) for n in (1, 2, 3)]
    assert shares[0] == pytest.approx(1)
    assert shares[0] > shares[1] > shares[2] >= 0
    assert kept_share(*loaded, loaded[0].initial_memory_state(1), texts[0]) == 0


def test_forgetting_a_turn_takes_more_of_it_than_of_others(loaded):
    texts = ["My boat is called Marigold.", "Porto porto porto?"]
    state = told(loaded, *texts)
    after = forget(*loaded, state, texts[1])
    lost = [kept_share(*loaded, state, text) - kept_share(*loaded, after, text) for text in texts]
    assert lost[1] > lost[0] >= 0
    assert after.turns.tolist() == state.turns.tolist()
    assert torch.equal(after.sites["top"]["address"], state.sites["top"]["address"])


def test_an_emptied_slot_is_empty_and_the_others_are_not(loaded):
    state = told(loaded, "My boat is called Marigold.")
    after = forget_slot(state, 1, 2)
    slots = state.sites["top"]["slots"].clone()
    assert slots[0, 1, 2].abs().max() > 0
    slots[0, 1, 2] = 0
    assert torch.equal(after.sites["top"]["slots"], slots)
    for head, slot in ((2, 0), (0, 4), (-1, 0)):
        with pytest.raises(ValueError, match="there is no slot"):
            forget_slot(state, head, slot)
    with pytest.raises(ValueError, match="no slots at site 'middle'"):
        forget_slot(state, 0, 0, site="middle")


def test_what_a_token_costs_in_a_cache(loaded):
    assert kv_bytes_per_token(loaded[0]) == 3 * 2 * 32 * 8  # layers, keys and values, hidden size, bytes of float64


@pytest.mark.needs_model
def test_the_shipped_memory_forgets_what_it_is_told_to_and_nothing_else():
    model, tokenizer = shipped.load_with_memory()
    chat = Conversation(model, tokenizer, max_new_tokens=12)
    for text in ("My boat is called Marigold.", "By the way, I live in Porto."):
        chat.read(text, "Noted.")
    state = chat.state
    assert "Marigold" in chat.say("What is my boat called?")
    chat.state = forget(model, tokenizer, state, "My boat is called Marigold.")
    assert "Marigold" not in chat.say("What is my boat called?")
    chat.state = forget(model, tokenizer, state, "My boat is called Marigold.")
    assert "Porto" in chat.say("Where do I live?")
