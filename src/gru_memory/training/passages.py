"""Books: what a memory can carry from one passage of a text to the next.

Attention sees one passage, memory all of them. What pays to carry are rare tokens that come again, names above all. Such a token is
*told* wherever it stands with another occurrence to come in a later passage, and *asked for* there. So addresses, strengths, read
gates and trust begin in closed form, as for facts (`alignment`); then the memory learns to make the text likelier, token by token.
What it comes to is a neural cache (Grave et al., "Improving neural language models with a continuous cache", 2016,
arXiv:1612.04426) that chooses what to keep, what to look for, and when to speak.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.books import read_books
from ..data.sessions import Session, Turn
from ..memory import GRUMemoryWithDecay
from .alignment import collect, fit_addresses, fit_read_gates, fit_strengths, fit_trust
from .features import FeatureCache
from .objective import address_loss, in_mode, logits_of, recall, rounded, write_loss
from .rows import Batch, pad_rows, turn_text
from .trainer import MemoryTrainer

PASSAGES = 8  # of a stretch, which one row reads from an empty memory
_SHORTEST, _LONGEST = 500, 2000  # characters of a passage; all of a stretch are about as long
_TRAINED = (0.05, 0.88)  # of a book, after its title pages
_VALIDATED = (0.88, 0.98)
_HELD_OUT = 128  # passages
_COMMON = 1e-3  # share of all tokens from which on one is too common to be worth a slot
_SHARE = 4  # `TrainingConfig.rows` are for sessions, which are a quarter as long
_ROWS = 4  # stretches of a batch, where nothing is learned by gradients
_WORD = 200  # characters after which the end of a passage is not waited for
_CHUNK = 1024  # positions whose logits are looked at together, where no gradient is needed
_OTHERS = 0.2  # share of the other tokens that a step looks at
_ALIGNED = 30_000  # pairs, and positions, that addresses and strengths are fitted to
_TRUSTED = 4  # batches that trust is fitted to
_SHARPNESS = (1.0, 0.5, 0.25, 0.12, 0.06)  # of that of conversations, of which the best is taken
_GATES = (0.4, 0.2, 0.1, 0.05, 0.02)  # likewise
_ADDRESSED, _WRITTEN = 0.05, 0.1  # of the weights of these objectives: a quarter of what recurs can be found at all
# Those few numbers have to go further than at a thousandth a step.
_FAST, _FASTER = {"gate", "sharpness", "trust", "strength_key.bias", "read_gate.bias"}, 10.0


class PassagePool:
    """Stretches of consecutive passages, drawn from the .txt files of a folder.

    Args:
        folder: of plain-text books.
        count: passages, as many of them as make whole stretches.
        rng: draws them.
        part: of each book that they are taken from, as shares of its length.

    Raises:
        FileNotFoundError: there is no .txt file.
        ValueError: no book is long enough, or there is nothing in them.
    """

    def __init__(
        self, folder: str | Path, count: int, rng: random.Random, part: tuple[float, float] = _TRAINED
    ) -> None:
        books = read_books(folder)
        books = [book[int(part[0] * len(book)) : int(part[1] * len(book))] for book in books]
        books = [book for book in books if len(book) > PASSAGES * _SHORTEST]
        if not books:
            raise ValueError(
                f"the books in {folder} are too short: {PASSAGES} passages have to fit into a tenth of one"
            )
        stretches = [_stretch(rng.choice(books), rng) for _ in range(max(1, count // PASSAGES))]
        self.stretches = [stretch for stretch in stretches if len(stretch.turns) > 1]
        if not self.stretches:
            raise ValueError(f"the books in {folder} hold nothing but white space")

    def turns(self) -> Iterator[Turn]:
        return iter(dict.fromkeys(turn for stretch in self.stretches for turn in stretch.turns))


def held_out_passages(folder: str | Path, rng: random.Random) -> PassagePool:
    """Passages from the ends of the same books, which `PassagePool` does not draw from by itself."""
    return PassagePool(folder, _HELD_OUT, rng, _VALIDATED)


def _stretch(book: str, rng: random.Random) -> Session:
    """Passages that follow each other, each of which ends with a word."""
    longest = min(_LONGEST, len(book) // PASSAGES)
    size = int(_SHORTEST * (longest / _SHORTEST) ** rng.random())
    start, turns = rng.randrange(max(1, len(book) - size * PASSAGES)), []
    for _ in range(PASSAGES):
        end = start + size
        while end < min(len(book), start + size + _WORD) and not book[end].isspace():
            end += 1
        if start < end:
            turns.append(Turn(None, book[start:end], learn="answer"))
        start = end
    return Session(tuple(turn for turn in turns if turn.assistant.strip()))


@dataclass
class Vocabulary:
    """The tokens that hidden states were computed of.

    Attributes:
        ids: (C,) those that occur.
        number: (V,) where each token is in `ids`, -100 where it is not.
        carried: (V,) bool, whether one is rare enough to be worth a slot.
    """

    ids: Tensor
    number: Tensor
    carried: np.ndarray

    @classmethod
    def of(cls, cache: FeatureCache, size: int) -> Vocabulary:
        counts = np.bincount(np.concatenate([cache.tokens(i) for i in range(len(cache))]), minlength=size)
        ids = torch.from_numpy(np.flatnonzero(counts))
        number = torch.full((size,), -100)
        number[ids] = torch.arange(len(ids))
        return cls(ids, number, counts < max(_COMMON * counts.sum(), 2))


def passages_batch(stretches: Sequence[Session], cache: FeatureCache, carried: np.ndarray) -> Batch:
    """One row a stretch, labelled from its second passage on, with what recurs marked as told and asked for.

    A position is `unknown` where a token comes that would be worth carrying, and never stood in an earlier passage.
    """
    return pad_rows([_row(stretch, cache, carried) for stretch in stretches])


def _row(stretch: Session, cache: FeatureCache, carried: np.ndarray) -> dict[str, np.ndarray]:
    found = [cache.find(turn_text(turn)) for turn in stretch.turns]
    tokens = np.concatenate([cache.tokens(i) for i in found]).astype(np.int64)
    passage = np.repeat(np.arange(len(found)), [len(cache.tokens(i)) for i in found])
    row = {name: np.zeros(len(tokens), dtype=bool) for name in ("base", "begins")}
    row |= recurring(tokens, passage, carried)
    within = np.append(passage[1:] == passage[:-1], False)  # whether the next token is one of the same passage
    learned = within & (passage > 0)
    row |= {
        "features": np.concatenate([cache.features(i) for i in found]),
        "tokens": tokens,
        "mask": np.ones(len(tokens), dtype=bool),
        "turn_starts": np.append(True, passage[1:] != passage[:-1]),
        "labels": np.where(learned, np.append(tokens[1:], 0), -100),
        "stands_for": np.ones(len(tokens), dtype=np.float32),
    }
    row["unknown"] = learned & carried[np.append(tokens[1:], 0)] & (row["asked"] == 0)
    return row


def recurring(tokens: np.ndarray, passage: np.ndarray, carried: np.ndarray) -> dict[str, np.ndarray]:
    """The columns of a `Batch` that say what is told and asked for, for T tokens of numbered passages.

    A token is the fact, each of its occurrences another value of it: what is asked for is the last one in an earlier passage, and
    those before it are outdated.
    """
    names = ("told", "asked", "fact", "value", "asked_fact", "asked_value")
    columns = {name: np.zeros(len(tokens), dtype=np.int64) for name in names}
    last_passage = {int(token): int(number) for token, number in zip(tokens, passage, strict=True)}
    before: dict[int, int] = {}  # a token -> where it stood last in an earlier passage
    here: dict[int, int] = {}  # and in this one
    for t, token in enumerate(map(int, tokens)):
        begins = t == 0 or passage[t] != passage[t - 1]
        if begins:
            before, here = before | here, {}
        if not carried[token]:
            continue
        here[token] = t
        if passage[t] < last_passage[token]:
            columns["told"][t] = columns["value"][t] = t + 1
            columns["fact"][t] = token + 1
        if token in before and not begins:
            columns["asked"][t - 1] = columns["asked_value"][t - 1] = before[token] + 1
            columns["asked_fact"][t - 1] = token + 1
    return columns


@dataclass
class PassagesReport:
    """Loss to minimise, and what it is made of."""

    loss: Tensor
    text_loss: float  # nats a token
    gain: float  # of it on the base model, nats a token
    address_loss: float
    write_loss: float
    recurring: float  # share of tokens that recur which are the likeliest


def passages_loss(
    memory: GRUMemoryWithDecay,
    head: Tensor,
    vocabulary: Vocabulary,
    batch: Batch,
    generator: torch.Generator,
    address_weight: float = 0.0,
    write_weight: float = 0.0,
    key_dropout: float = 0.0,
    others: float = _OTHERS,
) -> PassagesReport:
    """Cross-entropy of the next token over the `vocabulary`, plus `address_weight` times `address_loss` and `write_weight` times
    `write_loss`.

    It is taken of every token that recurs, and of a share of the `others`, which stand for all of them.
    """
    states, prepared, _ = recall(memory, head, batch, key_dropout, generator)
    labels = vocabulary.number[batch.labels.clamp_min(0)]
    taught = (batch.labels >= 0) & (labels >= 0)
    comes_again = taught & (batch.asked > 0)
    rest = taught & ~comes_again
    drawn = rest & (torch.rand(rest.shape, generator=generator) < others)
    where = comes_again | drawn
    counts = torch.where(comes_again, 1.0, float(rest.sum()) / max(1, int(drawn.sum())))[where]
    counts = counts / counts.sum().clamp_min(1e-9)
    weight = rounded(head).index_select(0, vocabulary.ids)
    losses, right = _losses(states[where], weight, labels[where])
    loss = losses @ counts
    with torch.no_grad():
        own, _ = _losses(batch.features[..., : memory.hidden_size][where], weight, labels[where])
        gain = own @ counts - loss
        right = right[comes_again[where]]
        recalled = right.float().mean().item() if len(right) else 0.0
    addressing, writing = address_loss(prepared.inputs, batch), write_loss(prepared.told, batch)
    total = loss + address_weight * addressing + write_weight * writing
    return PassagesReport(total, loss.item(), gain.item(), addressing.item(), writing.item(), recalled)


def _losses(states: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy (P,) of states (P, D), and whether the label is the likeliest; in parts where nothing is learned by it."""
    size = len(states) if torch.is_grad_enabled() else _CHUNK
    losses, right = [], []
    for part, wanted in zip(states.split(max(1, size)), labels.split(max(1, size)), strict=True):
        logits = logits_of(part, weight)
        losses.append(F.cross_entropy(logits, wanted, reduction="none"))
        right.append(logits.argmax(-1) == wanted)
    return torch.cat(losses), torch.cat(right)


class PassageTrainer(MemoryTrainer):
    """Trains `memory` on stretches of passages; see `MemoryTrainer`.

    The score is what the memory gains on the base model, in nats a token. Training ends with the last checkpoint.

    Args:
        validation: a pool and its features, by name.
    """

    def __init__(
        self,
        memory: GRUMemoryWithDecay,
        head: Tensor,
        pool: PassagePool,
        cache: FeatureCache,
        validation: dict[str, tuple[PassagePool, FeatureCache]],
        *settings,
    ) -> None:
        self.vocabulary = Vocabulary.of(cache, len(head))
        batches = {name: list(self._batches(*pair)) for name, pair in validation.items()}
        super().__init__(memory, head, pool, cache, batches, *settings)
        for group, (name, _) in zip(self.optimizer.param_groups, memory.named_parameters(), strict=True):
            if name in _FAST:
                group["share"] *= _FASTER

    def begin(self, layers: int, progress: Callable[[str, int, int], None] | None = None) -> None:
        """Addresses, strengths, read gates and trust in closed form; sharpness and gate by trying.

        Args:
            layers: blocks whose outputs are in the keys.
            progress: told how far it is.
        """
        memory, head, steps = self.memory, self.head, iter(range(5))
        tell = progress or (lambda what, done, total: None)

        def done(what: str) -> None:
            tell(f"aligning: {what}", next(steps), 5)

        if not any((batch.asked > 0).any() for batch in self._batches(self.pool, self.cache)):
            raise ValueError(
                "nothing that is rare comes again in a later passage: draw more of them (--passages), or take other books"
            )
        views = collect(memory, head, self._batches(self.pool, self.cache), positions=_ALIGNED, pairs=_ALIGNED)
        done("addresses")
        fit_addresses(memory, views, layers=layers)
        done("strengths")
        fit_strengths(memory, head, views)
        done("read gates")
        fit_read_gates(memory, views)
        del views  # gigabytes
        some = [batch for batch, _ in zip(self._batches(self.pool, self.cache), range(_TRUSTED), strict=False)]
        done("sharpness and trust")
        with torch.no_grad(), in_mode(memory, training=False):
            sharpest, full = memory.sharpness.clone(), memory.gate.clone()
            _try(memory.sharpness, [sharpest * f for f in _SHARPNESS], lambda: self._loss_of(some[0]).address_loss)
            fit_trust(memory, head, some)
            done("gate")
            _try(memory.gate, [full * f for f in _GATES], lambda: self._loss_of(some[0]).text_loss)

    def _loss_of(self, batch: Batch) -> PassagesReport:
        return passages_loss(self.memory, self.head, self.vocabulary, batch, torch.Generator().manual_seed(0))

    def _batches(self, pool: PassagePool, cache: FeatureCache) -> Iterator[Batch]:
        for start in range(0, len(pool.stretches), _ROWS):
            yield passages_batch(pool.stretches[start : start + _ROWS], cache, self.vocabulary.carried)

    def _batch(self) -> Batch:
        rng = random.Random(self.config.seed * 7_919 + self.step)
        count = max(1, self.config.rows // _SHARE)
        return passages_batch(
            [rng.choice(self.pool.stretches) for _ in range(count)], self.cache, self.vocabulary.carried
        )

    def _loss(self, batch: Batch, generator: torch.Generator) -> PassagesReport:
        config = self.config
        return passages_loss(
            self.memory, self.head, self.vocabulary, batch, generator, _ADDRESSED * config.address_weight,
            _WRITTEN * config.write_weight, config.key_dropout,
        )  # fmt: skip

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """By validation set, the gain in nats a token, and the share of recurring tokens that are the likeliest."""
        scores, every = {}, torch.arange(len(self.head))
        everything = Vocabulary(every, every, self.vocabulary.carried)
        with in_mode(self.memory, training=False):
            for name, batches in self.validation.items():
                generator = torch.Generator().manual_seed(0)
                reports = [passages_loss(self.memory, self.head, everything, batch, generator) for batch in batches]
                scores[f"{name}_gain"] = sum(report.gain for report in reports) / len(reports)
                scores[f"{name}_recurring"] = sum(report.recurring for report in reports) / len(reports)
        return scores

    def _score(self, scores: dict[str, float]) -> float:
        return sum(scores[f"{name}_gain"] for name in self.validation) / max(1, len(self.validation))


def _try(parameter: Tensor, values: Sequence[Tensor], loss: Callable[[], float]) -> None:
    """Leave that of the `values` in the parameter at which the loss is the least."""
    found = []
    for value in values:
        parameter.copy_(value)
        found.append(loss())
    parameter.copy_(values[found.index(min(found))])
