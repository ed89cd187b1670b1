"""How fast chats are answered, against the same model in `transformers serve`, which remembers nothing."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import torch

from .result import Result
from .soak import cpu_seconds

OURS, THEIRS, PAGED = "gru-memory serve", "transformers serve", "transformers serve --continuous-batching"
LEAST = 4  # replies a level
MESSAGE = "Tell me a long story about lighthouse number {number}."


def run(chats: tuple[int, ...] = (1, 8, 32), new_tokens: int = 32, rounds: int = 2, threads: int = 1) -> Result:
    """Start each server in turn, several times over, and let `chats` clients ask it at once for a reply of `new_tokens`.

    All have the same float32 weights, tokenizer, chat template and threads, and stream greedy replies of the same length.

    Args:
        chats: clients at once; there are `LEAST` replies at least, so that a single client asks several times.
        new_tokens: of a reply.
        rounds: how often each server is started; its figures are medians over them.
        threads: of torch, for every server.
    """
    result, found, began = Result(), {}, time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gru-chaos-") as folder:
        from gru_memory.embedded import load_model

        model, tokenizer = load_model()
        result.expect(model.dtype == torch.float32, f"the embedded model is loaded in {model.dtype}, theirs in float32")
        model.save_pretrained(f"{folder}/base")
        tokenizer.save_pretrained(f"{folder}/base")
        del model
        for number in range(rounds):
            for name, command, model_name in _servers(Path(folder), number, threads):
                try:
                    with _started(command, threads, Path(folder) / "log") as (url, process_id):
                        _ask(url, model_name, 0, 2)  # what is loaded on first use
                        for count in chats:
                            before = cpu_seconds(process_id)
                            first, seconds = _measure(url, model_name, count, new_tokens)
                            kept, tokens = found.setdefault((name, count), ([], [], [])), new_tokens * len(first)
                            kept[0].extend(first)
                            kept[1].append(tokens / seconds)
                            kept[2].append((cpu_seconds(process_id) - before) / tokens)
                except (RuntimeError, httpx2.TransportError) as error:
                    if name != PAGED:  # without which the two can be compared all the same
                        raise RuntimeError(f"{name} did not answer: {error}") from error
                    result.figures[name] = f"did not answer: {error}"
    for (name, count), (first, rates, cpu) in sorted(found.items(), key=lambda item: item[0][1]):
        first.sort()
        result.figures[f"{name}, {count} at once"] = (
            f"first token {statistics.median(first):.2f} s (p50), {first[int(0.99 * (len(first) - 1))]:.2f} s (p99); "
            f"{statistics.median(rates):.1f} tokens/s; {1e3 * statistics.median(cpu):.0f} ms of CPU a token"
        )
    for count in chats:
        ours, theirs = (statistics.median(found[name, count][1]) for name in (OURS, THEIRS))
        if count == min(chats):
            result.expect(ours >= theirs, f"{count} at once: {ours:.1f} tokens/s, theirs {theirs:.1f}")
        elif count == max(chats):
            result.expect(ours > theirs, f"{count} at once: {ours:.1f} tokens/s, theirs {theirs:.1f}")
    result.figures |= {"threads, for each server": f"{threads}", "time": f"{time.monotonic() - began:.0f} s"}
    return result


def _servers(folder: Path, number: int, threads: int) -> list[tuple[str, list[str], str]]:
    """Name, command without a port, and name of the model for clients."""
    base = str(folder / "base")
    ours = [
        sys.executable,
        "-c",
        "from gru_memory.cli import main; main()",
        "serve",
        "--store",
        f"{folder}/{number}.sqlite3",
    ]
    ours += ["--threads", str(threads)]
    theirs = [str(Path(sys.executable).parent / "transformers"), "serve", base, "--device", "cpu", "--dtype", "float32"]
    servers = [(OURS, ours, "smollm2"), (THEIRS, theirs, base), (PAGED, [*theirs, "--continuous-batching"], base)]
    return servers[number % 3 :] + servers[: number % 3]  # whatever else the machine does hits all of them


@contextlib.contextmanager
def _started(command: list[str], threads: int, log: Path) -> Iterator[tuple[str, int]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "GRU_MEMORY_LOG": "WARNING"}
    with log.open("wb") as file:
        process = subprocess.Popen([*command, "--port", str(port)], stdout=file, stderr=file, env=environment)
    try:
        deadline = time.monotonic() + 300
        while True:
            with contextlib.suppress(httpx2.TransportError):
                httpx2.get(f"{url}/", timeout=5)  # whatever it says
                break
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command[:2]} did not start: {log.read_text()[-1000:]}")
            time.sleep(0.5)
        yield url, process.pid
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(30)


def _ask(url: str, model: str, number: int, new_tokens: int) -> float:
    """Seconds to the first text of a reply, which has `new_tokens` tokens, none more or less."""
    body = {
        "model": model, "messages": [{"role": "user", "content": MESSAGE.format(number=number)}], "stream": True,
        "temperature": 0, "max_tokens": new_tokens,
    }  # fmt: skip
    if model == "smollm2":
        body["session_id"] = f"chat {number}"
    began, first, finish = time.monotonic(), None, None
    with httpx2.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=600) as answer:
        if answer.status_code != 200:
            raise RuntimeError(f"{answer.status_code}: {answer.read()[:500]!r}")
        for line in answer.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            choice = (json.loads(line[6:]).get("choices") or [{}])[0]
            finish = choice.get("finish_reason") or finish
            if first is None and (choice.get("delta") or {}).get("content"):
                first = time.monotonic() - began
    if first is None or finish != "length":
        raise RuntimeError(f"a reply that ended with {finish!r}, not after {new_tokens} tokens")
    return first


def _measure(url: str, model: str, count: int, new_tokens: int) -> tuple[list[float], float]:
    """Seconds to the first token of each reply, and seconds until the last of them ended."""
    firsts: list[float] = []
    wrong: list[Exception] = []

    def chat(number: int) -> None:
        try:
            for again in range(max(1, LEAST // count)):
                firsts.append(_ask(url, model, number + 100 * again, new_tokens))
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=chat, args=(10_000 * count + number,)) for number in range(count)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.monotonic() - began
    if wrong:
        raise wrong[0]
    return firsts, seconds
