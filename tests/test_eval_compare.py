"""Comparing memories beside one frozen model: equal numbers, no look ahead, attention within turns, values counted whole."""

import importlib.util

import pytest
import torch
from talking import talking_base, talking_tokenizer
from tiny import one_thread  # noqa: F401 (a fixture)

from gru_memory.data import FactGenerator
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
from gru_memory.training.collator import IGNORED, SessionCollator

INSTALLED = [name for name in VARIANTS if "titans" not in name or importlib.util.find_spec("titans_pytorch")]
SMALL = CompareConfig(variants=("top",), steps=1, rows=2, facts=2, between=1, tests=5)


@pytest.fixture(scope="module")
def batch():
    generator = FactGenerator(3)
    return SessionCollator(talking_tokenizer("gpt2"))([generator.session(1, 1) for _ in range(2)])


def awake(name: str) -> _Subject:
    """A subject whose every parameter is heard."""
    torch.manual_seed(0)
    subject = make_subject(talking_base("gpt2"), name)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in subject.parameters:
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator) / max(1, parameter.shape[-1]) ** 0.5
    return subject


@pytest.mark.parametrize("name", INSTALLED)
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


@pytest.mark.parametrize("name", INSTALLED)
def test_every_parameter_that_is_to_learn_does(name, batch):
    subject = awake(name)
    if not subject.parameters:
        return
    logits = subject.logits(batch)
    logits[batch["labels"] != IGNORED].logsumexp(-1).sum().backward()
    assert any(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in subject.parameters)
    assert all(p.grad is None or p.grad.isfinite().all() for p in subject.parameters)


@pytest.mark.parametrize("name", [name for name, (_, changes) in VARIANTS.items() if changes is not None])
def test_our_memories_have_the_same_number_of_floats(name):
    floats = TOKENS * 192
    config = _config({**_TOP, **VARIANTS[name][1]}, floats)
    assert len(config.sites) * config.num_heads * config.num_slots * config.slot_size == floats


def test_labels_of_a_test_are_the_values_alone():
    tokenizer = talking_tokenizer("gpt2")
    collate = SessionCollator(tokenizer)
    facts = FactGenerator(SMALL.seed + 1, values="test")
    wanted = [t.value for _ in range(SMALL.tests) for t in facts.session(2, 1).turns if t.learn == "answer"]
    found = []
    for labels in (row for part in make_tests(tokenizer, collate, SMALL) for row in part["labels"]):
        for run in "".join("x" if label != IGNORED else " " for label in labels.tolist()).split():
            found.append(len(run))
    lengths = [len(tokenizer(f" {value}", add_special_tokens=False)["input_ids"]) for value in wanted]
    assert len(found) == len(wanted)
    assert sum(abs(a - b) <= 1 for a, b in zip(found, lengths, strict=True)) > 0.8 * len(found)


def test_a_value_is_right_if_all_its_tokens_are():
    labels = torch.tensor([[IGNORED, 4, 5, IGNORED, 6, IGNORED]])
    said = torch.tensor([[4, 5, 0, 7, 0, 0]])  # what comes next at each position

    def logits(_):
        return torch.nn.functional.one_hot(said, 8).float() * 50

    found = measure(_Subject(logits, [], 0), [{"labels": labels}])
    assert found["values"] == 0.5
    assert found["tokens"] == pytest.approx(2 / 3)


def test_the_top_learns_what_it_is_trained_on_and_a_model_without_memory_cannot():
    base = talking_base("gpt2")
    budget = {"steps": 100, "rows": 4, "facts": 1, "between": 0, "learning_rate": 0.01}
    config = CompareConfig(variants=("top", "no memory"), tests=8, seed=5, **budget)
    outcome = evaluate_compare(base, talking_tokenizer("gpt2"), config)
    losses = outcome.details["losses"]["top"]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    ours, without = outcome.rows
    assert ours["loss"] < without["loss"]
    assert (without["bytes"], without["parameters"]) == (0, 0)


@pytest.mark.parametrize(
    ("settings", "message"), [({"variants": ("lstm",)}, "variants has lstm"), ({"rows": 0}, "rows is 0")]
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        CompareConfig(**settings)
