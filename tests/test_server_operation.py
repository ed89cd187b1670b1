"""Health, metrics, logs, and `gru-memory serve` as a process of its own."""

import json
import logging
import socket
import subprocess
import sys
import time

import pytest

pytest.importorskip("openai")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

import openai
from clients import (
    ADA,
    BOAT,
    chat,
    client_of_ada,  # noqa: F401 (a fixture)
    in_session,
    model_and_tokenizer,  # noqa: F401 (a fixture)
    plain_http,  # noqa: F401 (a fixture)
    shared_server,  # noqa: F401 (a fixture)
    user,
)
from serving import KEYS, MODEL, running

from gru_memory.server.http import JsonLines
from gru_memory.store import Limits


def test_health_and_metrics_hold_no_names(server, client, http):
    chat(client, BOAT, **in_session("secret name"))
    for path, text in (("/healthz", "ok"), ("/readyz", "ready")):
        assert http.get(path, headers={"authorization": ""}).text == f"{text}\n"
    shown = http.get("/metrics").text
    assert 'gru_memory_requests_total{route="/v1/chat/completions",status="200"}' in shown
    assert "gru_memory_first_token_seconds_count" in shown
    assert "secret" not in shown


def test_a_server_whose_store_is_away_is_not_ready(loaded, tmp_path, monkeypatch, http):
    from gru_memory.store import StoreUnavailable

    def away():
        raise StoreUnavailable("away")

    with running(tmp_path / "s", loaded) as server:
        monkeypatch.setattr(server.store, "check", away)
        assert http.get(f"{server.url}/readyz").status_code == 503
        assert http.get(f"{server.url}/healthz").status_code == 200


def test_cors_is_off_unless_it_is_asked_for(http, loaded, tmp_path):
    asked = {"origin": "https://page.example", "access-control-request-method": "POST"}
    assert "access-control-allow-origin" not in http.options("/v1/models", headers=asked).headers
    with running(tmp_path / "s", loaded, cors_origins=("https://page.example",)) as server:
        allowed = http.options(f"{server.url}/v1/models", headers=asked).headers
        assert allowed["access-control-allow-origin"] == "https://page.example"


def test_expired_sessions_are_removed(loaded, tmp_path):
    with running(tmp_path / "s", loaded, limits=Limits(ttl_seconds=0.2), purge_seconds=0.1) as server:
        server.store.create("short", ADA)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            with server.store.engine.connect() as connection:
                if connection.exec_driver_sql("SELECT count(*) FROM sessions").scalar() == 0:
                    return
            time.sleep(0.05)
        pytest.fail("the session is still there")


def test_what_goes_wrong_before_a_reply_begins_is_in_the_log(server, http, monkeypatch, caplog):
    def broken(*arguments):
        raise RuntimeError("nobody expected this")

    monkeypatch.setattr(server.app.state.service, "_plan", broken)
    body = {"model": MODEL, "messages": [user(BOAT)]}
    assert http.post("/v1/chat/completions", json=body).status_code == 500
    assert "nobody expected this" in caplog.text


def test_a_refused_key_is_counted_and_logged_under_its_route_and_without_its_names(server, http, caplog):
    counted = 'gru_memory_requests_total{route="/v1/memory/{session}",status="401"}'

    def count():
        lines = http.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(counted))

    before = count()
    with caplog.at_level(logging.INFO, logger="gru_memory.server"):
        refused = http.get("/v1/memory/hush", headers={"authorization": "Bearer swordfish"})
        assert refused.status_code == 401
        name, deadline = refused.headers["x-request-id"], time.monotonic() + 10
        while name not in (known := {getattr(r, "request_id", None): r for r in caplog.records}):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert count() == before + 1
    line = json.loads(JsonLines().format(known[name]))
    assert (line["route"], line["status"], line["owner"]) == ("/v1/memory/{session}", 401, "")
    assert not any(word in json.dumps(line) for word in ("swordfish", "hush"))


def test_logs_are_json_without_text(server, client, caplog, http):
    with caplog.at_level(logging.INFO):
        chat(client, "The password is swordfish.", **in_session("hush hush"))
        http.get("/v1/memory/hush hush")
        # A line is written after the answer was sent.
        deadline = time.monotonic() + 10
        while sum(record.getMessage() == "request" for record in caplog.records) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    lines = [JsonLines().format(record) for record in caplog.records if record.name.startswith("gru_memory")]
    requests = [json.loads(line) for line in lines if json.loads(line)["message"] == "request"]
    assert {request["route"] for request in requests} >= {"/v1/chat/completions", "/v1/memory/{session}"}
    assert all(request["status"] == 200 and request["request_id"] and request["seconds"] >= 0 for request in requests)
    assert not any(word in line for line in lines for word in ("swordfish", "hush", KEYS[0]))
    try:
        raise ValueError("swordfish")
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, "f", 1, "failed", (), __import__("sys").exc_info())
    assert "ValueError" in JsonLines().format(record) and "swordfish" not in JsonLines().format(record)


@pytest.mark.slow
@pytest.mark.needs_model
def test_the_command_serves_what_it_was_told_after_a_restart_too(tmp_path):
    """`gru-memory serve` as a process of its own, with the model and memory that ship."""
    keys = tmp_path / "keys"
    keys.write_text(KEYS[0])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-c", "from gru_memory.cli import main; main()", "serve", "--port", str(port)]
    command += ["--store", str(tmp_path / "sessions.sqlite3"), "--api-keys", str(keys)]

    def served(*texts):
        with (tmp_path / "log").open("ab") as log:
            process = subprocess.Popen(command, stderr=log, stdout=log)
        try:
            client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEYS[0], timeout=120)
            deadline = time.monotonic() + 240
            while True:
                try:
                    assert process.poll() is None, (tmp_path / "log").read_text()
                    client.models.list()
                    break
                except openai.APIConnectionError:
                    assert time.monotonic() < deadline, (tmp_path / "log").read_text()
                    time.sleep(0.5)
            made = [
                client.responses.create(model="smollm2", input=text, conversation="boat", max_output_tokens=16)
                for text in texts
            ]
            return [response.output_text for response in made]
        finally:
            process.terminate()
            assert process.wait(60) == 0, (tmp_path / "log").read_text()

    served("My boat is called Marigold.")
    assert "Marigold" in served("What is my boat called?")[0]
    log = (tmp_path / "log").read_text()
    assert '"route": "/v1/responses"' in log
    assert "Marigold" not in log
