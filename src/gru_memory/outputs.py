"""Model outputs with a field for the state.

`DistributedDataParallel` and FSDP take the output of a model apart and build it again from its fields, so an entry that
is no field of its class would be one too many.
"""

from __future__ import annotations

from dataclasses import fields, make_dataclass
from typing import Any

from transformers.utils import ModelOutput

from .state import MemoryState

_classes: dict[type[ModelOutput], type[ModelOutput]] = {}


def with_memory_state(outputs: ModelOutput, state: MemoryState) -> ModelOutput:
    """The same outputs, of a class of their own kind that has `memory_state` as its last field."""
    base = type(outputs)
    if base not in _classes:
        added = [("memory_state", MemoryState | None, None)]
        # pickle finds no class made here, so it is told how to make it again.
        methods = {"__module__": __name__, "__reduce__": lambda self: (_rebuild, (base, dict(self)))}
        _classes[base] = make_dataclass(f"{base.__name__}WithMemory", added, bases=(base,), namespace=methods)
    return _rebuild(
        base, {**{f.name: outputs[f.name] for f in fields(outputs) if f.name in outputs}, "memory_state": state}
    )


def _rebuild(base: type[ModelOutput], values: dict[str, Any]) -> ModelOutput:
    if base not in _classes:
        return with_memory_state(
            base(**{k: v for k, v in values.items() if k != "memory_state"}), values["memory_state"]
        )
    return _classes[base](**values)
