"""A long time at full load: memory that stays as it is, and turns that cost as much at the end as at the beginning."""

from __future__ import annotations

import os
import statistics
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import httpx2

from .result import Result
from .victim import MODEL, victim

TURNS = 40  # of a conversation before its client begins another one and deletes the first


@dataclass(frozen=True)
class Sample:
    """What the server used in one window of time, and the seconds each turn took in it."""

    resident: float  # MB
    cpu: float  # seconds
    turns: list[float]


def run(
    minutes: float,
    at_once: int = 16,
    growth_mb: float = 10.0,
    turns_slower: float = 1.5,
    cpu_more: float = 1.15,
    windows: int = 40,
) -> Result:
    """Talk to a server without a pause.

    Args:
        minutes: how long.
        at_once: clients.
        growth_mb: resident memory may grow by this from the second quarter of the time to the last.
        turns_slower: a turn may take this many times as long in the last quarter as in the second one.
        cpu_more: the same of the processor time that a turn takes. Quarters of seconds say little on a machine that does
            other things at once, so a run of seconds needs wider bounds.
        windows: samples of memory and times.
    """
    result, lock, stop = Result(), threading.Lock(), threading.Event()
    taken: list[float] = []
    wrong: list[str] = []

    def talk(url: str, who: int) -> None:
        with httpx2.Client(base_url=url, timeout=120) as http:
            number = 0
            while not stop.is_set():
                name = f"soak {who} {number}"
                for turn in range(TURNS):
                    if stop.is_set():
                        return
                    began = time.monotonic()
                    body = {"model": MODEL, "input": f"This is turn {turn}.", "conversation": name}
                    answer = http.post("/v1/responses", json=body)
                    with lock:
                        taken.append(time.monotonic() - began)
                        if answer.status_code != 200:
                            wrong.append(f"{answer.status_code} {answer.text[:200]}")
                http.delete(f"/v1/memory/{name}")
                number += 1

    samples: list[Sample] = []
    with tempfile.TemporaryDirectory(prefix="gru-chaos-") as folder:
        path = Path(folder) / "sessions.sqlite3"
        with victim(path) as (process, url):
            threads = [threading.Thread(target=talk, args=(url, who)) for who in range(at_once)]
            for thread in threads:
                thread.start()
            try:
                cpu = cpu_seconds(process.pid)
                for _ in range(windows):
                    time.sleep(60 * minutes / windows)
                    with lock:
                        turns, taken = taken, []
                    now = cpu_seconds(process.pid)
                    samples.append(Sample(_resident_mb(process.pid), now - cpu, turns))
                    cpu = now
            finally:
                stop.set()
                for thread in threads:
                    thread.join(180)
        size = path.stat().st_size
    _judge(samples, wrong, growth_mb, turns_slower, cpu_more, result)
    result.figures = {
        "minutes": f"{minutes:g}",
        "clients": f"{at_once}",
        **result.figures,
        "store": f"{size / 1e6:.1f} MB",
    }
    return result


def _judge(
    samples: list[Sample], wrong: list[str], growth_mb: float, turns_slower: float, cpu_more: float, result: Result
) -> None:
    quarter = len(samples) // 4
    early, late = samples[quarter : 2 * quarter], samples[-quarter:]
    memory = [statistics.median(sample.resident for sample in part) for part in (early, late)]
    turns = [[seconds for sample in part for seconds in sample.turns] for part in (early, late)]
    result.expect(not wrong, f"{len(wrong)} turns were refused, the first with {wrong[:1]}")
    result.expect(all(len(part) > 20 for part in turns), "hardly a turn was answered: this tried nothing")
    if not all(turns):
        return
    middle = [statistics.median(part) for part in turns]
    last = [sorted(part)[int(0.99 * len(part))] for part in turns]
    cpu = [sum(sample.cpu for sample in part) / len(said) for part, said in zip((early, late), turns, strict=True)]
    result.expect(memory[1] - memory[0] < growth_mb, f"the server grew from {memory[0]:.0f} to {memory[1]:.0f} MB")
    result.expect(middle[1] < turns_slower * middle[0], f"a turn took {middle[0]:.2f} s, in the end {middle[1]:.2f} s")
    result.expect(
        cpu[1] < cpu_more * cpu[0], f"a turn used {1e3 * cpu[0]:.1f} ms of CPU, in the end {1e3 * cpu[1]:.1f}"
    )
    result.figures = {
        "turns": f"{sum(len(sample.turns) for sample in samples):,}",
        "resident memory in the second and in the last quarter of the time": f"{memory[0]:.1f} and {memory[1]:.1f} MB",
        "CPU time a turn": f"{1e3 * cpu[0]:.1f} and {1e3 * cpu[1]:.1f} ms",
        "time of a turn, p50": f"{1e3 * middle[0]:.0f} and {1e3 * middle[1]:.0f} ms",
        "p99": f"{1e3 * last[0]:.0f} and {1e3 * last[1]:.0f} ms",
    }


def _resident_mb(process_id: int) -> float:
    pages = int(Path(f"/proc/{process_id}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def cpu_seconds(process_id: int) -> float:
    """What a process has used so far, all its threads together."""
    fields = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # user and system
