"""Associative recall: what is asked can be answered, models see no later token, states have the size that is stated."""

import importlib.util
from dataclasses import replace

import pytest
import torch
from tiny import one_thread  # noqa: F401 (a fixture)

from gru_memory.evaluation import associative
from gru_memory.evaluation.associative import IGNORED, NAMES, AssociativeConfig, evaluate_associative, make_sequences
from gru_memory.evaluation.mixers import KINDS, build

HAVE_TITANS = importlib.util.find_spec("titans_pytorch") is not None
needs_titans = pytest.mark.skipif(
    not HAVE_TITANS, reason="titans-pytorch is not installed: pip install 'gru-memory[bench]'"
)
EVERY_KIND = [pytest.param(kind, marks=[needs_titans] if kind == "titans" else []) for kind in KINDS]
SIZE = {"vocabulary": 32, "width": 16, "layers": 2, "state_bytes": 2048, "segment": 4}


def test_every_key_is_asked_for_once_and_wants_the_value_told_after_it():
    ids, wanted = make_sequences(5, 7, 64, torch.Generator().manual_seed(0))
    assert ids.shape == wanted.shape == (5, 28)
    assert (wanted[:, :14] == IGNORED).all()
    for row, labels in zip(ids.tolist(), wanted.tolist(), strict=True):
        told = dict(zip(row[0:14:2], row[1:14:2], strict=True))
        assert len(told) == 7 and all(0 < key < 32 <= value for key, value in told.items())
        asked = {key: label for key, label in zip(row[14:], labels[14:], strict=True) if label != IGNORED}
        assert asked == told
        assert all(key == 0 for key, label in zip(row[14:], labels[14:], strict=True) if label == IGNORED)


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_no_model_sees_a_later_token_and_all_see_the_first_one(kind):
    torch.manual_seed(0)
    model = build(kind, **SIZE)
    ids = torch.randint(1, 32, (2, 24), generator=torch.Generator().manual_seed(1))
    first, last = ids.clone(), ids.clone()
    first[:, 0], last[:, 16:] = (first[:, 0] + 1) % 32, 0
    with torch.no_grad():
        logits = model(ids)
        torch.testing.assert_close(model(last)[:, :16], logits[:, :16])
        assert (
            model(first)[:, 20:] - logits[:, 20:]
        ).abs().max() > 1e-6  # through the memory of five segments, for RMT


def test_attention_to_the_last_tokens_sees_those_whose_keys_and_values_fit_the_bytes():
    torch.manual_seed(0)
    model = build("window", **{**SIZE, "layers": 1})  # 16 tokens of 128 bytes, and two that a convolution sees
    ids = torch.randint(1, 32, (2, 24), generator=torch.Generator().manual_seed(1))
    other = ids.clone()
    other[:, 0] = (other[:, 0] + 1) % 32
    with torch.no_grad():
        change = (model(ids) - model(other)).abs().amax(dim=(0, 2))
    assert (change[:19] > 1e-6).all() and (change[19:] == 0).all()


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_states_have_at_most_the_size_that_was_asked_for(kind):
    model = build(kind, **SIZE)
    short, long = model.state_bytes(10), model.state_bytes(1000)
    if kind == "attention":
        assert (short, long) == (2 * 2 * 10 * 16 * 4, 2 * 2 * 1000 * 16 * 4)
    else:
        assert 0.5 * SIZE["state_bytes"] < short == long <= SIZE["state_bytes"]


@pytest.mark.parametrize("kind", [kind for kind in EVERY_KIND if kind.values != ("attention",)])
def test_states_that_are_too_small_are_refused(kind):
    with pytest.raises(ValueError, match="too few for a state"):
        build(kind, **{**SIZE, "state_bytes": 8})


@pytest.mark.parametrize("kind", ("gru", "mingru"))
def test_our_memory_lets_nothing_fade(kind):
    assert all((part.site.decay == 1).all() for part in build(kind, **SIZE).parts)


def test_without_titans_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr("gru_memory.bench.peers.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'gru-memory\[bench\]'"):
        build("titans", **SIZE)


SMALL = AssociativeConfig(
    kinds=("mingru", "rmt"), pairs=(2, 4), state_bytes=(2048,), steps=120, tokens=256, width=32, vocabulary=32, tests=16,
    learning_rates=(0.01,), segment=4, seed=1,
)  # fmt: skip


def test_our_memory_learns_it_in_a_few_steps_and_the_untrained_one_does_not_know_it():
    outcome = evaluate_associative(None, None, SMALL)
    accuracy = {(row["model"], row["pairs"]): row["accuracy"] for row in outcome.rows}
    assert accuracy[NAMES["mingru"], 4] > 0.9
    assert accuracy[NAMES["rmt"], 4] < 0.9
    untrained = evaluate_associative(None, None, replace(SMALL, kinds=("mingru",), steps=1, learning_rates=(1e-9,)))
    assert untrained.rows[-1]["accuracy"] < 0.5


def test_models_are_tested_on_sequences_that_training_did_not_have(monkeypatch):
    made = []

    def spy(*arguments):
        ids, wanted = make_sequences(*arguments)
        made.append(set(map(tuple, ids.tolist())))
        return ids, wanted

    monkeypatch.setattr(associative, "make_sequences", spy)
    evaluate_associative(None, None, replace(SMALL, kinds=("mingru",), pairs=(4,), steps=3))
    *trained, tested = made
    assert len(trained) == 3 and len(tested) == SMALL.tests
    assert not tested & set.union(*trained)


def test_a_seed_gives_the_same_figures_again():
    def figures(seed):
        torch.rand(seed)  # what has been drawn before does not matter
        few = replace(SMALL, kinds=("mingru",), steps=2, learning_rates=(0.01, 0.003))
        outcome = evaluate_associative(None, None, few)
        return [row["accuracy"] for row in outcome.rows], outcome.details["models"][0]["last_losses"]

    assert figures(3) == figures(5)


def test_the_learning_rate_with_the_lower_loss_is_kept():
    outcome = evaluate_associative(None, None, replace(SMALL, kinds=("mingru",), steps=20, learning_rates=(1e-9, 0.01)))
    (course,) = outcome.details["models"]
    assert course["learning_rate"] == 0.01
    assert course["last_losses"]["0.01"] < course["last_losses"]["1e-09"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kinds": ("lstm",)}, "kinds has lstm"),
        ({"pairs": (200,)}, "have 127 keys"),
        ({"tokens": 100}, "a sequence of 64 pairs has 256"),
        ({"width": 12}, "multiple of 8"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        AssociativeConfig(**settings)
