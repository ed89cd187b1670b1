"""Ways to get a model with memory: around a loaded model, by name, or back from a folder."""

from __future__ import annotations

import functools
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GPT2LMHeadModel, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from .config import CONFIG_NAME, MemoryConfig
from .modeling import MemoryMixin

CONFIG_KEY = "gru_memory"  # field of a saved model's config.json

# The untrained memory of `from_pretrained_with_memory`: heard at every site, softly enough for text to stay coherent
# (docs/memory.md has the figures).
UNTRAINED = {"sites": ("input", "middle", "top"), "gate_init": 0.1}


class _FromConfig(MemoryMixin):
    """A memory model that builds its memory from its config, as `from_pretrained` and `Class(config)` need."""

    def __init__(self, config, *args, **kwargs) -> None:
        super().__init__(config, *args, **kwargs)
        values = getattr(config, CONFIG_KEY, None)
        self.attach_memory(MemoryConfig(**UNTRAINED) if values is None else MemoryConfig.from_dict(values))

    def attach_memory(self, config: MemoryConfig, sites: dict[str, nn.Module] | None = None) -> None:
        super().attach_memory(config, sites)
        setattr(self.config, CONFIG_KEY, config.to_dict())

    @classmethod
    def from_pretrained_with_memory(cls, name_or_path: str, *, decay: float | list | None = None, **kwargs) -> Any:
        """Load a base model and give it an untrained memory.

        Args:
            name_or_path: hub name or folder of the base model.
            decay: what a tick keeps of every slot, in (0, 1].
            **kwargs: fields of `MemoryConfig`; everything else goes to the base model's `from_pretrained`.
        """
        return _load_with_memory(cls._base_class(), name_or_path, decay, kwargs)

    @classmethod
    def from_pretrained(cls, name_or_path, *args, **kwargs) -> Any:
        """`PreTrainedModel.from_pretrained`; a checkpoint without a memory is given an untrained one."""
        config = kwargs.get("config")
        if config is None:
            hub = {
                k: kwargs[k]
                for k in ("revision", "token", "cache_dir", "subfolder", "local_files_only", "gguf_file")
                if k in kwargs
            }
            config = AutoConfig.from_pretrained(name_or_path, **hub)
        if getattr(config, CONFIG_KEY, None) is None:
            return cls.from_pretrained_with_memory(name_or_path, *args, **kwargs)
        return super().from_pretrained(name_or_path, *args, **kwargs)

    @classmethod
    def _base_class(cls) -> type[PreTrainedModel]:
        return next(c for c in cls.__mro__ if issubclass(c, PreTrainedModel) and not issubclass(c, MemoryMixin))


class GPT2WithGRUMemory(_FromConfig, GPT2LMHeadModel):
    """GPT-2 with a memory: a `GPT2LMHeadModel` in every respect, and what `MemoryMixin` adds."""


@functools.cache
def memory_class(base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The class of `base` models with memory."""
    if issubclass(base, MemoryMixin):
        return base
    if base is GPT2LMHeadModel:
        return GPT2WithGRUMemory
    name = f"{base.__name__}WithGRUMemory"
    return type(name, (_FromConfig, base), {"__doc__": f"`{base.__name__}` with a memory.", "__module__": __name__})


def add_memory(
    model: PreTrainedModel, config: MemoryConfig | None = None, sites: dict[str, nn.Module] | None = None
) -> PreTrainedModel:
    """Give a loaded causal LM a memory, in place, and return it; its class becomes `memory_class(type(model))`.

    Only the memory is left trainable. With the default `gate_init=0` the model still computes what it did, bit for bit.

    Args:
        model: a causal LM of a known family (`register_backbone` teaches others).
        config: shape and sites; the defaults of `MemoryConfig` if None.
        sites: your own modules for some sites, by name: `forward(hidden_states, token_embeds, state, mask,
            turn_starts) -> (hidden_states, state)` and `initial_state(batch_size) -> dict of (B, ...) tensors`.

    Raises:
        ValueError: a family that is not known, or a site that the model does not have. The model is then unchanged.
    """
    base = type(model)
    model.__class__ = memory_class(base)
    try:
        model.attach_memory(config or MemoryConfig(), sites)
    except Exception:
        model.__class__ = base
        raise
    model.freeze_base()
    return model


class AutoModelWithGRUMemory:
    """Memory models by name, for every supported family."""

    def __init__(self) -> None:
        raise OSError("use AutoModelWithGRUMemory.from_pretrained(...) or .from_pretrained_with_memory(...)")

    @staticmethod
    def from_pretrained_with_memory(name_or_path: str, *, decay: float | list | None = None, **kwargs) -> Any:
        """Load any supported base model and give it an untrained memory; arguments as in `GPT2WithGRUMemory`."""
        return _load_with_memory(AutoModelForCausalLM, name_or_path, decay, kwargs)

    @staticmethod
    def from_pretrained(name_or_path: str, memory: str | Path | None = None, **kwargs) -> Any:
        """Load a model saved with its memory, or a base model and the memory saved in the folder `memory`."""
        if memory is not None:
            model = add_memory(AutoModelForCausalLM.from_pretrained(name_or_path, **kwargs))
            model.load_memory(memory)
            model.freeze_base()
            return model
        config = AutoConfig.from_pretrained(name_or_path)
        if getattr(config, CONFIG_KEY, None) is None:
            raise ValueError(
                f"{name_or_path} was saved without a memory: name the memory's folder (memory=..., it holds {CONFIG_NAME}), "
                "or use from_pretrained_with_memory for an untrained one"
            )
        return memory_class(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]).from_pretrained(name_or_path, **kwargs)


def _load_with_memory(
    base: Any, name_or_path: str, decay: float | list | None, kwargs: dict[str, Any]
) -> PreTrainedModel:
    names = {f.name for f in fields(MemoryConfig)}
    settings = {**UNTRAINED, **{k: kwargs.pop(k) for k in list(kwargs) if k in names}}
    if decay is not None:
        settings["decay"] = decay
    config = MemoryConfig(**settings)  # bad settings are refused before anything is loaded
    return add_memory(base.from_pretrained(name_or_path, **kwargs), config)
