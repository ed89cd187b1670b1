"""`generate()` that starts from a memory and commits the right one."""

from __future__ import annotations

import copy
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.generation import GenerationMode, StoppingCriteriaList

from .cache import attach, find_layer
from .state import MemoryState

# Strategies that feed every token once, in order: the state of the last step is nearly the one to commit.
_ONE_PASS = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)


@dataclass
class GenerationRun:
    """What one call of `generate` has to know at its end. Each thread has its own."""

    start: MemoryState | None
    given: bool  # the caller passed `start`
    mode: GenerationMode | None = None
    cache: Cache | None = None
    keeps_cache: bool = False  # the caller sees the cache afterwards
    prompt_ids: Tensor | None = None  # (B, P) after expansion for beams and returned sequences
    prompt_mask: Tensor | None = None  # (B, P), None if nothing is padded
    prompt_memory_mask: Tensor | None = None
    finished: Tensor | None = None  # (B,) rows that have ended
    ended: set[tuple[int, ...]] = field(default_factory=set)  # beams that have ended; their rows move, so as tokens
    steps: int = 0
    model_kwargs: dict[str, Any] | None = None  # as after the last forward pass


_run: ContextVar[GenerationRun | None] = ContextVar("gru_memory_generation", default=None)


class RecordingCriteria(StoppingCriteriaList):
    """Stopping criteria that also note which rows have ended: from then on their pad tokens must not reach memory."""

    run: GenerationRun

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs) -> Tensor:
        done = super().__call__(input_ids, scores, **kwargs)
        if self.run.mode in _ONE_PASS:
            self.run.finished = done if self.run.finished is None else self.run.finished | done
        else:
            self.run.ended.update(map(tuple, input_ids[done.to(input_ids.device)].tolist()))
        return done


class MemoryGenerationMixin:
    """`generate` with a memory. It may be used wherever the base model's `generate` is."""

    @torch.no_grad()
    def generate(self, *args, memory_state: MemoryState | None = None, **kwargs) -> Any:
        """`transformers.GenerationMixin.generate`, starting from a memory.

        After it, the memory holds the prompt and everything that was generated, the last token included. Rows that end
        early stop being written when they end.

        Args:
            memory_state: start from this and leave `model.memory_state` alone. Without it, persistent mode starts from
                `model.memory_state` and commits the new one there; ephemeral mode starts empty and commits nothing.
            memory_mask: (B, prompt) False where tokens are context only: attention sees them, memory does not.

        With `return_dict_in_generate=True` the output carries the new state as `memory_state`.

        Raises:
            ValueError: a state for another batch size or memory, or a strategy that memory does not support.
            FloatingPointError: the new state is not finite; the old one stays.
        """
        if self.memory_disabled:
            return super().generate(*args, **kwargs)
        carry = memory_state is None and self.memory_config.mode == "persistent"
        run = GenerationRun(start=self.memory_state if carry else memory_state, given=memory_state is not None)
        token = _run.set(run)
        try:
            result = super().generate(*args, **kwargs)
            final = self._state_after(run, result).detach()
        finally:
            _run.reset(token)
        if not final.is_finite():
            raise FloatingPointError(
                "the memory became NaN or infinite; the state from before this call is kept. Check the model's dtype "
                "(float16 overflows easily: try bfloat16) and its inputs"
            )
        if carry:
            self._memory_state = final
        if not isinstance(result, Tensor):
            result["memory_state"] = final
        return result

    def _expand_inputs_for_generation(self, *args, **kwargs):
        input_ids, model_kwargs = super()._expand_inputs_for_generation(*args, **kwargs)
        if run := _run.get():
            run.prompt_ids = input_ids
        return input_ids, model_kwargs

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ):
        run = _run.get()
        if run is not None:
            max_cache_length += 1  # the last token, which `generate` alone never feeds, must fit a static cache too
        result = super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
        if run is None:
            return result
        if generation_mode == GenerationMode.ASSISTED_GENERATION:
            raise ValueError(
                "assisted and prompt-lookup decoding take tokens back, which this memory cannot: decode without an "
                "assistant, or inside `with model.disable_memory():`"
            )
        cache = model_kwargs.get("past_key_values")
        layer = find_layer(cache)
        if layer is not None and layer.state is not None and not run.given:
            run.start = layer.state  # the user's cache goes on where it was
        if run.start is None:
            run.start = self.initial_memory_state(batch_size)
        self.check_memory_state(run.start, batch_size, whose=True)
        expanded = run.start.repeat_interleave(max(generation_config.num_beams, generation_config.num_return_sequences))
        if cache is not None:
            attach(cache, expanded, self.config.get_text_config().num_hidden_layers)
        else:
            model_kwargs["memory_state"] = expanded
        run.mode, run.cache = generation_mode, cache
        run.keeps_cache = bool(generation_config.return_dict_in_generate) or getattr(cache, "_is_user_defined", False)
        run.prompt_mask, run.prompt_memory_mask = model_kwargs.get("attention_mask"), model_kwargs.get("memory_mask")
        return result

    def _get_stopping_criteria(self, *args, **kwargs) -> StoppingCriteriaList:
        criteria = super()._get_stopping_criteria(*args, **kwargs)
        if run := _run.get():
            criteria = RecordingCriteria(criteria)
            criteria.run = run
        return criteria

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, *args, **kwargs):
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        run = _run.get()
        if run is None:
            return model_kwargs
        # This runs after a forward pass and before its token is chosen: `finished` is about the tokens before. Beams
        # that are still in the running have not ended, so nothing has to be held there.
        mask = model_kwargs.get("memory_mask")
        finished = run.finished
        if mask is None and finished is not None:
            mask = run.prompt_ids.new_ones(
                run.prompt_ids.shape[0], run.prompt_ids.shape[1] + run.steps, dtype=torch.bool
            )
        if mask is not None:
            writes = mask.new_ones(len(mask), 1) if finished is None else ~finished.to(mask.device).unsqueeze(1)
            model_kwargs["memory_mask"] = torch.cat([mask, writes.to(mask.dtype)], dim=1)
        run.steps += 1
        run.model_kwargs = model_kwargs
        return model_kwargs

    def _state_after(self, run: GenerationRun, result: Any) -> MemoryState:
        """The state after the prompt and everything generated. `generate` never feeds the last token it chose."""
        sequences = result if isinstance(result, Tensor) else result.sequences
        if run.mode in _ONE_PASS and run.cache is not None:
            kwargs = dict(run.model_kwargs)
            if run.keeps_cache:  # the caller's cache must not hold the token that the next call will feed
                kwargs["past_key_values"] = copy.deepcopy(run.cache)
            inputs = self.prepare_inputs_for_generation(sequences, next_sequence_length=1, **kwargs)
            return self(**inputs, return_dict=True).memory_state
        return self._state_of(run, sequences)

    def _state_of(self, run: GenerationRun, sequences: Tensor) -> MemoryState:
        """The state by one forward pass over whole sequences: for strategies that reorder or re-feed them."""
        prompt = run.prompt_ids.shape[1]
        if prompt == 0 or (run.cache is not None and getattr(run.cache, "_is_user_defined", False)):
            raise ValueError(
                "with beams, or without a KV cache, memory needs the whole prompt as input_ids: pass no inputs_embeds and no "
                "past_key_values of your own"
            )
        rows = len(sequences) // run.start.batch_size
        live = _live(run, sequences)
        every = len(run.prompt_ids) // run.start.batch_size  # rows that decoding made of one conversation
        seen = _or_ones(run.prompt_mask, run.prompt_ids)[::every].repeat_interleave(rows, dim=0)
        written = _or_ones(run.prompt_memory_mask, run.prompt_ids)[::every].repeat_interleave(rows, dim=0)
        attention_mask = torch.cat([seen, torch.ones_like(live)], dim=1)
        return self(
            input_ids=sequences,
            attention_mask=attention_mask.long(),
            position_ids=(attention_mask.long().cumsum(dim=1) - 1).clamp_min(0),
            memory_mask=torch.cat([written, live], dim=1),
            memory_state=run.start.repeat_interleave(rows),
            use_cache=False,
            return_dict=True,
        ).memory_state


def _live(run: GenerationRun, sequences: Tensor) -> Tensor:
    """(B, new tokens) True up to and with the token that ended a row: what comes after it is padding."""
    prompt, length = run.prompt_ids.shape[1], sequences.shape[1]
    if run.mode in _ONE_PASS:
        mask = run.model_kwargs.get("memory_mask")
        return torch.ones_like(sequences[:, prompt:], dtype=torch.bool) if mask is None else mask[:, prompt:].bool()
    rows = [tuple(row) for row in sequences.tolist()]
    ends = [next((end for end in range(prompt + 1, length) if row[:end] in run.ended), length) for row in rows]
    positions = torch.arange(prompt, length, device=sequences.device)
    return positions < torch.tensor(ends, device=sequences.device).unsqueeze(1)


def _or_ones(mask: Tensor | None, like: Tensor) -> Tensor:
    return torch.ones_like(like, dtype=torch.bool) if mask is None else mask.to(like.device).bool()
