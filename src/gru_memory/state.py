"""`MemoryState`: everything a memory knows of a batch of conversations, as a value that goes in and comes out."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as deserialize
from safetensors.torch import save as serialize
from torch import Tensor
from torch.nn import functional as F

from .config import ADDRESSINGS, KEPT_IN
from .packing import pack_int4, unpack_int4
from .whole_files import write_whole

FORMAT_VERSION = 2  # 2: slots may be packed, see `packing`; what is not packed is written as 1
_KIND = "gru-memory state"
AS_KEPT = "kept"  # for `dtype`: what the memory's config says that conversations are kept in
HOLDS_THE_SAME = 0.9  # cosine from which two slots that are found by their content hold the same
MAX_FILE_BYTES = 1 << 30  # read no further: a state is kilobytes a conversation


@dataclass(frozen=True, eq=False)
class MemoryState:
    """The state of a memory, B conversations (rows) at once. Never changed in place: every method returns a new one.

    Attributes:
        sites: site name -> what that site keeps; every tensor has the batch first. `GRUMemoryWithDecay` keeps "slots"
            (B, N, S, d), and where the last position decided that the next token goes: "address" (B, N, S) or (B, r) and
            "strength" (B, N); with `addressing="content"`, "strength" (B, 2N), how surely the last token was "told" (B, N), and how
            far the next one may take another's place, "replacing" (B, N).
        tokens: (B,) int64, tokens taken in so far.
        turns: (B,) int64, turns begun so far.
        pending: (B,) bool, a turn has begun of which memory has not seen a token yet.
        decay_rates: site name -> what one tick keeps of the slots, broadcasting over (N, S).
        fingerprint: of the model and the memory this belongs to; None if unknown.
        kept_in: what conversations of this memory are stored in, `MemoryConfig.kept_in`.
        addressing: how slots are found, `MemoryConfig.addressing`: whether a slot means the same in every conversation.
    """

    sites: dict[str, dict[str, Tensor]]
    tokens: Tensor
    turns: Tensor
    pending: Tensor
    decay_rates: dict[str, Tensor] = field(default_factory=dict)
    fingerprint: str | None = None
    kept_in: str = "float16"
    addressing: str = "learned"

    def __repr__(self) -> str:
        sites = ", ".join(
            f"{name} {' x '.join(map(str, kept['slots'].shape[1:]))}" if "slots" in kept else name
            for name, kept in self.sites.items()
        )
        counts = f"turns={self.turns.tolist()}, tokens={self.tokens.tolist()}"
        return f"MemoryState({sites}; {counts}, {self.num_bytes:,} bytes)"

    @property
    def batch_size(self) -> int:
        return self.tokens.shape[0]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors: what one conversation keeps, if B is 1."""
        return sum(t.numel() * t.element_size() for t in (*self._site_tensors(), self.tokens, self.turns, self.pending))

    def is_finite(self) -> bool:
        """False if any number in it is NaN or infinite."""
        return all(bool(torch.isfinite(t).all()) for t in self._site_tensors())

    def select(self, rows: int | Sequence[int] | Tensor) -> MemoryState:
        """The given rows, in the given order, repeated as often as given."""
        index = torch.as_tensor([rows] if isinstance(rows, int) else rows, device=self.tokens.device)
        if index.dtype == torch.bool:
            if index.shape != self.tokens.shape:
                raise IndexError(
                    f"a mask of {tuple(index.shape)} rows does not fit the {self.batch_size} rows of this state"
                )
            index = index.nonzero().squeeze(1)
        if index.numel() and not (-self.batch_size <= int(index.min()) and int(index.max()) < self.batch_size):
            raise IndexError(f"rows {index.tolist()} are not all among the {self.batch_size} rows of this state")
        index = index.long() % max(1, self.batch_size)
        return self._map(lambda t: t.index_select(0, index.to(t.device)))

    def repeat_interleave(self, repeats: int) -> MemoryState:
        """Every row `repeats` times in a row: what `generate` does to a batch for beams or several returned sequences."""
        return self if repeats == 1 else self._map(lambda t: t.repeat_interleave(repeats, dim=0))

    @staticmethod
    def cat(states: Sequence[MemoryState]) -> MemoryState:
        """One state with the rows of all. They must belong to one memory."""
        if not states:
            raise ValueError("nothing to concatenate: give at least one state")
        first = states[0]
        for other in states[1:]:
            if other.fingerprint != first.fingerprint:
                raise ValueError(
                    "these states belong to different models or memories, so their rows cannot share a batch"
                )
            if other._layout() != first._layout():
                raise ValueError(f"these states differ in layout: {first._layout()} and {other._layout()}")
            if (other.kept_in, other.addressing) != (first.kept_in, first.addressing) or not _same_rates(first, other):
                raise ValueError(
                    "these states fade, are found or are kept differently, so their rows cannot share a batch"
                )
        parts = iter(torch.cat(group) for group in zip(*(s._tensors() for s in states), strict=True))
        return first._map(lambda _: next(parts))

    def detach(self) -> MemoryState:
        """The same numbers, no gradient through them: where back-propagation through time is cut."""
        return self._map(Tensor.detach)

    def clone(self) -> MemoryState:
        return self._map(Tensor.clone)

    def to(self, *args, **kwargs) -> MemoryState:
        """Move or cast the sites' tensors as `torch.Tensor.to` does; counters only move."""
        probe = torch.empty(0).to(*args, **kwargs)
        device = probe.device if args and not isinstance(args[0], torch.dtype) or "device" in kwargs else None
        sites = {site: {k: t.to(*args, **kwargs) for k, t in kept.items()} for site, kept in self.sites.items()}
        if device is None:
            return replace(self, sites=sites)
        rates = {site: rate.to(device) for site, rate in self.decay_rates.items()}
        counters = {name: getattr(self, name).to(device) for name in ("tokens", "turns", "pending")}
        return replace(self, sites=sites, decay_rates=rates, **counters)

    def decay(self, ticks: float) -> MemoryState:
        """Let `ticks` ticks of the clock pass without a word: slots times lambda^ticks."""
        if not ticks >= 0:
            raise ValueError(f"ticks is {ticks}: time passes forwards, use a number of at least 0")
        sites = {site: dict(kept) for site, kept in self.sites.items()}
        for site, rate in self.decay_rates.items():
            slots = sites[site]["slots"]
            sites[site]["slots"] = slots * (rate.to(slots) ** ticks).unsqueeze(-1)
        return replace(self, sites=sites)

    def merge(self, other: MemoryState) -> MemoryState:
        """What two conversations hold, row by row, as one that goes on where this one stands.

        What only one of them holds stays as it is, what both hold counts once, and merging a state with itself or with an
        empty one changes nothing. Slots at learned addresses become the sum of both, shortened to the longer of the two: where both
        wrote different things to one slot they share it, as if told one after the other. Of slots that are found by their
        content, the fullest of both stay. Tokens and turns add up.

        Raises:
            ValueError: the states belong to different memories, or have different numbers of rows.
        """
        if other.fingerprint != self.fingerprint or other._layout() != self._layout():
            raise ValueError("these states belong to different models or memories: merge states of one memory")
        if other.batch_size != self.batch_size:
            raise ValueError(
                f"these states hold {self.batch_size} and {other.batch_size} conversations: select as many rows of each"
            )
        sites, join = {}, _fullest if self.addressing == "content" else _joined
        for name, kept in self.sites.items():
            if "slots" not in kept:
                raise ValueError(f"site {name!r} has no slots: only states of GRUMemoryWithDecay can be merged")
            sites[name] = {**kept, "slots": join(kept["slots"], other.sites[name]["slots"].to(kept["slots"]))}
        tokens, turns = self.tokens + other.tokens.to(self.tokens), self.turns + other.turns.to(self.turns)
        return replace(self, sites=sites, tokens=tokens, turns=turns)

    def forget(
        self,
        what: str | tuple[int, int],
        model: Any = None,
        tokenizer: Any = None,
        reply: str | None = None,
        system: str | None = None,
        site: str = "top",
    ) -> MemoryState:
        """The state without one slot, given as (head, slot), or without what a turn wrote, given as its text.

        A text needs the model and the tokenizer that read it; see `gru_memory.editing.forget`.

        Raises:
            ValueError: there is no such slot, a text comes without model and tokenizer, or `what` is neither.
        """
        from . import editing  # which is made of states

        if not isinstance(what, str):
            try:
                head, slot = what
            except (TypeError, ValueError) as error:
                raise ValueError(f"{what!r} is nothing to forget: give the text of a turn, or (head, slot)") from error
            return editing.forget_slot(self, head, slot, site=site)
        if model is None or tokenizer is None:
            raise ValueError("to forget a text, give the model and the tokenizer that read it")
        return editing.forget(model, tokenizer, self, what, reply, system)

    def to_bytes(self, dtype: torch.dtype | str | None = None, metadata: dict[str, str] | None = None) -> bytes:
        """The state as the bytes of a safetensors file.

        Args:
            dtype: what to keep floats in. None keeps every bit. `torch.float16` (or "float16") halves the size and costs
                about 5e-4 of a slot's range; "int4" takes an eighth, costs up to 1/14, and keeps all but the slots in half
                precision. "kept" is what the memory's config says (`MemoryConfig.kept_in`).
            metadata: further strings for the file's header; `read_metadata` gives them back.
        """
        dtype = self.kept_in if dtype == AS_KEPT else dtype
        if isinstance(dtype, str) and dtype not in KEPT_IN:
            raise ValueError(f"dtype is {dtype!r}: use a torch.dtype, None, {AS_KEPT!r} or one of {KEPT_IN}")
        rounded = torch.float16 if dtype == "int4" else getattr(torch, dtype) if isinstance(dtype, str) else dtype
        tensors, shapes = {}, {}
        for name, tensor in self._named():
            tensor = tensor.detach().cpu().contiguous()
            if dtype == "int4" and name.endswith("/slots") and _fits_int4(tensor):
                tensors[name], shapes[name] = pack_int4(tensor), list(tensor.shape)
            else:
                tensors[name] = tensor.to(rounded) if rounded and tensor.is_floating_point() else tensor
        rates = {f"decay/{site}": rate.detach().cpu().contiguous() for site, rate in self.decay_rates.items()}
        dtypes = {name: str(t.dtype).removeprefix("torch.") for name, t in [*self._named(), *rates.items()]}
        header = {
            "kind": _KIND,
            "version": str(FORMAT_VERSION if shapes else 1),
            "fingerprint": self.fingerprint or "",
            "kept_in": self.kept_in,
            "addressing": self.addressing,
            "dtypes": json.dumps(dtypes),
        }
        if shapes:
            header["packed"] = json.dumps(shapes)
        return serialize(tensors | rates, {**(metadata or {}), **header})

    def save(
        self, path: str | Path, dtype: torch.dtype | str | None = None, metadata: dict[str, str] | None = None
    ) -> None:
        """Write `to_bytes` to a file for its owner alone, whole or not at all."""
        write_whole(path, self.to_bytes(dtype, metadata), private=True)

    @staticmethod
    def read_metadata(source: str | Path | bytes) -> dict[str, str]:
        """The strings in the header of a saved state: a file, or its bytes."""
        data, name = _read(source)
        return _open(data, name)[0]

    @classmethod
    def load(cls, path: str | Path, fingerprint: str | None = None) -> MemoryState:
        """Read what `save` wrote, on the CPU.

        Args:
            path: the file.
            fingerprint: that of the memory it is for (`model.memory_fingerprint()`); None accepts any.

        Raises:
            ValueError: not a state file, damaged, from a newer version, of another model or memory, or not finite.
        """
        data, name = _read(path)
        return cls.from_bytes(data, fingerprint, name)

    @classmethod
    def from_bytes(cls, data: bytes, fingerprint: str | None = None, name: str = "this state") -> MemoryState:
        """`load` from what `to_bytes` returned; `name` is what errors call it."""
        header, tensors = _open(data, name)
        try:
            if header.get("kind") != _KIND:
                raise ValueError(f"{name} is not a memory state: write one with MemoryState.save or Conversation.save")
            if not (version := header.get("version", "")).isdecimal():
                raise KeyError("version")
            if int(version) > FORMAT_VERSION:
                raise ValueError(f"{name} was written by a newer version of gru-memory: upgrade to read it")
            if fingerprint is not None and header.get("fingerprint") != fingerprint:
                raise ValueError(
                    f"{name} belongs to another model or memory: load it with the pair that wrote it, or start anew"
                )
            dtypes = json.loads(header["dtypes"])
            for packed, shape in json.loads(header.get("packed", "{}")).items():
                tensors[packed] = unpack_int4(tensors[packed], shape)
            state = cls._from_named(
                {k: t.to(getattr(torch, dtypes.get(k, "float32"))) for k, t in tensors.items()}, header
            )
        except (KeyError, AttributeError, TypeError, RecursionError, RuntimeError, json.JSONDecodeError) as error:
            raise ValueError(_damaged(name, error)) from error
        if not state.is_finite():
            raise ValueError(f"{name} holds NaN or infinite numbers: restore it from a copy or start anew")
        return state

    @classmethod
    def _from_named(cls, tensors: dict[str, Tensor], header: dict[str, str]) -> MemoryState:
        sites: dict[str, dict[str, Tensor]] = {}
        rates = {}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition("/")
            if kind == "site":
                site, _, key = rest.partition("/")
                sites.setdefault(site, {})[key] = tensor
            elif kind == "decay":
                rates[rest] = tensor
        counters = {name: tensors[name] for name in ("tokens", "turns", "pending")}
        if [t.dtype for t in counters.values()] != [torch.int64, torch.int64, torch.bool]:
            raise KeyError("its counters are no whole numbers")
        kept_in = header.get("kept_in", "float16")
        if kept_in not in KEPT_IN:
            raise KeyError("kept_in")
        addressing = header.get("addressing", "learned")
        if addressing not in ADDRESSINGS:
            raise KeyError("addressing")
        fingerprint = header.get("fingerprint") or None
        state = cls(
            sites, decay_rates=rates, fingerprint=fingerprint, kept_in=kept_in, addressing=addressing, **counters
        )
        if not sites or any(t.shape[:1] != state.tokens.shape for t in state._tensors()):
            raise KeyError("its tensors do not have one batch size")
        return state

    def _named(self) -> list[tuple[str, Tensor]]:
        named = [
            (f"site/{site}/{key}", self.sites[site][key])
            for site in sorted(self.sites)
            for key in sorted(self.sites[site])
        ]
        return [*named, *((name, getattr(self, name)) for name in ("tokens", "turns", "pending"))]

    def _tensors(self) -> list[Tensor]:
        return [t for _, t in self._named()]

    def _site_tensors(self) -> list[Tensor]:
        return [t for kept in self.sites.values() for t in kept.values()]

    def _layout(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(t.shape[1:]) for name, t in self._named()}

    def _map(self, change: Callable[[Tensor], Tensor]) -> MemoryState:
        """Apply `change` to every tensor with a batch axis, in the order of `_named`."""
        changed = {name: change(t) for name, t in self._named()}
        sites = {site: {key: changed[f"site/{site}/{key}"] for key in kept} for site, kept in self.sites.items()}
        return replace(self, sites=sites, **{name: changed[name] for name in ("tokens", "turns", "pending")})


def _fits_int4(tensor: Tensor) -> bool:
    """Whether it holds floats in [-1, 1] alone: the "slots" of a site of somebody's own may be anything."""
    return tensor.is_floating_point() and bool((tensor.abs() <= 1).all())


def _same_rates(one: MemoryState, other: MemoryState) -> bool:
    if one.decay_rates.keys() != other.decay_rates.keys():
        return False
    pairs = ((rate, other.decay_rates[site]) for site, rate in one.decay_rates.items())
    return all(a is b or torch.equal(a.cpu(), b.cpu()) for a, b in pairs)


def _joined(one: Tensor, other: Tensor) -> Tensor:
    """(B, N, S, d) and the same: their sum, slot by slot no longer than the longer of the two."""
    total = one + other
    longest = torch.maximum(one.norm(dim=-1, keepdim=True), other.norm(dim=-1, keepdim=True))
    shortened = (longest / total.norm(dim=-1, keepdim=True).clamp_min(1e-12)).clamp_max(1)
    return (total * shortened).clamp(-1, 1)


def _fullest(one: Tensor, other: Tensor) -> Tensor:
    """(B, N, S, d) and the same: the S longest slots of both, those of `one` in their places; of two that hold the same, one."""
    count = one.shape[2]
    alike = (
        F.normalize(one, dim=-1) @ F.normalize(other, dim=-1).transpose(2, 3) > HOLDS_THE_SAME
    )  # (B, N, S, S of other)
    length, others = one.norm(dim=-1), other.norm(dim=-1)
    weaker = alike & (length.unsqueeze(3) < others.unsqueeze(2))
    length = length.masked_fill(
        weaker.any(dim=3), -1
    )  # what the other one holds more of goes before an empty slot does
    others = others.masked_fill((alike & ~weaker).any(dim=2), 0)
    order = torch.cat([length, others], dim=2).argsort(dim=2, descending=True, stable=True)  # (B, N, 2S)
    kept = torch.zeros_like(order, dtype=torch.bool).scatter_(2, order[..., :count], True)
    mine, theirs = kept.split(count, dim=2)
    # As many of theirs come in as places become free: the k-th of them takes the k-th free place.
    free = (~mine).int().argsort(dim=2, descending=True, stable=True)
    coming = theirs.int().argsort(dim=2, descending=True, stable=True)
    taken = torch.arange(count, device=one.device) < theirs.sum(dim=2, keepdim=True)
    taken = (taken & (others.gather(2, coming) > 0)).unsqueeze(-1)
    free, coming = (index.unsqueeze(-1).expand_as(one) for index in (free, coming))
    return one.scatter(2, free, torch.where(taken, other.gather(2, coming), one.gather(2, free)))


def regular_size(path: Path) -> int:
    """Bytes of a file. Raises ValueError for a pipe or device, which does not say how much it holds, and for a folder."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path} is no regular file, nothing was read: copy what it holds to one")
    return status.st_size


def _read(source: str | Path | bytes) -> tuple[bytes, str]:
    """The bytes of a state and what to call it; a file that is too large is not read."""
    if isinstance(source, bytes):
        return source, "this state"
    path = Path(source)
    if (size := regular_size(path)) > MAX_FILE_BYTES:
        raise ValueError(f"{path} is {size} bytes: no memory state is that large, nothing was read")
    return path.read_bytes(), str(path)


def _open(data: bytes, name: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Header strings and tensors of safetensors bytes."""
    try:
        tensors = deserialize(data)  # checks every length and offset first
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(_damaged(name, error)) from error
    return header, tensors


def _damaged(name: str, error: Exception) -> str:
    return f"{name} is damaged or not a memory state ({error}): restore it from a copy or start anew"
