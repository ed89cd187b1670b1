"""One token through a memory site in as few steps as there are: what decoding on a CPU runs.

The same equations as in `GRUMemoryWithDecay.run`, for T = 1 and without gradients, in one call of compiled code. A site
then takes four operations of torch, all of them allocations, where the general path takes more than 80
(`tests/test_operation_counts.py`); threads share it, if it is large enough (`scan.team`). Weights and hidden states in
bfloat16 are read as they are; all between them is computed in float32, where the general path rounds after every step.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .addressing import rules
from .scan import can_compile
from .scan.team import openmp, run_in_team, team_size

if TYPE_CHECKING:
    from .memory import GRUMemoryWithDecay, SiteState

_KINDS = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "uint16"}  # what numpy calls their bits
TEAM_BYTES = 250_000  # of weights and slots that each thread of a team has to read, or a token has one thread


class _Plan(NamedTuple):
    """How compiled code finds the parameters of a site."""

    parameters: list[Tensor]  # keeps them, so that no other tensor comes to lie at these addresses
    addresses: list[int]
    dtype: torch.dtype  # of the state
    stored: torch.dtype  # of the weights
    floor: float
    weights: Tensor  # see `one_token_kernels.site_one`
    sizes: Tensor
    entry: Callable[[str, str, str], Any]
    shared: int  # bytes of a row that the threads of a team share
    weight_bytes: int


_plans: weakref.WeakKeyDictionary[GRUMemoryWithDecay, _Plan] = weakref.WeakKeyDictionary()


def can_run(site: GRUMemoryWithDecay, hidden_states: Tensor) -> bool:
    """Whether `run_one` may stand in for `site.run`: one token on a CPU, nothing to learn, plain weights of one float type."""
    if hidden_states.shape[1] != 1 or not hidden_states.numel() or hidden_states.device.type != "cpu":
        return False
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return False
    parameters = list(site._parameters.values())
    for module in site._modules.values():
        # Anything else, such as an adapter around a projection, computes something else.
        if type(module) is not nn.Linear or module._forward_hooks or module._forward_pre_hooks:
            return False
        parameters += module._parameters.values()
    parameters = [parameter for parameter in parameters if parameter is not None]
    plan = _plans.get(site)
    if (
        plan is not None
        and plan.floor == site.floor
        and plan.addresses == [parameter.data_ptr() for parameter in parameters]
        and all(map(Tensor.is_contiguous, parameters))  # one that was transposed begins where it did
    ):
        return True
    return can_compile(hidden_states) and _make_plan(site, parameters)


def _make_plan(site: GRUMemoryWithDecay, parameters: list[Tensor]) -> bool:
    """Note where the parameters are, if compiled code can read them there."""
    from .scan.one_token_kernels import WEIGHTS, entry, shared_widths

    stored, dtype = site.gate.dtype, site.state_dtype
    found = dict(site.named_parameters())
    if stored not in _KINDS or not set(found) <= set(WEIGHTS) or len(found) != len(parameters):
        return False
    for parameter in parameters:
        if type(parameter) is not nn.Parameter or parameter.dtype != stored:
            return False
        if parameter.device.type != "cpu" or not parameter.is_contiguous():  # fetched when a projection runs, for one
            return False
    decay = site.decay  # lives as long as the site, unless the site moves; then its parameters move as well
    sizes = [site.hidden_size, site.embed_size, site.key_size, site.num_heads, site.num_slots, site.slot_size]
    sizes += [site.address_rank, site.persistent_slots, *decay.shape, site.decay_every == "token", site.signature_size]
    most = torch.tensor([site.max_strength, site.floor], dtype=dtype, device="cpu")
    places = rules(dtype)
    weights = [found[name].data_ptr() if name in found else 0 for name in WEIGHTS]
    weights += [tensor.data_ptr() for tensor in (decay, most, places)]
    _plans[site] = _Plan(
        [*(parameter.detach() for parameter in parameters), decay, most, places],
        [parameter.data_ptr() for parameter in parameters],
        dtype,
        stored,
        site.floor,
        torch.tensor(weights, device="cpu"),
        torch.tensor(sizes, device="cpu"),
        entry,
        sum(shared_widths.py_func(weights, sizes)) * dtype.itemsize,
        sum(parameter.nbytes for parameter in parameters),
    )
    return True


def run_one(
    site: GRUMemoryWithDecay,
    hidden_states: Tensor,
    token_embeds: Tensor | None,
    state: SiteState,
    mask: Tensor | None,
    turn_starts: Tensor | None,
    key_states: Tensor | None,
) -> tuple[Tensor, SiteState]:
    """`site.forward` for T = 1, right after `can_run` said so."""
    plan, batch = _plans[site], hidden_states.shape[0]
    dtype, given = plan.dtype, (hidden_states, token_embeds, key_states)
    as_weights = all(tensor is None or tensor.dtype == plan.stored for tensor in given)
    stream = plan.stored if as_weights else dtype  # few pairs of types, for each is compiled by itself
    hidden, embeds, further = (None if tensor is None else _rows(tensor, stream) for tensor in given)
    visible = None if mask is None else _rows(mask, torch.bool)
    starts = None if turn_starts is None else _rows(turn_starts, torch.bool)
    kept = {name: _rows(tensor, dtype) for name, tensor in state.items()}
    recalled, after = torch.empty_like(hidden), {name: torch.empty_like(tensor) for name, tensor in kept.items()}
    before = (kept["address"], kept["strength"], kept.get("told"), kept.get("replacing"), kept["slots"])
    new = (recalled, after["slots"], after["address"], after["strength"], after.get("told"), after.get("replacing"))
    tensors = (hidden, embeds, further, visible, starts, *before, *new)
    places = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    function = plan.entry(_KINDS[dtype], _KINDS[plan.stored], _KINDS[stream])
    threads = team_size()
    if plan.weight_bytes + kept["slots"].nbytes < TEAM_BYTES * threads:
        threads = 1
    team = openmp()[1:] if threads > 1 else (0, 0, 0)
    shared = ctypes.create_string_buffer(batch * plan.shared)
    known = (plan.weights.data_ptr(), plan.sizes.data_ptr(), batch, *team, ctypes.addressof(shared))
    data = (ctypes.c_int64 * (len(known) + len(places) + 1))(*known, *places)
    run_in_team(function, ctypes.addressof(data), threads)
    if not data[-1]:
        raise MemoryError("compiled code could not finish a token of the memory: see standard error")
    return recalled.to(hidden_states.dtype), after


def _rows(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In this type, and in memory row by row."""
    return tensor if tensor.dtype == dtype and tensor.is_contiguous() else tensor.to(dtype).contiguous()
