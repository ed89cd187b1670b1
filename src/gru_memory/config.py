"""`MemoryConfig`: everything that defines a memory, in one place; the defaults live here and nowhere else."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from numbers import Integral, Real
from typing import Any

CONFIG_NAME = "memory_config.json"
# 2: base models by name and weights, own sites by class, several memories in a config.json. 3: gates of shape (1,), not ().
# 4: a memory with an address rank asks by the projection it writes by, unless its queries are not tied.
FORMAT_VERSION = 4
_TIED_SINCE = 4

CELLS = ("gru", "mingru")
CLOCKS = ("token", "turn")
ADDRESSINGS = ("learned", "content")
MODES = ("persistent", "ephemeral")
KEPT_IN = ("float32", "float16", "int4")
# How a memory is used, began and is stored, not what a state of it means.
# The last one shows in which weights there are.
_USE = ("mode", "gate_init", "kept_in", "persistent_floor", "tied_queries")
_IN_PLACE = ("mode", "kept_in")  # read each time, where all else is what modules were built by
_FORMAT_1_MEANING = (
    "format_version",
    "sites",
    "num_heads",
    "num_slots",
    "slot_size",
    "decay",
    "decay_every",
    "cell",
    "key_layers",
)
_LAYER_SITE = re.compile(r"layer:(\d+)")


@dataclass
class MemoryConfig:
    """Shape and meaning of a memory.

    A conversation's state takes `len(sites) * num_heads * num_slots * (slot_size + 1)` floats and a little more.
    """

    sites: tuple[str, ...] = field(
        default=("top",), metadata={"help": "where memory hooks in: 'input', 'middle', 'top' or 'layer:K'"}
    )
    num_heads: int = field(default=4, metadata={"help": "heads that address their own slots"})
    num_slots: int = field(default=16, metadata={"help": "slots a head"})
    slot_size: int = field(default=128, metadata={"help": "floats in a slot"})
    decay: float | list = field(
        default=0.97, metadata={"help": "kept per tick, in (0, 1]: one number, or one a head, or one a slot"}
    )
    decay_every: str = field(default="token", metadata={"help": "what a tick is: 'token' or 'turn'"})
    cell: str = field(default="gru", metadata={"help": "'gru', or 'mingru' whose gates do not look at the state"})
    gate_init: float = field(
        default=0.0, metadata={"help": "how loudly an untrained memory speaks; 0 is the base model"}
    )
    key_layers: tuple[int, ...] = field(
        default=(), metadata={"help": "blocks whose output joins the site's own hidden state in keys and queries"}
    )
    address_rank: int = field(
        default=0, metadata={"help": "numbers that keys and queries pass through; 0 addresses by the whole key"}
    )
    tied_queries: bool = field(
        default=True, metadata={"help": "behind an address rank, ask by the projection that is written by"}
    )
    signature_size: int = field(
        default=0, metadata={"help": "of the floats in a slot, those that say what it was written under; 0 for none"}
    )
    addressing: str = field(
        default="learned",
        metadata={
            "help": "'learned' addresses, or 'content': every write finds a free slot, every read the likest one"
        },
    )
    max_strength: float = field(
        default=1.0, metadata={"help": "the most that a write replaces of what its slots hold, in (0, 1]"}
    )
    persistent_slots: int = field(
        default=0, metadata={"help": "learned slots a head that are read but never written and never fade"}
    )
    persistent_floor: float = field(
        default=0.0,
        metadata={"help": "share of a read, in [0, 1), up to which a learned slot is left out once training is over"},
    )
    kept_in: str = field(
        default="float16", metadata={"help": "what stored conversations keep slots in: 'float32', 'float16' or 'int4'"}
    )
    mode: str = field(
        default="persistent", metadata={"help": "'persistent' carries memory from call to call, 'ephemeral' does not"}
    )

    def __post_init__(self) -> None:
        for f in fields(self):
            setattr(self, f.name, _plain(getattr(self, f.name)))
        if isinstance(self.sites, str):
            raise ValueError(f"sites is the text {self.sites!r}: give a tuple, such as ({self.sites!r},)")
        for name in ("sites", "key_layers"):
            if not isinstance(value := getattr(self, name), Iterable):
                raise ValueError(f"{name} of a memory is {value!r}: give a tuple")
        self.sites = tuple(self.sites)
        self.key_layers = tuple(self.key_layers)
        if not self.sites:
            raise ValueError("sites is empty: name at least one of 'input', 'middle', 'top', 'layer:K'")
        for site in self.sites:
            if site not in ("input", "middle", "top") and not (isinstance(site, str) and _LAYER_SITE.fullmatch(site)):
                raise ValueError(f"unknown site {site!r}: use 'input', 'middle', 'top' or 'layer:K' (K counts from 0)")
        if len(set(self.sites)) != len(self.sites):
            raise ValueError(f"sites {self.sites} names a site twice: give each one once")
        for name in ("num_heads", "num_slots", "slot_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is {value!r}: it must be a whole number of at least 1")
        for name in ("address_rank", "signature_size", "persistent_slots"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"{name} is {value!r}: it must be a whole number, 0 for none")
        if not isinstance(self.tied_queries, bool):
            raise ValueError(f"tied_queries is {self.tied_queries!r}: it must be True or False")
        check_signature(self.signature_size, self.slot_size, self.address_rank)
        check_max_strength(self.max_strength)
        check_persistent_floor(self.persistent_floor)
        check_addressing(self.addressing, self.cell, self.signature_size, self.address_rank)
        if self.kept_in not in KEPT_IN:
            raise ValueError(f"kept_in is {self.kept_in!r}: choose one of {KEPT_IN}")
        if self.decay_every not in CLOCKS:
            raise ValueError(f"decay_every is {self.decay_every!r}: choose one of {CLOCKS}")
        if self.mode not in MODES:
            raise ValueError(f"mode is {self.mode!r}: choose one of {MODES}")
        if any(not isinstance(layer, int) or isinstance(layer, bool) or layer < 0 for layer in self.key_layers):
            raise ValueError(f"key_layers is {self.key_layers}: a key layer is the number of a block, counted from 0")
        if len(set(self.key_layers)) != len(self.key_layers):
            raise ValueError(f"key_layers {self.key_layers} names a block twice: give each one once")
        if not isinstance(self.gate_init, (int, float)) or not math.isfinite(self.gate_init):
            raise ValueError(f"gate_init is {self.gate_init!r}: it must be a finite number, 0 for a silent memory")
        check_decay(self.decay, self.num_heads, self.num_slots)

    def __setattr__(self, name: str, value: Any) -> None:
        """Raises AttributeError for what the memory of a model was built by, and ValueError for what is out of range."""
        if not self.__dict__.get("_in_use"):
            object.__setattr__(self, name, value)
            return
        if name not in _IN_PLACE:
            raise AttributeError(
                f"{name} of a memory that is in use cannot be changed in place, only {' and '.join(_IN_PLACE)}: give the model "
                f"another memory, with dataclasses.replace(config, {name}={value!r})"
            )
        replace(self, **{name: value})
        object.__setattr__(self, name, value)

    def in_use(self) -> MemoryConfig:
        """A copy for the model that it is the memory of."""
        config = replace(self)
        object.__setattr__(config, "_in_use", True)
        return config

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with the version of the format."""
        values = asdict(self)
        values["sites"], values["key_layers"] = list(self.sites), list(self.key_layers)
        return {"format_version": FORMAT_VERSION, **values}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MemoryConfig:
        """Inverse of `to_dict`. Unknown fields and newer formats are refused."""
        values = dict(values)
        version = values.pop("format_version", FORMAT_VERSION)
        if not isinstance(version, int) or version < 1:
            raise ValueError(f"format_version is {version!r}: it must be a whole number; save the memory again")
        if version > FORMAT_VERSION:
            raise ValueError(
                f"memory format {version} is newer than this library reads ({FORMAT_VERSION}): upgrade gru-memory"
            )
        if version < _TIED_SINCE:
            values.setdefault("tied_queries", not values.get("address_rank"))
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(
                f"unknown fields {sorted(unknown)} in the memory config; known: {[f.name for f in fields(cls)]}. If a newer "
                "gru-memory wrote it: upgrade gru-memory"
            )
        return cls(**values)

    def meaning(self) -> dict[str, Any]:
        """The fields that say what a state of this memory means, for fingerprints.

        Those of format 1 always, and as that format wrote them; a later field only where it is not at its default. So the
        states that earlier versions kept go on being accepted.
        """
        values, defaults = {**self.to_dict(), "format_version": 1}, MemoryConfig().to_dict()
        later = set(values) - set(_FORMAT_1_MEANING) - set(_USE)
        return {k: v for k, v in values.items() if k in _FORMAT_1_MEANING or (k in later and v != defaults[k])}


def _plain(value: Any) -> Any:
    """numpy's numbers as Python's, which JSON can hold; in lists, too."""
    if isinstance(value, (list, tuple)):
        return type(value)(map(_plain, value))
    if isinstance(value, Real) and not isinstance(value, (int, float)):
        return int(value) if isinstance(value, Integral) else float(value)
    return value


def check_signature(signature_size: int, slot_size: int, address_rank: int) -> None:
    """Raise ValueError unless a signature fits into a slot, beside what is stored, and there is a rank to take it from."""
    if not 0 <= signature_size < slot_size:
        raise ValueError(
            f"signature_size is {signature_size}: it must leave something of the {slot_size} floats of a slot to values"
        )
    if signature_size and not address_rank:
        raise ValueError("signatures are taken from the rank that addresses pass through: give an address_rank as well")


def check_max_strength(max_strength: float) -> None:
    """Raise ValueError unless writes may replace a share of what is there."""
    if isinstance(max_strength, bool) or not isinstance(max_strength, (int, float)) or not 0 < max_strength <= 1:
        raise ValueError(
            f"max_strength is {max_strength!r}: it must be in (0, 1]; 1 lets a write replace all that is there"
        )


def check_persistent_floor(floor: float) -> None:
    """Raise ValueError unless something is left above it."""
    if isinstance(floor, bool) or not isinstance(floor, (int, float)) or not 0 <= floor < 1:
        raise ValueError(f"persistent_floor is {floor!r}: it must be in [0, 1); 0 leaves nothing out")


def check_addressing(addressing: str, cell: str, signature_size: int, address_rank: int) -> None:
    """Raise ValueError unless there is such a cell, and a memory can be addressed so with it."""
    if cell not in CELLS:
        raise ValueError(f"cell is {cell!r}: choose one of {CELLS}")
    if addressing not in ADDRESSINGS:
        raise ValueError(f"addressing is {addressing!r}: choose one of {ADDRESSINGS}")
    if addressing == "content" and (cell != "mingru" or not signature_size):
        raise ValueError(
            "addressing by content compares signatures, which the 'gru' cell would change: give cell='mingru' and a "
            f"signature_size above 0, not {cell!r} and {signature_size}"
        )
    if addressing == "content" and min(signature_size, address_rank) < 2:
        raise ValueError(
            "addressing by content tells keys apart by the angle between them, and single numbers have none: give a signature_size "
            f"and an address_rank of at least 2, not {signature_size} and {address_rank}"
        )


def check_decay(decay: float | list, num_heads: int, num_slots: int) -> list[list[float]]:
    """`decay` as nested lists that broadcast over (heads, slots): (1, 1), (heads, 1), (1, slots) or (heads, slots).

    A flat list of `num_heads` numbers is one a head, of `num_slots` numbers one a slot; where both are equal it is one
    a slot. Raises ValueError for numbers outside (0, 1] and for lists of another length.
    """
    rows = decay if isinstance(decay, (list, tuple)) else [decay]
    if any(isinstance(row, (list, tuple)) for row in rows):
        if len(rows) != num_heads or any(not isinstance(row, (list, tuple)) or len(row) != num_slots for row in rows):
            raise ValueError(f"decay as a table must be {num_heads} rows (heads) of {num_slots} numbers (slots)")
        table = [list(row) for row in rows]
    elif len(rows) in (1, num_slots):
        table = [list(rows)]
    elif len(rows) == num_heads:
        table = [[value] for value in rows]
    else:
        raise ValueError(
            f"decay has {len(rows)} numbers: give one, or one a head ({num_heads}), or one a slot ({num_slots})"
        )
    for value in (value for row in table for value in row):
        if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value <= 1:
            raise ValueError(
                f"decay {value!r} is not in (0, 1]: use 1 to keep traces for ever, 0.99 slow, 0.9 fast fading"
            )
    return table
