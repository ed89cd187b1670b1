"""Several memories on one model, by name: one is active, the others wait."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from .config import MemoryConfig

DEFAULT_NAME = "default"
_PREFIX = "gru_memory"  # of the attributes of the model that hold the sites
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


def check_name(name: Any) -> str:
    """`name`, if a memory can be called that. Raises ValueError."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(
            f"{name!r} cannot be the name of a memory: use letters, digits, '-' and '_', and start with a letter or digit"
        )
    return name


def container_name(name: str) -> str:
    """Attribute of the model that holds the sites of this memory. The first one was there before memories had names."""
    return _PREFIX if name == DEFAULT_NAME else f"{_PREFIX}_{name}"


class NamedMemoriesMixin:
    """The memories of a model. Each has its own config, weights and state; only the active one reads and writes.

    The model's class says what setting one means (`_activate_memory`) and which state is in use (`_memory_state`).
    """

    @property
    def memories(self) -> dict[str, MemoryConfig]:
        """The config of every memory on this model, by name, oldest first."""
        return dict(self.__dict__.get("_memories", {}))

    @property
    def active_memory(self) -> str | None:
        """Name of the memory in use; "default" unless another one was set."""
        return self.__dict__.get("_active_memory")

    @property
    def memory_config(self) -> MemoryConfig:
        """The config of the active memory."""
        config = self.__dict__.get("_memories", {}).get(self.active_memory)
        if config is None:
            raise AttributeError("this model has no memory: give it one with gru_memory.add_memory(model)")
        return config

    def set_memory(self, name: str) -> None:
        """Use another memory. The one in use keeps its state until it is set again.

        As with peft's `set_adapter`, the memory that is set becomes trainable and the others do not learn.

        Raises:
            ValueError: no memory of this name. Nothing has changed then.
        """
        name = self._require(name)
        if name == self.active_memory:
            return
        parked = self.__dict__.setdefault("_parked_states", {})
        parked[self.active_memory] = self._memory_state
        self._activate_memory(name, parked.pop(name, None))
        for other in self.memories:
            self._container(other).requires_grad_(other == name)
        self._memories_changed()

    def delete_memory(self, name: str) -> None:
        """Remove a memory and its state.

        Raises:
            ValueError: no memory of this name, or the active one. Nothing has changed then.
        """
        name = self._require(name)
        if name == self.active_memory:
            raise ValueError(
                f"the memory {name!r} is in use: set another one first (model.set_memory), or load over it"
            )
        del self._modules[container_name(name)]
        self._memories = {other: config for other, config in self.memories.items() if other != name}
        for kept in ("_parked_states", "_fingerprints"):
            self.__dict__.get(kept, {}).pop(name, None)
        self._memories_changed()

    def _install_memory(self, name: str, config: MemoryConfig, container: nn.ModuleDict) -> None:
        """Put a memory in place, or in the place of the one of this name. The first one, and the active one, is in use."""
        self._memories = {**self.memories, name: config.in_use()}
        self.add_module(container_name(name), container)
        for kept in ("_parked_states", "_fingerprints"):  # the address of a new weight may be that of an old one
            self.__dict__.get(kept, {}).pop(name, None)
        if self.active_memory in (None, name):
            self._activate_memory(name, None)
        else:
            container.requires_grad_(False)
        self._memories_changed()

    def _memories_changed(self) -> None:
        """Called when a memory came, went or was set."""

    def _container(self, name: str | None) -> nn.ModuleDict | None:
        return None if name is None else self._modules.get(container_name(name))

    def _require(self, name: str | None) -> str:
        """The name of a memory that is there; None means the active one."""
        name = self.active_memory if name is None else name
        if name not in self.memories:
            raise ValueError(
                f"no memory is called {name!r} (there are: {', '.join(self.memories) or 'none'}): load it with "
                f"model.load_memory(..., name={name!r})"
            )
        return name
