"""`kill -9` of a server in the middle of writing."""

from __future__ import annotations

import random
import signal
import tempfile
import time
from pathlib import Path

from gru_memory import Conversation, MemoryState
from gru_memory.store import SessionStore

from .result import Result
from .talkers import Talk, Talkers, check
from .victim import NEW_TOKENS, tiny, victim


def run(kills: int, conversations: int = 20, replayed: int = 5, seed: int = 0) -> Result:
    """Kill a server that writes `conversations` at once, at a random moment, start another on its file, and so on.

    Args:
        kills: how often.
        conversations: written at the same time.
        replayed: conversations that are said once more at the end, alone, to compare the state.
        seed: of the moments.
    """
    result, draw, seen = Result(), random.Random(seed), {}
    talks = [Talk(f"talk {number}") for number in range(conversations)]
    extra, began = 0, time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gru-chaos-") as folder:
        path = Path(folder) / "sessions.sqlite3"
        refused = 0
        for _ in range(kills):
            talkers = Talkers(talks)
            with victim(path) as (process, url):
                talkers.start(url)
                talkers.wait_for(1)
                time.sleep(draw.uniform(0.0, 1.0))
                process.kill()
                process.join()
                result.expect(process.exitcode == -signal.SIGKILL, f"the server ended by itself: {process.exitcode}")
                talkers.stop()
            refused += sum(talkers.refused.values())
            result.expect(not talkers.refused, f"the server refused: {dict(talkers.refused)}")
            with SessionStore(str(path)) as store:
                extra, _ = check(store, talks, result, seen)
                with store.engine.connect() as connection:
                    said = connection.exec_driver_sql("PRAGMA integrity_check").scalar()
                result.expect(said == "ok", f"SQLite finds its file damaged: {said}")
        with SessionStore(str(path)) as store:
            for talk in talks[:replayed]:
                _replay(store, talk, result)
    told = sum(len(talk.acknowledged) for talk in talks)
    result.expect(told >= 2 * kills, f"only {told} turns were acknowledged: this tried nothing")
    result.figures = {
        "kills": f"{kills}",
        "conversations": f"{conversations}",
        "acknowledged turns, all there": f"{told:,}",
        "further turns kept whose answer was lost on the way": f"{extra:,}",
        "sessions that cannot be read": "0" if not result.broken else "see what broke",
        "conversations said again, alone, with the same state": f"{min(replayed, conversations)}",
        "time": f"{time.monotonic() - began:.0f} s",
    }
    return result


def _replay(store: SessionStore, talk: Talk, result: Result) -> None:
    """The state that outlived all those servers is that of a conversation nobody ever interrupted."""
    session = store.get(talk.name)
    alone = Conversation(*tiny(), max_new_tokens=NEW_TOKENS)
    for turn in store.transcript(session):
        said = alone.say(turn.user)
        result.expect(said == turn.reply, f"{talk.name}: {turn.reply!r} was answered, {said!r} would be right")
    kept = MemoryState.from_bytes(store.head(session).state)
    for site, tensors in kept.sites.items():
        off = (tensors["slots"] - alone.state.sites[site]["slots"]).abs().max().item()
        result.expect(off < 1e-9, f"{talk.name}: slots at {site} are off by {off:.1e}")
