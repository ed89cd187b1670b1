"""Many conversations at once, each told a fact of its own."""

from __future__ import annotations

import random
import re
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
from serving import KEYS, MODEL, running

from gru_memory import Conversation, MemoryState
from gru_memory.server.settings import owner_of

from .result import Result
from .victim import tiny

ASKED = "What is my boat called?"
NEW_TOKENS = 16  # enough for a name and the words before it
_SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]


def names(count: int, seed: int = 0) -> list[str]:
    """Names that nobody has, no two alike: three syllables and an end."""
    draw, found = random.Random(seed), {}
    while len(found) < count:
        found[("".join(draw.choices(_SYLLABLES, k=3)) + draw.choice("lnrst")).capitalize()] = None
    return list(found)


def told(name: str) -> str:
    return f"My boat is called {name}."


def run(conversations: int, at_once: int = 16) -> Result:
    """Tell each conversation a name and ask for it, `at_once` at a time, and compare with each of them alone.

    The model is tiny and its weights are random: replies and slots must be those of the conversation alone, to the last digits
    of float64.

    Args:
        conversations: how many.
        at_once: clients.
    """
    began, kept_in = time.monotonic(), Conversation.kept_in
    Conversation.kept_in = None
    try:
        result = _tiny(names(conversations), at_once)
    finally:
        Conversation.kept_in = kept_in
    result.figures["time"] = f"{time.monotonic() - began:.0f} s"
    return result


def _talk(url: str, model: str, name: str) -> list[str]:
    headers = {"authorization": f"Bearer {KEYS[0]}"}
    with httpx2.Client(base_url=url, timeout=3600, headers=headers) as http:
        replies = []
        for text in (told(name), ASKED):
            body = {"model": model, "input": text, "conversation": f"the {name}", "max_output_tokens": NEW_TOKENS}
            answer = http.post("/v1/responses", json=body)
            answer.raise_for_status()
            replies.append(answer.json()["output"][0]["content"][0]["text"])
    return replies


def _tiny(boats: list[str], at_once: int) -> Result:
    result, worst = Result(), 0.0
    loaded = tiny()
    with (
        tempfile.TemporaryDirectory(prefix="gru-chaos-") as folder,
        running(Path(folder) / "sessions.sqlite3", loaded) as server,
    ):
        with ThreadPoolExecutor(at_once) as pool:
            replies = list(pool.map(lambda name: _talk(server.url, MODEL, name), boats))
        shared = _rows_a_pass(server)
        for name, got in zip(boats, replies, strict=True):
            alone = Conversation(*loaded, max_new_tokens=NEW_TOKENS)
            wanted = [alone.say(told(name)), alone.say(ASKED)]
            result.expect(got == wanted, f"{name}: answered {got}, alone {wanted}")
            session = server.store.get(f"the {name}", owner_of(KEYS[0]))
            kept = MemoryState.from_bytes(server.store.head(session).state)
            for site, tensors in kept.sites.items():
                off = (tensors["slots"] - alone.state.sites[site]["slots"]).abs().max().item()
                worst = max(worst, off)
                result.expect(off < 1e-9, f"{name}: slots at {site} are off by {off:.1e}")
    result.expect(shared > 1.5, f"only {shared:.1f} conversations shared a forward pass: this tried nothing")
    result.figures = {
        "conversations of a tiny model, each as it is alone": f"{len(boats):,}, {at_once} at once",
        "conversations in a forward pass": f"{shared:.1f} on average",
        "largest difference of any slot to the conversation alone": f"{worst:.0e}",
    }
    return result


def facts(conversations: int, at_once: int = 16) -> Result:
    """The same with SmolLM2 and the memory that ships, whose answers are read for the names of others.

    Args:
        conversations: how many.
        at_once: clients.
    """
    from gru_memory.server.engine import EngineLimits
    from gru_memory.shipped import load_with_memory

    result, boats, began = Result(), names(conversations), time.monotonic()
    patient = EngineLimits(wait_seconds=3600, request_seconds=3600)
    with tempfile.TemporaryDirectory(prefix="gru-chaos-") as folder:
        path = Path(folder) / "sessions.sqlite3"
        with running(path, load_with_memory(), engine=patient) as server, ThreadPoolExecutor(at_once) as pool:
            replies = list(pool.map(lambda name: _talk(server.url, MODEL, name), boats))
            shared = _rows_a_pass(server)
    everyone, right = set(boats), 0
    for name, both in zip(boats, replies, strict=True):
        said = [set(re.findall(r"[A-Za-z]+", reply)) for reply in both]
        right += name in said[1]
        others = set.union(*said) & (everyone - {name})
        result.expect(not others, f"{name} was answered {both}: there is somebody else's in it")
    result.expect(right > len(boats) / 4, f"only {right} of {len(boats)} knew their own: this tried nothing")
    result.figures = {
        "conversations of SmolLM2": f"{len(boats):,}, {at_once} at once, {shared:.1f} in a forward pass on average",
        "of them answered with their own name": f"{right:,}",
        "a reply with the name of another": "0" if not result.broken else "see what broke",
        "time": f"{time.monotonic() - began:.0f} s",
    }
    return result


def _rows_a_pass(server: object) -> float:
    batch = server.app.state.metrics.batch.collect()[0].samples
    values = {sample.name.rpartition("_")[2]: sample.value for sample in batch if not sample.labels}
    return values["sum"] / max(1.0, values["count"])
