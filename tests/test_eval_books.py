"""Books: a bounded state stays bounded where an accumulator grows, and windows are scored on the same tokens."""

import math

import pytest
import torch
from talking import FAMILIES, talking_model, talking_tokenizer
from torch.nn import functional as F

from gru_memory import backbones
from gru_memory.evaluation.drift import ADDING_KEEPING, KEEPING, MEMORY, DriftConfig, evaluate_drift
from gru_memory.evaluation.longdoc import LongDocConfig, evaluate_longdoc
from gru_memory.evaluation.texts import stream, text_tokens
from gru_memory.evaluation.variants import same_blocks, with_decay
from gru_memory.state import AS_KEPT, MemoryState


@pytest.fixture(scope="module")
def loaded():
    return talking_model("llama"), talking_tokenizer("llama")


def test_the_memory_stays_bounded_where_an_accumulator_grows(loaded, small_books):
    config = DriftConfig(str(small_books), tokens=1200, window=100, points=3)
    rows = evaluate_drift(*loaded, config).rows
    size = {name: [row["size"] for row in rows if row["memory"] == name] for name in {row["memory"] for row in rows}}
    assert all(row["largest"] <= 1 + 1e-6 for row in rows if row["memory"] in (MEMORY, KEEPING))
    assert max(row["largest"] for row in rows if row["memory"] == ADDING_KEEPING) > 5
    first, _, last = size[ADDING_KEEPING]
    assert last > 2 * first
    assert size[KEEPING][-1] < 1.2 * size[KEEPING][0]
    assert [row["tokens"] for row in rows if row["memory"] == MEMORY] == [400, 800, 1200]


@torch.no_grad()
def test_drift_gives_the_loss_of_the_memory_and_of_the_base_model(loaded, small_books):
    model, tokenizer = loaded
    result = evaluate_drift(model, tokenizer, DriftConfig(str(small_books), tokens=128, window=64, points=1))
    ids, names = stream(str(small_books), tokenizer, 128, 1234)
    assert result.details["books"] == names
    state, losses, base = model.initial_memory_state(1), [], []
    for piece in ids.split(64):
        output = model(input_ids=piece[None], memory_state=state)
        state = output.memory_state
        losses.append(F.cross_entropy(output.logits[0, :-1].float(), piece[1:]).item())
        with model.disable_memory():
            base.append(F.cross_entropy(model(input_ids=piece[None]).logits[0, :-1].float(), piece[1:]).item())
    (row,) = [row for row in result.rows if row["memory"] == MEMORY]
    assert row["loss"] == pytest.approx(sum(losses) / 2)
    assert row["added"] == pytest.approx(sum(losses) / 2 - sum(base) / 2)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("sites", "runs"), [(("top",), 1), (("middle", "top"), 3)])
def test_blocks_run_once_where_no_memory_changes_what_they_say(family, sites, runs):
    model, ids = talking_model(family, sites=sites, key_layers=(), decay_every="token"), torch.arange(10, 30)[None]
    blocks, counted = backbones.blocks_of(model), []
    blocks[0].register_forward_hook(lambda *_: counted.append("called"))
    blocks[0].get_submodule("mlp").register_forward_hook(lambda *_: counted.append("run"))

    def passes():
        with model.disable_memory():
            yield model(input_ids=ids, use_cache=False).logits
        for decay in (0.9, 0.5):
            with with_decay(model, decay):
                yield model(input_ids=ids, use_cache=False).logits

    alone = list(passes())
    counted.clear()
    with same_blocks(model):
        together = list(passes())
    assert all(map(torch.equal, alone, together)) and not torch.equal(*alone[1:])
    assert counted.count("called") == 3 and counted.count("run") == runs
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, alone[1])
    assert counted.count("run") == runs + 1  # and from then on they run again


def test_a_state_that_bursts_is_reported_as_missing(loaded, small_books, monkeypatch):
    from gru_memory.evaluation import drift

    monkeypatch.setattr(MemoryState, "is_finite", lambda self: False)
    result = drift.evaluate_drift(*loaded, DriftConfig(str(small_books), tokens=128, window=64, points=1))
    assert all(row["size"] is row["loss"] is row["added"] is row["largest"] is None for row in result.rows)


def test_a_stream_takes_books_in_an_order_of_its_seed(loaded, small_books):
    _, tokenizer = loaded
    orders = {tuple(stream(str(small_books), tokenizer, 2000, seed)[1]) for seed in range(8)}
    assert len(orders) == 2
    assert len(stream(str(small_books), tokenizer, 2000, 1)[0]) == 2000
    with pytest.raises(ValueError, match="ask for fewer"):
        stream(str(small_books), tokenizer, 10**6, 1)


@torch.no_grad()
@pytest.mark.parametrize("kept_in", ["float32", "int4"])
def test_windows_are_scored_on_the_same_tokens(small_books, kept_in):
    """Each figure against a forward pass over every window on its own."""
    model, tokenizer = talking_model("llama", kept_in=kept_in), talking_tokenizer("llama")
    config = LongDocConfig(str(small_books), tokens=100, windows=(24,), batch_size=2)
    result = evaluate_longdoc(model, tokenizer, config)
    half_precision = 2 * 3 * 32 * 2  # bytes: keys and values, blocks, width, two bytes a number
    kept = len(model.initial_memory_state(1).to_bytes(AS_KEPT))
    assert result.details["state_bytes"] == kept and result.details["kv_bytes_per_token"] == half_precision
    assert result.details["tokens_worth"] == kept // half_precision > 1
    assert [row["book"] for row in result.rows] == ["boats", "letters"]
    row, worth, window = result.rows[0], result.details["tokens_worth"], 24
    assert row["tokens"] == 3 * 23
    share = 0.05 + 0.55 * torch.rand((), generator=torch.Generator().manual_seed(1234)).item()
    ids = text_tokens(small_books / "boats.txt", tokenizer, 100, share)
    wanted = {name: [] for name in ("base", "reset", "larger", "double", "carried")}
    state = model(input_ids=ids[None, :24], memory_state=model.initial_memory_state(1)).memory_state

    def loss(first, start, memory_state=None):
        output = model(input_ids=ids[None, first : start + window], memory_state=memory_state)
        scored = output.logits[0, start - first : -1].float()
        return F.cross_entropy(scored, ids[start + 1 : start + window]).item(), getattr(output, "memory_state", None)

    for start in (24, 48, 72):
        with model.disable_memory():
            for name, before in (("base", 0), ("larger", worth), ("double", window)):
                wanted[name].append(loss(start - before, start)[0])
        wanted["reset"].append(loss(start, start, model.initial_memory_state(1))[0])
        value, state = loss(start, start, MemoryState.from_bytes(state.to_bytes(AS_KEPT)))
        wanted["carried"].append(value)
    for name, losses in wanted.items():
        assert row[name] == pytest.approx(math.fsum(losses) / 3, rel=1e-6), name
    assert row["gain"] == pytest.approx(row["reset"] - row["carried"])
    assert abs(row["gain"]) > 1e-5


def test_a_window_that_does_not_fit_is_refused(loaded, small_books):
    for windows in ((384,), (64,)):  # as many as there are positions; more than half of what is read
        with pytest.raises(ValueError, match="do not fit"):
            evaluate_longdoc(*loaded, LongDocConfig(str(small_books), tokens=100, windows=windows))
