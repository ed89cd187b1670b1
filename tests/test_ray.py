"""Two replicas over one PostgreSQL: turns of a conversation land on either, and one is killed under load."""

import socket

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
from gru_memory.server import ServerSettings
from gru_memory.server.ray_serve import APPLICATION, DEPLOYMENT, ReplicaSpec, Scaling, start, stop
from gru_memory.shipped import load_with_memory
from gru_memory.store import SessionStore

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`"),  # in Ray's own code
]
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
    """The URL of two replicas, and that of their store."""
    require(has_package("ray"), "Ray is not installed: pip install 'gru-memory[ray]'")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    store = postgres.empty()
    settings = ServerSettings(model_name=MODEL, default_new_tokens=NEW_TOKENS)
    try:
        start(ReplicaSpec(*folders, store, settings, threads=1), Scaling(2, 2, cpus=0.1), port=port)
        yield f"http://127.0.0.1:{port}", store
    finally:
        stop()


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
