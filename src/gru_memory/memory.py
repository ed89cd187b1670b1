"""`GRUMemoryWithDecay`: one memory site. It addresses, writes, fades and reads; the recurrence itself is in `scan`."""

from __future__ import annotations

import contextlib
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import one_token
from . import scan as recurrence
from .addressing import NO_WRITE, Lookup, find_places
from .config import (
    CLOCKS,
    MemoryConfig,
    check_addressing,
    check_decay,
    check_max_strength,
    check_persistent_floor,
    check_signature,
)

SiteState = dict[str, Tensor]

_TRUST = (4.0, 12.0, -3.0)  # where trust begins: an empty read counts for little, one that agrees in full
_SHARPNESS = 60.0  # of reading by content: e-folds between a slot that agrees in full and an empty one

_DEFAULTS = {name: f.default for name, f in MemoryConfig.__dataclass_fields__.items()}


class Prepared(NamedTuple):
    """What a stretch of tokens asks of a memory, whatever is stored in it."""

    inputs: recurrence.ScanInputs
    told: Tensor  # (B, T, N) the probability that a token is to be written, 0 where the memory holds
    last_key: SiteState  # where the next token will be written
    read_gate: Tensor  # (B, T, N, 1)
    persistent: Tensor | None  # (B, T, N, P) how much of each persistent slot is read, where there are any
    signature: Tensor | None  # (B, T, N, f) what is asked for, where slots are signed


class GRUMemoryWithDecay(nn.Module):
    """A recurrent memory beside a stream of hidden states.

    With x_t the hidden state, e_t the output embedding of token t, and for each of N heads on its own (index left out):

        address   a_t = softmax(W_k k_{t-1})            k_t = [norm(x_t), norm(key_states_t) where given, norm(e_t)]
        strength  b_t = b_max sigmoid(w_b [k_{t-1}, norm(e_t)])
        value     v_t = W_e norm(e_t) + W_x norm(x_t)
        decay     H~  = lambda * H_{t-1}                at each tick of the clock
        content   c_t = sum_s a_{t,s} H~_s
        update    C_t = GRUCell(v_t, c_t);  H_s = H~_s + b_t a_{t,s} (C_t - H~_s)
        query     r_t = softmax(W_q k_t)
        read      y_t = x_t + W_o concat_heads(g_t sum_s r_{t,s} H_{t,s}),  g_t = gate * sigmoid(w_g norm(x_t))

    The address comes from the position *before* the token that is stored, so that a later position which expects the
    same kind of token finds it (the induction pattern). With `cell="mingru"` the update is C_t = tanh(v_t).

    With `address_rank`, k is norm(W_r k_t) in addresses and norm(W_p k_t) in queries, and W_q is W_k. With `signature_size`,
    the last f of the d floats of a slot say under which key it was written, v_t = [value, W_f norm(W_r k_{t-1})], and a read
    counts as far as that agrees with what is asked for. With m_n the mean over f of the signature read by head n times
    tanh(W_f norm(W_p k_t)), and M the mean of max(0, m_n) over the heads,

        trust     y_n *= sigmoid(c_1 m_n + c_2 M + c_3),  after which the signature is left out of the read

    With `addressing="content"` there are no W_k and W_q: `addressing` says how slots are found by their signatures. What is told
    is then a chain, p_t = (1 - p_{t-1}) sigmoid(w_b [k_{t-1}, k_t]) + p_{t-1} sigmoid(w_c [k_{t-1}, k_t]), of tokens with which
    it begins and tokens with which it goes on, b_t = b_max max(0, p_t - 0.05) / 0.95, and m_n is the cosine of the signature
    read and the one asked for, so that what fades is heard less, but is no less sure of itself.

    Args:
        hidden_size: D, width of the hidden states.
        num_heads: N, heads that address their own slots.
        num_slots: S, slots a head.
        slot_size: d, floats in a slot.
        decay: lambda in (0, 1], kept of every slot per tick: a number, one a head or one a slot.
        decay_every: "token" (every position ticks) or "turn" (the first position of a turn ticks).
        cell: "gru" or "mingru".
        gate_init: initial gate; at 0 the output is the input, bit for bit, until training opens it.
        embed_size: width of the token embeddings, `hidden_size` if None.
        key_size: width of `key_states`, 0 if the site addresses by its own hidden state alone.
        address_rank: r, numbers that keys and queries pass through; 0 addresses by the whole key.
        persistent_slots: P, learned slots a head that reads may choose.
        persistent_floor: t in [0, 1), the share of a read up to which a learned slot is left out, and of which more counts as
            (share - t) / (1 - t); not in training mode, in which every slot has to be heard to learn.
        signature_size: f of the d floats of a slot, those that say what it was written under; needs `address_rank`.
        tied_queries: W_q is W_k, where there is an `address_rank`; False for memories of format 3 and before.
        max_strength: b_max in (0, 1], the most that a write replaces of what its slots hold.
        addressing: "learned" or "content"; the latter needs the "mingru" cell and a `signature_size`.

    Raises:
        ValueError: an argument out of range; the message says which values are allowed.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int = _DEFAULTS["num_heads"],
        num_slots: int = _DEFAULTS["num_slots"],
        slot_size: int = _DEFAULTS["slot_size"],
        decay: float | list = _DEFAULTS["decay"],
        decay_every: str = _DEFAULTS["decay_every"],
        cell: str = _DEFAULTS["cell"],
        gate_init: float = _DEFAULTS["gate_init"],
        embed_size: int | None = None,
        key_size: int = 0,
        address_rank: int = _DEFAULTS["address_rank"],
        persistent_slots: int = _DEFAULTS["persistent_slots"],
        persistent_floor: float = _DEFAULTS["persistent_floor"],
        signature_size: int = _DEFAULTS["signature_size"],
        tied_queries: bool = _DEFAULTS["tied_queries"],
        max_strength: float = _DEFAULTS["max_strength"],
        addressing: str = _DEFAULTS["addressing"],
    ) -> None:
        super().__init__()
        if decay_every not in CLOCKS:
            raise ValueError(f"decay_every is {decay_every!r}: choose one of {CLOCKS}")
        for name, size in (
            ("hidden_size", hidden_size),
            ("num_heads", num_heads),
            ("num_slots", num_slots),
            ("slot_size", slot_size),
        ):
            if size < 1:
                raise ValueError(f"{name} is {size}: it must be at least 1")
        for name, size in (("address_rank", address_rank), ("persistent_slots", persistent_slots)):
            if size < 0:
                raise ValueError(f"{name} is {size}: it must be 0 or more")
        self.hidden_size, self.embed_size, self.key_size = hidden_size, embed_size or hidden_size, key_size
        self.num_heads, self.num_slots, self.slot_size = num_heads, num_slots, slot_size
        check_signature(signature_size, slot_size, address_rank)
        check_max_strength(max_strength)
        check_persistent_floor(persistent_floor)
        check_addressing(addressing, cell, signature_size)
        self.addressing = addressing
        self.address_rank, self.persistent_slots, self.signature_size = address_rank, persistent_slots, signature_size
        self.value_size, self.max_strength = slot_size - signature_size, max_strength
        self.persistent_floor = persistent_floor
        self.decay_every, self.cell, self.gate_init = decay_every, cell, gate_init
        self.decay_table = check_decay(decay, num_heads, num_slots)
        self._decay: Tensor | None = None

        width = num_heads * self.value_size
        key_width = hidden_size + key_size + self.embed_size
        if address_rank:
            self.key_rank = nn.Linear(key_width, address_rank)
            self.query_rank = nn.Linear(key_width, address_rank)
        if addressing == "content":
            self.sharpness = nn.Parameter(torch.empty(1))
        else:
            self.key = nn.Linear(address_rank or key_width, num_heads * num_slots)
        if addressing == "learned" and not (address_rank and tied_queries):
            self.query = nn.Linear(address_rank or key_width, num_heads * num_slots)
        if signature_size:
            self.signature = nn.Linear(address_rank, num_heads * signature_size, bias=False)
            self.trust = nn.Parameter(torch.empty(3))  # c_1, c_2, c_3
        strengths = num_heads * (2 if addressing == "content" else 1)  # after what was told there is another one
        self.strength_key = nn.Linear(key_width, strengths)
        self.strength_embed = nn.Linear(key_width if address_rank else self.embed_size, strengths, bias=False)
        self.value_embed = nn.Linear(self.embed_size, width, bias=False)
        self.value_hidden = nn.Linear(hidden_size, width, bias=False)
        self.read_gate = nn.Linear(key_width if address_rank else hidden_size, num_heads)
        self.output = nn.Linear(width, hidden_size, bias=False)
        self.gate = nn.Parameter(torch.empty(1))  # FSDP2 refuses parameters of no dimension
        if persistent_slots:
            self.persistent_query = nn.Linear(address_rank or key_width, num_heads * persistent_slots)
            self.persistent = nn.Parameter(torch.empty(num_heads, persistent_slots, self.value_size))
        if cell == "gru":
            self.weight_ih = nn.Parameter(torch.empty(num_heads, 3 * slot_size, slot_size))
            self.weight_hh = nn.Parameter(torch.empty(num_heads, 3 * slot_size, slot_size))
            self.bias_ih = nn.Parameter(torch.empty(num_heads, 3 * slot_size))
            self.bias_hh = nn.Parameter(torch.empty(num_heads, 3 * slot_size))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initial weights: queries equal keys, and reading is the transpose of writing.

        So from the first step a token stored under a key comes back, as itself, where the same key is asked for;
        training sharpens what is already there. (Values through an untrained random projection did not learn.)
        """
        if self.addressing == "learned":
            nn.init.normal_(self.key.weight, std=2 / math.sqrt(self.key.in_features))
            nn.init.zeros_(self.key.bias)
        else:
            self.sharpen(0.66)  # what tanh leaves of the mean square that the weights below give signatures
        if self.address_rank:
            _orthogonal(self.key_rank.weight)
            nn.init.zeros_(self.key_rank.bias)
            self.query_rank.load_state_dict(self.key_rank.state_dict())
        if hasattr(self, "query"):
            self.query.load_state_dict(self.key.state_dict())
        if self.signature_size:
            nn.init.normal_(self.signature.weight, std=2 / math.sqrt(self.address_rank))
            self.trust.copy_(torch.tensor(_TRUST))
        if self.persistent_slots:
            nn.init.normal_(self.persistent_query.weight, std=1 / math.sqrt(self.persistent_query.in_features))
            nn.init.zeros_(self.persistent_query.bias)
            nn.init.zeros_(self.persistent)
        for linear in (self.strength_key, self.read_gate):
            nn.init.normal_(linear.weight, std=0.02 / math.sqrt(linear.in_features))
            nn.init.zeros_(linear.bias)
        nn.init.normal_(self.strength_embed.weight, std=0.02 / math.sqrt(self.strength_embed.in_features))
        _orthogonal(self.value_embed.weight)
        nn.init.zeros_(self.value_hidden.weight)
        if self.embed_size == self.hidden_size:
            self.output.weight.copy_(self.value_embed.weight.t())
        else:
            _orthogonal(self.output.weight)
        self.gate.fill_(self.gate_init)
        if self.cell == "gru":
            d = self.slot_size
            for weight in (self.weight_ih, self.weight_hh):
                nn.init.uniform_(weight, -0.1 / math.sqrt(d), 0.1 / math.sqrt(d))
            self.weight_ih[:, 2 * d :] += torch.eye(d)  # the new content starts as the value, as in mingru
            nn.init.zeros_(self.bias_ih)
            nn.init.zeros_(self.bias_hh)
            self.bias_ih[:, d : 2 * d] = -2.0  # the update gate starts open for the new content

    @torch.no_grad()
    def sharpen(self, mean_square: float) -> None:
        """Let reading by content tell slots apart well, where so much is the mean square of the numbers in signatures."""
        self.sharpness.fill_(_SHARPNESS / (mean_square * self.signature_size))

    @torch.no_grad()
    def match_embeddings(self, embeddings: Tensor, ridge: float = 0.3) -> None:
        """Make what is written recognisable among all tokens: value and read projections in the whitened embedding space.

        Output embeddings of pretrained models share a few directions that hold most of their length, so a random
        projection of one token looks like many others when it is read. With C the second moment of the normed rows of
        `embeddings` (V, E), c its mean eigenvalue and Q random and orthogonal, W_o is the transpose of
        Q (C + ridge c)^{-1/2}, and W_e that matrix, scaled so that values have a root mean square of 1 before the tanh.
        """
        normed = _rms_norm(embeddings.detach().float())
        moment, directions = torch.linalg.eigh(normed.t() @ normed / len(normed))
        root = directions * (moment + ridge * moment.mean()).rsqrt() @ directions.t()  # (E, E)
        mixing = nn.init.orthogonal_(torch.empty(self.value_embed.out_features, self.embed_size, dtype=root.dtype))
        mixing = mixing.to(root.device)
        if self.embed_size == self.hidden_size:
            self.output.weight.copy_((mixing @ root).t())
        self.value_embed.weight.copy_(mixing @ root / (normed @ root @ mixing.t()).pow(2).mean().sqrt())

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args) -> None:
        gate = state_dict.get(f"{prefix}gate")
        if gate is not None and gate.dim() == 0:  # as before format 3
            state_dict[f"{prefix}gate"] = gate.reshape(1)
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def state_dtype(self) -> torch.dtype:
        """Slots accumulate in at least float32, whatever the weights are in."""
        return torch.promote_types(self.gate.dtype, torch.float32)

    @property
    def floor(self) -> float:
        """The share of a read up to which a learned slot is left out now."""
        return 0.0 if self.training else self.persistent_floor

    @property
    def decay(self) -> Tensor:
        """What a tick keeps, broadcasting over (N, S). No buffer: rounded to bfloat16 with a model, 0.97 were 0.9688."""
        if self._decay is None or (self._decay.device, self._decay.dtype) != (self.gate.device, self.state_dtype):
            with torch.inference_mode(False):  # it may be learned beside later
                self._decay = torch.tensor(self.decay_table, dtype=self.state_dtype, device=self.gate.device)
        return self._decay

    def initial_state(self, batch_size: int) -> SiteState:
        """The state of a memory that has seen nothing: empty slots and, as previous key, that of a zero hidden state."""
        dtype = self.state_dtype
        shape = (batch_size, self.num_heads, self.num_slots)
        slots = torch.zeros(*shape, self.slot_size, dtype=dtype, device=self.gate.device)
        if self.address_rank:
            address = slots.new_zeros(batch_size, self.address_rank)
        else:  # clones, for biases may be trained in place
            address = self.key.bias.to(dtype).view(1, *shape[1:]).expand(shape).clone()
        strength = self.strength_key.bias.to(dtype).expand(batch_size, -1).clone()
        state = {"slots": slots, "address": address, "strength": strength}
        if self.addressing == "learned":
            return state
        told = slots.new_zeros(batch_size, self.num_heads)
        return {**state, "told": told, "replacing": torch.ones_like(told)}

    def forward(
        self,
        hidden_states: Tensor,
        token_embeds: Tensor | None = None,
        state: SiteState | None = None,
        mask: Tensor | None = None,
        turn_starts: Tensor | None = None,
        key_states: Tensor | None = None,
    ) -> tuple[Tensor, SiteState]:
        """Read and write along a stretch of hidden states.

        Args:
            hidden_states: (B, T, D) stream at this site.
            token_embeds: (B, T, E) output embeddings of the same tokens; None stores by the hidden states alone.
            state: what this returned for the stretch before; None for an empty memory.
            mask: (B, T) bool, False where the memory must hold (padding); None for all True.
            turn_starts: (B, T) bool, True where a turn begins; only `decay_every="turn"` looks at it.
            key_states: (B, T, `key_size`) further hidden states to address by.

        Returns:
            (B, T, D) hidden states with what was recalled added, and the new state.

        Raises:
            ValueError: a shape that does not fit.
        """
        self._check(hidden_states, token_embeds, state, mask, turn_starts, key_states)
        if state is None:
            state = self.initial_state(hidden_states.shape[0])
        if type(self) is GRUMemoryWithDecay and one_token.can_run(self, hidden_states):
            return one_token.run_one(self, hidden_states, token_embeds, state, mask, turn_starts, key_states)
        hidden_states, state, _ = self.run(hidden_states, token_embeds, state, mask, turn_starts, key_states)
        return hidden_states, state

    def run(
        self,
        hidden_states: Tensor,
        token_embeds: Tensor | None,
        state: SiteState,
        mask: Tensor | None,
        turn_starts: Tensor | None,
        key_states: Tensor | None,
    ) -> tuple[Tensor, SiteState, recurrence.ScanInputs]:
        """`forward` without its checks; the third result says where it wrote and read."""
        prepared = self.prepare(hidden_states, token_embeds, state, mask, turn_starts, key_states)
        reads, slots = self.recur(prepared.inputs, state["slots"])
        recalled = self.recalled(reads, prepared.read_gate, prepared.persistent, prepared.signature)
        return hidden_states + recalled.to(hidden_states.dtype), {"slots": slots, **prepared.last_key}, prepared.inputs

    def recalled(self, reads: Tensor, read_gate: Tensor, persistent: Tensor | None, signature: Tensor | None) -> Tensor:
        """What is added to the hidden states (..., D), of reads (..., N, d) and the parts of `Prepared` for the same positions."""
        if signature is not None:
            reads = self._trusted(reads, signature)
        reads = read_gate * reads
        if persistent is not None:
            learned = (self.gate * self.persistent).to(reads.dtype)
            reads = reads + torch.einsum("...np,npd->...nd", persistent, learned)
        return self.output(reads.flatten(-2).to(self.output.weight.dtype))

    def recur(self, inputs: recurrence.ScanInputs, slots: Tensor) -> tuple[Tensor, Tensor]:
        """The recurrence alone: what is read at every position (B, T, N, d), and the slots (B, N, S, d) after the last."""
        cell = recurrence.CellWeights(self.weight_hh, self.bias_hh) if self.cell == "gru" else None
        if cell is not None and self.weight_hh.dtype != self.state_dtype:
            cell = recurrence.CellWeights(*(w.to(self.state_dtype) for w in cell))
        with _without_autocast(slots.device.type):  # the recurrence keeps its precision
            return recurrence.scan(inputs, slots.to(self.state_dtype), cell)

    def _trusted(self, reads: Tensor, signature: Tensor) -> Tensor:
        """The values read, each head's as far as it, and all heads together, found what is asked for.

        reads (..., N, d) and signature (..., N, f); returns (..., N, d - f).
        """
        return reads[..., : self.value_size] * self.trust_in(reads, signature).unsqueeze(-1)

    def trust_in(self, reads: Tensor, signature: Tensor) -> Tensor:
        """How far each head's read is trusted (..., N), in (0, 1): of reads (..., N, d) and what was asked for (..., N, f)."""
        agreement, together = self.agreements(reads[..., self.value_size :], signature)
        trust = self.trust.to(reads.dtype)
        return torch.sigmoid(trust[0] * agreement + trust[1] * together + trust[2])

    def agreements(self, found: Tensor, signature: Tensor) -> tuple[Tensor, Tensor]:
        """How well signatures (..., N, f) that were read agree with those asked for: m (..., N) of each head, M (..., 1) of all."""
        if self.addressing == "content":
            agreement = F.cosine_similarity(found, signature, dim=-1, eps=1e-6)
        else:
            agreement = (found * signature).mean(dim=-1)
        return agreement, agreement.clamp_min(0).mean(dim=-1, keepdim=True)

    def prepare(
        self,
        hidden_states: Tensor,
        token_embeds: Tensor | None,
        state: SiteState,
        mask: Tensor | None,
        turn_starts: Tensor | None,
        key_states: Tensor | None,
    ) -> Prepared:
        """Where a stretch of tokens writes and reads, and what it writes; only `addressing="content"` looks at the slots for it."""
        batch, length = hidden_states.shape[:2]
        N, S, dtype = self.num_heads, self.num_slots, self.state_dtype
        if mask is None:
            mask = torch.ones(batch, length, dtype=torch.bool, device=hidden_states.device)
        mask = mask.bool()
        visible = mask[..., None]

        normed, embeds, keys = self.keys_of(
            torch.where(visible, hidden_states, 0),
            None if token_embeds is None else torch.where(visible, token_embeds, 0),
            None if key_states is None else torch.where(visible, key_states, 0),
        )

        # What each position decides for the next one, shifted by one visible position (the state holds the first).
        key = _rms_norm(self.key_rank(keys)) if self.address_rank else self.key(keys)  # (B, T, r) or (B, T, N*S)
        decided = torch.cat([key, self.strength_key(keys)], dim=-1).to(dtype)
        before = torch.cat([state["address"].flatten(1), state["strength"]], dim=-1).to(dtype)
        shifted, last = _shift(decided, before, mask)
        strengths = self.strength_key.out_features
        key, strength = shifted.split([shifted.shape[-1] - strengths, strengths], dim=-1)
        signed = None
        if self.signature_size:
            signed = self.signature(key.to(self.gate.dtype)).unflatten(-1, (N, self.signature_size))
        strength = strength + self.strength_embed(keys if self.address_rank else embeds).to(dtype)  # (B, T, N)
        values = (self.value_embed(embeds) + self.value_hidden(normed)).unflatten(-1, (N, self.value_size))
        if signed is not None:
            values = torch.cat([values, signed.to(values)], dim=-1)  # (B, T, N, d)
        if self.cell == "gru":
            values = torch.einsum("btnd,nkd->btnk", values, self.weight_ih) + self.bias_ih  # (B, T, N, 3d)
        else:
            values = values.tanh()

        told, told_last = self.told(strength, state, mask)
        ticks = mask if self.decay_every == "token" else mask & _or_false(turn_starts, mask)
        keep = torch.where(ticks[..., None, None], self.decay.to(dtype), 1.0).expand(batch, length, N, S)
        asked = _rms_norm(self.query_rank(keys)) if self.address_rank else keys
        signature = None
        if self.signature_size:
            signature = self.signature(asked).to(dtype).unflatten(-1, (N, self.signature_size)).tanh()
        if self.addressing == "content":
            strength = self.write_strength(told)
            written = values[..., self.value_size :].to(dtype)
            lookup = Lookup(written, strength, told, mask, keep, signature, self.sharpness.to(dtype))
            signatures = state["slots"][..., self.value_size :].to(dtype)
            address, keep, query, replacing = find_places(lookup, signatures, state["replacing"].to(dtype))
        else:
            strength = self.write_strength(told)
            if self.address_rank:
                key = self.key(key.to(self.gate.dtype)).to(dtype)
            address = key.unflatten(-1, (N, S)).softmax(dim=-1)  # (B, T, N, S)
            query = getattr(self, "query", self.key)(asked).to(dtype).unflatten(-1, (N, S)).softmax(dim=-1)
        persistent = None
        if self.persistent_slots:
            persistent = self.persistent_query(asked).to(dtype).unflatten(-1, (N, -1)).softmax(dim=-1)
            if floor := self.floor:
                persistent = ((persistent - floor) / (1 - floor)).clamp_min(0)
        read_gate = self.gate * torch.sigmoid(self.read_gate(keys if self.address_rank else normed))
        inputs = recurrence.ScanInputs(values.to(dtype), address, strength.unsqueeze(-1) * address, keep, query)
        before, decided = last.split([last.shape[-1] - strengths, strengths], dim=-1)
        last_key = {"address": before if self.address_rank else before.unflatten(-1, (N, S)), "strength": decided}
        if self.addressing == "content":
            last_key |= {"told": told_last, "replacing": replacing}
        return Prepared(inputs, told, last_key, read_gate.to(dtype).unsqueeze(-1), persistent, signature)

    def told(self, strength: Tensor, state: SiteState, mask: Tensor) -> tuple[Tensor, Tensor | None]:
        """How surely tokens are to be written (B, T, N), 0 where the memory holds, and what the state keeps of it.

        strength (B, T, N), or (B, T, 2N) for beginning and going on, before its sigmoid; mask (B, T) bool.
        """
        told = torch.sigmoid(strength)
        if self.addressing == "learned":
            return told * mask[..., None], None
        begins, goes_on = told.chunk(2, dim=-1)
        told = _chain(begins, goes_on, state["told"].to(told), mask)
        return told * mask[..., None], told[:, -1]

    def write_strength(self, told: Tensor) -> Tensor:
        """How strongly tokens are written, of how surely they are told; both (B, T, N)."""
        if self.addressing == "content":
            told = ((told - NO_WRITE) / (1 - NO_WRITE)).clamp_min(0)
        return told if self.max_strength == 1 else self.max_strength * told

    def keys_of(
        self, hidden_states: Tensor, token_embeds: Tensor | None, key_states: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What a position is addressed by: norm(x) (..., D), norm(e) (..., E) and k (..., D + `key_size` + E)."""
        normed = _rms_norm(hidden_states.to(self.gate.dtype))
        if token_embeds is None:
            embeds = normed.new_zeros(*normed.shape[:-1], self.embed_size)
        else:
            embeds = _rms_norm(token_embeds.to(self.gate.dtype))
        further = [] if key_states is None else [_rms_norm(key_states.to(self.gate.dtype))]
        return normed, embeds, torch.cat([normed, *further, embeds], dim=-1)

    def content_of(self, token_embeds: Tensor) -> Tensor:
        """What tokens (V, E) are written as into an empty slot, by their output embeddings alone: (V, N, d - signature)."""
        values = self.value_embed(_rms_norm(token_embeds.to(self.gate.dtype))).unflatten(-1, (-1, self.value_size))
        if self.cell != "gru":
            return values.tanh()
        values = torch.nn.functional.pad(values, (0, self.signature_size))
        inputs = torch.einsum("vnd,nkd->vnk", values, self.weight_ih) + self.bias_ih
        cell = recurrence.CellWeights(self.weight_hh, self.bias_hh)
        return recurrence.gru_cell(inputs, torch.zeros_like(values), cell)[..., : self.value_size]

    def load_gru_cell(self, cell: nn.GRUCell, head: int = 0) -> None:
        """Copy the weights of a `torch.nn.GRUCell` of width `slot_size` into one head.

        With one slot, strength 1 and no decay this head then runs as that cell does.
        """
        if self.cell != "gru":
            raise ValueError("load_gru_cell needs a memory with cell='gru'")
        if (cell.input_size, cell.hidden_size) != (self.slot_size, self.slot_size):
            raise ValueError(
                f"the GRUCell is {cell.input_size} -> {cell.hidden_size}: it must be {self.slot_size} -> {self.slot_size}, "
                "the slot size of this memory"
            )
        with torch.no_grad():
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                source = getattr(cell, name)
                getattr(self, name)[head] = 0.0 if source is None else source

    def _check(self, hidden_states, token_embeds, state, mask, turn_starts, key_states) -> None:
        batch, length = hidden_states.shape[:2]
        if hidden_states.dim() != 3 or hidden_states.shape[2] != self.hidden_size or length == 0:
            raise ValueError(
                f"hidden_states are {tuple(hidden_states.shape)}: expected (batch, tokens >= 1, {self.hidden_size})"
            )
        expected = {"token_embeds": (token_embeds, self.embed_size), "key_states": (key_states, self.key_size)}
        for name, (tensor, width) in expected.items():
            if tensor is not None and tensor.shape != (batch, length, width):
                raise ValueError(f"{name} are {tuple(tensor.shape)}: expected {(batch, length, width)}")
        if self.key_size and key_states is None:
            raise ValueError(f"this memory addresses by {self.key_size} further features: pass key_states")
        for name, flags in (("mask", mask), ("turn_starts", turn_starts)):
            if flags is not None and flags.shape != (batch, length):
                raise ValueError(f"{name} is {tuple(flags.shape)}: expected {(batch, length)}")
        if state is not None:
            self.check_state(state, batch)

    def check_state(self, state: SiteState, batch_size: int) -> None:
        """Raise ValueError unless `state` is one of this memory for `batch_size` rows."""
        shapes = {
            "slots": (batch_size, self.num_heads, self.num_slots, self.slot_size),
            "address": (batch_size, self.address_rank)
            if self.address_rank
            else (batch_size, self.num_heads, self.num_slots),
            "strength": (batch_size, self.strength_key.out_features),
        }
        if self.addressing == "content":
            shapes |= {name: (batch_size, self.num_heads) for name in ("told", "replacing")}
        if set(state) != set(shapes):
            raise ValueError(
                f"the state holds {sorted(state)}: expected {sorted(shapes)}; start from None or initial_state()"
            )
        for name, shape in shapes.items():
            if state[name].shape != shape:
                raise ValueError(
                    f"state {name!r} is {tuple(state[name].shape)}, expected {shape}: it belongs to another memory or batch "
                    "size; use state.select / MemoryState.cat to change the rows, or start from None"
                )


def _without_autocast(device_type: str) -> contextlib.AbstractContextManager:
    """The meta device has no autocast to switch off. (`is_autocast_available` would break a compiled graph before torch 2.13.)"""
    if device_type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)


def _orthogonal(weight: Tensor) -> None:
    """`nn.init.orthogonal_` in at least float32: there is no QR for half precision."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    weight.copy_(nn.init.orthogonal_(torch.empty(weight.shape, dtype=dtype, device=weight.device)))


def _rms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], eps=1e-6)


def _or_false(flags: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if flags is None else flags.bool()


def _chain(begins: Tensor, goes_on: Tensor, before: Tensor, mask: Tensor) -> Tensor:
    """p_t = (1 - p_{t-1}) begins_t + p_{t-1} goes_on_t, held where the mask is False; all (B, T, N), before (B, N) is p_0.

    The composition of affine maps is associative, so it takes log2(T) steps (Hillis and Steele, "Data parallel algorithms", 1986).
    """
    seen = mask.unsqueeze(-1)
    slope, offset = torch.where(seen, goes_on - begins, 1.0), torch.where(seen, begins, 0.0)
    reach = 1
    while reach < mask.shape[1]:
        earlier_slope = F.pad(slope[:, :-reach], (0, 0, reach, 0), value=1.0)
        earlier_offset = F.pad(offset[:, :-reach], (0, 0, reach, 0))
        slope, offset = slope * earlier_slope, slope * earlier_offset + offset
        reach *= 2
    return slope * before.unsqueeze(1) + offset


def _shift(decided: Tensor, before: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """For every position the row of `decided` at the last visible position before it, and the last row of all.

    decided (B, T, K), before (B, K) for the first position, mask (B, T). Returns ((B, T, K), (B, K)).
    """
    rows = torch.cat([before.unsqueeze(1), decided], dim=1)  # (B, T+1, K), row t+1 is position t
    positions = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    latest = torch.where(mask, positions, 0).cummax(dim=1).values  # (B, T) last visible row up to and with t
    previous = F.pad(latest[:, :-1], (1, 0))  # up to and without t
    gather = torch.cat([previous, latest[:, -1:]], dim=1)[..., None].expand(-1, -1, rows.shape[2])
    picked = rows.gather(1, gather)
    return picked[:, :-1], picked[:, -1]
