"""Long documents: what a memory carried from window to window is worth, against windows that attention could have instead."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..drawing import PALETTE, panels, save
from ..limits import at_least
from .asking import as_kept, kept_bytes
from .full_history import kv_bytes_per_token
from .outcome import Evaluation, Figure, Outcome, Progress, Row, labels_of
from .texts import book_paths, text_tokens, window_of

_HALF = 2  # bytes of a number in half precision


@dataclass(frozen=True)
class LongDocConfig:
    """What is read."""

    books: str | None = field(default=None, metadata={"help": "folder of plain-text books (.txt) not trained on"})
    tokens: int = field(default=4096, metadata={"help": "tokens of each book"})
    windows: tuple[int, ...] = field(default=(128, 256, 512), metadata={"help": "tokens that attention sees"})
    seed: int = field(default=1234, metadata={"help": "of where in each book the reading begins"})
    batch_size: int = field(default=4, metadata={"help": "windows at once, where they do not depend on each other"})

    def __post_init__(self) -> None:
        at_least(self, 2, "windows", "tokens")
        at_least(self, 1, "batch_size")
        book_paths(self.books)


@torch.no_grad()
def evaluate_longdoc(model: Any, tokenizer: Any, config: LongDocConfig, progress: Progress | None = None) -> Outcome:
    """Loss on the same tokens of every book, read in windows, by what may be known from before a window.

    Nothing (the base model; the memory, reset); what the memory carries, from window to window as it is kept on disk; as many
    tokens more in sight as those bytes could hold in a KV cache of two bytes a number, at least one; and a window of twice the
    length. The first token of each window is never scored.
    """
    began, tell = time.perf_counter(), progress or (lambda *_: None)
    state = model.initial_memory_state(1)
    per_token = kv_bytes_per_token(model) * _HALF // model.get_output_embeddings().weight.element_size()
    worth = max(1, kept_bytes(state) // per_token)  # tokens
    paths = book_paths(config.books)
    rows: list[Row] = []
    stretches = [_stretch(path, tokenizer, config) for path in paths]
    for number, (path, stretch) in enumerate(zip(paths, stretches, strict=True)):
        tell("books", number, len(paths))
        ids = stretch.to(model.device)
        for window in config.windows:
            before = -(-max(window, worth) // window) * window  # whole windows
            if window_of(model, window + worth) < window + worth or len(ids) < before + window:
                raise ValueError(
                    f"windows of {window} tokens do not fit: {path.name} gives {len(ids)} tokens, and the model needs "
                    f"{window + worth} positions; choose smaller --windows"
                )
            rows.append({"book": path.stem, "window": window, **_measure(model, ids, window, worth, config.batch_size)})
    tell("books", len(paths), len(paths))
    details = {"state_bytes": kept_bytes(state), "kv_bytes_per_token": per_token, "tokens_worth": worth}
    return Outcome(config, rows, time.perf_counter() - began, details)


def _measure(model: Any, ids: Tensor, window: int, worth: int, batch_size: int) -> dict[str, float | None]:
    """Mean losses in nats a token, of the tokens that every way of reading predicts."""
    every = range(0, len(ids) - window + 1, window)
    starts = [start for start in every if start >= max(window, worth)]  # enough text before each
    alone = [(start, start + window) for start in starts]
    with model.disable_memory():
        base = _loss_of(model, ids, alone, window, batch_size)
        larger = _loss_of(model, ids, [(start - worth, end) for start, end in alone], window, batch_size)
        double = None
        if window_of(model, 2 * window) == 2 * window:
            double = _loss_of(model, ids, [(start - window, end) for start, end in alone], window, batch_size)
    reset = _loss_of(model, ids, alone, window, batch_size)
    carried = _carried(model, ids[: starts[-1] + window], window, starts[0])
    return {
        "base": base, "reset": reset, "carried": carried, "gain": reset - carried, "gain_on_base": base - carried,
        "larger": larger, "gain_larger": base - larger, "double": double, "gain_double": double and base - double,
        "tokens": len(starts) * (window - 1),
    }  # fmt: skip


def _loss_of(model: Any, ids: Tensor, spans: Sequence[tuple[int, int]], window: int, batch_size: int) -> float:
    """Loss of the last `window` - 1 tokens of each span (first, end), read on its own; with memory, from an empty one."""
    losses = []
    for start in range(0, len(spans), batch_size):
        rows = torch.stack([ids[first:end] for first, end in spans[start : start + batch_size]])  # (B, T)
        logits = model(input_ids=rows, use_cache=False, **_empty(model, len(rows))).logits
        losses += _losses(logits, rows, window)
    return math.fsum(losses) / len(losses)


def _carried(model: Any, ids: Tensor, window: int, first: int) -> float:
    """The same, with the memory carried from window to window; windows before token `first` are not scored."""
    state, losses = model.initial_memory_state(1), []
    for number, piece in enumerate(ids.split(window)):
        output = model(input_ids=piece[None], memory_state=as_kept(state), use_cache=False)
        state = output.memory_state
        if number * window >= first:
            losses += _losses(output.logits, piece[None], window)
    return math.fsum(losses) / len(losses)


def _losses(logits: Tensor, rows: Tensor, window: int) -> list[float]:
    """logits (B, T, V), rows (B, T) -> the mean loss of each row's last `window` - 1 tokens."""
    found = F.cross_entropy(
        logits[:, -window:-1].flatten(0, 1).float(), rows[:, 1 - window :].flatten(), reduction="none"
    )
    return found.view(len(rows), -1).mean(1).tolist()


def _empty(model: Any, rows: int) -> dict[str, Any]:
    return {} if model.memory_disabled else {"memory_state": model.initial_memory_state(rows)}


def _stretch(path: Any, tokenizer: Any, config: LongDocConfig) -> Tensor:
    """`tokens` tokens of a book, from a place that the seed chooses."""
    generator = torch.Generator().manual_seed(config.seed)
    share = 0.05 + 0.55 * torch.rand((), generator=generator).item()
    ids = text_tokens(path, tokenizer, config.tokens, skipped=share)
    if not len(ids):
        raise ValueError(f"{path} has no text to read: leave it out of the books")
    return ids


def plot_longdoc(runs: Sequence[dict[str, Any]], path: Any, title: str) -> None:
    """Gains in nats a token, over the base model with the same window but for the first: a group of bars a window."""
    ways = {
        "gain": "memory carried, on memory reset",
        "gain_on_base": "memory carried, on the base model",
        "gain_larger": "window larger by the state's bytes",
        "gain_double": "window twice as long",
    }
    figure, (axes,) = panels(1, width=8, height=4.4)
    windows = labels_of(runs, "window")
    for number, (key, name) in enumerate(ways.items()):
        for at, window in enumerate(windows):
            found = [
                row[key] for run in runs for row in run["rows"] if row["window"] == window and row[key] is not None
            ]
            if not found:
                continue
            place = at + (number - 1.5) * 0.2
            axes.bar(place, math.fsum(found) / len(found), 0.18, color=PALETTE[number], label=name if at == 0 else None)
            axes.plot([place] * len(found), found, "o", color="black", markersize=3, alpha=0.6)
    axes.set_xticks(range(len(windows)), [f"{window} tokens" for window in windows])
    axes.axhline(0, color="0.3", linewidth=0.8)
    axes.set(xlabel="window of attention", ylabel="gain (nats a token)")
    axes.plot([], [], "o", color="black", markersize=3, label="one book and seed")
    axes.legend(fontsize=8, frameon=False)
    axes.set_title(title, loc="left", fontweight="bold")
    save(figure, path)


LONGDOC = Evaluation(
    name="longdoc",
    about="Loss of the base model on books read in windows, and gains: memory carried, larger windows (nats a token).",
    config=LongDocConfig,
    run=evaluate_longdoc,
    labels={"book": "book", "window": "window"},
    figures={
        "base": Figure("base", "nats"),
        "reset": Figure("memory reset", "nats", shown=False),
        "carried": Figure("memory carried", "nats", shown=False),
        "gain": Figure("carried, on reset", "change"),
        "gain_on_base": Figure("carried, on base", "change"),
        "larger": Figure("window + state's bytes", "nats", shown=False),
        "gain_larger": Figure("larger window", "change"),
        "double": Figure("window twice as long", "nats", shown=False),
        "gain_double": Figure("window x 2", "change"),
        "tokens": Figure("tokens", "count"),
    },
    plot=plot_longdoc,
)
