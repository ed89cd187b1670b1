"""Harm: how far the memory moves the model where it has nothing to say."""

from __future__ import annotations

import sysconfig
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.books import text_paths
from ..data.facts import FactGenerator
from ..data.sessions import Session, read_jsonl
from ..drawing import PALETTE, panels, save
from ..limits import at_least
from ..state import MemoryState
from .batched import BatchReader, Pair
from .outcome import Evaluation, Figure, Outcome, Progress, labels_of
from .texts import SKIPPED, text_tokens, window_of

WINDOW = 512  # tokens of a book that attention sees, fewer if the model has fewer positions
_POSITIONS_AT_ONCE = 128  # rows of logits in one softmax


@dataclass(frozen=True)
class HarmConfig:
    """What is read; see `evaluate_harm`."""

    books: str | None = field(default=None, metadata={"help": "folder of plain-text books (.txt); none: no books"})
    tokens: int = field(default=8192, metadata={"help": "tokens of each book and of each file of code"})
    conversations: int = field(default=32, metadata={"help": "conversations in which nothing was told"})
    turns: int = field(default=12, metadata={"help": "turns of each"})
    facts: int = field(default=20, metadata={"help": "facts told before all texts are read again; 0: leave that out"})
    code: str | None = field(default=None, metadata={"help": "folder of .py files; none: Python's own library"})
    code_files: int = field(default=3, metadata={"help": "files of code, drawn with the seed; 0: no code"})
    chats: str | None = field(default=None, metadata={"help": "JSONL file of further chats, in the sessions' format"})
    seed: int = field(default=1234, metadata={"help": "of conversations, facts and files"})
    batch_size: int = field(default=8, metadata={"help": "conversations at once"})

    def __post_init__(self) -> None:
        at_least(self, 1, "tokens", "turns", "batch_size")
        at_least(self, 0, "conversations", "facts", "code_files")
        if not (self.books or self.conversations or self.code_files or self.chats):
            raise ValueError(
                "there is nothing to read: give --books or --chats, or --conversations or --code-files above 0"
            )
        if self.books is not None:
            self.book_paths()
        if self.chats is not None and not Path(self.chats).is_file():
            raise FileNotFoundError(f"there is no file {self.chats}: name one of chats in the sessions' format")

    def book_paths(self) -> list[Path]:
        """The books, in the order of their names. Raises FileNotFoundError if there is none."""
        return [] if self.books is None else text_paths(self.books)

    def code_paths(self) -> list[Path]:
        """The files of code: of those that are long enough, some drawn with the seed."""
        if not self.code_files:
            return []
        folder = self.code or sysconfig.get_paths()["stdlib"]
        paths = text_paths(folder, "*.py", "Python files")
        long = [path for path in paths if path.stat().st_size > 4 * self.tokens] or paths
        return sorted(Random(f"code {self.seed}").sample(long, min(self.code_files, len(long))))


@dataclass(frozen=True)
class HarmResult:
    """The model with memory against the base model, on one kind of text. Loss and KL in nats a token."""

    text: str
    tokens: int
    base_loss: float
    memory_loss: float
    loss_change_percent: float
    kl_mean: float  # KL(base || memory) over the whole vocabulary
    kl_median: float
    changed_top1: float  # share of positions whose likeliest next token is another one
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Comparison:
    """Per-token figures of some text, gathered piece by piece."""

    base_loss: list[Tensor] = field(default_factory=list)
    memory_loss: list[Tensor] = field(default_factory=list)
    kl: list[Tensor] = field(default_factory=list)
    changed: list[Tensor] = field(default_factory=list)

    def add(self, base: Tensor, memory: Tensor, targets: Tensor) -> None:
        """base, memory (P, V) logits, targets (P,) the tokens that came next."""
        for start in range(0, len(targets), _POSITIONS_AT_ONCE):
            part = slice(start, start + _POSITIONS_AT_ONCE)
            p, q = (F.log_softmax(logits[part].float(), dim=-1) for logits in (base, memory))
            self.base_loss.append(F.nll_loss(p, targets[part], reduction="none").cpu())
            self.memory_loss.append(F.nll_loss(q, targets[part], reduction="none").cpu())
            self.kl.append(F.kl_div(q, p, reduction="none", log_target=True).sum(-1).cpu())
            self.changed.append((p.argmax(-1) != q.argmax(-1)).cpu())

    def result(self, text: str, seconds: float) -> HarmResult:
        if not self.kl:
            raise ValueError(f"there was no token to predict: {text}")
        base, memory = torch.cat(self.base_loss).double().mean(), torch.cat(self.memory_loss).double().mean()
        kl = torch.cat(self.kl).double()
        return HarmResult(
            text=text,
            tokens=len(kl),
            base_loss=base.item(),
            memory_loss=memory.item(),
            loss_change_percent=100 * (memory / base - 1).item(),
            kl_mean=kl.mean().item(),
            kl_median=kl.median().item(),
            changed_top1=torch.cat(self.changed).double().mean().item(),
            seconds=round(seconds, 1),
        )


def evaluate_harm(model: Any, tokenizer: Any, config: HarmConfig, progress: Progress | None = None) -> list[HarmResult]:
    """Compare the model with memory to itself without, over the whole vocabulary.

    On books and code (attention sees windows of 512 tokens, memory the whole stretch), on conversations of unrelated turns
    held out from training, and on further chats: from an empty memory, and from one full of facts which none of it is about.

    Returns:
        one result a kind of text; conversations and chats give one for the replies and one for all their tokens.
    """
    tell = progress or (lambda *_: None)
    reader = BatchReader(model, tokenizer)
    chats = [] if config.chats is None else [_pairs(session) for session in read_jsonl(config.chats)]
    results = []
    for facts in dict.fromkeys((0, config.facts)):
        after = f" after {facts} facts" if facts else ""
        for kind, paths, skipped in (("books", config.book_paths(), SKIPPED), ("code", config.code_paths(), 0.0)):
            if not paths:
                continue
            comparison, began = Comparison(), time.perf_counter()
            state = reader.read_all(reader.start(1), [_facts(config, facts, 1)[0]])
            for number, path in enumerate(paths):
                tell(kind + after, number, len(paths))
                compare_book(model, text_tokens(path, tokenizer, config.tokens, skipped), comparison, state=state)
            tell(kind + after, len(paths), len(paths))
            results.append(comparison.result(kind + after, time.perf_counter() - began))
        batches = {"small talk": list(_conversations(config, facts))}
        batches["chats"] = [
            ([told], [chat]) for told, chat in zip(_facts(config, facts, len(chats)), chats, strict=True)
        ]
        for kind, parts in batches.items():
            if not parts:
                continue
            began, replies, everything = time.perf_counter(), Comparison(), Comparison()
            for number, (told, talk) in enumerate(parts):
                tell(kind + after, number, len(parts))
                compare_conversations(reader, told, talk, replies, everything)
            tell(kind + after, len(parts), len(parts))
            seconds = time.perf_counter() - began
            for part, name in ((replies, "replies"), (everything, "all tokens")):
                results.append(part.result(f"{kind}{after}: {name}", seconds))
    return results


@torch.no_grad()
def compare_book(
    model: Any, ids: Tensor, comparison: Comparison, window: int = WINDOW, state: MemoryState | None = None
) -> None:
    """Run a book's tokens (T,) through both, window by window; memory goes on from window to window, from `state`."""
    state = model.initial_memory_state(1) if state is None else state
    for piece in ids.to(model.device).split(window_of(model, window)):
        if len(piece) < 2:
            return
        base, output = _both(model, state, input_ids=piece[None])
        state = output.memory_state
        comparison.add(base[0, :-1], output.logits[0, :-1], piece[1:])


@torch.no_grad()
def compare_conversations(
    reader: BatchReader,
    told: Sequence[Sequence[Pair]],
    talk: Sequence[Sequence[Pair]],
    replies: Comparison,
    everything: Comparison,
) -> None:
    """Read `told` into empty memories, then compare both models on every turn of `talk` (all rows of one length)."""
    states = reader.read_all(reader.start(len(talk)), told)
    prefix = len(reader.renderer.prefix_ids)
    for turns in zip(*talk, strict=True):
        rendered = [reader.renderer.turn(user, reply) for user, reply in turns]
        inputs = reader.inputs(states, [turn.ids for turn in rendered], left=False)
        base, output = _both(reader.model, states, **inputs)
        states = output.memory_state
        for row, turn in enumerate(rendered):
            ids = inputs["input_ids"][row, : prefix + len(turn.ids)]
            for comparison, first in ((replies, prefix + turn.reply_start), (everything, max(prefix, 1))):
                part = slice(first - 1, len(ids) - 1)  # the positions before the tokens to predict
                comparison.add(base[row, part], output.logits[row, part], ids[first:])


def _both(model: Any, state: MemoryState, **inputs: Tensor) -> tuple[Tensor, Any]:
    """Logits of the base model, and the output of the model with memory."""
    with model.disable_memory():
        base = model(**inputs, use_cache=False).logits
    return base, model(**inputs, memory_state=state, use_cache=False)


def _conversations(config: HarmConfig, facts: int) -> Iterator[tuple[list[list[Pair]], list[list[Pair]]]]:
    """Batches of (told turns, unrelated turns); the unrelated ones do not depend on `facts`."""
    told = _facts(config, facts, config.conversations)
    talking = FactGenerator(config.seed, phrasings="test")
    for start in range(0, config.conversations, config.batch_size):
        rows = range(start, min(start + config.batch_size, config.conversations))
        talk = [[talking.talk() for _ in range(config.turns)] for _ in rows]
        yield [told[row] for row in rows], [[(t.user, t.assistant) for t in turns] for turns in talk]


def _facts(config: HarmConfig, facts: int, rows: int) -> list[list[Pair]]:
    """For each of `rows` memories the turns that tell it so many facts."""
    telling = FactGenerator(config.seed, values="test")
    sessions = [telling.session(facts, 0).turns if facts else () for _ in range(rows)]
    return [[(turn.user, turn.assistant) for turn in turns if turn.kind == "tell"] for turns in sessions]


def _pairs(session: Session) -> list[Pair]:
    return [
        (turn.user, turn.assistant) for turn in session.turns if turn.user is not None and turn.assistant is not None
    ]


def run_harm(model: Any, tokenizer: Any, config: HarmConfig, progress: Progress | None = None) -> Outcome:
    """`evaluate_harm` in the form of all evaluations."""
    began = time.perf_counter()
    results = evaluate_harm(model, tokenizer, config, progress)
    rows = []
    for result in results:
        row = {
            name: value for name, value in result.to_json().items() if name not in ("loss_change_percent", "seconds")
        }
        rows.append({**row, "change": result.memory_loss - result.base_loss})
    return Outcome(config, rows, time.perf_counter() - began)


def plot_harm(runs: Sequence[dict[str, Any]], path: Any, title: str) -> None:
    """Change of the loss, and KL, for every kind of text; one point a seed."""
    figure, (left, right) = panels(2, width=5.6, height=1.6 + 0.34 * len(labels_of(runs, "text")))
    texts = labels_of(runs, "text")
    for axes, key, name in (
        (left, "change", "change of the loss (nats a token)"),
        (right, "kl_mean", "mean KL (nats a token)"),
    ):
        found = [[row[key] for run in runs for row in run["rows"] if row["text"] == text] for text in texts]
        colours = [PALETTE[1] if " after " in text else PALETTE[0] for text in texts]
        axes.barh(range(len(texts)), [sum(values) / len(values) for values in found], 0.7, color=colours)
        for place, values in enumerate(found):
            axes.plot(values, [place] * len(values), "o", color="black", markersize=3)
        axes.set_yticks(range(len(texts)), texts if axes is left else [""] * len(texts), fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel(name)
    left.axvline(0, color="0.3", linewidth=0.8)
    left.set_title(title, loc="left", fontweight="bold")
    for colour, name in ((PALETTE[0], "from an empty memory"), (PALETTE[1], "after facts")):
        right.plot([], [], "s", color=colour, markersize=9, label=name)
    right.legend(fontsize=8, frameon=False)
    save(figure, path)


HARM = Evaluation(
    name="harm",
    about="With memory against the base model on text in which there is nothing to recall (nats a token).",
    config=HarmConfig,
    run=run_harm,
    labels={"text": "text"},
    figures={
        "tokens": Figure("tokens", "count"),
        "base_loss": Figure("base loss", "nats"),
        "memory_loss": Figure("with memory", "nats"),
        "change": Figure("change", "change"),
        "kl_mean": Figure("KL mean", "nats"),
        "kl_median": Figure("KL median", "nats"),
        "changed_top1": Figure("other top token", "share"),
    },
    plot=plot_harm,
)
