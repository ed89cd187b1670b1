"""Harm: how far the memory moves the model where it has nothing to say."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.facts import FactGenerator
from ..state import MemoryState
from .batched import BatchReader, Pair
from .texts import text_paths, text_tokens, window_of

Progress = Callable[[str, int, int], None]  # (what is being done, done, in all)

WINDOW = 512  # tokens of a book that attention sees, fewer if the model has fewer positions
_POSITIONS_AT_ONCE = 128  # rows of logits in one softmax


@dataclass(frozen=True)
class HarmConfig:
    """What is read; see `evaluate_harm`."""

    books: str | None = field(default=None, metadata={"help": "folder of plain-text books (.txt); none: no books"})
    tokens: int = field(default=8192, metadata={"help": "tokens of each book"})
    conversations: int = field(default=32, metadata={"help": "conversations in which nothing was told"})
    turns: int = field(default=12, metadata={"help": "turns of each"})
    facts: int = field(default=5, metadata={"help": "facts told before the same conversations; 0: leave them out"})
    seed: int = field(default=1234, metadata={"help": "of the conversations"})
    batch_size: int = field(default=8, metadata={"help": "conversations at once"})

    def __post_init__(self) -> None:
        for name in ("tokens", "turns", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        for name in ("conversations", "facts"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 0")
        if self.books is not None:
            self.book_paths()

    def book_paths(self) -> list[Path]:
        """The books, in the order of their names. Raises FileNotFoundError if there is none."""
        return [] if self.books is None else text_paths(self.books)


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

    On books (attention sees windows of 512 tokens, memory the whole stretch), and on conversations of unrelated turns
    held out from training: from an empty memory, and from one that was told facts which none of it is about.

    Returns:
        one result a kind of text; conversations give one for the replies and one for all their tokens.
    """
    tell = progress or (lambda *_: None)
    results = []
    if paths := config.book_paths():
        comparison, began = Comparison(), time.perf_counter()
        for number, path in enumerate(paths):
            tell("books", number, len(paths))
            compare_book(model, text_tokens(path, tokenizer, config.tokens), comparison)
        tell("books", len(paths), len(paths))
        results.append(comparison.result("books", time.perf_counter() - began))
    for facts in dict.fromkeys((0, config.facts) if config.conversations else ()):
        name = f"small talk after {facts} facts" if facts else "small talk"
        began = time.perf_counter()
        replies, everything = Comparison(), Comparison()
        batches = list(_conversations(config, facts))
        for number, (told, talk) in enumerate(batches):
            tell(name, number, len(batches))
            compare_conversations(BatchReader(model, tokenizer), told, talk, replies, everything)
        tell(name, len(batches), len(batches))
        seconds = time.perf_counter() - began
        results += [replies.result(f"{name}: replies", seconds), everything.result(f"{name}: all tokens", seconds)]
    return results


@torch.no_grad()
def compare_book(model: Any, ids: Tensor, comparison: Comparison, window: int = WINDOW) -> None:
    """Run a book's tokens (T,) through both, window by window; memory goes on from window to window."""
    state = model.initial_memory_state(1)
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
    telling = FactGenerator(config.seed, values="test")
    talking = FactGenerator(config.seed, phrasings="test")
    for start in range(0, config.conversations, config.batch_size):
        rows = range(start, min(start + config.batch_size, config.conversations))
        told = [telling.session(facts, 0).turns if facts else () for _ in rows]
        talk = [[talking.talk() for _ in range(config.turns)] for _ in rows]
        yield [_tells(turns) for turns in told], [[(t.user, t.assistant) for t in turns] for turns in talk]


def _tells(turns: Sequence[Any]) -> list[Pair]:
    return [(turn.user, turn.assistant) for turn in turns if turn.kind == "tell"]
