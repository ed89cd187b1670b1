"""Associative recall: pairs of keys and values are told, then keys are asked for (MQAR, Arora et al. 2023, 2312.04927)."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..drawing import MARKERS, PALETTE, panels, save
from ..limits import at_least, choices
from .mixers import KINDS, Mixer, build
from .outcome import Evaluation, Figure, Needs, Outcome, Progress, Row, curve, labels_of

NAMES = {
    "gru": "ours, gru",
    "mingru": "ours, mingru",
    "rmt": "RMT memory tokens",
    "titans": "titans NeuralMemory",
    "window": "attention to the last tokens",
    "attention": "attention",
}
GROWS = "grows"  # the state of attention
IGNORED = -100
_WARM_UP, _LAST_RATE, _WEIGHT_DECAY, _CLIP = 50, 0.02, 0.01, 1.0


@dataclass(frozen=True)
class AssociativeConfig:
    """The task, the models, and what training they get."""

    kinds: tuple[str, ...] = field(default=KINDS, metadata={"help": f"of {', '.join(KINDS)}"})
    pairs: tuple[int, ...] = field(
        default=(4, 8, 16, 32, 64), metadata={"help": "pairs told before they are asked for"}
    )
    state_bytes: tuple[int, ...] = field(
        default=(4096, 16384), metadata={"help": "most that a model may carry from token to token, in float32"}
    )
    steps: int = field(default=600, metadata={"help": "optimiser steps of each model"})
    tokens: int = field(default=2048, metadata={"help": "tokens in a step, all of one number of pairs"})
    learning_rates: tuple[float, ...] = field(
        default=(0.003, 0.01), metadata={"help": "peaks that are tried; the model with the lower last loss is kept"}
    )
    width: int = field(default=64, metadata={"help": "of the hidden states"})
    layers: int = field(default=2, metadata={"help": "of each model"})
    vocabulary: int = field(default=256, metadata={"help": "tokens: one half keys, one half values"})
    segment: int = field(default=32, metadata={"help": "tokens that attention of RMT sees at once"})
    tests: int = field(default=64, metadata={"help": "sequences that each number of pairs is tested on"})
    seed: int = field(default=1234, metadata={"help": "of weights and sequences"})

    def __post_init__(self) -> None:
        at_least(self, 1, "pairs", "state_bytes", "steps", "layers", "segment", "tests")
        at_least(self, 0, "learning_rates")
        choices(self, "kinds", KINDS)
        if self.width < 8 or self.width % 8:
            raise ValueError(f"width is {self.width}: give a multiple of 8")
        if max(self.pairs) >= self.vocabulary // 2:
            raise ValueError(
                f"pairs is {max(self.pairs)}: the {self.vocabulary} tokens of --vocabulary have {self.vocabulary // 2 - 1} keys"
            )
        if self.tokens < 4 * max(self.pairs):
            raise ValueError(
                f"tokens is {self.tokens}: a sequence of {max(self.pairs)} pairs has {4 * max(self.pairs)}"
            )


def make_sequences(rows: int, pairs: int, vocabulary: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Token ids (B, 4n) and what should come after each (B, 4n), -100 where nothing is asked.

    First n keys, each with its value after it; then 2n places, at n of which, drawn at random, the keys are asked for in
    another order, and 0 at all others. Keys of a sequence differ; values may be equal.
    """
    keys = torch.rand(rows, vocabulary // 2 - 1, generator=generator).argsort(dim=1)[:, :pairs] + 1  # (B, n)
    values = torch.randint(vocabulary // 2, vocabulary, (rows, pairs), generator=generator)
    order = torch.rand(rows, pairs, generator=generator).argsort(dim=1)
    places = torch.rand(rows, 2 * pairs, generator=generator).argsort(dim=1)[:, :pairs].sort(dim=1).values
    told = torch.stack([keys, values], dim=-1).flatten(1)  # (B, 2n)
    asked = torch.zeros_like(told).scatter(1, places, keys.gather(1, order))
    wanted = torch.full_like(told, IGNORED).scatter(1, places, values.gather(1, order))
    return torch.cat([told, asked], dim=1), torch.cat([torch.full_like(told, IGNORED), wanted], dim=1)


def evaluate_associative(
    model: Any, tokenizer: Any, config: AssociativeConfig, progress: Progress | None = None
) -> Outcome:
    """Train every kind from scratch on all numbers of pairs, once for each size of state, and test it on each of them.

    `model` and `tokenizer` are not used: the models are small ones of this evaluation's own.
    """
    began, tell = time.perf_counter(), progress or (lambda *_: None)
    sized = [(kind, size) for kind in config.kinds for size in (config.state_bytes if kind != "attention" else (0,))]
    total = len(sized) * len(config.learning_rates) * config.steps
    done, rows, courses = 0, [], []
    for kind, size in sized:
        found = []
        for rate in config.learning_rates:

            def step(number: int, done: int = done) -> None:
                tell("steps", done + number, total)

            torch.manual_seed(config.seed)
            candidate = build(kind, config.vocabulary, config.width, config.layers, size, config.segment)
            start = time.perf_counter()
            loss = train(candidate, config, rate, step)
            found.append((loss, rate, time.perf_counter() - start, candidate))
            done += config.steps
        loss, rate, seconds, best = min(found, key=lambda one: one[0])
        parameters = sum(parameter.numel() for parameter in best.parameters())
        about = {"model": NAMES[kind], "state": GROWS if kind == "attention" else size}
        rows += [{**about, **_test(best, pairs, config), "seconds": seconds} for pairs in config.pairs]
        losses = {str(one[1]): one[0] for one in found}
        courses.append({**about, "parameters": parameters, "learning_rate": rate, "last_losses": losses})
    return Outcome(config, rows, time.perf_counter() - began, {"models": courses})


def train(model: Mixer, config: AssociativeConfig, rate: float, step: Any) -> float:
    """`config.steps` of AdamW, warm-up and cosine. Returns the mean loss of the last tenth, in nats a question."""
    generator, draw = torch.Generator().manual_seed(config.seed), Random(f"associative {config.seed}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=_WEIGHT_DECAY)
    losses = []
    for number in range(config.steps):
        done = number / config.steps
        share = min(1.0, (number + 1) / _WARM_UP) * (
            _LAST_RATE + (1 - _LAST_RATE) * 0.5 * (1 + math.cos(math.pi * done))
        )
        for group in optimizer.param_groups:
            group["lr"] = rate * share
        pairs = draw.choice(config.pairs)
        ids, wanted = make_sequences(config.tokens // (4 * pairs), pairs, config.vocabulary, generator)
        loss = F.cross_entropy(model(ids).flatten(0, 1), wanted.flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), _CLIP)
        optimizer.step()
        losses.append(loss.item())
        step(number + 1)
    last = losses[-max(1, config.steps // 10) :]
    return math.fsum(last) / len(last)


def _test(model: Mixer, pairs: int, config: AssociativeConfig) -> Row:
    """Accuracy on sequences that training has not drawn."""
    ids, wanted = make_sequences(
        config.tests, pairs, config.vocabulary, torch.Generator().manual_seed(config.seed + 1_000_003)
    )
    asked = wanted != IGNORED
    right = []
    with torch.no_grad():
        for some, labels, where in zip(ids.split(16), wanted.split(16), asked.split(16)):
            right.append((model(some).argmax(-1) == labels)[where])
    return {
        "pairs": pairs,
        "accuracy": torch.cat(right).float().mean().item(),
        "bytes": model.state_bytes(4 * pairs),
        "questions": int(asked.sum()),
    }


def plot_associative(runs: Sequence[dict[str, Any]], path: Any, title: str) -> None:
    """Accuracy against the number of pairs, a panel for each size of the state; attention is in all of them."""
    sizes = [size for size in labels_of(runs, "state") if size != GROWS] or [GROWS]
    figure, axes = panels(len(sizes), width=5.0, height=4.2)
    models = labels_of(runs, "model")
    for place, size in zip(axes, sizes, strict=True):
        for number, name in enumerate(models):
            x, mean, low, high = curve(runs, "pairs", "accuracy", model=name, state=size)
            if not x:
                x, mean, low, high = curve(runs, "pairs", "accuracy", model=name, state=GROWS)
            style = {
                "color": PALETTE[number],
                "marker": MARKERS[number],
                "linestyle": "--" if name == NAMES["attention"] else "-",
            }
            place.plot(x, [100 * y for y in mean], label=name, **style)
            place.fill_between(
                x, [100 * y for y in low], [100 * y for y in high], color=PALETTE[number], alpha=0.15, linewidth=0
            )
        place.set_xscale("log", base=2)
        place.set_xticks(x, [str(int(n)) for n in x])
        place.set(xlabel="pairs told before they are asked for", ylim=(-3, 103))
        if size != GROWS:
            place.set_title(f"{size:,} bytes of state", fontsize=10)
    axes[0].set_ylabel("keys answered with their value (%)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=11)
    save(figure, path)


ASSOCIATIVE = Evaluation(
    name="associative",
    about="Multi-query associative recall of small models trained from scratch, by number of pairs and bytes of state.",
    config=AssociativeConfig,
    run=evaluate_associative,
    needs=Needs.NOTHING,
    labels={"model": "model", "state": "state at most", "pairs": "pairs"},
    figures={
        "accuracy": Figure("accuracy", "share"),
        "bytes": Figure("bytes of state", "bytes"),
        "questions": Figure("questions", "count"),
        "seconds": Figure("training", "seconds"),
    },
    plot=plot_associative,
)
