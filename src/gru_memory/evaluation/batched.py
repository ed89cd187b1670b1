"""Many conversations at once: what `Conversation` does with one, row by row, in padded batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..placement import fed_on
from ..prefix import KeptPrefix, cache_of, kept_prefix, turn_begun
from ..rendering import TurnRenderer
from ..state import MemoryState

Pair = tuple[str, str | None]  # user message, reply

GREEDY = {"do_sample": False, "num_beams": 1}


class BatchReader:
    """Reads turns into, and asks questions of, a batch of memory states. Attention sees one turn, as in `Conversation`.

    Args:
        model: a causal LM with memory.
        tokenizer: its tokenizer.
        system: system prompt; None leaves the default of the chat template.
    """

    def __init__(self, model: Any, tokenizer: Any, system: str | None = None) -> None:
        if not hasattr(model, "initial_memory_state"):
            raise ValueError(f"{type(model).__name__} has no memory: give it one with gru_memory.add_memory(model)")
        self.model, self.tokenizer, self.system = model, tokenizer, system
        self.renderer = TurnRenderer(tokenizer, system)
        known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self.pad_id: int = next(token for token in known if token is not None)

    def start(self, rows: int) -> MemoryState:
        """`rows` conversations in which nothing was said yet."""
        return self.model.initial_memory_state(rows)

    @torch.no_grad()
    def read(self, states: MemoryState, turns: Sequence[Pair]) -> MemoryState:
        """The states after one more turn in every row, nothing generated."""
        ids = [self.renderer.turn(user, reply).ids for user, reply in turns]
        inputs, cached = self.inputs(states, ids, left=False), {"memory_state": states, "use_cache": False}
        if prefix := self._kept_prefix(states):
            inputs |= {name: inputs[name][:, prefix.length :] for name in ("input_ids", "memory_mask")}
            cached = self._after(prefix, states) | {"use_cache": True}
        states = self.model(**inputs, **cached, logits_to_keep=1).memory_state
        if not states.is_finite():
            raise FloatingPointError("the memory became NaN or infinite while it read these turns")
        return states

    def read_all(self, states: MemoryState, conversations: Sequence[Sequence[Pair]]) -> MemoryState:
        """The states after all turns of every conversation; they may differ in length."""
        for step in range(max(map(len, conversations), default=0)):
            active = [row for row, turns in enumerate(conversations) if step < len(turns)]
            resting = [row for row in range(len(conversations)) if row not in active]
            new = self.read(states.select(active), [conversations[row][step] for row in active])
            if resting:
                order = [*active, *resting]
                both = MemoryState.cat([new, states.select(resting)])
                new = both.select([order.index(row) for row in range(len(order))])
            states = new
        return states

    def ask(self, states: MemoryState, questions: Sequence[str], **generation: Any) -> tuple[list[str], MemoryState]:
        """One greedy reply a row, from its state and the question alone; and the states after question and reply.

        Arguments as for `generate` (max_new_tokens, ...).
        """
        inputs = self.inputs(states, [self.renderer.prompt(question) for question in questions], left=True)
        settings = {**GREEDY, **generation, "pad_token_id": self.pad_id, "return_dict_in_generate": True}
        start = {"memory_state": states}
        plain = set(generation) <= {"max_new_tokens"} and not self.model.generation_config.cache_implementation
        if plain and (prefix := self._kept_prefix(states)):
            # The prefix comes first in every row, and its padding between it and the question.
            inputs = {name: _prefix_first(t, inputs["attention_mask"], prefix.length) for name, t in inputs.items()}
            start = self._after(prefix, states)
        output = self.model.generate(**inputs, **start, **settings)
        return self.decode(output.sequences, inputs["input_ids"].shape[1]), output.memory_state

    def inputs(self, states: MemoryState, turns: Sequence[list[int]], left: bool) -> dict[str, Tensor]:
        """Prefix and one turn a row, padded `left` or right. Memory takes the prefix in with the first turn only."""
        prefix = self.renderer.prefix_ids
        rows = [prefix + ids for ids in turns]
        longest = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if longest is not None and max(map(len, rows)) > longest:
            raise ValueError(
                f"a turn has {max(map(len, rows))} tokens, the model has {longest} positions: make it shorter"
            )
        input_ids, attention_mask = pad(rows, self.pad_id, left, fed_on(self.model))
        memory_mask = attention_mask.bool()
        for row, begun in enumerate(states.turns.tolist()):
            if begun:
                first = input_ids.shape[1] - len(rows[row]) if left else 0
                memory_mask[row, first : first + len(prefix)] = False
        return {"input_ids": input_ids, "attention_mask": attention_mask, "memory_mask": memory_mask}

    def prefix_fed(self, states: MemoryState) -> int:
        """How many tokens `read` feeds before those of a turn: the prefix, unless it is kept."""
        return 0 if self._kept_prefix(states) else len(self.renderer.prefix_ids)

    def _kept_prefix(self, states: MemoryState) -> KeptPrefix | None:
        """What every row begins with, if none of them is new."""
        return kept_prefix(self.model, self.renderer.prefix_ids) if bool((states.turns > 0).all()) else None

    def _after(self, prefix: KeptPrefix, states: MemoryState) -> dict[str, Any]:
        cache, _ = cache_of(self.model, [prefix] * states.batch_size)
        return {"past_key_values": cache, "memory_state": turn_begun(states)}

    def decode(self, sequences: Tensor, prompt_length: int) -> list[str]:
        """The text after the prompt, row by row."""
        new = sequences[:, prompt_length:]
        return [text.strip() for text in self.tokenizer.batch_decode(new, skip_special_tokens=True)]


def _prefix_first(values: Tensor, mask: Tensor, length: int) -> Tensor:
    """Rows (B, T) padded on the left by `mask`, with their first `length` tokens moved to the columns before the padding."""
    columns = torch.arange(values.shape[1], device=values.device)
    padding = values.shape[1] - mask.sum(dim=1, keepdim=True)
    source = torch.where(
        columns < length, columns + padding, torch.where(columns < length + padding, columns - length, columns)
    )
    return values.gather(1, source)


def pad(rows: Sequence[list[int]], pad_id: int, left: bool, device: Any = None) -> tuple[Tensor, Tensor]:
    """Token ids (B, T) and attention mask (B, T) of rows of different lengths."""
    longest = max(map(len, rows))
    input_ids = torch.full((len(rows), longest), pad_id)
    attention_mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for row, ids in enumerate(rows):
        part = slice(longest - len(ids), longest) if left else slice(0, len(ids))
        input_ids[row, part] = torch.tensor(ids)
        attention_mask[row, part] = 1
    return input_ids.to(device), attention_mask.to(device)
