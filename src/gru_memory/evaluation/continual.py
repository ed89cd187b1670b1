"""Continual learning: a stream of sets of facts, taken in by the memory without touching a weight, or trained into a LoRA."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.facts import FactGenerator, FactTurns
from ..data.sessions import Turn
from ..drawing import panels, save
from ..limits import at_least, choices
from .asking import as_kept, ask_all, kept_bytes
from .batched import BatchReader, pad
from .full_history import ask_alone
from .outcome import Evaluation, Figure, Outcome, Progress
from .scoring import contains

METHODS = {
    "memory": "memory, no weight changed",
    "lora": "LoRA, set after set",
    "replay": "LoRA with replay",
    "base": "base model, frozen",
}


@dataclass(frozen=True)
class ContinualConfig:
    """The stream, and how much training its rivals get."""

    sets: int = field(default=4, metadata={"help": "sets of facts, one after the other"})
    facts: int = field(default=4, metadata={"help": "facts of a set"})
    methods: tuple[str, ...] = field(default=tuple(METHODS), metadata={"help": f"of {', '.join(METHODS)}"})
    steps: int = field(default=24, metadata={"help": "optimiser steps of a LoRA on each set"})
    rows: int = field(default=8, metadata={"help": "turns in a step, drawn from the set's wordings"})
    replayed: int = field(default=8, metadata={"help": "further turns in a step, of earlier sets, with replay"})
    wordings: int = field(
        default=4, metadata={"help": "ways a LoRA is told each fact, and shown it asked and answered"}
    )
    rank: int = field(default=8, metadata={"help": "of the LoRA, on every linear layer"})
    learning_rate: float = field(default=1e-3, metadata={"help": "of AdamW on the LoRA"})
    seed: int = field(default=1234, metadata={"help": "of the facts and of the training"})
    max_new_tokens: int = field(default=24, metadata={"help": "longest reply, in tokens"})
    batch_size: int = field(default=16, metadata={"help": "questions at once"})

    def __post_init__(self) -> None:
        at_least(self, 2, "sets")
        at_least(self, 1, "facts", "steps", "rows", "wordings", "rank", "max_new_tokens", "batch_size")
        at_least(self, 0, "replayed", "learning_rate")
        choices(self, "methods", METHODS)


@dataclass
class _Course:
    """What a method reached: R[i][j] is the share of set j answered after set i was learned."""

    matrix: list[list[float]]
    seconds: float  # learning the whole stream
    bytes: int  # kept for it at its end
    replies: list[dict[str, Any]]


def evaluate_continual(
    model: Any, tokenizer: Any, config: ContinualConfig, progress: Progress | None = None
) -> Outcome:
    """Learn the sets one after the other; after each, ask for the facts of all, the question alone in the context.

    The memory reads every fact once, in one turn. A LoRA is trained on several wordings of every fact, and on several
    questions with their answers, though never on the question that is asked in the end; with replay every step holds
    turns of the earlier sets too, which have to be kept for that.
    """
    began, tell = time.perf_counter(), progress or (lambda *_: None)
    stream = make_stream(config)
    reader = BatchReader(model, tokenizer)
    courses: dict[str, _Course] = {}
    total = len(config.methods) * config.sets
    for number, method in enumerate(config.methods):

        def done(count: int, at: int = number) -> None:
            tell("sets", at * config.sets + count, total)

        done(0)
        if method == "memory":
            courses[method] = _with_memory(reader, stream, config, done)
        elif method == "base":
            courses[method] = _frozen(reader, stream, config)
        else:
            courses[method] = _with_lora(reader, stream, config, method == "replay", done)
        done(config.sets)
    items = config.sets * config.facts
    rows = []
    for method, course in courses.items():
        costs = {"seconds": course.seconds / items, "bytes": course.bytes / items, "kept": course.bytes}
        rows.append({"method": METHODS[method], **summary(course.matrix), **costs})
    details = {
        "R": {METHODS[method]: course.matrix for method, course in courses.items()},
        "replies": {METHODS[method]: course.replies for method, course in courses.items()},
    }
    return Outcome(config, rows, time.perf_counter() - began, details)


def summary(matrix: Sequence[Sequence[float]]) -> dict[str, float]:
    """Average accuracy at the end, accuracy just after learning, backward transfer and forgetting (Lopez-Paz and Ranzato,
    1706.08840; Chaudhry et al., 1801.10112), of R[i][j]."""
    last, before = len(matrix) - 1, range(len(matrix) - 1)
    return {
        "average": sum(matrix[last]) / len(matrix),
        "learned": sum(matrix[i][i] for i in range(len(matrix))) / len(matrix),
        "backward": sum(matrix[last][j] - matrix[j][j] for j in before) / last,
        "forgetting": sum(max(matrix[i][j] for i in range(j, last)) - matrix[last][j] for j in before) / last,
    }


def make_stream(config: ContinualConfig) -> list[list[FactTurns]]:
    """Sets of facts, no two of one attribute or value. The last question of each is kept for the test."""
    generator = FactGenerator(config.seed, values="test")
    taken: set[str] = set()
    facts: list[FactTurns] = []
    while len(facts) < config.sets * config.facts:
        turns = generator.fact_turns(config.wordings, config.wordings + 1)
        marks = {turns.fact.attribute, turns.fact.value.lower()}
        if taken.isdisjoint(marks):
            taken |= marks
            facts.append(turns)
    return [facts[start : start + config.facts] for start in range(0, len(facts), config.facts)]


@torch.no_grad()
def _with_memory(reader: BatchReader, stream: Sequence[list[FactTurns]], config: ContinualConfig, done: Any) -> _Course:
    state, seconds, matrix, replies = reader.start(1), 0.0, [], []
    for number, facts in enumerate(stream):
        began = time.perf_counter()
        state = as_kept(reader.read_all(state, [[(f.tells[0].user, f.tells[0].assistant) for f in facts]]))
        seconds += time.perf_counter() - began
        now = state

        def ask(questions: list[str], now: Any = now) -> list[str]:
            return ask_all(reader, now, [0] * len(questions), questions, config.batch_size, config.max_new_tokens)

        _test(stream, number, ask, matrix, replies)
        done(number + 1)
    return _Course(matrix, seconds, kept_bytes(state), replies)


def _frozen(reader: BatchReader, stream: Sequence[list[FactTurns]], config: ContinualConfig) -> _Course:
    matrix, replies = [], []
    _test(stream, 0, lambda questions: _ask_base(reader, questions, config), matrix, replies)
    return _Course(matrix * len(stream), 0.0, 0, replies)  # the same after every set


def _with_lora(
    reader: BatchReader, stream: Sequence[list[FactTurns]], config: ContinualConfig, replay: bool, done: Any
) -> _Course:
    rng = Random(f"continual {config.seed} {replay}")
    matrix: list[list[float]] = []
    replies: list[dict[str, Any]] = []
    seconds, kept = 0.0, 0
    with lora(reader.model, config.rank, config.seed) as parameters:
        optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate)
        earlier: list[Turn] = []
        for number, facts in enumerate(stream):
            began = time.perf_counter()
            turns = [turn for fact in facts for turn in (*fact.tells, *fact.asks[:-1])]
            for _ in range(config.steps):
                batch = [rng.choice(turns) for _ in range(config.rows)]
                if replay and earlier:
                    batch += [rng.choice(earlier) for _ in range(config.replayed)]
                loss = _loss(reader, batch)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
            earlier += turns
            seconds += time.perf_counter() - began
            _test(stream, number, lambda questions: _ask_base(reader, questions, config), matrix, replies)
            done(number + 1)
        kept = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    if replay:
        kept += sum(len((turn.user + (turn.assistant or "")).encode()) for turn in earlier)
    return _Course(matrix, seconds, kept, replies)


@contextlib.contextmanager
def lora(model: Any, rank: int, seed: int) -> Iterator[list[torch.nn.Parameter]]:
    """The base model with a new LoRA on every linear layer of its blocks, for a while; its parameters alone need gradients."""
    try:
        from peft import LoraConfig, get_peft_model
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error}; a LoRA needs: pip install 'gru-memory[bench]'", name=error.name) from error
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    settings = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", exclude_modules=r".*gru_memory.*", task_type="CAUSAL_LM"
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted = get_peft_model(model, settings)
    try:
        yield [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    finally:
        adapted.unload()
        vars(model).pop("peft_config", None)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(wanted[name])


def _loss(reader: BatchReader, turns: Sequence[Turn]) -> Tensor:
    """Nats a token, of told turns from their first token, of questions on their answers."""
    prefix = reader.renderer.prefix_ids
    rendered = [reader.renderer.turn(turn.user, turn.assistant) for turn in turns]
    ids, mask = pad([prefix + one.ids for one in rendered], reader.pad_id, left=False, device=reader.model.device)
    labels = ids.masked_fill(mask == 0, -100)
    for row, (turn, one) in enumerate(zip(turns, rendered, strict=True)):
        labels[row, : len(prefix) + (one.reply_start if turn.kind == "ask" else 0)] = -100
    with reader.model.disable_memory():
        logits = reader.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)


def _ask_base(reader: BatchReader, questions: list[str], config: ContinualConfig) -> list[str]:
    return ask_alone(reader, questions, config.batch_size, config.max_new_tokens)


def _test(
    stream: Sequence[list[FactTurns]], after: int, ask: Any, matrix: list[list[float]], replies: list[dict[str, Any]]
) -> None:
    """Ask for every fact of every set, and add a row to the matrix."""
    asked = [(number, fact.asks[-1]) for number, facts in enumerate(stream) for fact in facts]
    right: list[list[bool]] = [[] for _ in stream]
    for (number, turn), reply in zip(asked, ask([turn.user for _, turn in asked]), strict=True):
        right[number].append(contains(reply, turn.value))
        about = {"after_set": after, "set": number}
        replies.append({**about, "question": turn.user, "value": turn.value, "reply": reply})
    matrix.append([sum(flags) / len(flags) for flags in right])


def plot_continual(runs: Sequence[dict[str, Any]], path: Any, title: str) -> None:
    """The matrix R of every method, mean over the runs."""
    methods = list(runs[0]["details"]["R"])
    figure, axes = panels(len(methods), width=3.6, height=3.9)
    for place, method in zip(axes, methods, strict=True):
        stacked = torch.tensor([run["details"]["R"][method] for run in runs]).mean(0)
        image = place.imshow((100 * stacked).tolist(), vmin=0, vmax=100, cmap="cividis")
        place.grid(False)
        for i, row in enumerate(stacked.tolist()):
            for j, share in enumerate(row):
                colour = "white" if share < 0.6 else "black"
                place.text(j, i, f"{100 * share:.0f}", ha="center", va="center", fontsize=8, color=colour)
        count = range(len(stacked))
        place.set_xticks(count, [i + 1 for i in count])
        place.set_yticks(count, [i + 1 for i in count])
        average = sum(row["average"] for run in runs for row in run["rows"] if row["method"] == method) / len(runs)
        place.set_title(f"{method}\naverage {100 * average:.0f}%", fontsize=9)
        place.set_xlabel("set asked for")
    axes[0].set_ylabel("after learning set")
    figure.colorbar(image, ax=axes, label="replies that contain the value (%)", fraction=0.02)
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    save(figure, path)


CONTINUAL = Evaluation(
    name="continual",
    about="A stream of sets of facts: memory without a weight changed, LoRA, LoRA with replay, frozen base.",
    config=ContinualConfig,
    run=evaluate_continual,
    labels={"method": "method"},
    figures={
        "average": Figure("average accuracy", "share"),
        "learned": Figure("just after learning", "share"),
        "backward": Figure("backward transfer", "points"),
        "forgetting": Figure("forgetting", "points"),
        "seconds": Figure("seconds an item", "seconds"),
        "bytes": Figure("bytes an item", "bytes"),
        "kept": Figure("kept in all", "bytes"),
    },
    plot=plot_continual,
)
