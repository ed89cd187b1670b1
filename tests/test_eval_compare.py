"""Comparing memories beside one frozen model: equal numbers, no look ahead, attention within turns, values counted whole."""

import importlib.util
from itertools import groupby

import pytest
import torch
from talking import talking_base, talking_tokenizer
from tiny import one_thread  # noqa: F401 (a fixture)

from gru_memory.data import FactGenerator
from gru_memory.evaluation import compare
from gru_memory.evaluation.compare import (
    _TOP,
    TOKENS,
    VARIANTS,
    CompareConfig,
    _config,
    _Subject,
    evaluate_compare,
    make_subject,
    make_tests,
    measure,
)
from gru_memory.evaluation.rivals import DecayedAverage, MemoryTokens, TitansSite
from gru_memory.memory import GRUMemoryWithDecay
from gru_memory.training.collator import IGNORED, SessionCollator

HAVE_TITANS = importlib.util.find_spec("titans_pytorch") is not None
needs_titans = pytest.mark.skipif(
    not HAVE_TITANS, reason="titans-pytorch is not installed: pip install 'gru-memory[bench]'"
)
EVERY_NAME = [pytest.param(name, marks=[needs_titans] if "titans" in name else []) for name in VARIANTS]
SMALL = CompareConfig(variants=("top",), steps=1, rows=2, facts=2, between=1, tests=5)


@pytest.fixture(scope="module")
def batch():
    generator = FactGenerator(3)
    return SessionCollator(talking_tokenizer("gpt2"))([generator.session(1, 1) for _ in range(2)])


def awake(name: str) -> _Subject:
    """A subject whose every parameter is heard; with a budget that has two slots of 64 numbers a head in it."""
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "TOKENS", 20)
        subject = make_subject(talking_base("gpt2"), name)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in subject.parameters:
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator) / max(1, parameter.shape[-1]) ** 0.5
    return subject


@pytest.mark.parametrize("name", EVERY_NAME)
def test_memory_carries_what_was_told_to_later_turns_and_nothing_back(name, batch):
    subject = awake(name)
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    last = starts[-1]
    with torch.no_grad():
        logits = subject.logits(batch)
        assert logits.shape[:2] == batch["input_ids"].shape
        first = {**batch, "input_ids": batch["input_ids"].clone()}
        first["input_ids"][0, 2] += 1
        moved = (subject.logits(first) - logits).abs()
        assert (moved[0, last:].max() > 1e-7) == (name != "no memory")
        assert moved[1].max() < 1e-4  # the other row
        later = {**batch, "input_ids": batch["input_ids"].clone()}
        later["input_ids"][0, last:] = 5
        assert (subject.logits(later) - logits)[0, :last].abs().max() < 1e-4


@pytest.mark.parametrize("name", EVERY_NAME)
def test_every_parameter_that_is_to_learn_does(name, batch):
    subject = awake(name)
    if not subject.parameters:
        return
    logits = subject.logits(batch)
    logits[batch["labels"] != IGNORED].logsumexp(-1).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in subject.parameters)
    learning = [p.grad is not None and bool(p.grad.abs().max() > 0) for p in subject.parameters]
    assert all(learning) if VARIANTS[name][1] is None else any(learning)


@pytest.mark.parametrize("name", [name for name, (_, changes) in VARIANTS.items() if changes is not None])
def test_our_memories_carry_no_more_than_the_budget_and_hardly_less(name):
    floats = TOKENS * 192
    config = _config({**_TOP, **VARIANTS[name][1]}, floats)
    state = GRUMemoryWithDecay(
        8, config.num_heads, config.num_slots, config.slot_size, cell=config.cell, addressing=config.addressing,
        address_rank=config.address_rank, signature_size=config.signature_size,
    ).initial_state(1)  # fmt: skip
    carried = len(config.sites) * sum(part.numel() for part in state.values())
    one_slot_more = len(config.sites) * config.num_heads * (config.slot_size + 1)
    assert floats - one_slot_more < carried <= floats


def test_labels_of_a_test_are_the_values_alone():
    """The fewest tokens that a value is in, one after the other."""
    tokenizer = talking_tokenizer("gpt2")
    facts = FactGenerator(SMALL.seed + 1, values="test")
    wanted = [t.value for _ in range(SMALL.tests) for t in facts.session(2, 1).turns if t.learn == "answer"]
    found = []
    for part in make_tests(tokenizer, SessionCollator(tokenizer), SMALL):
        for labels in part["labels"].tolist():
            runs = [list(run) for learned, run in groupby(labels, lambda label: label != IGNORED) if learned]
            found += runs
    assert len(found) == len(wanted)
    for run, value in zip(found, wanted, strict=True):
        assert value in tokenizer.decode(run)
        assert value not in tokenizer.decode(run[1:]) and value not in tokenizer.decode(run[:-1])


def test_the_top_begins_recognisable_and_open():
    """What is written can be told apart when it is read: both maps are of the same directions."""
    model = talking_base("gpt2")
    make_subject(model, "top")
    top = model.memory_sites()["top"]
    written, read = top.value_embed.weight, top.output.weight.T
    assert torch.nn.functional.cosine_similarity(written, read).min() > 0.999
    assert top.gate.item() == 1


def test_a_seed_gives_the_same_figures_again():
    def figures(before):
        torch.rand(before)  # what has been drawn before does not matter
        outcome = evaluate_compare(talking_base("gpt2"), talking_tokenizer("gpt2"), SMALL)
        return outcome.details["losses"], outcome.rows[0]["loss"]

    assert figures(3) == figures(5)


def test_a_value_is_right_if_all_its_tokens_are():
    labels = torch.tensor([[IGNORED, 4, 5, IGNORED, 6, IGNORED]])
    said = torch.tensor([[4, 5, 0, 7, 0, 0]])  # what comes next at each position

    def logits(_):
        return torch.nn.functional.one_hot(said, 8).float() * 50

    found = measure(_Subject(logits, [], 0), [{"labels": labels}])
    assert found["values"] == 0.5
    assert found["tokens"] == pytest.approx(2 / 3)
    assert found["loss"] == pytest.approx(50 / 3, rel=1e-3)


def test_the_decayed_average_is_the_one_of_its_equation():
    torch.manual_seed(0)
    site = DecayedAverage(6, 5, decay=0.8)
    torch.nn.init.normal_(site.output.weight)
    x, e, mask = torch.randn(2, 9, 6), torch.randn(2, 9, 5), torch.rand(2, 9) > 0.3
    average, wanted = torch.zeros(2, 5), []
    for t in range(9):
        average = torch.where(mask[:, t, None], 0.8 * average + 0.2 * e[:, t], average)
        wanted.append(x[:, t] + average @ site.output.weight.T)
    torch.testing.assert_close(site(x, e, site.initial_state(2), mask, None)[0], torch.stack(wanted, dim=1))
    assert site.state_floats == 5


def test_memory_tokens_read_each_row_as_if_it_were_alone():
    """Rows have other numbers of turns, of other lengths; those that have ended keep still."""
    model, generator = talking_base("llama"), FactGenerator(3)
    collate = SessionCollator(talking_tokenizer("llama"))
    sessions = [generator.session(facts, between) for facts, between in ((1, 0), (2, 1), (1, 2))]
    torch.manual_seed(0)
    tokens = MemoryTokens(model, 3)
    with torch.no_grad():
        together = tokens.logits(model, collate(sessions))
        for row, session in enumerate(sessions):
            alone = tokens.logits(model, collate([session]))[0]
            torch.testing.assert_close(together[row, : len(alone)], alone, rtol=1e-3, atol=1e-4)
            assert not together[row, len(alone) :].any()
    assert tokens.state_floats == 3 * 32


@needs_titans
def test_titans_stores_what_came_before_each_token_and_nothing_that_is_masked():
    torch.manual_seed(0)
    site, given = TitansSite(16, 12, 512), []
    torch.nn.init.normal_(site.output.weight)
    site.stored.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    x, e, mask = torch.randn(1, 24, 16), torch.randn(1, 24, 12), torch.ones(1, 24, dtype=torch.bool)
    mask[:, 5] = False
    with torch.no_grad():
        out, _ = site(x, e, site.initial_state(1), mask, None)
        norms = [torch.nn.functional.rms_norm(part, part.shape[-1:]) for part in (x, e)]
        torch.testing.assert_close(given[0][:, 1:], torch.cat([norms[0][:, :-1], norms[1][:, 1:]], dim=-1))
        for place, heard in ((5, False), (6, True)):
            other = e.clone()
            other[:, place] += 1
            assert ((site(x, other, site.initial_state(1), mask, None)[0] - out).abs().max() > 1e-6) == heard


def test_the_top_learns_what_it_is_trained_on_and_a_model_without_memory_cannot():
    base = talking_base("gpt2")
    budget = {"steps": 100, "rows": 4, "facts": 1, "between": 0, "learning_rate": 0.01}
    config = CompareConfig(variants=("top", "no memory"), tests=8, seed=5, **budget)
    outcome = evaluate_compare(base, talking_tokenizer("gpt2"), config)
    losses = outcome.details["losses"]["top"]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    ours, without = outcome.rows
    assert ours["loss"] < without["loss"]
    allowed = 4 * TOKENS * base.config.hidden_size  # a slot more of so few would be too much
    assert 0.7 * allowed < ours["bytes"] <= allowed
    assert (without["bytes"], without["parameters"]) == (0, 0)


@pytest.mark.parametrize(
    ("settings", "message"), [({"variants": ("lstm",)}, "variants has lstm"), ({"rows": 0}, "rows is 0")]
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        CompareConfig(**settings)
