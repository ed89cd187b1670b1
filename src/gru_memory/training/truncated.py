"""Truncated back-propagation through time, for sessions whose graph does not fit into memory at once.

A row is cut between turns into segments. The state goes from one to the next, detached: each segment's loss trains what
happened in that segment, on a memory filled by everything before it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Trainer

from ..state import MemoryState
from .collator import IGNORED, PAD_POSITION

_FILLER = {"input_ids": 0, "position_ids": PAD_POSITION, "labels": IGNORED, "memory_mask": False}
Batch = dict[str, Tensor]


def segments(batch: Batch, max_tokens: int, count: int = 1) -> list[Batch]:
    """Cut a batch of `SessionCollator` into batches of the same rows, whole turns of at most `max_tokens` a row in each.

    A turn is never cut, since attention has to see it whole: a longer one is a segment by itself. Rows that have ended
    go on as padding, at which memory holds its state.

    Args:
        batch: (B, T) tensors.
        max_tokens: of a row, in one segment.
        count: how many segments there are at least; further ones are padding.

    Raises:
        ValueError: a batch that is not one of `SessionCollator`, or `max_tokens` below 1.
    """
    if set(batch) != set(_FILLER):
        raise ValueError(f"the batch holds {sorted(batch)}: only batches of SessionCollator can be cut between turns")
    if max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}: a segment has at least 1 token")
    starts = (batch["position_ids"] == 0).cpu()
    # A row ends with the last token that memory sees; what follows is padding.
    ends = (batch["memory_mask"].long().cumsum(dim=1).argmax(dim=1) + 1).tolist()
    spans = [_spans(row[:end].nonzero().flatten().tolist(), end, max_tokens) for row, end in zip(starts, ends)]
    parts = []
    for k in range(max(count, *(len(row) for row in spans))):
        cuts = [row[k] if k < len(row) else (0, 0) for row in spans]
        length = max(1, *(stop - start for start, stop in cuts))
        parts.append(
            {
                name: torch.stack(
                    [
                        F.pad(row[start:stop], (0, length - stop + start), value=value)
                        for row, (start, stop) in zip(batch[name], cuts)
                    ]
                )
                for name, value in _FILLER.items()
            }
        )
    return parts


def _spans(starts: list[int], end: int, max_tokens: int) -> list[tuple[int, int]]:
    """Whole turns, as many as fit, from one cut to the next."""
    spans, first = [], 0
    for start, stop in zip(starts, [*starts[1:], end]):
        if stop - first > max_tokens and start > first:
            spans.append((first, start))
            first = start
    return [*spans, (first, end)]


class TruncatedTrainer(Trainer):
    """`transformers.Trainer` that back-propagates through `segment_tokens` tokens of a row at a time.

    One batch is still one step: the segments' gradients add up, over the same number of labels as if the row were whole.
    Evaluation runs over whole rows, as it keeps no graph.

    Args:
        segment_tokens: the longest piece of a row that is back-propagated through at once (see `segments`).
        **kwargs: of `transformers.Trainer`; `data_collator` must be a `SessionCollator`.
    """

    def __init__(self, *args: Any, segment_tokens: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.segment_tokens = segment_tokens
        self._carried: MemoryState | None = None
        self._carries = False

    def training_step(self, model: Any, inputs: Batch, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        if num_items_in_batch is None:
            raise RuntimeError(
                "the Trainer does not count the labels of a batch, so segments cannot be weighed: use a model whose forward "
                "takes num_items_in_batch (the causal LMs of transformers do)"
            )
        parts = segments(inputs, self.segment_tokens)
        # Processes wait for each other in every forward and backward pass, so all of them do as many.
        counts = self.accelerator.gather(torch.tensor([len(parts)], device=self.args.device))
        parts = segments(inputs, self.segment_tokens, int(counts.max()))
        loss, self._carries = torch.zeros((), device=self.args.device), True
        try:
            for part in parts:
                loss = loss + super().training_step(model, part, num_items_in_batch)
        finally:
            self._carries, self._carried = False, None
        return loss

    def compute_loss(self, model: Any, inputs: Batch, return_outputs: bool = False, **kwargs: Any) -> Any:
        if not self._carries:
            return super().compute_loss(model, inputs, return_outputs, **kwargs)
        inputs = {**inputs, "memory_state": self._carried}
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        self._carried = outputs["memory_state"].detach()
        return (loss, outputs) if return_outputs else loss
