"""Facts of a small world spread over turns, and questions that need one, two or three of them (bAbI, BABILong)."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch.nn import functional as F

from .. import backbones
from ..data.facts import FactGenerator
from ..data.sessions import Session, Turn, write_jsonl
from ..drawing import MARKERS, PALETTE, panels, save
from ..limits import at_least, choices
from ..rendering import TurnRenderer
from ..state import MemoryState
from ..training.features import PREFIX, FeatureCache, build_feature_cache
from ..training.frozen import weights_sum
from ..training.request import TrainRequest
from ..training.rows import make_batch, turn_text
from ..training.run import train_loaded
from ..training.trainer import TrainingConfig
from .asking import as_kept, ask_all, asked
from .babi_world import TASKS, answer_in, spread, story
from .batched import BatchReader
from .outcome import Evaluation, Figure, Needs, Outcome, Progress, curve, labels_of

MEAN = "mean"
# Table 1 of Rodkin et al. 2024 (2407.04841): RMT with GPT-2 (137M) trained on BABILong, exact match in percent, at 64,000 tokens.
PUBLISHED = {1: 99.6, 2: 72.7, 3: 51.9, 4: 51.2, 5: 88.5}
PUBLISHED_AS = "RMT (137M) on BABILong at 64k tokens, as published in arXiv:2407.04841"


@dataclass(frozen=True)
class BabiConfig:
    """What a memory is trained on, and what it is asked."""

    tasks: tuple[int, ...] = field(default=tuple(TASKS), metadata={"help": "of 1 to 5, all trained into one memory"})
    turns: tuple[int, ...] = field(default=(0, 10, 50), metadata={"help": "turns of noise among the facts of a story"})
    stories: int = field(default=2000, metadata={"help": "stories to train on"})
    most_noise: int = field(default=6, metadata={"help": "turns of noise in a story to train on, drawn from 0 to this"})
    talk: int = field(
        default=300, metadata={"help": "distinct turns of noise to train on, and as many others to test on"}
    )
    steps: int = field(default=2000, metadata={"help": "training steps"})
    rows: int = field(default=8, metadata={"help": "stories in a step, about"})
    tests: int = field(default=50, metadata={"help": "stories of each task to test on"})
    seed: int = field(default=1234, metadata={"help": "of stories and training"})
    work: str | None = field(
        default=None,
        metadata={"help": "folder for hidden states and memories, used again; a temporary one if not given"},
    )
    max_new_tokens: int = field(default=40, metadata={"help": "longest reply, in tokens"})
    batch_size: int = field(default=16, metadata={"help": "questions at once"})

    def __post_init__(self) -> None:
        at_least(self, 1, "stories", "talk", "steps", "rows", "tests", "max_new_tokens", "batch_size")
        at_least(self, 0, "turns", "most_noise")
        choices(self, "tasks", TASKS)


def evaluate_babi(model: Any, tokenizer: Any, config: BabiConfig, progress: Progress | None = None) -> Outcome:
    """Train one memory for all tasks on stories, then ask it for others, with more noise than training had.

    A statement is a turn; attention sees one turn. What the base model says of a turn does not depend on a memory at the
    top, so noise, and in training everything, is read from cached hidden states. In the test notes and answers are generated.
    An answer is right if the last word in it that can be one is the one asked for.
    """
    began, tell = time.perf_counter(), progress or (lambda *_: None)
    tests = make_tests(config)
    rows, replies = [], []
    with _folder(config.work) as work:
        model = train_memory(model, tokenizer, config, work, tell)
        trained = time.perf_counter() - began
        silent = [
            Session(tuple(turn for turn in session.turns if turn.learn != "answer"))
            for sessions in tests.values()
            for session in sessions
        ]
        cache = _cache(model, tokenizer, silent, work)
        reader = BatchReader(model, tokenizer)
        for number, ((task, turns), sessions) in enumerate(tests.items()):
            tell("asking", number, len(tests))
            questions = [asked(session)[0] for session in sessions]
            told = [_told_live(reader, sessions[start : start + config.batch_size], cache, config.max_new_tokens)
                    for start in range(0, len(sessions), config.batch_size)]  # fmt: skip
            states = as_kept(MemoryState.cat([state for state, _ in told]))
            wrong_notes = [wrong for _, notes in told for wrong in notes]
            found = ask_all(
                reader,
                states,
                range(len(sessions)),
                [turn.user for turn in questions],
                config.batch_size,
                config.max_new_tokens,
            )
            right = [answer_in(reply) == turn.value for reply, turn in zip(found, questions, strict=True)]
            for turn, reply, wrong in zip(questions, found, wrong_notes, strict=True):
                replies.append(
                    {"task": task, "turns": turns, "question": turn.user, "value": turn.value, "reply": reply,
                     "wanted": turn.assistant, "wrong_notes": wrong}
                )  # fmt: skip
            rows.append({"task": task, "turns": turns, "accuracy": sum(right) / len(right), "questions": len(right)})
        tell("asking", len(tests), len(tests))
    for row in rows:
        row["published"] = PUBLISHED[row["task"]] / 100
    for turns in config.turns:
        same = [row for row in rows if row["turns"] == turns]
        means = {name: sum(row[name] for row in same) / len(same) for name in ("accuracy", "published")}
        rows.append({"task": MEAN, "turns": turns, **means, "questions": sum(row["questions"] for row in same)})
    details = {"training_seconds": trained, "published_as": PUBLISHED_AS, "replies": replies}
    return Outcome(config, rows, time.perf_counter() - began, details)


def make_tests(config: BabiConfig) -> dict[tuple[int, int], list[Session]]:
    """Stories by task and turns of noise: for every number of turns the same ones, none of which training has."""
    rng, talk = Random(f"babi test {config.seed}"), _talk(config, "test")
    known = {_said(one) for one, _ in _training_stories(config)}
    tests: dict[tuple[int, int], list[Session]] = {}
    for task in config.tasks:
        stories: list[list[Turn]] = []
        while len(stories) < config.tests:
            one = story(task, rng)
            if _said(one) not in known:
                stories.append(one)
        for turns in config.turns:
            tests[task, turns] = [spread(one, rng.choices(talk, k=turns), rng) for one in stories]
    return tests


def _talk(config: BabiConfig, part: str) -> list[Turn]:
    """Turns of noise; the wordings of the test are held out of training."""
    generator = FactGenerator(config.seed, phrasings=part)
    return [generator.talk() for _ in range(config.talk)]


def _training_stories(config: BabiConfig) -> Iterator[tuple[list[Turn], Session]]:
    """Every story to train on, as it is and with noise in it."""
    rng, talk = Random(f"babi train {config.seed}"), _talk(config, "train")
    for number in range(config.stories):
        turns = story(config.tasks[number % len(config.tasks)], rng)
        yield turns, spread(turns, rng.choices(talk, k=rng.randint(0, config.most_noise)), rng)


def _said(turns: Sequence[Turn]) -> tuple[str | None, ...]:
    """What names a story: all that is told and asked in it."""
    return tuple(turn.user for turn in turns)


def train_memory(model: Any, tokenizer: Any, config: BabiConfig, work: Path, tell: Progress) -> Any:
    """The model with a memory trained on `config.stories` stories."""
    sessions = [session for _, session in _training_stories(config)]
    out = work / f"memory-{config.seed}"
    out.mkdir(parents=True, exist_ok=True)
    write_jsonl(out / "stories.jsonl", sessions)
    training = TrainingConfig(
        steps=config.steps,
        rows=config.rows,
        seed=config.seed,
        validate_every=75,
        warmup_steps=50,
        base_weight=1.5,
        apart_weight=0.0,  # stories tell the same of the same few things
    )
    request = TrainRequest(
        out=str(out),
        data=str(out / "stories.jsonl"),
        training=training,
        # Much of what notes and answers say by heart is a small share of a read, and nothing here is harmed by saying it.
        memory={"persistent_floor": 0.0},
        cache=str(work / "states"),
    )

    def report(values: dict) -> None:
        if "validation" not in values:
            tell("training", values["step"], values["steps"])

    model = train_loaded(model, tokenizer, request, report, tell).float()
    model.save_memory(out, dtype=torch.float16)
    return model


@contextlib.contextmanager
def _folder(name: str | None) -> Iterator[Path]:
    if name is not None:
        yield Path(name)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def _cache(model: Any, tokenizer: Any, sessions: Sequence[Session], work: Path) -> FeatureCache:
    """Hidden states of every turn but the questions."""
    turns = (turn for session in sessions for turn in session.turns if turn.kind != "ask")
    texts = [PREFIX, *dict.fromkeys(turn_text(turn) for turn in turns)]
    with model.disable_memory():
        return build_feature_cache(
            work / "states", model, backbones.before_head_of(model), backbones.blocks_of(model), TurnRenderer(tokenizer),
            texts, model.memory_config.key_layers, f"{weights_sum(model)} float32",
        )  # fmt: skip


def _told_live(
    reader: BatchReader, sessions: Sequence[Session], cache: FeatureCache, max_new_tokens: int
) -> tuple[MemoryState, list[list[dict[str, str]]]]:
    """The states before the questions, every note as the model itself said it; and of each session the notes that differ
    from those of training."""
    model, states = reader.model, reader.start(len(sessions))
    parts = [_parts(session) for session in sessions]
    wrong: list[list[dict[str, str]]] = [[] for _ in sessions]
    for number in range(max(map(len, parts))):
        here = {row: part[number] for row, part in enumerate(parts) if number < len(part)}
        silent = {row: turns for row, (turns, _) in here.items() if turns}
        if silent:
            read = read_cached(model, list(silent.values()), cache, states.select(list(silent)))
            states = _put(states, list(silent), read)
        noted = {row: turn for row, (_, turn) in here.items() if turn is not None}
        if noted:
            users = [turn.user for turn in noted.values()]
            replies, read = reader.ask(states.select(list(noted)), users, max_new_tokens=max_new_tokens)
            states = _put(states, list(noted), read)
            for (row, turn), reply in zip(noted.items(), replies, strict=True):
                if reply != turn.assistant:
                    wrong[row].append({"statement": turn.user, "wanted": turn.assistant, "reply": reply})
    return states, wrong


def _parts(session: Session) -> list[tuple[list[Turn], Turn | None]]:
    """The session without its question in stretches: turns that are only read, and a statement that the model replies to."""
    parts: list[tuple[list[Turn], Turn | None]] = []
    silent: list[Turn] = []
    for turn in session.turns:
        if turn.kind == "tell" and turn.learn == "answer":
            parts.append((silent, turn))
            silent = []
        elif turn.kind != "ask":
            silent.append(turn)
    return [*parts, (silent, None)] if silent else parts


def _put(states: MemoryState, rows: list[int], new: MemoryState) -> MemoryState:
    """`states` with `new` ones in these rows."""
    rest = [row for row in range(len(states.tokens)) if row not in rows]
    both = MemoryState.cat([new, states.select(rest)]) if rest else new
    order = [*rows, *rest]
    return both.select([order.index(row) for row in range(len(order))])


@torch.no_grad()
def read_cached(
    model: Any, conversations: Sequence[Sequence[Turn]], cache: FeatureCache, states: MemoryState
) -> MemoryState:
    """The states after these turns of each conversation."""
    memory, head = model.memory_sites()["top"], model.get_output_embeddings().weight
    batch = make_batch([Session(tuple(turns)) for turns in conversations], cache).to(memory.gate.device)
    prefix = len(cache.tokens(cache.find(PREFIX)))
    begun = states.turns > 0
    if prefix:  # memory takes it in once
        batch.mask[begun, :prefix] = False
        batch.turn_starts[begun, :prefix] = False
        batch.turn_starts[begun, prefix] = True
    own, extra = batch.features[..., : memory.hidden_size], batch.features[..., memory.hidden_size :]
    _, site = memory(
        own, F.embedding(batch.tokens, head), states.sites["top"], batch.mask, batch.turn_starts,
        extra if memory.key_size else None,
    )  # fmt: skip
    tokens, turns = (
        kept + new.sum(dim=1) for kept, new in ((states.tokens, batch.mask), (states.turns, batch.turn_starts))
    )
    return replace(states, sites={"top": site}, tokens=tokens, turns=turns)


def plot_babi(runs: Sequence[dict[str, Any]], path: Any, title: str) -> None:
    """Accuracy by turns of noise, a line for each task with the range of the seeds, and the published figures at the right."""
    figure, (axes,) = panels(1, width=7.2, height=4.6)
    tasks, turns = labels_of(runs, "task"), sorted(labels_of(runs, "turns"))
    beside = len(turns)  # place of what is published
    for number, task in enumerate(tasks):
        _, mean, low, high = curve(runs, "turns", "accuracy", task=task)
        colour = "black" if task == MEAN else PALETTE[number]
        aside = 0.06 * (number - (len(tasks) - 1) / 2)  # so that none hides another
        mean, low, high = ([100 * y for y in ys] for ys in (mean, low, high))
        axes.errorbar(
            [place + aside for place in range(beside)],
            mean,
            yerr=[[y - least for y, least in zip(mean, low)], [most - y for y, most in zip(mean, high)]],
            color=colour,
            marker=MARKERS[number],
            label=MEAN if task == MEAN else f"task {task}: {TASKS[task]}",
            linewidth=2.2 if task == MEAN else 1.4,
            elinewidth=1,
            capsize=2,
        )
        published = curve(runs, "turns", "published", task=task)[1][0]
        axes.plot(
            beside + aside, 100 * published, color=colour, marker=MARKERS[number], markerfacecolor="none", markersize=8
        )
    axes.axvline(beside - 0.5, color="0.7", linewidth=0.8)
    axes.set_xticks(range(beside + 1), [*map(str, turns), "RMT 137M, 64k tokens,\nas published"])
    axes.set(
        xlabel="turns of noise among the facts", ylabel="right answers (%)", xlim=(-0.5, beside + 0.5), ylim=(-3, 105)
    )
    axes.set_title(title, loc="left", fontweight="bold")
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    save(figure, path)


BABI = Evaluation(
    name="babi",
    about="Questions that need one to three facts of a small world (bAbI tasks 1 to 5), with turns of noise between the facts.",
    config=BabiConfig,
    run=evaluate_babi,
    needs=Needs.MODEL,
    labels={"task": "task", "turns": "turns of noise"},
    figures={
        "accuracy": Figure("right answers", "share"),
        "questions": Figure("questions", "count"),
        "published": Figure("RMT 137M, 64k tokens, as published", "share", measured=False),
    },
    plot=plot_babi,
)
