"""One forward pass of a model with memory: what its hooks share, and the hooks.

The call is found through a context variable, so threads do not see each other's; nothing of it outlives the pass.
"""

from __future__ import annotations

import functools
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from . import backbones
from .cache import Stretch
from .clock import counted
from .placement import run_where_it_lies
from .state import MemoryState


@dataclass
class MemoryCall:
    """What the hooks of one forward pass share. Lives for that pass only; each thread has its own."""

    owner: nn.Module
    modules: dict[str, nn.Module]  # the sites by name
    before: MemoryState
    state: MemoryState  # `before` with its counters after this call; its sites are still those of `before`
    token_embeds: Tensor | None
    starts: Tensor  # (B, T) bool, position 0 of a turn
    visible: Tensor  # (B, T) bool
    ticks: Tensor  # (B, T) bool
    key_states: dict[int, Tensor] = field(default_factory=dict)
    new_sites: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    recorded: dict[str, tuple[nn.Module, dict[str, Tensor]]] | None = None  # what sites read, to take tokens back


class _Traced:
    """Stands in for `_call` inside `torch.compile`, which does not know context variables. Set during tracing only."""

    call: MemoryCall | None = None


_traced = _Traced()
_call: ContextVar[MemoryCall | None] = ContextVar("gru_memory_call", default=None)
disabled: ContextVar[tuple[int, ...]] = ContextVar(
    "gru_memory_disabled", default=()
)  # ids of models whose memory is off


def run_with(call: MemoryCall, forward: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """`forward` of the call's model, while the hooks find the call."""
    if torch.compiler.is_compiling():
        _traced.call = call
        try:
            return forward(call.owner, *args, **kwargs)
        finally:
            _traced.call = None
    token = _call.set(call)
    try:
        return forward(call.owner, *args, **kwargs)
    finally:
        _call.reset(token)


def _current_call() -> MemoryCall | None:
    return _traced.call if torch.compiler.is_compiling() else _call.get()


def stretch_of(call: MemoryCall) -> Stretch | None:
    """How to take tokens of this call back, if it was recorded."""
    if call.recorded is None:
        return None
    return Stretch(call.visible.shape[1], call.before, functools.partial(_state_until, call))


def _state_until(call: MemoryCall, length: int) -> MemoryState:
    """The state after the first `length` tokens of a recorded call: its sites go over what they read again."""
    visible = call.visible[:, :length]
    ticks, state = counted(call.before, call.starts[:, :length], visible)
    embeds = None if call.token_embeds is None else call.token_embeds[:, :length]
    sites = dict(call.before.sites)
    for site, (module, given) in call.recorded.items():
        given = {name: tensor[:, :length] for name, tensor in given.items()}
        given |= {"token_embeds": embeds, "state": sites[site], "mask": visible, "turn_starts": ticks}
        _, sites[site] = run_where_it_lies(module, **given)
    return replace(state, sites=sites)


def keep_key_states(module: nn.Module, args: tuple, output: Any, layer: int) -> None:
    call = _current_call()
    if call is not None:
        call.key_states[layer] = backbones.hidden_states_in(output)


def run_before(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    call = _current_call()
    if call is None:
        return _refuse_training_unheard(module)
    if args:
        return (call.owner.run_site("input", args[0], call), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": call.owner.run_site("input", kwargs["hidden_states"], call)}


def run_after(module: nn.Module, args: tuple, output: Any, site: str) -> Any:
    call = _current_call()
    if call is None:
        return _refuse_training_unheard(module)
    if isinstance(output, tuple):
        return (call.owner.run_site(site, output[0], call), *output[1:])
    return call.owner.run_site(site, output, call)


def _refuse_training_unheard(module: nn.Module) -> None:
    """Raise RuntimeError if somebody trains on what the backbone says by itself, and would never notice that memory has no part."""
    if module.training and torch.is_grad_enabled() and not disabled.get() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "the backbone of a model with memory is being trained by itself, so its memory has no part in it: call the model, or "
            "do this inside `with model.disable_memory():`. (TRL's SFTTrainer does so unless its compute_loss is that of the "
            "Trainer, see docs/training.md; so does checkpointing that wraps the blocks, unlike gradient_checkpointing_enable().)"
        )
