"""What conversations take, measured for one and counted up for a thousand and a million: `python -m gru_memory.bench.sizing`."""

from __future__ import annotations

import math
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..conversation import Conversation
from ..evaluation.full_history import kv_bytes_per_token
from ..evaluation.report import environment
from ..server.engine import Done, Engine, EngineLimits, Event, Failed, Job
from ..store import Limits, SessionStore

TURNS = 10  # of each conversation
MESSAGE = "By the way, my boat is called Marigold, and it has lain in the harbour of Porto since last summer."
NEW_TOKENS = 32  # of a reply
DAY = 86_400  # seconds


@dataclass(frozen=True)
class Sizes:
    """Of one conversation of `TURNS` turns, or of one turn of it. Bytes and seconds of processor time.

    Attributes:
        state: bytes of its memory, as it is kept.
        stored: bytes of database with the states of all turns, so that any of them can be gone on from.
        stored_last: the same with the last state alone.
        history: bytes of the KV cache that its whole history would need.
        tokens: of one turn, reply included.
        alone, together: processor time of a turn, one at a time and `batch` at once.
        commit: processor time of keeping a turn.
        batch: conversations at once.
    """

    state: int
    stored: float
    stored_last: float
    history: int
    tokens: int
    alone: float
    together: float
    commit: float
    batch: int


def measure(model: Any, tokenizer: Any, batch: int = 16, sessions: int = 100) -> Sizes:
    """Run turns and keep sessions, in a temporary folder.

    Args:
        model: a causal LM with memory.
        tokenizer: its tokenizer.
        batch: conversations at once, for the cheaper of the two ways to serve.
        sessions: that are written into each database.
    """
    engine = Engine(model, tokenizer, EngineLimits(max_batch=batch, wait_seconds=3600, request_seconds=3600))
    try:
        _turn_seconds(engine, 1)  # whatever the first turn has to load
        alone, tokens, reply = _turn_seconds(engine, 1)
        together, _, _ = _turn_seconds(engine, batch)
    finally:
        engine.close()
    conversation, states = Conversation(model, tokenizer), []
    for _ in range(TURNS):
        conversation.read(MESSAGE, reply)
        states.append(conversation.to_bytes())
    stored, commit = _stored(states, reply, sessions, Limits())
    stored_last, _ = _stored(states, reply, sessions, Limits(max_states=1))
    history = TURNS * tokens * kv_bytes_per_token(model)
    return Sizes(len(states[-1]), stored, stored_last, history, tokens, alone, together, commit, batch)


def _turn_seconds(engine: Engine, count: int) -> tuple[float, int, str]:
    """Processor seconds of a turn of `count` conversations at once; tokens of one; a reply."""
    ended, done = threading.Semaphore(0), []

    def heard(event: Event) -> None:
        if isinstance(event, (Done, Failed)):
            done.append(event)
            ended.release()

    began = time.process_time()
    for _ in range(count):
        engine.submit(Job(Conversation(engine.model, engine.tokenizer), MESSAGE, heard, max_new_tokens=NEW_TOKENS))
    for _ in range(count):
        ended.acquire()
    seconds = time.process_time() - began
    for event in done:
        if isinstance(event, Failed):
            raise event.error
    return seconds / count, done[0].prompt_tokens + done[0].completion_tokens, done[0].reply


def _stored(states: list[bytes], reply: str, sessions: int, limits: Limits) -> tuple[float, float]:
    """Bytes of database a session, and processor seconds a turn that is kept."""
    with tempfile.TemporaryDirectory(prefix="gru-memory-") as folder:
        path = Path(folder) / "sessions.sqlite3"
        with SessionStore(str(path), limits) as store:
            began = time.process_time()
            for number in range(sessions):
                session = store.create(f"session {number}")
                for state in states:
                    session = store.commit(session, [(MESSAGE, reply)], state, session.head).session
            seconds = time.process_time() - began
        return path.stat().st_size / sessions, seconds / (sessions * len(states))


def render(sizes: Sizes, model_name: str) -> str:
    """docs/sizing.md."""
    rows = [
        ("memory, as it is kept", sizes.state, _bytes),
        (f"SQLite file, {TURNS} turns with their text, the last state", sizes.stored_last, _bytes),
        (f"SQLite file, {TURNS} turns with their text and all states", sizes.stored, _bytes),
        (f"KV cache that {TURNS} turns of history would need instead", sizes.history, _bytes),
        (f"processor time of one turn each, {sizes.batch} at once", sizes.together + sizes.commit, _time),
        ("the same, one at a time", sizes.alone + sizes.commit, _time),
    ]
    here = environment()
    turn, batch = sizes.together + sizes.commit, sizes.batch
    lines = [
        "# Sizing",
        "",
        "Written by `python -m gru_memory.bench.sizing > docs/sizing.md`, which measures one conversation and counts it up.",
        f"Run it on the machine that is to serve. Here: {model_name}, {here['threads']} thread on {here['cpu']}.",
        "",
        "| | one conversation | 1,000 | 1,000,000 |",
        "|---|---|---|---|",
        *(f"| {what} | {show(one)} | {show(1e3 * one)} | {show(1e6 * one)} |" for what, one, show in rows),
        "",
        f"A turn is {sizes.tokens} tokens: a message, and a reply of up to {NEW_TOKENS}. Processor time is that of all cores",
        f"together, and counts no waiting; keeping a turn is {1e3 * sizes.commit:.1f} ms of it. So one core answers",
        f"{DAY / turn:,.0f} turns a day when {batch} conversations come at once, and if each conversation has {TURNS} turns a",
        f"day, spread evenly, 1,000 of them need {_cores(sizes, 1e3)}, and 1,000,000 need {_cores(sizes, 1e6)}. Days are not",
        "even: multiply by what your busiest hour has in times of the average one.",
        "",
        "- **Memory of the machine** does not grow with the number of conversations: a state is in it only while its turn is",
        f"  answered. A replica needs the model, and {_bytes(sizes.history / TURNS)} of KV cache for each turn in progress.",
        "- **Disk** is set by `--max-states`, 64 unless set: how many responses of a session can be gone on from.",
        "  Text takes what it takes; `--no-text` keeps none.",
        "- **Write rate**: a turn writes its state and its text once, and SQLite writes both twice (log and file).",
        "",
    ]
    return "\n".join(lines)


def _cores(sizes: Sizes, conversations: float) -> str:
    cores = math.ceil(conversations * TURNS * (sizes.together + sizes.commit) / DAY)
    return "1 core" if cores <= 1 else f"{cores:,} cores"


def _bytes(count: float) -> str:
    for unit in ("bytes", "KB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:,.0f} {unit}" if unit == "bytes" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def _time(seconds: float) -> str:
    if seconds < 1:
        return f"{1e3 * seconds:.0f} ms"
    for length, unit in ((1, "s"), (60, "min"), (3600, "h"), (DAY, "days")):
        if seconds < 100 * length or unit == "days":
            return f"{seconds / length:,.1f} {unit}"
    raise AssertionError


def main() -> None:
    from ..embedded import EMBEDDED_NAME
    from ..shipped import load_with_memory

    sys.stdout.write(
        render(measure(*load_with_memory(EMBEDDED_NAME)), "SmolLM2-135M-Instruct with the memory that ships")
    )


if __name__ == "__main__":
    main()
