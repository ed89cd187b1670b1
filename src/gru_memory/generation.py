"""`generate()` that starts from a memory and commits the right one."""

from __future__ import annotations

import copy
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.generation import GenerationMode, StoppingCriteriaList

from .cache import attach, find_layer
from .state import MemoryState

# Strategies after which the cache holds the returned tokens but the last, in order; with beams it does not.
_ROW_BY_ROW = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE, GenerationMode.ASSISTED_GENERATION)
_ASSISTED = GenerationMode.ASSISTED_GENERATION


@dataclass
class GenerationRun:
    """What one call of `generate` has to know at its end. Each thread has its own.

    R rows are decoded, the same number for each of B conversations. Columns are those of the attention mask: all
    tokens of a row since its cache was empty, padding included.
    """

    model: Any
    start: MemoryState | None  # B rows, or R if it came in a cache with so many
    given: bool  # the caller passed `start`
    commits: bool = False  # the new state becomes that of the model
    custom: bool = False  # a function of the caller's decodes
    by_model: bool = False  # an assistant model guesses
    drafting: bool = False  # this run proposes tokens to another one, which decides what becomes of them
    mode: GenerationMode | None = None
    conversations: int = 0  # B
    cache: Cache | None = None
    cache_before: Cache | None = None  # a copy of what the caller brought, where decoding mixes its rows
    keeps_cache: bool = False  # the caller sees the cache afterwards
    recorded_before: bool = True  # the cache's memory layer could take tokens back before this call
    prompt_ids: Tensor | None = None  # (R, P), P = 0 for a prompt of embeddings
    prompt_embeds: Tensor | None = None  # (R, P, D)
    prompt_mask: Tensor | None = None  # (R, columns) False where padding, None if there is none
    prompt_columns: int = 0
    memory_mask: Tensor | None = None  # (R, columns) bool of prompt and decoded tokens, None if all are written
    columns: int = 0
    finished: Tensor | None = None  # (R,) rows that have ended
    ended: set[tuple[int, ...]] = field(default_factory=set)  # beams that have ended; their rows move, so as tokens
    model_kwargs: dict[str, Any] | None = None  # as after the last forward pass

    @property
    def row_by_row(self) -> bool:
        return self.mode in _ROW_BY_ROW and not self.custom

    def take_prompt(self, generation_config: Any, model_kwargs: dict[str, Any]) -> None:
        """Keep what describes the prompt. `memory_mask` leaves the arguments: an assistant need not know it."""
        self.prompt_embeds = model_kwargs.get("inputs_embeds")
        mask = model_kwargs.get("attention_mask")
        if self.prompt_embeds is not None and self.mode == _ASSISTED and (self.by_model or mask is not None):
            # An assistant model reads tokens, and transformers would cut the mask to the tokens that there are: none.
            raise ValueError("assisted and prompt-lookup decoding need the prompt as input_ids, not as inputs_embeds")
        width = (self.prompt_ids if self.prompt_embeds is None else self.prompt_embeds).shape[1]
        # With a cache the prompt may be the new tokens alone; the mask then tells of all. One without padding is dropped.
        seen = getattr(generation_config, "_mask_length", width) if mask is None else mask.shape[1]
        self.columns = self.prompt_columns = max(width, seen)
        self.prompt_mask = None if mask is None else mask.bool()
        memory_mask = model_kwargs.pop("memory_mask", None)
        if memory_mask is None:
            return
        rows = len(self.prompt_ids)
        if memory_mask.shape not in ((rows, width), (rows, self.columns)):
            raise ValueError(
                f"memory_mask is {(self.conversations, *memory_mask.shape[1:])}: one column for each of the {width} prompt "
                "tokens is needed"
            )
        missing = self.columns - memory_mask.shape[1]
        self.memory_mask = F.pad(memory_mask.bool().to(self.prompt_ids.device), (missing, 0), value=True)

    def expanded(self, state: MemoryState, rows: int) -> MemoryState:
        return state if state.batch_size == rows else state.repeat_interleave(rows // state.batch_size)

    def written(self, begin: int, end: int, with_padding: bool = False) -> Tensor:
        """(R, end - begin) bool, which of these columns memory takes in: of an assistant's candidates all.

        `with_padding` also leaves out what the attention mask calls padding: with a cache of fixed size, the mask that
        the model gets is made for attention and does not say so.
        """
        result = self.prompt_ids.new_ones(len(self.prompt_ids), end - begin, dtype=torch.bool)
        for mask in (self.memory_mask, self.prompt_mask if with_padding else None):
            if mask is not None:
                known = mask[:, begin:end]
                result[:, : known.shape[1]] &= known.to(result.device)
        return result

    def extend(self, new_tokens: int) -> None:
        """Tokens were fed and these come next. `finished` tells of the tokens before them."""
        if self.finished is not None and self.memory_mask is None:
            self.memory_mask = self.prompt_ids.new_ones(len(self.prompt_ids), self.columns, dtype=torch.bool)
        if self.memory_mask is not None:
            writes = self.memory_mask.new_ones(len(self.memory_mask), new_tokens)
            if self.finished is not None:
                writes &= ~self.finished.to(writes.device).unsqueeze(1)
            self.memory_mask = torch.cat([self.memory_mask, writes], dim=1)
        self.columns += new_tokens

    def end_recording(self) -> None:
        """A cache that outlives this call keeps no past it was not asked to keep."""
        layer = find_layer(self.cache)
        if layer is not None and not self.recorded_before and not self.drafting:
            layer.stop_recording()

    def source_rows(self, sequences: Tensor) -> Tensor:
        """(returned rows,) index among the R rows of the prompt that each was made of."""
        first = torch.arange(self.conversations, device=sequences.device) * (len(self.prompt_ids) // self.conversations)
        return first.repeat_interleave(len(sequences) // self.conversations)

    def masks_of(self, sequences: Tensor) -> tuple[Tensor, Tensor]:
        """(returned rows, columns) bool: what is no padding, and what memory takes in."""
        rows, prompt = self.source_rows(sequences), self.prompt_ids.shape[1]
        new = sequences[:, prompt:]
        mask = torch.ones(len(sequences), self.prompt_columns + new.shape[1], dtype=torch.bool, device=sequences.device)
        written = mask.clone()
        if self.prompt_mask is not None:
            mask[:, : self.prompt_columns] = self.prompt_mask[rows]
        if self.memory_mask is not None:
            written[:, : self.prompt_columns] = self.memory_mask[rows, : self.prompt_columns]
            if self.row_by_row:
                written[:, self.prompt_columns :] = self.written(self.prompt_columns, mask.shape[1])
        if self.ended:
            written[:, self.prompt_columns :] = self._before_end(sequences, prompt)
        return mask, written

    def _before_end(self, sequences: Tensor, prompt: int) -> Tensor:
        """(rows, new tokens) True up to and with the token that ended a beam: what comes after it is padding."""
        length = sequences.shape[1]
        rows = [tuple(row) for row in sequences.tolist()]
        ends = [next((end for end in range(prompt + 1, length) if row[:end] in self.ended), length) for row in rows]
        positions = torch.arange(prompt, length, device=sequences.device)
        return positions < torch.tensor(ends, device=sequences.device).unsqueeze(1)

    def positions_of(self, sequences: Tensor, mask: Tensor) -> Tensor:
        """(returned rows, columns) positions as they were in decoding."""
        used = None if self.model_kwargs is None else self.model_kwargs.get("position_ids")
        if (
            used is not None
            and used.dim() == 2
            and len(used) == len(self.prompt_ids)
            and used.shape[1] >= mask.shape[1]
        ):
            return used[self.source_rows(sequences), : mask.shape[1]]
        return (mask.long().cumsum(dim=1) - 1).clamp_min(0)


_run: ContextVar[GenerationRun | None] = ContextVar("gru_memory_generation", default=None)


class RecordingCriteria(StoppingCriteriaList):
    """Stopping criteria that also note which rows have ended: from then on their pad tokens must not reach memory."""

    run: GenerationRun

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs) -> Tensor:
        done = super().__call__(input_ids, scores, **kwargs)
        if not self.run.row_by_row:
            self.run.ended.update(map(tuple, input_ids[done.to(input_ids.device)].tolist()))
        elif self.run.mode != _ASSISTED:  # its one row ends where decoding does, and it may ask about mere candidates
            self.run.finished = done if self.run.finished is None else self.run.finished | done
        return done


class MemoryGenerationMixin:
    """`generate` with a memory. It may be used wherever the base model's `generate` is."""

    @torch.no_grad()
    def generate(self, *args, memory_state: MemoryState | None = None, **kwargs) -> Any:
        """`transformers.GenerationMixin.generate`, starting from a memory.

        After it, the memory holds the prompt and everything that was generated, the last token included. Rows that end
        early stop being written when they end. An assistant model that has a memory of its own takes in the same text.

        Args:
            memory_state: start from this and leave `model.memory_state` alone. Without it, persistent mode starts from
                `model.memory_state` and commits the new one there; ephemeral mode starts empty and commits nothing.
            memory_mask: (B, prompt) False where tokens are context only: attention sees them, memory does not.

        With `return_dict_in_generate=True` the output carries the new state as `memory_state`.

        Raises:
            ValueError: a state for another batch size or memory, or a strategy that memory does not support.
            FloatingPointError: the new state is not finite; the old one stays.
        """
        outer = _run.get()
        run = None if self.memory_disabled else self._begin_run(outer, memory_state, kwargs)
        token = _run.set(run)
        try:
            result = super().generate(*args, **kwargs)
            if run is None or run.drafting:
                return result
            states = [(self, self._state_after(run, result)), *_assistant_after(run, result, kwargs)]
            states = [(model, _kept(state)) for model, state in states]
        finally:
            _run.reset(token)
            if run is not None:
                run.end_recording()
        if not all(state.is_finite() for _, state in states):
            raise FloatingPointError(
                "the memory became NaN or infinite; the state from before this call is kept. Check the model's dtype "
                "(float16 overflows easily: try bfloat16) and its inputs"
            )
        if run.commits:
            for model, state in states:
                model._memory_state = state
        if not isinstance(result, Tensor):
            result["memory_state"] = states[0][1]
        return result

    def _begin_run(
        self, outer: GenerationRun | None, memory_state: MemoryState | None, kwargs: dict[str, Any]
    ) -> GenerationRun:
        persistent = memory_state is None and self.memory_config.mode == "persistent"
        run = GenerationRun(
            self, start=self.memory_state if persistent else memory_state, given=memory_state is not None
        )
        run.custom = kwargs.get("custom_generate") is not None
        assistant = kwargs.get("assistant_model")
        run.by_model = assistant is not None
        remembers = isinstance(assistant, MemoryGenerationMixin) and not assistant.memory_disabled
        if remembers and kwargs.get("assistant_tokenizer") is not None:
            raise ValueError(
                "an assistant with a memory needs the tokenizer of the model: what transformers translates is cut into other "
                "tokens at every step, and a memory cannot go that far back. Call this inside `with assistant.disable_memory():`"
            )
        run.drafting = bool(getattr(kwargs.get("generation_config"), "is_assistant", False))
        run.commits = persistent
        if run.drafting and outer is not None:
            run.memory_mask = outer.memory_mask
            if outer.model is self:  # the first blocks of a model draft for all of them
                run.start = outer.start
        return run

    def heal_tokens(self, input_ids: Tensor, *args, **kwargs) -> Tensor:
        """As in transformers. The base model alone chooses the token that replaces the last one of a prompt."""
        with self.disable_memory():
            input_ids = super().heal_tokens(input_ids, *args, **kwargs)
        if run := _run.get():
            run.prompt_ids = input_ids
        return input_ids

    def init_continuous_batching(self, *args, **kwargs) -> Any:
        """Refused while the memory is on: there, the tokens of several conversations share one row."""
        if not self.memory_disabled:
            raise ValueError(
                "continuous batching packs several conversations into one row, and a memory knows one conversation a row: "
                "use generate(), or batch inside `with model.disable_memory():`"
            )
        return super().init_continuous_batching(*args, **kwargs)

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
        repeats = max(generation_config.num_beams, generation_config.num_return_sequences)
        run.mode, run.conversations, run.cache = generation_mode, batch_size, model_kwargs.get("past_key_values")
        if self.training and checkpoints(self) and generation_config.use_cache:
            raise ValueError(
                "gradient checkpointing takes the key-value cache away in training mode, so that each token would be decoded from "
                "the one before it alone: call model.eval() before generate(), or pass use_cache=False"
            )
        run.take_prompt(generation_config, model_kwargs)
        given_cache = getattr(run.cache, "_is_user_defined", False)
        run.keeps_cache = bool(generation_config.return_dict_in_generate) or given_cache
        layer = find_layer(run.cache)
        if layer is not None and layer.state is not None and not run.given:
            run.start = layer.state.clone()  # the user's cache goes on where it was, maybe in place
        if run.start is None:
            run.start = self.initial_memory_state(batch_size)
        if given_cache and repeats > 1:
            self._take_repeated_cache(run, repeats)
        else:
            self.check_memory_state(run.start, batch_size, whose=True)
        expanded = run.expanded(run.start, len(run.prompt_ids))
        if run.cache is None:
            model_kwargs["memory_state"] = expanded
            return result
        layer = attach(run.cache, self.config.get_text_config().num_hidden_layers)
        layer.set(expanded)
        run.recorded_before = layer.record_past
        if generation_config.is_assistant:
            layer.activate_past_recording()
        return result

    def _take_repeated_cache(self, run: GenerationRun, repeats: int) -> None:
        """`generate` repeats a prompt for beams or several sequences, but not the cache that goes with it."""
        rows, past = len(run.prompt_ids), int(run.cache.get_seq_length())
        if past and next(layer.keys for layer in run.cache.layers if layer.keys is not None).shape[0] != rows:
            raise ValueError(
                f"this cache does not have a row for each of the {rows} sequences to decode: call "
                f"cache.batch_repeat_interleave({repeats}) first"
            )
        whole = run.start.batch_size == rows
        self.check_memory_state(run.start, rows if whole else run.conversations, whose=True)
        if past and not run.row_by_row:
            if not isinstance(run.cache, DynamicCache):
                raise ValueError(
                    f"beams that go on from a {type(run.cache).__name__} cannot be followed by a memory: use a DynamicCache"
                )
            run.cache_before = copy.deepcopy(run.cache)

    def prepare_inputs_for_generation(self, input_ids: Tensor, *args, inputs_embeds: Tensor | None = None, **kwargs):
        run, cache = _run.get(), kwargs.get("past_key_values")
        if inputs_embeds is not None:
            kwargs["inputs_embeds"] = inputs_embeds
        if run is None or run.model is not self:
            return super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        if run.mode == _ASSISTED and kwargs.get("is_first_iteration") and (past := cache.get_seq_length()):
            # transformers feeds the whole prompt here, whatever of it the caller's cache holds already.
            whole = input_ids.shape[1] >= run.columns
            kwargs["next_sequence_length"] = input_ids.shape[1] - past if whole else None
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        fixed = cache is not None and cache.is_compileable
        if run.memory_mask is not None or fixed:
            fed = inputs["inputs_embeds"] if inputs.get("input_ids") is None else inputs["input_ids"]
            length = fed.shape[1]
            # The length of a fixed cache is a number on the device; a step of decoding can do without it.
            begin = run.columns - 1 if fixed and length == 1 else 0 if cache is None else int(cache.get_seq_length())
            inputs["memory_mask"] = run.written(begin, begin + length, with_padding=fixed)
        return inputs

    def _get_stopping_criteria(self, *args, **kwargs) -> StoppingCriteriaList:
        criteria = super()._get_stopping_criteria(*args, **kwargs)
        if run := _run.get():
            criteria = RecordingCriteria(criteria)
            criteria.run = run
        return criteria

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, *args, **kwargs):
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        if run := _run.get():
            run.extend(kwargs.get("num_new_tokens", 1))
            run.model_kwargs = model_kwargs
        return model_kwargs

    def _state_after(self, run: GenerationRun, result: Any) -> MemoryState:
        """The state after the prompt and everything generated. `generate` never feeds the last token it chose."""
        sequences = result if isinstance(result, Tensor) else getattr(result, "sequences", None)
        if not isinstance(sequences, Tensor) or run.prompt_ids is None:
            raise ValueError(
                "memory needs to know what was decoded: let custom_generate call model.generate or be called by it, and "
                "return the token ids or an output with .sequences"
            )
        if run.row_by_row and run.cache is not None:
            return self._state_after_last_token(run, sequences)
        return self._state_by_replay(run, sequences)

    def _state_after_last_token(self, run: GenerationRun, sequences: Tensor) -> MemoryState:
        cache, layer, kwargs = run.cache, find_layer(run.cache), dict(run.model_kwargs)
        attention = [other for other in cache.layers if other is not layer]
        # A cache that the caller keeps must not hold the token that the next call will feed.
        rewinds = run.keeps_cache and all(type(other) is DynamicLayer for other in attention)
        if run.keeps_cache and not rewinds:
            kwargs["past_key_values"] = copy.deepcopy(cache)
        before = layer.state
        width = run.prompt_columns + sequences.shape[1] - run.prompt_ids.shape[1]
        for name in (
            "attention_mask",
            "position_ids",
            "token_type_ids",
        ):  # longer, where a stop was noticed a step late
            if kwargs.get(name) is not None:
                kwargs[name] = kwargs[name][..., :width]
        inputs = self.prepare_inputs_for_generation(sequences, next_sequence_length=1, **kwargs)
        state = self(**inputs, return_dict=True).memory_state
        if rewinds:
            for other in attention:
                other.crop(-1)
            layer.set(before)
        return state

    def _state_by_replay(self, run: GenerationRun, sequences: Tensor) -> MemoryState:
        """The state by a forward pass over whole sequences: for strategies that reorder or re-feed them."""
        mask, written = run.masks_of(sequences)  # (returned rows, columns)
        positions = run.positions_of(sequences, mask)
        rows = run.source_rows(sequences)
        cache = run.cache_before
        if cache is not None:
            cache.batch_select_indices(rows)
        elif run.prompt_embeds is not None:
            cache = DynamicCache(config=self.config)
        state = run.expanded(run.start, len(run.prompt_ids)).select(rows)
        begin = 0 if cache is None else cache.get_seq_length()
        parts = [{"input_ids": sequences[:, sequences.shape[1] - mask.shape[1] + begin :]}]
        if run.prompt_embeds is not None:
            parts = [{"inputs_embeds": run.prompt_embeds[rows][:, begin:]}, {"input_ids": sequences}]
        for part in parts:
            end = begin + next(iter(part.values())).shape[1]
            state = self(
                **part,
                attention_mask=mask[:, :end].long(),
                position_ids=positions[:, begin:end],
                memory_mask=written[:, begin:end],
                memory_state=state,
                past_key_values=cache,
                use_cache=cache is not None,
                return_dict=True,
            ).memory_state
            begin = end
        return state


def checkpoints(model: Any) -> bool:
    """Whether gradient checkpointing is on; transformers 5.23 calls it activation checkpointing."""
    on = getattr(type(model), "is_activation_checkpointing", None)
    return model.is_activation_checkpointing if on is not None else model.is_gradient_checkpointing


def _kept(state: MemoryState) -> MemoryState:
    """A state that may be kept and learned from: no gradient through it, and no tensor of `torch.inference_mode`."""
    state = state.detach()
    if not torch.is_inference_mode_enabled():
        return state
    with torch.inference_mode(False):
        return state.clone()


def _assistant_after(
    run: GenerationRun, result: Any, kwargs: dict[str, Any]
) -> list[tuple[MemoryGenerationMixin, MemoryState]]:
    """An assistant with a memory of its own, and its state after the same text: drafting left it where it was."""
    assistant = kwargs.get("assistant_model")
    if not run.commits or not isinstance(assistant, MemoryGenerationMixin) or assistant is run.model:
        return []
    whole = run.prompt_embeds is None and run.prompt_ids.shape[1] == run.prompt_columns
    if assistant.memory_disabled or assistant.memory_config.mode != "persistent" or not whole:
        return []
    start = assistant.memory_state or assistant.initial_memory_state(1)
    own = replace(run, model=assistant, start=start, cache=None, cache_before=None)
    sequences = result if isinstance(result, Tensor) else result.sequences
    return [(assistant, assistant._state_by_replay(own, sequences).detach())]
