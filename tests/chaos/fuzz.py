"""Requests that nobody should send: what schemathesis makes of the OpenAPI schema, and hypothesis of the rest."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import httpx2
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import KEYS, MODEL, running

from .result import Result
from .victim import tiny

SECRET, BOBS = "swordfish", "bob's"  # what another key has said, and in which session: no answer may hold the first
MARK = "gru-chaos-mark"  # is in every name that looks like a path: no file that is opened may hold it
CHECKS = "not_a_server_error,ignored_auth,use_after_free,unsupported_method,response_schema_conformance"
LONG = 10 << 20  # characters
_KEY = {"authorization": f"Bearer {KEYS[0]}"}

NASTY = [
    BOBS,
    "../" * 8 + MARK,
    f"..%2f..%2f{MARK}",
    f"/etc/{MARK}",
    f"C:\\{MARK}",
    f"{MARK}\0.safetensors",
    f"{MARK}\n",
    f"'; DROP TABLE sessions; -- {MARK}",
    f"{MARK}\u202e\ud7ff",
    f"file:///{MARK}",
    "%s%n" + MARK,
    "{{7*7}}" + MARK,
    "x" * 70_000 + MARK,
    " ",
    ".",
    "..",
]
names = st.one_of(st.sampled_from(NASTY), st.text(max_size=40).map(lambda text: text + MARK))

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from(NASTY[:-4]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)

_SAID = {"role": "user", "content": "a"}
BODIES = {  # requests as they should be; the session a is there
    "/v1/chat/completions": {"model": MODEL, "messages": [_SAID]},
    "/v1/responses": {"model": MODEL, "input": "a"},
    "/v1/conversations": {"items": [_SAID], "metadata": {}},
    "/v1/conversations/a": {"metadata": {}},
    "/v1/conversations/a/items": {"items": [_SAID]},
    "/v1/memory/a/fork": {"name": "b", "at": None},
    "/v1/memory/a/forget": {"head": 0, "slot": 0},
    "/v1/memory/a/decay": {"ticks": 1},
    "/v1/memory/a/remember": {"text": "a"},
    "/v1/memory/a/trace": {"text": "a"},
}
PLACES = [  # where a name can stand in a path
    *(f"/v1/memory/{{}}{below}" for below in ("", "/transcript", "/trace", "/export", "/fork", "/forget", "/decay")),
    "/v1/memory/{}/remember",
    "/v1/models/{}",
    "/v1/responses/{}",
    "/v1/conversations/{}",
    "/v1/conversations/{}/items",
    "/v1/conversations/{0}/items/{0}",
    "/v1/conversations/a/items/{}",
]


def _bombs() -> list[bytes]:
    deep = 200_000
    message = b'{"model":"tiny","messages":[{"role":"user","content":"a"}],%s}'
    return [
        b"[" * deep,
        b'{"a":' * deep,
        b'{"model":' + b"[" * deep + b"]" * deep + b"}",
        message % (b'"metadata":' + b'{"a":' * 50_000 + b"1" + b"}" * 50_000),
        message % b",".join(b'"k%d":1' % number for number in range(50_000)),
        message % (b'"seed":' + b"9" * 100_000),
        message % b'"temperature":1e999',
        message % b'"top_p":-Infinity',
        message % (b'"stop":' + json.dumps(["a" * 250_000] * 4).encode()),
        b'{"model":"tiny","messages":[' + b",".join([b'{"role":"user","content":"a"}'] * 30_000) + b"]}",
        b'{"model":"' + b"x" * LONG + b'"}',
        b'{"model":"tiny","messages":[{"role":"user","content":"' + b"a " * 120_000 + b'"}]}',
        b'{"model":"tiny","model":"tiny","messages":[{"role":"user","content":"\\u0000"}]}',
        b"\xff\xfe" + '{"model":"tiny"}'.encode("utf-16-le"),
        b"\x1f\x8b\x08\x00" + b"\0" * 1000,
    ]


def run(examples: int, schemathesis_examples: int, seed: int = 0) -> Result:
    """Send nonsense to a running server; see that it refuses it and goes on.

    Args:
        examples: requests of each kind that hypothesis makes.
        schemathesis_examples: requests for each operation of the schema, in each of its phases; 0 leaves it out.
        seed: of both.
    """
    result, began = Result(), time.monotonic()
    with (
        _opened_files() as opened,
        tempfile.TemporaryDirectory(prefix="gru-chaos-") as folder,
        running(Path(folder) / "sessions.sqlite3", tiny(), default_new_tokens=2, most_new_tokens=4) as server,
        httpx2.Client(base_url=server.url, timeout=120) as http,
    ):
        _whisper(http)
        statuses = _hypothesis(http, examples, result)
        if schemathesis_examples:
            _schemathesis(server.url, schemathesis_examples, seed, result)
        answer = http.post("/v1/responses", headers=_KEY, json={"model": MODEL, "input": "Still there?"})
        result.expect(answer.status_code == 200, f"afterwards the server answers {answer.status_code}")
        ready = http.get("/readyz").status_code
        result.expect(ready == 200, f"afterwards the server is not ready: {ready}")
    touched = sorted(path for path in opened if MARK in path)
    result.expect(not touched, f"files were opened by the name a client gave: {touched[:3]}")
    result.figures = {
        "requests that hypothesis made": f"{statuses.total():,}, answered "
        + ", ".join(f"{status}: {count:,}" for status, count in sorted(statuses.items())),
        **result.figures,
        "files opened meanwhile, none by the name of a request": f"{len(opened):,}",
        "time": f"{time.monotonic() - began:.0f} s",
    }
    return result


def _whisper(http: httpx2.Client) -> None:
    """Something that only Bob may hear of."""
    bob = {"authorization": f"Bearer {KEYS[1]}"}
    body = {"model": MODEL, "input": f"The password is {SECRET}.", "conversation": BOBS}
    http.post("/v1/responses", headers=bob, json=body).raise_for_status()


def _hypothesis(http: httpx2.Client, examples: int, result: Result) -> Counter:
    statuses: Counter[int] = Counter()

    def send(method: str, path: str, **arguments: object) -> None:
        try:
            answer = http.request(method, path, **arguments)
        except (httpx2.LocalProtocolError, httpx2.InvalidURL, UnicodeError):
            return  # the client's library itself refuses to send it
        statuses[answer.status_code] += 1
        what = f"{method} {path[:80]!r} {str(arguments)[:120]}"
        result.expect(answer.status_code < 500, f"{what}: {answer.status_code} {answer.text[:200]}")
        result.expect(SECRET not in answer.text, f"{what} told what only another key may know")
        text = answer.text if answer.status_code >= 400 else ""
        result.expect(len(text) < 2_000, f"{what}: an error of {len(text)} characters")
        leak = re.search(r"Traceback|File \"|site-packages|sqlalchemy|sqlite3|gru-chaos-\w{8}", text)
        result.expect(not leak, f"{what}: an answer shows what is inside: {text[:200]}")

    once = settings(
        max_examples=examples, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    send("POST", "/v1/responses", json={"model": MODEL, "input": "a", "conversation": "a"}, headers=_KEY)

    @once
    @given(names, st.sampled_from(PLACES), st.sampled_from(["GET", "POST", "DELETE"]), st.booleans())
    def paths(name: str, place: str, method: str, whole: bool) -> None:
        send(method, place.format(quote(name, safe="" if whole else "/")[:60_000]), headers=_KEY)

    @once
    @given(names, st.sampled_from(["after", "limit", "order", "offset", "top", "slots", "name"]),
           st.sampled_from(["/v1/conversations/a/items", "/v1/memory", "/v1/memory/a", "/v1/memory/a/export"]))  # fmt: skip
    def queries(value: str, parameter: str, path: str) -> None:
        send("GET", path, params={parameter: value[:60_000]}, headers=_KEY)

    @once
    @given(names, st.sampled_from(["x-session-id", "x-openwebui-chat-id", "authorization", "content-type", "cookie"]))
    def headers(value: str, name: str) -> None:
        raw = value[:60_000].encode("utf-8", "surrogatepass")
        send("POST", "/v1/chat/completions", json=BODIES["/v1/chat/completions"], headers={**_KEY, name: raw})

    @once
    @given(
        names, st.sampled_from(["conversation", "previous_response_id", "session_id", "user", "model", "instructions"])
    )
    def ids(value: str, field: str) -> None:
        body = json.dumps({"model": MODEL, "input": "a", field: value}).encode()
        send("POST", "/v1/responses", content=body, headers={**_KEY, "content-type": "application/json"})

    @once
    @given(st.sampled_from(sorted(BODIES)), values, st.integers(0, 3))
    def bodies(path: str, value: object, field: int) -> None:
        body = BODIES[path]
        if isinstance(value, dict):
            value = {**body, **value}
        elif field < 3:  # a good body but for one field
            value = {**body, sorted(body)[field % len(body)]: value}
        content = json.dumps(value).encode()
        send("POST", path, content=content, headers={**_KEY, "content-type": "application/json"})

    @once
    @given(st.binary(max_size=4_000))
    def files(data: bytes) -> None:
        send("POST", "/v1/memory/import", params={"name": MARK}, content=data, headers=_KEY)

    for check in (paths, queries, headers, ids, bodies, files):
        check()
    for bomb in _bombs():
        for path in ("/v1/chat/completions", "/v1/responses", "/v1/conversations/a/items"):
            send("POST", path, content=bomb, headers={**_KEY, "content-type": "application/json"})
    huge = "x" * LONG + MARK
    for field in ("conversation", "previous_response_id", "user", "session_id"):
        send("POST", "/v1/responses", json={"model": MODEL, "input": "a", field: huge}, headers=_KEY)
    return statuses


def _schemathesis(url: str, examples: int, seed: int, result: Result) -> None:
    with tempfile.TemporaryDirectory(prefix="gru-chaos-") as folder:
        command = [
            sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", "--header",
            f"Authorization: Bearer {KEYS[0]}", "--checks", CHECKS, "--max-examples", str(examples), "--seed", str(seed),
            "--no-color", "--suppress-health-check", "all", "--warnings", "off", "--continue-on-failure", "--no-shrink",
            "--generation-database", "none",
        ]  # fmt: skip
        ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    lines = [line.strip() for line in ran.stdout.splitlines() if line.strip()]
    result.expect(ran.returncode == 0, "schemathesis: " + " | ".join(lines[-200:] or [ran.stderr[-500:]]))
    made = re.search(r"([\d,]+) generated", ran.stdout)
    result.expect(made and int(made[1].replace(",", "")) > 100, "schemathesis made no requests worth the name")
    if made:
        result.figures["requests that schemathesis made"] = f"{made[1]}, with the checks {CHECKS.replace(',', ', ')}"


@contextmanager
def _opened_files() -> Iterator[set[str]]:
    """Every path that is opened in this process in the meantime, by Python at least."""
    global _hears
    if not _hears:  # a hook cannot be taken off again
        sys.addaudithook(_hear)
        _hears = True
    _listening.append(found := set())
    try:
        yield found
    finally:
        _listening.remove(found)


_listening: list[set[str]] = []
_hears = False


def _hear(event: str, arguments: tuple) -> None:
    if event in ("open", "os.listdir", "os.mkdir", "os.remove", "os.rename", "sqlite3.connect"):
        for found in _listening:
            found.add(str(arguments[0]))
