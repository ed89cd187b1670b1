"""Wrong keys, other tenants' names and ids: the same answer as for what never was, after the same time."""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import httpx2
from serving import KEYS, MODEL, running

from gru_memory.store.sessions import new_id

from .result import Result
from .victim import tiny

ADA, BOB = ({"authorization": f"Bearer {key}"} for key in KEYS)
_CHANCE = 5.0  # standard errors that a difference may have without being one; a chance of 1 in 2 million


def run(pairs: int, store_url: str | None = None, seed: int = 0) -> Result:
    """Bob asks for what is Ada's and for what never was, in random order, `pairs` times each way.

    Args:
        pairs: requests of each kind.
        store_url: of an empty store; None is a new SQLite file.
        seed: of the order.
    """
    result, draw = Result(), random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="gru-chaos-") as folder:
        url = store_url or Path(folder) / "sessions.sqlite3"
        with running(url, tiny()) as server, httpx2.Client(base_url=server.url, timeout=60) as http:
            made = [
                _response(http, ADA, input="My boat is called Marigold.", conversation="private") for _ in range(20)
            ]
            assert all(answer.status_code == 200 for answer in made)
            ids = [answer.json()["id"] for answer in made]
            for name, (hers, nobodys, status) in _questions(http, ids, draw).items():
                _compare(name, hers, nobodys, status, pairs, draw, result)
    return result


def _response(http: httpx2.Client, who: dict, **fields: object) -> httpx2.Response:
    return http.post("/v1/responses", headers=who, json={"model": MODEL, **fields})


def _questions(http: httpx2.Client, ids: list[str], draw: random.Random) -> dict[str, tuple]:
    """What is asked -> (of what is Ada's, of what never was, the status that both must get)."""

    def get(path: Callable[[], str], who: dict = BOB) -> Callable[[], httpx2.Response]:
        return lambda: http.get(path(), headers=who)

    def delete(path: Callable[[], str]) -> Callable[[], httpx2.Response]:
        return lambda: http.delete(path(), headers=BOB)

    def go_on(identity: Callable[[], str]) -> Callable[[], httpx2.Response]:
        return lambda: _response(http, BOB, input="Where?", previous_response_id=identity())

    def hers() -> str:
        return draw.choice(ids)

    def nobodys() -> str:
        return new_id("resp")

    def wrong(near: bool) -> dict:
        key = KEYS[0][:-1] + "0" if near else "bob" + "x" * (len(KEYS[0]) - 3)
        return {"authorization": f"Bearer {key}"}

    return {
        "a key that is almost right, a key that is all wrong": (
            get(lambda: "/v1/memory", wrong(near=True)), get(lambda: "/v1/memory", wrong(near=False)), 401,
        ),
        "memory of another's session, of none": (
            get(lambda: "/v1/memory/private"), get(lambda: f"/v1/memory/{draw.randrange(10**6, 10**7)}"), 404,
        ),
        "going on from another's response, from none": (go_on(hers), go_on(nobodys), 404),
        "showing another's response, none": (
            get(lambda: f"/v1/responses/{hers()}"), get(lambda: f"/v1/responses/{nobodys()}"), 404,
        ),
        "deleting another's conversation, none": (
            delete(lambda: "/v1/conversations/private"),
            delete(lambda: f"/v1/conversations/{draw.randrange(10**6, 10**7)}"), 404,
        ),
    }  # fmt: skip


def _compare(
    name: str, hers: Callable, nobodys: Callable, status: int, pairs: int, draw: random.Random, result: Result
) -> None:
    times: dict[str, list[float]] = {"hers": [], "nobodys": []}
    seen = set()
    for number in range(-5, pairs):  # the first ones warm up
        order = [("hers", hers), ("nobodys", nobodys)]
        draw.shuffle(order)
        for whose, ask in order:
            began = time.perf_counter()
            answer = ask()
            seconds = time.perf_counter() - began
            headers = {k: v for k, v in answer.headers.items() if k not in ("date", "x-request-id")}
            seen.add((answer.status_code, answer.text, tuple(sorted(headers.items()))))
            if number >= 0:
                times[whose].append(seconds)
    result.expect(len(seen) == 1, f"{name}: the answers differ: {sorted(seen)[:3]}")
    result.expect({answer[0] for answer in seen} == {status}, f"{name}: {status} was expected, not {sorted(seen)[:3]}")
    # What somebody who listens to the times can tell: each pair says who was slower, and noise that lasts hits both.
    slower = sum(a > b for a, b in zip(times["hers"], times["nobodys"], strict=True))
    share, error = slower / pairs, 0.5 / pairs**0.5
    middle = {whose: statistics.median(values) for whose, values in times.items()}
    result.expect(
        abs(share - 0.5) < _CHANCE * error,
        f"{name}: the first took longer in {share:.1%} of {pairs:,} pairs: time tells",
    )
    result.figures[name] = (
        f"both {status}, the same bytes; medians {1e3 * middle['hers']:.2f} and {1e3 * middle['nobodys']:.2f} ms; the first "
        f"was slower in {share:.1%} ± {error:.1%} of {pairs:,} pairs"
    )
