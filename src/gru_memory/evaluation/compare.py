"""Which sites, which cell, which shape, which decay, and against which rivals: the same small budget of training for each."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import MemoryConfig
from ..data.facts import FactGenerator
from ..data.sessions import Session
from ..drawing import PALETTE, figure_class, save
from ..limits import at_least, choices
from ..memory import GRUMemoryWithDecay
from ..models import add_memory
from ..training.collator import IGNORED, SessionCollator, pad_rows
from .outcome import Evaluation, Figure, Needs, Outcome, Progress, Row, spread
from .rivals import DecayedAverage, MemoryTokens, TitansSite

TOKENS = 16  # of RMT; all others get as many numbers as these have, or fewer
_SPREAD_DECAY = [0.9, 0.97, 0.99, 0.998]  # one a head
_WARM_UP, _LAST_RATE, _CLIP = 20, 0.05, 1.0
_TOP: dict[str, Any] = {"sites": ("top",), "cell": "mingru", "size": 32, "decay": 0.998, "decay_every": "turn"}
# As in the memory that ships, half of a slot or more says what it was written under.
_BY_CONTENT: dict[str, Any] = {
    "addressing": "content",
    "heads": 1,
    "size": 64,
    "signature_size": 32,
    "address_rank": 32,
}

# name -> (question, what differs from _TOP); None: no memory of ours.
VARIANTS: dict[str, tuple[str, dict[str, Any] | None]] = {
    "top": ("site", {}),
    "middle": ("site", {"sites": ("middle",)}),
    "input": ("site", {"sites": ("input",)}),
    "input + middle + top": ("site", {"sites": ("input", "middle", "top")}),
    "gru": ("cell", {"cell": "gru"}),
    "slots of 64": ("shape", {"size": 64}),
    "slots of 16": ("shape", {"size": 16}),
    "slots of 8": ("shape", {"size": 8}),
    "slots found by content": ("addressing", _BY_CONTENT),
    "0.998 a token": ("decay", {"decay_every": "token"}),
    "0.9 a turn": ("decay", {"decay": 0.9}),
    "several time scales": ("decay", {"decay": _SPREAD_DECAY}),
    "no decay": ("decay", {"decay": 1.0}),
    "titans NeuralMemory": ("rival", None),
    "RMT memory tokens": ("rival", None),
    "decayed average": ("rival", None),
    "no memory": ("rival", None),
}
REFERENCE = "top"


@dataclass(frozen=True)
class CompareConfig:
    """Which memories, and the budget that each gets."""

    variants: tuple[str, ...] = field(default=tuple(VARIANTS), metadata={"help": "names as in the table, with commas"})
    steps: int = field(default=150, metadata={"help": "optimiser steps of each"})
    rows: int = field(default=8, metadata={"help": "sessions in a step"})
    facts: int = field(default=3, metadata={"help": "facts in a session: 1 to this in training, this many in the test"})
    between: int = field(default=3, metadata={"help": "unrelated turns: 0 to this in training, this many in the test"})
    learning_rate: float = field(default=0.003, metadata={"help": "peak, of AdamW"})
    tests: int = field(default=50, metadata={"help": "sessions to test on, with values that training never has"})
    seed: int = field(default=1234, metadata={"help": "of weights, sessions and tests"})

    def __post_init__(self) -> None:
        at_least(self, 1, "steps", "rows", "facts", "tests")
        at_least(self, 0, "between", "learning_rate")
        choices(self, "variants", VARIANTS)


@dataclass
class _Subject:
    """One memory beside the model: its logits, what of it learns, and how many numbers it carries."""

    logits: Callable[[dict[str, Tensor]], Tensor]
    parameters: list[nn.Parameter]
    floats: int


def evaluate_compare(model: Any, tokenizer: Any, config: CompareConfig, progress: Progress | None = None) -> Outcome:
    """Train every variant on the same sessions, then measure it on others: whole sessions in a row, attention within turns.

    At the top ours begins with value and read projections matched to the output embeddings, as it does in training
    (`GRUMemoryWithDecay.match_embeddings`), and fully open; nothing is fitted to sessions. Below the top, and for rivals, there is
    no such beginning. The model is frozen; gradients pass through it to sites below its top. Figures are of teacher forcing: what
    is next, given the right answer up to there.
    """
    began, tell = time.perf_counter(), progress or (lambda *_: None)
    collate = SessionCollator(tokenizer)
    tests = [_moved(batch, model.device) for batch in make_tests(tokenizer, collate, config)]
    total = len(config.variants) * config.steps
    rows: list[Row] = []
    courses: dict[str, list[float]] = {}
    for number, name in enumerate(config.variants):

        def step(done: int, at: int = number) -> None:
            tell("steps", at * config.steps + done, total)

        torch.manual_seed(config.seed)
        subject = make_subject(model, name)
        start = time.perf_counter()
        courses[name] = train(subject, collate, config, step)
        seconds = time.perf_counter() - start
        sizes = {"bytes": 4 * subject.floats, "parameters": sum(p.numel() for p in subject.parameters)}
        rows.append(
            {"about": VARIANTS[name][0], "memory": name, **measure(subject, tests), **sizes, "seconds": seconds}
        )
    return Outcome(config, rows, time.perf_counter() - began, {"losses": courses, "reference": _TOP})


def make_subject(model: Any, name: str) -> _Subject:
    """The model with this memory (in place: one takes the place of another), or what stands for it."""
    width, head = model.config.get_text_config().hidden_size, model.get_output_embeddings().weight
    floats, changes = TOKENS * width, VARIANTS[name][1]
    config = _config({**_TOP, **(changes or {})}, floats)
    site: nn.Module | None = None
    if name == "titans NeuralMemory":
        site = TitansSite(width, head.shape[1], floats)
    elif name == "decayed average":
        site = DecayedAverage(width, head.shape[1], decay=0.97)
    model = add_memory(model, config, sites={"top": site} if site is not None else None).float()
    if name == "RMT memory tokens":
        tokens = MemoryTokens(model, TOKENS)

        def read(batch: dict[str, Tensor]) -> Tensor:
            with model.disable_memory():
                return tokens.logits(model, batch)

        return _Subject(read, list(tokens.parameters()), tokens.state_floats)
    if name == "no memory":

        def alone(batch: dict[str, Tensor]) -> Tensor:
            with model.disable_memory():
                return model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits

        return _Subject(alone, [], 0)
    for place, module in model.memory_sites().items():
        if place == "top" and isinstance(module, GRUMemoryWithDecay):
            module.match_embeddings(head)
            nn.init.ones_(module.gate)  # what it says goes to the logits alone

    def logits(batch: dict[str, Tensor]) -> Tensor:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        return model(**inputs, use_cache=False).logits

    if site is not None:
        return _Subject(logits, site.learned(), site.state_floats)
    kept = sum(part.numel() for state in model.initial_memory_state(1).sites.values() for part in state.values())
    return _Subject(logits, list(model.memory_parameters()), kept)


def _config(settings: dict[str, Any], floats: int) -> MemoryConfig:
    """A memory whose state has at most `floats` numbers, shared equally by its sites. Sites below the top begin softly."""
    settings = dict(settings)
    heads = settings.pop("heads", 4)
    size = min(settings.pop("size"), max(1, floats // heads))
    each = floats // len(settings["sites"])
    if settings.get("addressing") == "content":  # beside the slots: the key before, and four numbers a head
        slots = (each - settings["address_rank"] - 4 * heads) // heads // size
    else:  # each slot's share of the address before, and a strength a head
        slots = (each - heads) // heads // (size + 1)
    slots = max(1, slots)
    return MemoryConfig(num_heads=heads, num_slots=slots, slot_size=size, gate_init=0.1, **settings)


def train(
    subject: _Subject, collate: SessionCollator, config: CompareConfig, step: Callable[[int], None]
) -> list[float]:
    """`config.steps` of AdamW on answers, with warm-up and cosine. Returns the losses, nats a token of an answer."""
    if not subject.parameters:
        step(config.steps)
        return []
    rng, facts = Random(f"compare {config.seed}"), FactGenerator(config.seed)
    optimizer = torch.optim.AdamW(subject.parameters, lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    losses = []
    for number in range(config.steps):
        cosine = _LAST_RATE + (1 - _LAST_RATE) * 0.5 * (1 + math.cos(math.pi * number / config.steps))
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * min(1.0, (number + 1) / _WARM_UP) * cosine
        told, between = rng.randint(1, config.facts), rng.randint(0, config.between)
        batch = collate([facts.session(told, between) for _ in range(config.rows)])
        batch = _moved(batch, subject.parameters[0].device)
        loss = _loss(subject.logits(batch), batch["labels"])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(subject.parameters, _CLIP)
        optimizer.step()
        losses.append(loss.item())
        step(number + 1)
    return losses


def _moved(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: values.to(device) for name, values in batch.items()}


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Nats a token; logits (B, T, V), labels (B, T) not yet shifted."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED)


def make_tests(tokenizer: Any, collate: SessionCollator, config: CompareConfig) -> list[dict[str, Tensor]]:
    """Batches in which the labels are the tokens of the values asked for, and of nothing else."""
    facts = FactGenerator(config.seed + 1, values="test")
    rows = [_values_alone(facts.session(config.facts, config.between), tokenizer, collate) for _ in range(config.tests)]
    return [pad_rows(rows[start : start + config.rows], collate.pad_id) for start in range(0, len(rows), config.rows)]


def _values_alone(session: Session, tokenizer: Any, collate: SessionCollator) -> dict[str, list[int]]:
    row = collate.row(session)
    labels, place = row["labels"], 0
    for turn in (turn for turn in session.turns if turn.learn == "answer"):
        while labels[place] == IGNORED:
            place += 1
        start = place
        while place < len(labels) and labels[place] != IGNORED:
            place += 1
        pieces = [tokenizer.decode([token]) for token in labels[start:place]]
        ends = [sum(map(len, pieces[: i + 1])) for i in range(len(pieces))]
        first = "".join(pieces).rfind(turn.value)
        last = first + len(turn.value) if first >= 0 else -1
        for i, end in enumerate(ends):
            if not (end > first and end - len(pieces[i]) < last):
                labels[start + i] = IGNORED
    return row


@torch.no_grad()
def measure(subject: _Subject, tests: Sequence[dict[str, Tensor]]) -> Row:
    """Shares of values with every token right, and of their tokens; nats a token of them."""
    values, tokens, losses = [], [], []
    for batch in tests:
        logits = subject.logits(batch)
        wanted = batch["labels"][:, 1:]
        asked = wanted != IGNORED
        right = (logits[:, :-1].argmax(-1) == wanted) & asked
        losses.append(F.cross_entropy(logits[:, :-1][asked].float(), wanted[asked], reduction="none"))
        tokens.append(right[asked])
        begins = asked & ~F.pad(asked[:, :-1], (1, 0))
        number = begins.long().cumsum(1)  # of the value within its row
        for row in range(len(wanted)):
            for value in range(1, int(number[row].max()) + 1):
                values.append(bool(right[row][asked[row] & (number[row] == value)].all()))
    return {
        "values": sum(values) / len(values),
        "tokens": torch.cat(tokens).float().mean().item(),
        "loss": torch.cat(losses).mean().item(),
    }


def plot_compare(runs: Sequence[dict[str, Any]], path: Any, title: str) -> None:
    """Bars of values and of their tokens, with the spread between the runs, grouped by what is compared."""
    lines = spread(runs, COMPARE)
    figure = figure_class()(figsize=(8.5, 1.8 + 0.36 * len(lines)), layout="constrained")
    axes = figure.add_subplot()
    longest = 5.0
    for number, (key, name) in enumerate((("values", "whole values"), ("tokens", "tokens of values"))):
        places = [row + 0.2 * (2 * number - 1) for row in range(len(lines))]
        means = [100 * figures[key].mean for _, figures in lines]
        errors = [100 * (figures[key].deviation or 0) for _, figures in lines]
        whiskers = errors if len(runs) > 1 else None
        axes.barh(places, means, 0.38, xerr=whiskers, color=PALETTE[number], label=name, ecolor="black", capsize=2)
        longest = max([longest, *(mean + error for mean, error in zip(means, errors, strict=True))])
        for place, mean, error in zip(places, means, errors, strict=True):
            axes.annotate(
                f"{mean:.0f}", (mean + error, place), (4, 0), textcoords="offset points", va="center", fontsize=7
            )
    axes.set_yticks(range(len(lines)), [f"{labels['about']}: {labels['memory']}" for labels, _ in lines], fontsize=8)
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.set(
        xlabel="right under teacher forcing (%), values that training never had", xlim=(0, min(108, 1.12 * longest))
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, loc="left", fontweight="bold")
    figure.legend(loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    save(figure, path)


COMPARE = Evaluation(
    name="compare",
    about="Sites, cells, shapes, decays and rivals, each trained on the same sessions with the same number of steps.",
    config=CompareConfig,
    run=evaluate_compare,
    needs=Needs.MODEL,
    labels={"about": "compares", "memory": "memory"},
    figures={
        "values": Figure("values", "share"),
        "tokens": Figure("tokens of values", "share"),
        "loss": Figure("loss (nats)", "nats"),
        "bytes": Figure("bytes of state", "bytes"),
        "parameters": Figure("parameters", "count"),
        "seconds": Figure("training", "seconds"),
    },
    plot=plot_compare,
)
