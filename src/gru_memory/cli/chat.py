"""`gru-memory chat`: a conversation in the terminal, or through a pipe."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from rich.table import Table
from rich.text import Text
from transformers import TextStreamer

from ..editing import forget, forget_slot, kept_share, remember
from ..embedded import EMBEDDED_NAME
from ..evaluation.full_history import kv_bytes_per_token
from ..inspection import said_tokens, slot_words
from ..store import SessionStore, StoredConversation, StoreError
from ..store.digests import user_digest
from .output import (
    DEVICE_HELP,
    MEMORY_HELP,
    MODEL_HELP,
    STORE_HELP,
    console,
    errors,
    harmless,
    kilobytes,
    load,
    one_line_errors,
    set_threads,
    write_new,
)

SLOTS_SHOWN = 12
NEARLY = 0.9  # of the likest word's likeness, for others to be shown beside it
FACTS_SHOWN = 12
FACTS_READ = 60  # of the last turns: each one is read again to see what is left of it


@one_line_errors
def chat_command(
    session: Annotated[str, typer.Option(help="name of the conversation; it goes on where it was")] = "default",
    model: Annotated[str, typer.Option(help=MODEL_HELP)] = EMBEDDED_NAME,
    memory: Annotated[Optional[str], typer.Option(help=MEMORY_HELP)] = None,  # noqa: UP045 (typer on Python 3.10)
    store: Annotated[Optional[str], typer.Option(help=STORE_HELP)] = None,  # noqa: UP045
    ephemeral: Annotated[bool, typer.Option("--ephemeral", help="keep nothing of this conversation")] = False,
    system: Annotated[Optional[str], typer.Option(help="system prompt of a new conversation")] = None,  # noqa: UP045
    text: Annotated[bool, typer.Option(help="keep the messages of a new conversation, not its memory alone")] = True,
    context_turns: Annotated[int, typer.Option(help="turns that attention sees, this one included")] = 1,
    max_new_tokens: Annotated[int, typer.Option(help="longest reply, in tokens")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; higher is more varied")] = 0.0,
    device: Annotated[Optional[str], typer.Option(help=DEVICE_HELP)] = None,  # noqa: UP045
    threads: Annotated[Optional[int], typer.Option(help="threads of torch")] = None,  # noqa: UP045
) -> None:
    """Talk to a model that remembers. Every turn is kept at once; /help says what else can be typed.

    In a pipe, each line is a turn. Replies, and what commands show, go to standard output, all else to standard error.
    """
    set_threads(threads)
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature is {temperature}: it must be a finite number, at least 0")
    for name, count in (("context_turns", context_turns), ("max_new_tokens", max_new_tokens)):
        if count < 1:
            raise ValueError(f"{name} is {count}: it must be at least 1")
    _require_unicode(system or "", "the system prompt")
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    with contextlib.ExitStack() as stack:
        kept = None
        if not ephemeral:
            opened = stack.enter_context(SessionStore(store))
            kept = opened.get_or_begin(session, keep_text=text)  # made with its first turn
            if kept.head is not None and (system is not None or (kept.keep_text and not text)):
                told = "--system and --no-text are for new conversations"
                errors.print(Text(f"session {session!r} goes on as it began: {told}", style="yellow"), soft_wrap=True)
        loaded, tokenizer = load(model, memory, device)
        talk = StoredConversation(
            loaded, tokenizer, None if ephemeral else opened, kept, system, text,
            context_turns=context_turns, max_new_tokens=max_new_tokens, **sampling,
        )  # fmt: skip
        Chat(talk, loaded, tokenizer).run()


class _Printer(TextStreamer):
    """Shows a reply as it comes."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        sys.stdout.write(harmless(text) + ("\n" if stream_end else ""))
        sys.stdout.flush()


class Chat:
    """Reads lines and answers them. A line that begins with / is a command, one with // is said without the first."""

    def __init__(self, talk: StoredConversation, model: Any, tokenizer: Any) -> None:
        self.talk, self.model, self.tokenizer = talk, model, tokenizer
        self.interactive = _at_a_terminal()
        self.commands: dict[str, tuple[str, str, Callable[[str], None]]] = {
            "help": ("", "this list", self._help),
            "history": ("", "what was said", self._history),
            "memory": ("[N]", "the N strongest slots, as words that were said", self._memory),
            "facts": ("", "what you said, and how much of each message is left in memory", self._facts),
            "remember": ("TEXT", "tell the memory something without an answer", self._remember),
            "forget": (
                "TEXT | HEAD:SLOT",
                "take your messages that contain TEXT out of memory, or empty one slot",
                self._forget,
            ),
            "fork": ("NAME", "go on in a new session that begins as this one is now", self._fork),
            "save": ("FILE", "write the conversation as one file, for `gru-memory sessions import`", self._save),
            "ephemeral": ("", "keep nothing from here on", self._ephemeral),
            "stats": ("", "turns, tokens and bytes", self._stats),
            "quit": ("", "leave; so does Ctrl-D", self._quit),
        }

    def run(self) -> None:
        """Until the input ends."""
        with contextlib.suppress(AttributeError, OSError):  # not every input can; a wrong byte then ends it
            sys.stdin.reconfigure(errors="surrogateescape")  # or one would hide the good lines that were read with it
        if self.interactive:
            self._greet()
        while (line := self._line()) is not None:
            if not line.strip():
                continue
            try:
                _require_unicode(line, "this line")
                if line.startswith("/") and not line.startswith("//"):
                    self._command(line[1:].strip())
                else:
                    self._say(line.removeprefix("/"))
            except (ValueError, OSError, StoreError, FloatingPointError) as error:
                if not self.interactive or isinstance(error, BrokenPipeError):
                    raise
                errors.print(Text(f"error: {error}", style="red"), soft_wrap=True)
                self._refresh()
            except EOFError:
                return
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
                errors.print(Text("\nstopped; this turn was not kept", style="yellow"))
                self._refresh()

    def _refresh(self) -> None:
        with contextlib.suppress(ValueError, OSError, StoreError):  # the next turn meets it again, and says so
            self.talk.refresh()

    def _line(self) -> str | None:
        if not self.interactive:
            line = sys.stdin.readline()
            return line.rstrip("\n") if line else None
        try:
            return input("> ")
        except EOFError:
            return None
        except KeyboardInterrupt:  # drops what was typed, as a shell does
            errors.print()
            return ""

    def _greet(self) -> None:
        with contextlib.suppress(ImportError):
            import readline

            for turn in self.talk.transcript():
                readline.add_history((turn.user or "").replace("\n", " "))
        turns = self.talk.conversation.turns
        name = "an ephemeral conversation" if self.talk.ephemeral else f"session {self.talk.session.name!r}"
        console.print(f"{name}, {turns} turns so far. /help lists commands, Ctrl-D leaves.", markup=False)

    def _say(self, line: str) -> None:
        if self.interactive:
            self.talk.say(line, streamer=_Printer(self.tokenizer))
        else:
            _plain(self.talk.say(line))  # only what was kept is printed

    def _command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        if name not in self.commands:
            raise ValueError(f"there is no command /{name}: /help lists those there are")
        usage, _, call = self.commands[name]
        if usage and not usage.startswith("[") and not rest.strip():
            raise ValueError(f"/{name} needs more: /{name} {usage}")
        if not usage and rest.strip():
            raise ValueError(f"/{name} takes no argument: type /{name} alone, or //{name} ... to say it to the model")
        call(rest.strip())

    def _help(self, rest: str) -> None:
        table = Table(box=None, show_header=False)
        for name, (usage, what, _) in self.commands.items():
            table.add_row(Text(f"/{name} {usage}".strip()), Text(what))
        table.add_row(Text("//TEXT"), Text("say /TEXT to the model"))
        console.print(table)

    def _history(self, rest: str) -> None:
        for turn in self.talk.transcript():
            _plain(f"> {turn.user}" if turn.user is not None else "> (not kept)")
            if turn.reply:
                _plain(turn.reply)

    def _memory(self, rest: str) -> None:
        if rest and not (rest.isdecimal() and int(rest)):
            raise ValueError(f"/memory takes a number of slots, at least 1, not {rest!r}")
        said = said_tokens(self.tokenizer, [(turn.user, turn.reply) for turn in self.talk.transcript()])
        count = int(rest) if rest else SLOTS_SHOWN
        state = self.talk.conversation.state
        slots = slot_words(self.model, self.tokenizer, state, among=said, strongest=count)
        strongest = slots[0].norm if slots else 1.0
        table = Table(box=None, show_header=False)
        for slot in slots:
            words = "  ".join(repr(word) for word, likeness in slot.words if likeness >= NEARLY * slot.words[0][1])
            table.add_row(Text(f"{slot.head}:{slot.slot}"), Text(_bar(slot.norm / strongest)), Text(words))
        if slots:
            console.print(table)
        else:
            console.print("The memory is empty.")

    def _facts(self, rest: str) -> None:
        talk = self.talk
        turns = [turn for turn in talk.transcript()[-FACTS_READ:] if turn.user is not None]
        state, system = talk.conversation.state, talk.conversation.system
        shares = {turn.user: kept_share(self.model, self.tokenizer, state, turn.user, None, system) for turn in turns}
        table = Table(box=None, show_header=False)
        for text, share in sorted(shares.items(), key=lambda item: item[1], reverse=True)[:FACTS_SHOWN]:
            table.add_row(Text(_bar(share)), Text(f"{100 * share:.0f}%"), Text(harmless(text)))
        if shares:
            console.print(table)
        else:
            console.print("Nothing was said yet, or its text is not kept.")

    def _remember(self, rest: str) -> None:
        remember(self.talk, rest)
        self._done("Taken in.")

    def _forget(self, rest: str) -> None:
        state, system = self.talk.conversation.state, self.talk.conversation.system
        head, _, slot = rest.partition(":")
        if head.isdecimal() and slot.isdecimal():
            self.talk.edit(forget_slot(state, int(head), int(slot)))
            self._done(f"Slot {rest} is empty.")
            return
        texts = self._told(rest)
        for text, reply in texts:
            state = forget(self.model, self.tokenizer, state, text, reply, system)
        self.talk.edit(state)
        self._done(f"Forgotten: {len(texts)} message(s). The text of the session stays until the session is removed.")

    def _told(self, wanted: str) -> list[tuple[str, str | None]]:
        """The turns in which `wanted` was said; where no text is kept, those whose message it is, without the reply."""
        turns = self.talk.transcript()
        if self.talk.ephemeral or self.talk.session.keep_text:
            known = [(turn.user, turn.reply) for turn in turns if turn.user and wanted.lower() in turn.user.lower()]
            if not known:
                raise ValueError(f"no message of yours contains {wanted!r}: /history shows them")
            return known
        digest = user_digest(self.talk.session.salt, wanted)
        known = [(wanted, None) for turn in turns if turn.user_digest == digest]
        if not known:
            raise ValueError(f"no message of yours reads {wanted!r}, word for word, so nothing was changed")
        return known

    def _fork(self, rest: str) -> None:
        if self.talk.ephemeral:
            raise ValueError("an ephemeral conversation has no session to fork: /save it")
        self.talk.fork(rest)
        self._done(f"In session {rest!r} now.")

    def _save(self, rest: str) -> None:
        file = Path(rest).expanduser()
        write_new(file, self.talk.export(file.stem))
        self._done(f"Written to {rest}: `gru-memory sessions import` takes it in.")

    def _ephemeral(self, rest: str) -> None:
        if self.talk.ephemeral:
            self._done("Nothing is kept already.")
            return
        self.talk.make_ephemeral()
        self._done("Nothing is kept from here on; the session stays as it was.")

    def _stats(self, rest: str) -> None:
        conversation = self.talk.conversation
        tokens, state = conversation.state.tokens.item(), len(conversation.to_bytes())
        kv = kv_bytes_per_token(self.model) * tokens
        name = "ephemeral" if self.talk.ephemeral else self.talk.session.name
        _plain(f"session  {name}")
        _plain(f"turns    {conversation.turns}")
        _plain(f"tokens   {tokens}")
        _plain(f"memory   {kilobytes(state)}")
        _plain(f"a KV cache of those tokens would be {kilobytes(kv)}")

    def _quit(self, rest: str) -> None:
        raise EOFError

    def _done(self, message: str) -> None:
        """Confirms a command; in a pipe standard output is for replies."""
        (console if self.interactive else errors).print(Text(message), soft_wrap=True)


def _require_unicode(text: str, what: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} is no valid UTF-8: convert it, with iconv for example") from error


def _plain(line: str) -> None:
    sys.stdout.write(harmless(line) + "\n")
    sys.stdout.flush()


def _bar(share: float, width: int = 20) -> str:
    full = round(max(0.0, min(1.0, share)) * width)
    return "█" * full + "░" * (width - full)


def _at_a_terminal() -> bool:
    return sys.stdin.isatty()
