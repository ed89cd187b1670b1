"""One token through a memory site in as few steps as there are: what decoding on a CPU runs.

The same equations as in `GRUMemoryWithDecay.run`, for T = 1 and without gradients: torch does the large matrix
products, two calls of compiled code all the rest. A site then takes some 15 operations of torch, allocations counted,
where the general path takes more than 80 (`tests/test_operation_counts.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .scan import can_compile

if TYPE_CHECKING:
    from .memory import GRUMemoryWithDecay, SiteState

_FLOATS = (torch.float32, torch.float64)
_WORK_PER_THREAD = 200_000


def can_run(site: GRUMemoryWithDecay, hidden_states: Tensor) -> bool:
    """Whether `run_one` may stand in for `site.run`: one token on a CPU, nothing to learn, plain weights of one float type."""
    weight = site.gate
    if hidden_states.shape[1] != 1 or weight.dtype not in _FLOATS or hidden_states.device.type != "cpu":
        return False
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or not can_compile(hidden_states):
        return False
    for module in site._modules.values():
        # Anything else, such as an adapter around a projection, computes something else.
        if type(module) is not nn.Linear or module._forward_hooks or module._forward_pre_hooks:
            return False
        if type(module.weight) is not nn.Parameter or module.weight.dtype != weight.dtype:
            return False
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
    """`site.forward` for T = 1, see `can_run`."""
    from .scan.one_token_kernels import keys_and_gates, write_and_read_one
    from .scan.threads import share

    batch, dtype = hidden_states.shape[0], site.gate.dtype
    heads, count, size, hidden_size = site.num_heads, site.num_slots, site.slot_size, site.hidden_size
    whole = bool(site.address_rank)
    hidden = hidden_states.view(batch, -1).to(dtype)
    embeds = (
        hidden.new_zeros(batch, site.embed_size) if token_embeds is None else token_embeds.view(batch, -1).to(dtype)
    )
    further = hidden.new_empty(batch, 0) if key_states is None else key_states.view(batch, -1).to(dtype)
    visible = mask.view(batch).bool() if mask is not None else torch.ones(batch, dtype=torch.bool)
    ticks = visible
    if site.decay_every == "turn":
        ticks = torch.zeros_like(visible) if turn_starts is None else visible & turn_starts.view(batch)

    keys = hidden.new_empty(batch, hidden_size + site.key_size + site.embed_size)
    write, strength, gates = (hidden.new_empty(batch, heads) for _ in range(3))
    keys_and_gates(
        *_arrays(hidden, embeds, further, visible, state["strength"].to(dtype), site.strength_key.weight),
        *_arrays(site.strength_key.bias, site.strength_embed.weight), whole,
        *_arrays(site.read_gate.weight, site.read_gate.bias), whole, *_arrays(site.gate.view(1), keys, write, strength, gates),
    )  # fmt: skip
    if whole:
        key = F.rms_norm(site.key_rank(keys), (site.address_rank,), eps=1e-6)
        asked = F.rms_norm(site.query_rank(keys), (site.address_rank,), eps=1e-6)
        before = state["address"].to(dtype)
        address = site.key(before)
    else:
        key, asked = site.key(keys), keys
        address = before = state["address"].reshape(batch, -1).to(dtype)
    query = site.query(asked)
    values = F.linear(keys[:, -site.embed_size :], site.value_embed.weight)
    values.addmm_(keys[:, :hidden_size], site.value_hidden.weight.t())

    slots = state["slots"].to(dtype).contiguous()
    reads, after = torch.empty_like(values), torch.empty_like(slots)
    if site.cell == "gru":
        cell = (site.weight_ih, site.bias_ih, site.weight_hh, site.bias_hh)
    else:
        cell = (values.new_empty(0, 0, 0), values.new_empty(0, 0)) * 2
    arrays = _arrays(values, address, query, write, gates, ticks, site.decay, slots, *cell, reads, after)
    work = count * size + (6 * size * size if site.cell == "gru" else 0)
    share(lambda first, last: write_and_read_one(*arrays, first, last), batch * heads, -(-_WORK_PER_THREAD // work))
    if site.persistent_slots:
        weights = site.persistent_query(asked).view(batch, heads, -1).softmax(dim=-1)
        reads += torch.einsum("bnp,npd->bnd", weights, site.gate * site.persistent).reshape(batch, -1)
    recalled = torch.addmm(hidden, reads, site.output.weight.t()) if dtype == hidden_states.dtype else None
    if recalled is None:
        recalled = hidden_states.view(batch, -1) + F.linear(reads, site.output.weight).to(hidden_states.dtype)
    last_key = key if mask is None else torch.where(visible.unsqueeze(1), key, before)
    new = {"slots": after, "address": last_key.view(state["address"].shape), "strength": strength}
    return recalled.view(hidden_states.shape), new


def _arrays(*tensors: Tensor) -> list:
    return [tensor.detach().contiguous().numpy() for tensor in tensors]
