"""`gru-memory serve --ray`: two replicas over one PostgreSQL. Turns land on either, and one is killed under load."""

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time

import pytest
from postgres import has_package, require

pytest.importorskip("openai")
pytest.importorskip("fastapi")

import httpx2
import openai
import torch
from chaos.result import Result
from chaos.talkers import Talk, Talkers, check
from chaos.victim import MODEL, NEW_TOKENS
from talking import talking_base, talking_model, talking_tokenizer
from typer.testing import CliRunner

from gru_memory import Conversation, MemoryState
from gru_memory.server.ray_serve import APPLICATION, DEPLOYMENT, Scaling
from gru_memory.shipped import load_with_memory
from gru_memory.store import SessionStore

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`"),  # in Ray's own code
]
SCALING = {"--min-replicas": "2", "--max-replicas": "3", "--target-chats": "40", "--replica-cpus": "0.1"}
TURNS = ["My boat is called Marigold.", "I live in Porto.", *(f"This is turn {number}." for number in range(3, 13))]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model without memory, and a memory for it."""
    base, memory = (tmp_path_factory.mktemp(name) for name in ("base", "memory"))
    talking_base("llama").save_pretrained(base)
    talking_tokenizer("llama").save_pretrained(base)
    talking_model("llama").float().save_memory(memory)
    return str(base), str(memory)


@pytest.fixture(scope="module")
def cluster(postgres, folders):
    """The URL of two replicas, and that of their store. The command itself has started them, and a cluster for them."""
    require(has_package("ray"), "Ray is not installed: pip install 'gru-memory[ray]'")
    with socket.socket() as first, socket.socket() as second:
        for probe in (first, second):
            probe.bind(("127.0.0.1", 0))
        port, ray_port = (probe.getsockname()[1] for probe in (first, second))
    base, memory = folders
    store, url = postgres.empty(), f"http://127.0.0.1:{port}"
    command = [
        sys.executable, "-c", "from gru_memory.cli import main; main()", "serve", "--ray", "--model", base, "--memory", memory,
        "--model-name", MODEL, "--store", store, "--port", str(port), "--threads", "1", "--max-new-tokens", str(NEW_TOKENS),
        *(part for option in SCALING.items() for part in option),
    ]  # fmt: skip
    with tempfile.TemporaryFile("w+") as log, pytest.MonkeyPatch.context() as patch:
        patch.setenv(
            "RAY_AUTH_MODE", "token"
        )  # a cluster lets nobody in without its token: this one has one of our own
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        patch.delenv("RAY_ADDRESS", raising=False)
        environment = {**os.environ, "RAY_GCS_SERVER_PORT": str(ray_port)}
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        import ray

        try:
            _wait_until_ready(url, process, log)
            ray.init(f"127.0.0.1:{ray_port}", log_to_driver=False)
            yield url, store
            ray.shutdown()
            process.send_signal(signal.SIGTERM)
            assert process.wait(120) == 0
        finally:
            ray.shutdown()
            process.kill()
            process.wait()


def _wait_until_ready(url, process, log):
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if httpx2.get(f"{url}/readyz", timeout=5).status_code == 200:
                return
        except httpx2.TransportError:
            pass
        time.sleep(0.2)
    log.seek(0)
    raise AssertionError(f"gru-memory serve --ray did not start: {log.read()[-2000:]}")


def test_ray_knows_the_settings_of_the_command(cluster):
    from ray import serve
    from ray.serve.context import _get_global_client  # what `serve status` shows, without the dashboard that it asks

    wanted, deadline = ("RUNNING", "HEALTHY", {"RUNNING": 2}), time.monotonic() + 120
    while True:  # the first replica answers before the second one has started
        status = serve.status().applications[APPLICATION]
        replica = status.deployments[DEPLOYMENT]
        found = status.status, replica.status, replica.replica_states
        if found == wanted or time.monotonic() > deadline:
            break
        time.sleep(0.2)
    assert found == wanted
    made = _get_global_client().get_serve_details()["applications"][APPLICATION]["deployments"][DEPLOYMENT]
    settings = made["deployment_config"]
    scaling = {name: settings["autoscaling_config"][name] for name in ("min_replicas", "max_replicas")}
    assert scaling == {"min_replicas": 2, "max_replicas": 3}
    assert settings["autoscaling_config"]["target_ongoing_requests"] == 40.0
    assert settings["ray_actor_options"]["num_cpus"] == 0.1
    assert len(made["replicas"]) == 2


def test_consecutive_turns_land_on_different_replicas(cluster, folders, monkeypatch):
    url, store_url = cluster
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=120)
    replies, replicas = [], []
    for text in TURNS:
        raw = client.responses.with_raw_response.create(model=MODEL, input=text, conversation="wanderer")
        replies.append(raw.parse().output_text)
        replicas.append(raw.headers["x-gru-memory-replica"])
    assert len(set(replicas)) == 2
    assert any(first != second for first, second in zip(replicas, replicas[1:]))

    monkeypatch.setattr(Conversation, "kept_in", torch.float16)  # as replicas keep it between two turns
    alone = Conversation(*load_with_memory(*folders), max_new_tokens=NEW_TOKENS)
    for text, reply in zip(TURNS, replies, strict=True):
        assert alone.say(text) == reply
        alone.load(alone.to_bytes())
    with SessionStore(store_url) as store:
        session = store.get("wanderer")
        kept = MemoryState.from_bytes(store.head(session).state)
    for site, tensors in alone.state.sites.items():
        torch.testing.assert_close(kept.sites[site]["slots"].float(), tensors["slots"].float(), atol=2e-3, rtol=0)


def test_the_same_interface_streams_too(cluster):
    client = openai.OpenAI(base_url=f"{cluster[0]}/v1", api_key="any", max_retries=0, timeout=120)
    chunks = list(
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": TURNS[0]}], stream=True)
    )
    assert chunks[-1].choices[0].finish_reason
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve("resp_never")
    assert httpx2.get(f"{cluster[0]}/readyz", timeout=60).text == "ready\n"


def test_a_replica_is_killed_under_load_and_nothing_is_lost(cluster):
    import ray

    url, store_url = cluster
    talks = [Talk(f"talk {number}") for number in range(8)]
    talkers = Talkers(talks)
    talkers.start(url)
    try:
        talkers.wait_for(40, seconds=300)
        assert len(talkers.served_by) == 2
        dead = next(iter(talkers.served_by))
        name = f"SERVE_REPLICA::{APPLICATION}#{DEPLOYMENT}#{dead}"
        ray.kill(ray.get_actor(name, namespace="serve"))
        served = dict(talkers.served_by)
        talkers.wait_for(40, seconds=300)
        failed = sum(talkers.refused.values()) + talkers.lost
    finally:
        talkers.stop()
    others = sum(count for name, count in talkers.served_by.items() if name != dead)
    assert others > served.get(next(name for name in served if name != dead), 0)
    assert failed <= 3 * len(talks), f"{failed} requests failed: {dict(talkers.refused)}"
    result = Result()
    with SessionStore(store_url) as store:
        check(store, talks, result, {})
    assert not result.broken, "\n".join(result.broken)


def test_replicas_need_a_store_that_all_of_them_reach(tmp_path):
    from gru_memory.cli.app import app

    said = CliRunner().invoke(app, ["serve", "--ray", "--store", str(tmp_path / "s.sqlite3")])
    assert said.exit_code == 1
    assert "postgresql://" in said.output
    with pytest.raises(ValueError, match="replicas"):
        Scaling(min_replicas=3, max_replicas=2)
