"""Clients that talk to a server whatever happens to it, and note what it has acknowledged."""

from __future__ import annotations

import threading
import time
from collections import Counter
from dataclasses import dataclass, field

import httpx2

from gru_memory import MemoryState
from gru_memory.store import SessionNotFound, SessionStore

from .result import Result
from .victim import MODEL


@dataclass(frozen=True)
class Acknowledged:
    """A turn to which the server has answered 200."""

    text: str
    reply: str
    response_id: str


@dataclass
class Talk:
    """One conversation as its client knows it."""

    name: str
    asked: list[str] = field(default_factory=list)
    acknowledged: list[Acknowledged] = field(default_factory=list)


class Talkers:
    """A thread for each conversation, which says one thing after the other.

    Attributes:
        refused: (status, code) -> how often that was the answer.
        served_by: replica -> turns it has answered; "" where there are none.
        lost: how often the connection broke.
    """

    def __init__(self, talks: list[Talk], pause: float = 0.0) -> None:
        self.talks, self.pause = talks, pause
        self.refused: Counter[tuple[int, str]] = Counter()
        self.served_by: Counter[str] = Counter()
        self.lost = 0
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._threads: list[threading.Thread] = []

    @property
    def acknowledged(self) -> int:
        return sum(len(talk.acknowledged) for talk in self.talks)

    def start(self, url: str) -> None:
        self._stop.clear()
        self._threads = [threading.Thread(target=self._talk, args=(url, talk)) for talk in self.talks]
        for thread in self._threads:
            thread.start()

    def wait_for(self, turns: int, seconds: float = 60.0) -> None:
        """Wait until this many more turns are acknowledged."""
        wanted, deadline = self.acknowledged + turns, time.monotonic() + seconds
        while self.acknowledged < wanted:
            if time.monotonic() > deadline:
                raise TimeoutError(f"the server answered {dict(self.refused)}, and nothing else in {seconds:.0f} s")
            time.sleep(0.005)

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(120)

    def _talk(self, url: str, talk: Talk) -> None:
        with httpx2.Client(base_url=url, timeout=60) as http:
            while not self._stop.is_set():
                text = f"{talk.name} says {len(talk.asked)}."
                talk.asked.append(text)
                body = {"model": MODEL, "input": text, "conversation": talk.name}
                try:
                    answer = http.post("/v1/responses", json=body)
                except httpx2.TransportError:
                    with self._lock:
                        self.lost += 1
                    self._stop.wait(0.05)
                    continue
                if answer.status_code == 200:
                    made = answer.json()
                    with self._lock:
                        self.served_by[answer.headers.get("x-gru-memory-replica", "")] += 1
                    reply = made["output"][0]["content"][0]["text"]
                    talk.acknowledged.append(Acknowledged(text, reply, made["id"]))
                else:
                    with self._lock:
                        self.refused[answer.status_code, _code(answer)] += 1
                    self._stop.wait(0.05)
                if self.pause:
                    self._stop.wait(self.pause)


def _code(answer: httpx2.Response) -> str:
    """What the server calls it; "" if it was not the server that answered, but something before it."""
    try:
        return answer.json()["error"]["code"]
    except ValueError:
        return ""


def check(store: SessionStore, talks: list[Talk], result: Result, seen: dict[str, int]) -> tuple[int, int]:
    """Every acknowledged turn is there, in order, and every session can be read.

    Of the snapshots, exactly those are gone that `Limits.max_states` lets go of: as there are no branches, those with as
    many newer ones. Returns how many turns were kept that nobody acknowledged, and how many acknowledged ones have lost
    their snapshots.

    Args:
        store: after whatever happened to it.
        talks: what the clients know.
        result: is told what does not hold.
        seen: name -> acknowledged turns whose snapshots were read at an earlier check; brought up to date.
    """
    extra = gone = 0
    for talk in talks:
        if not talk.acknowledged:
            continue
        try:
            session = store.get(talk.name)
            turns = store.transcript(session)
            head = MemoryState.from_bytes(store.head(session).state)
        except (SessionNotFound, ValueError) as error:
            result.broken.append(f"{talk.name} cannot be read: {error}")
            continue
        kept = [(turn.user, turn.reply, turn.id) for turn in turns]
        places = {identity: place for place, (_, _, identity) in enumerate(kept)}
        told = [(turn.text, turn.reply, turn.response_id) for turn in talk.acknowledged]
        missing = [turn for turn in told if turn not in kept]
        result.expect(not missing, f"{talk.name} lost {len(missing)} acknowledged turns, the first is {missing[:1]}")
        order = [places[turn[2]] for turn in told if turn in kept]
        result.expect(order == sorted(order), f"{talk.name}: turns are not in the order in which they were said")
        texts = [text for text, _, _ in kept]
        result.expect(len(set(texts)) == len(texts), f"{talk.name}: a turn was written twice")
        result.expect(set(texts) <= set(talk.asked), f"{talk.name} holds what nobody said")
        counts = (session.turns, int(head.turns), len(kept))
        result.expect(len(set(counts)) == 1, f"{talk.name}: session, state and transcript count {counts} turns")
        still = {identity for _, _, identity in kept[-store.limits.max_states :]}  # older ones lose their states
        for turn in talk.acknowledged[seen.get(talk.name, 0) :]:
            try:
                MemoryState.from_bytes(store.snapshot(turn.response_id).state)
                result.expect(turn.response_id in still, f"{talk.name}: {turn.response_id} kept its state for too long")
            except SessionNotFound as error:
                result.expect(turn.response_id not in still, f"{talk.name}: a snapshot is gone: {error}")
                gone += 1
            except ValueError as error:
                result.broken.append(f"{talk.name}: the snapshot {turn.response_id} cannot be read: {error}")
        seen[talk.name] = len(talk.acknowledged)
        extra += len(kept) - len(told)
    return extra, gone
