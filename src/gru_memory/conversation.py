"""`Conversation`: turns over a memory. Attention sees the last few turns, memory sees all of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as deserialize
from safetensors.torch import save as serialize

from .placement import fed_on
from .rendering import TurnRenderer, require_text
from .state import AS_KEPT, MemoryState
from .whole_files import write_whole

USUAL_GENERATION = {"max_new_tokens": 64, "do_sample": False}


class TurnTooLong(ValueError):
    """A turn, with what attention sees beside it, has more tokens than the model has positions."""


class Conversation:
    """A chat whose cost never grows: only the last turns are fed, everything before is in the memory's state.

    Args:
        model: a causal LM with memory (`add_memory`, `AutoModelWithGRUMemory`, `GPT2WithGRUMemory`).
        tokenizer: its tokenizer; without a chat template a plain "User: / Assistant:" script is used.
        system: system prompt; None leaves the default of the chat template.
        context_turns: turns that attention sees, the current one included; at least 1.
        **generation: defaults for `say`, as for `generate` (max_new_tokens=64, do_sample=False, ...).

    Attributes:
        state: the `MemoryState`, kilobytes. It may be read, kept and put back.
        turns: how many turns were taken in.
    """

    kept_in: torch.dtype | str | None = AS_KEPT  # what `to_bytes` and `save` write floats in; None: every bit

    def __init__(
        self, model: Any, tokenizer: Any, system: str | None = None, context_turns: int = 1, **generation: Any
    ) -> None:
        if not isinstance(context_turns, int) or context_turns < 1:
            raise ValueError(f"context_turns is {context_turns!r}: the current turn is always seen, so at least 1")
        if not hasattr(model, "initial_memory_state"):
            raise ValueError(f"{type(model).__name__} has no memory: give it one with gru_memory.add_memory(model)")
        self.model, self.tokenizer, self.system, self.context_turns = model, tokenizer, system, context_turns
        self.generation = generation
        self.renderer = TurnRenderer(tokenizer, system)
        self.reset()

    def reset(self) -> None:
        """Forget everything and start anew."""
        self.state: MemoryState = self.model.initial_memory_state(1)
        self.turns = 0
        self._context: list[tuple[str, str | None]] = []

    @torch.no_grad()
    def read(self, text: str, reply: str | None = None) -> None:
        """Take a turn in without generating. `reply` is what the assistant is known to have answered, if anything."""
        self._refuse_without_memory()
        inputs = self.inputs(text, reply)
        state = self.model(**inputs, memory_state=self.state, logits_to_keep=1, use_cache=False).memory_state
        if not state.is_finite():
            raise FloatingPointError("the memory became NaN or infinite on this turn; the state from before it is kept")
        self.commit(state, text, reply)

    def say(self, text: str, **generation: Any) -> str:
        """Take a turn in and return the reply; arguments as for `generate`, over the defaults of this conversation."""
        self._refuse_without_memory()
        settings = self._settings(generation)
        longest = settings.get("max_new_tokens", getattr(settings.get("generation_config"), "max_new_tokens", None))
        inputs = self.prompt(text, longest or 0)
        if settings.get("pad_token_id") is None and self.tokenizer.pad_token_id is None:
            settings["pad_token_id"] = self.tokenizer.eos_token_id
        output = self.model.generate(**inputs, memory_state=self.state, **{**settings, "return_dict_in_generate": True})
        if output.sequences.shape[0] != 1:
            raise ValueError("a conversation has one reply: leave num_return_sequences at 1")
        new = output.sequences[0, inputs["input_ids"].shape[1] :]
        reply = self.tokenizer.decode(new, skip_special_tokens=True).strip()
        self.commit(output.memory_state, text, reply)
        return reply

    def _settings(self, generation: dict[str, Any]) -> dict[str, Any]:
        """Of `generate`: what `say` was given, over what this conversation was, over the usual where neither says otherwise."""
        given = {**self.generation, **generation}
        if given.get("generation_config") is not None:
            return given
        usual = {"do_sample": False} if given.get("max_length") is not None else USUAL_GENERATION
        return {**usual, **given}

    def _refuse_without_memory(self) -> None:
        if self.model.memory_disabled:
            raise RuntimeError(
                "the memory is disabled here, and a conversation is nothing without it: leave `disable_memory()`, or ask the base "
                "model itself (model.generate(**chat.prompt(text), ...))"
            )

    def inputs(self, text: str, reply: str | None = None) -> dict[str, torch.Tensor]:
        """What `read` feeds to the model: one row of `input_ids`, `attention_mask` and `memory_mask`, each (1, T)."""
        require_text(text)
        return self._inputs(self.renderer.turn(text, reply).ids)

    def prompt(self, text: str, max_new_tokens: int = 0) -> dict[str, torch.Tensor]:
        """What `say` feeds to the model, up to the point where the reply begins.

        With `commit` this is for those who run the model themselves, many conversations in one batch for example.

        Raises:
            ValueError: an empty turn, or one that does not fit with `max_new_tokens` after it.
        """
        require_text(text)
        return self._inputs(self.renderer.prompt(text), max_new_tokens)

    def repeated_prefix(self) -> tuple[int, ...]:
        """The tokens that `inputs` and `prompt` begin with for attention alone; none in the first turn, where memory takes them in.

        With `prefix.kept_prefix` they need not be fed, which counts where many conversations are read in one batch; a turn alone
        is bound by reading the weights, and gains little.
        """
        return tuple(self.renderer.prefix_ids) if self.turns else ()

    def use_system(self, system: str | None) -> None:
        """Let attention see another system prompt from the next turn on. Memory has taken in the first one, once."""
        self.renderer, self.system = TurnRenderer(self.tokenizer, system), system

    def commit(self, state: MemoryState, text: str, reply: str | None) -> None:
        """Go on from `state`, in which this turn was taken in."""
        self.state = state
        self.turns += 1
        self._context = [*self._context, (text, reply)][-self.context_turns + 1 :] if self.context_turns > 1 else []

    def leave_context(self) -> None:
        """Let attention see no turn from before; memory has taken them in."""
        self._context = []

    def to_bytes(self, context: bool = True) -> bytes:
        """The conversation as the bytes of one safetensors file: its state and the turns that attention still sees.

        In what the memory's config says (`MemoryConfig.kept_in`), unless `kept_in` says otherwise. Without `context` there
        is no text of a turn in it, and attention begins with the next one.
        """
        about = {
            "turns": self.turns,
            "context": self._context if context else [],
            "system": self.system,
            "context_turns": self.context_turns,
        }
        return self.state.to_bytes(self.kept_in, metadata={"conversation": json.dumps(about)})

    def save(self, path: str | Path) -> None:
        """Write `to_bytes` to a file for its owner alone, whole or not at all."""
        write_whole(path, self.to_bytes(), private=True)

    def load(self, source: str | Path | bytes) -> None:
        """Go on with a saved conversation, a file or its bytes. On any error this one stays as it was.

        Raises:
            ValueError: what is there is no conversation, or not one of this model and memory; see `MemoryState.load`.
        """
        fingerprint = self.model.memory_fingerprint()
        whole = isinstance(source, bytes)
        state = MemoryState.from_bytes(source, fingerprint) if whole else MemoryState.load(source, fingerprint)
        name = "this state" if whole else source
        try:
            about = json.loads(MemoryState.read_metadata(source)["conversation"])
            turns, system, context = about["turns"], about["system"], [tuple(turn) for turn in about["context"]]
            if not _is_conversation(turns, system, context):
                raise TypeError("of the wrong types")
        except (KeyError, TypeError, RecursionError, json.JSONDecodeError) as error:
            raise ValueError(f"{name} is a state, not a conversation: read it with MemoryState.load") from error
        if state.batch_size != 1:
            raise ValueError(f"{name} holds {state.batch_size} conversations, not one: read it with MemoryState.load")
        self.model.check_memory_state(state, 1, whose=True)
        # How it fades, is found and is kept are the memory's to say: a batch has one of each, and a file may say anything.
        fresh = self.model.initial_memory_state(1)
        state = replace(state, decay_rates=fresh.decay_rates, kept_in=fresh.kept_in, addressing=fresh.addressing)
        self.renderer = TurnRenderer(self.tokenizer, system)
        self.state, self.turns, self.system = state.to(fed_on(self.model)), turns, system
        self._context = context[-self.context_turns + 1 :] if self.context_turns > 1 else []

    def _inputs(self, ids: list[int], room: int = 0) -> dict[str, torch.Tensor]:
        """The prefix, the turns still in sight and the new tokens; memory takes in what it has not seen yet."""
        prefix = self.renderer.prefix_ids
        context = [
            token for turn in self._context for token in (*self.renderer.turn(*turn).ids, *self.renderer.separator_ids)
        ]
        longest = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        total = len(prefix) + len(context) + len(ids) + room
        if longest is not None and total > longest:
            raise TurnTooLong(
                f"this turn needs {total} positions, the model has {longest}: give the text in several turns, ask for fewer new "
                "tokens, or let attention see fewer context_turns"
            )
        seen = len(context) + (len(prefix) if self.turns else 0)
        input_ids = torch.tensor([prefix + context + ids], device=fed_on(self.model))
        memory_mask = torch.ones_like(input_ids, dtype=torch.bool)
        memory_mask[:, :seen] = False
        return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "memory_mask": memory_mask}


def without_turns(data: bytes, said: str | None = None) -> bytes:
    """What `to_bytes` returned, where attention does not see turns in which the user said this. Memory stays as it is.

    None is any turn: no text of one is left then.
    """
    metadata = MemoryState.read_metadata(data)
    try:
        about = json.loads(metadata["conversation"])
        context = [turn for turn in about["context"] if said is not None and turn[0] != said]
        if len(context) == len(about["context"]):
            return data
    except (KeyError, TypeError, IndexError, RecursionError, json.JSONDecodeError):  # a state, but no conversation
        return data
    return serialize(deserialize(data), {**metadata, "conversation": json.dumps({**about, "context": context})})


def _is_conversation(turns: object, system: object, context: list[tuple]) -> bool:
    """What the header of a saved conversation says has the types that it must have."""
    pairs = all(
        len(turn) == 2 and isinstance(turn[0], str) and isinstance(turn[1], (str, type(None))) for turn in context
    )
    return isinstance(turns, int) and turns >= 0 and isinstance(system, (str, type(None))) and pairs
