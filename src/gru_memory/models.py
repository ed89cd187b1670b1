"""Ways to get a model with memory: around a loaded model, by name, or back from a folder."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GPT2LMHeadModel, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from .config import CONFIG_NAME, FORMAT_VERSION, MemoryConfig
from .memory import GRUMemoryWithDecay
from .modeling import MemoryMixin
from .named import DEFAULT_NAME, check_name, container_name
from .own_sites import OWN_SITES_KEY, build_own_sites, describe_own_sites, own_tensors
from .placement import refuse_replaced_forward, renew_hook
from .saving import read_memory

CONFIG_KEY = "gru_memory"  # field of a saved model's config.json
KNOWN_AS_KEY = "known_as"  # in it, of a memory that was cast: its fingerprint, under the digest of its weights

# The untrained memory of `from_pretrained_with_memory`: heard at every site, softly enough for text to stay coherent
# (docs/memory.md has the figures).
UNTRAINED = {"sites": ("input", "middle", "top"), "gate_init": 0.1}

# What finds a file on the hub: the config is asked for with the same words as the weights.
_HUB = ("revision", "token", "cache_dir", "subfolder", "local_files_only", "force_download", "gguf_file")
_HUB_OF_MEMORY = ("token", "cache_dir", "local_files_only")  # what a base model and a memory beside it share

_SETTINGS = {f.name for f in fields(MemoryConfig)}

Sites = dict[str, nn.Module] | dict[str, dict[str, nn.Module]]


class _FromConfig(MemoryMixin):
    """A memory model that builds its memory from its config, as `from_pretrained` and `Class(config)` need."""

    def __init__(self, config, *args, sites: Sites | None = None, scalar_gates: bool = False, **kwargs) -> None:
        super().__init__(config, *args, **kwargs)
        active, entries = _read_memories(getattr(config, CONFIG_KEY, None))
        given = _sites_by_memory(sites, active, entries)
        for name in sorted(entries, key=lambda name: name != active):  # the first one is in use
            memory, own, known_as = entries[name]
            self.attach_memory(memory, build_own_sites(own, given.get(name, {}), f"the memory {name!r}"), name)
            self._cast_from().update(known_as)
        self._memories = {name: self._memories[name] for name in entries}
        self._memories_changed()
        if scalar_gates:  # as before format 3, for `from_pretrained` to read such weights
            self._reshape_gates(())

    def _move_missing_keys_from_meta_to_device(self, *args, **kwargs) -> None:
        """A step of `from_pretrained`: it empties what no file holds, but modules of somebody's own keep what they have."""
        own = {
            f"{container_name(name)}.{key}": tensor
            for name in self.memories
            for key, tensor in own_tensors(self._container(name))
            if tensor.device.type != "meta"
        }
        super()._move_missing_keys_from_meta_to_device(*args, **kwargs)
        with torch.no_grad():
            for key, tensor in own.items():
                if (moved := self.get_parameter_or_buffer(key)) is not tensor:
                    moved.copy_(tensor)

    def _reshape_gates(self, shape: tuple[int, ...]) -> None:
        for name in self.memories:
            for site in self._sites_of(name).values():
                if isinstance(site, GRUMemoryWithDecay):
                    loaded = getattr(site.gate, "_is_hf_initialized", False)
                    site.gate = nn.Parameter(site.gate.detach().reshape(shape), site.gate.requires_grad)
                    site.gate._is_hf_initialized = loaded

    def _memories_changed(self) -> None:
        memories = {}
        for name, config in self.memories.items():
            own = describe_own_sites(self._sites_of(name))
            values = {k: v for k, v in config.to_dict().items() if k != "format_version"}  # one for all of them
            memories[name] = values | ({OWN_SITES_KEY: own} if own else {})
            if self._is_readable(name) and (lineage := self._lineage_of(name)):
                memories[name][KNOWN_AS_KEY] = dict([lineage])
        values = {"format_version": FORMAT_VERSION, "active": self.active_memory, "memories": memories}
        setattr(self.config, CONFIG_KEY, values)

    def save_pretrained(self, *args, **kwargs) -> Any:
        """`PreTrainedModel.save_pretrained`: the whole model, with all of its memories."""
        self._memories_changed()  # a config may have been changed in place, such as its mode
        return super().save_pretrained(*args, **kwargs)

    def __reduce_ex__(self, protocol) -> Any:
        # A class that `memory_class` made exists in this process only. Pickles and copies name its base, and make it again.
        make, args, state, *rest = super().__reduce_ex__(protocol)
        base = self._base_class()
        if type(self) is memory_class(base):
            make, args = _blank, (base,)
        state = {k: v for k, v in state.items() if k != "_fingerprints"}  # they go by addresses of this process
        return make, args, state, *rest

    @classmethod
    def from_pretrained_with_memory(
        cls,
        name_or_path: str,
        *,
        decay: float | list | None = None,
        memory: str | Path | None = None,
        check_base: bool = True,
        **kwargs,
    ) -> Any:
        """Load a base model and give it an untrained memory, or the one saved in `memory`.

        Args:
            name_or_path: hub name or folder of the base model.
            decay: what a tick keeps of every slot, in (0, 1].
            memory: folder or hub name ("user/repo") of a saved memory, which brings its own settings. `token`, `cache_dir` and
                `local_files_only` go for it too, `revision` and `subfolder` for the base model alone (for those of a
                memory, see `load_memory`).
            check_base: also refuse other weights under the memory, not only another family or other sizes.
            **kwargs: fields of `MemoryConfig`; everything else goes to the base model's `from_pretrained`.

        Raises:
            ValueError: settings that are out of range, or together with `memory`; and as for `load_memory`.
        """
        return _load_with_memory(cls._base_class(), name_or_path, decay, memory, check_base, kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs) -> Any:
        """`PreTrainedModel.from_pretrained`; a checkpoint without a memory is given an untrained one.

        Only the active memory is trainable after it. `sites` gives the modules of your own that the model was saved
        with, by site, or by memory and site if several memories have some; those of a kind that `register_site` knows are
        made anew without it.

        Raises:
            ValueError: a memory of a newer version, one with a module of your own that `sites` does not give, or settings
                for a memory that brings its own.
        """
        memories = getattr(_config_of(pretrained_model_name_or_path, kwargs), CONFIG_KEY, None)
        if memories is None:
            return cls.from_pretrained_with_memory(pretrained_model_name_or_path, *args, **kwargs)
        # `sites` may hold modules instead of names.
        settings = [k for k in kwargs if k in _SETTINGS and not (k == "sites" and isinstance(kwargs[k], dict | None))]
        if settings:
            raise ValueError(
                f"{', '.join(sorted(settings))} cannot be set for {pretrained_model_name_or_path}, which was saved with a memory: "
                "it brings its own settings"
            )
        older = memories.get("format_version", FORMAT_VERSION) < 3
        if older:
            kwargs["scalar_gates"] = True
        result = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = result[0] if isinstance(result, tuple) else result  # a tuple with output_loading_info=True
        if older:
            model._reshape_gates((1,))
        model.freeze_base()
        return result

    def _get_name(self) -> str:
        # What `repr` says. The Trainer looks it up among its causal LMs, to shift the labels of a smoothed loss.
        return self._base_class().__name__

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


def _is_about_others(record: logging.LogRecord) -> bool:
    """Pipelines know models by the name of their class, and report an error, with a list of all names, for ours."""
    return "WithGRUMemory' is not supported for text-generation" not in record.getMessage()


logging.getLogger("transformers.pipelines.base").addFilter(_is_about_others)


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
    if config is not None and not isinstance(config, MemoryConfig):
        raise TypeError(f"config is a {type(config).__name__}: give a MemoryConfig, such as MemoryConfig(decay=0.9)")
    return _convert(model, lambda model: model.attach_memory(config or MemoryConfig(), sites))


class AutoModelWithGRUMemory:
    """Memory models by name, for every supported family."""

    def __init__(self) -> None:
        raise OSError("use AutoModelWithGRUMemory.from_pretrained(...) or .from_pretrained_with_memory(...)")

    @staticmethod
    def from_pretrained_with_memory(
        name_or_path: str,
        *,
        decay: float | list | None = None,
        memory: str | Path | None = None,
        check_base: bool = True,
        **kwargs,
    ) -> Any:
        """Load any supported base model and give it a memory; arguments and errors as for `GPT2WithGRUMemory`."""
        return _load_with_memory(AutoModelForCausalLM, name_or_path, decay, memory, check_base, kwargs)

    @staticmethod
    def from_pretrained(
        pretrained_model_name_or_path: str, memory: str | Path | None = None, *, check_base: bool = True, **kwargs
    ) -> Any:
        """Load a model saved with its memories, or a base model and the saved `memory` (a folder or "user/repo").

        Arguments and errors as for `from_pretrained_with_memory`, and `sites` as for `GPT2WithGRUMemory.from_pretrained`.
        """
        name_or_path = pretrained_model_name_or_path
        if memory is not None:
            return _load_with_memory(AutoModelForCausalLM, name_or_path, None, memory, check_base, kwargs)
        config = _config_of(name_or_path, kwargs)
        if getattr(config, CONFIG_KEY, None) is None:
            raise ValueError(
                f"{name_or_path} was saved without a memory: name the memory's folder (memory=..., it holds {CONFIG_NAME}), "
                "or use from_pretrained_with_memory for an untrained one"
            )
        return memory_class(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]).from_pretrained(name_or_path, **kwargs)


def _load_with_memory(
    base: Any,
    name_or_path: str,
    decay: float | list | None,
    memory: str | Path | None,
    check_base: bool,
    kwargs: dict[str, Any],
) -> PreTrainedModel:
    settings = {k: kwargs.pop(k) for k in list(kwargs) if k in _SETTINGS}
    if decay is not None:
        settings["decay"] = decay
    modules = settings.pop("sites") if isinstance(settings.get("sites"), dict) else None
    if memory is None:
        if modules is not None:
            raise ValueError(
                "sites holds modules, for a memory that was saved: name their places, or use add_memory(sites=)"
            )
        config = MemoryConfig(**{**UNTRAINED, **settings})  # bad settings are refused before anything is loaded
        return _with_memory(
            base.from_pretrained(name_or_path, **kwargs), lambda model: _attach_first(model, config, name_or_path)
        )
    if settings:
        raise ValueError(f"{', '.join(sorted(settings))} cannot be set together with memory=, which brings its own")
    saved = read_memory(memory, **{k: kwargs[k] for k in _HUB_OF_MEMORY if k in kwargs})
    return _with_memory(
        base.from_pretrained(name_or_path, **kwargs),
        lambda model: model._load_saved(saved, None, modules, check_base),
    )


def _attach_first(model: PreTrainedModel, config: MemoryConfig, name_or_path: str) -> None:
    if getattr(model.config, CONFIG_KEY, None) is not None:
        raise ValueError(
            f"{name_or_path} was saved with a memory, which an untrained one would take the place of: load both with "
            "from_pretrained, or give its base model a new one with add_memory"
        )
    model.attach_memory(config, None)


def _with_memory(loaded: Any, attach: Callable[[PreTrainedModel], None]) -> Any:
    """What `from_pretrained` returned, its model with a memory: a model, or one and what output_loading_info=True tells of it."""
    if isinstance(loaded, tuple):
        return (_convert(loaded[0], attach), *loaded[1:])
    return _convert(loaded, attach)


def _convert(model: PreTrainedModel, attach: Callable[[PreTrainedModel], None]) -> PreTrainedModel:
    """Make a base model one with memory. If `attach` fails it is what it was."""
    base = type(model)
    if memory_class(base) is not base:
        refuse_replaced_forward(model)
    model.__class__ = memory_class(base)
    try:
        attach(model)
    except Exception:
        model.__class__ = base
        raise
    renew_hook(model)
    model.freeze_base()
    return model


def _config_of(name_or_path: str, kwargs: dict[str, Any]) -> Any:
    """The config of a checkpoint: the one that is given, or the one that is there."""
    config = kwargs.get("config")
    if config is None or isinstance(config, (str, Path)):
        config = AutoConfig.from_pretrained(config or name_or_path, **{k: kwargs[k] for k in _HUB if k in kwargs})
    return config


def _read_memories(
    values: dict[str, Any] | None,
) -> tuple[str, dict[str, tuple[MemoryConfig, dict[str, Any], dict[str, str]]]]:
    """The active memory, and config, own sites and casts of each, from a config.json. Format 1 knew one memory only."""
    if values is None:
        return DEFAULT_NAME, {DEFAULT_NAME: (MemoryConfig(**UNTRAINED), {}, {})}
    if "memories" not in values:
        return DEFAULT_NAME, {DEFAULT_NAME: (MemoryConfig.from_dict(values), {}, {})}
    try:
        entries, active = {}, values["active"]
        for name, entry in values["memories"].items():
            entry = {**entry, "format_version": values["format_version"]}
            own, known_as = dict(entry.pop(OWN_SITES_KEY, {})), dict(entry.pop(KNOWN_AS_KEY, {}))
            entries[check_name(name)] = MemoryConfig.from_dict(entry), own, known_as
        if active not in entries:
            raise KeyError(active)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{CONFIG_KEY} in config.json is damaged ({error}): save the model again") from error
    return active, entries


def _sites_by_memory(sites: Sites | None, active: str, entries: dict[str, Any]) -> dict[str, dict[str, nn.Module]]:
    """`sites` by memory and site. Without names of memories they are for the one that has sites of its own."""
    if not sites:
        return {}
    if all(isinstance(given, dict) for given in sites.values()):
        if unknown := set(sites) - set(entries):
            raise ValueError(f"sites are given for memories {sorted(unknown)}, and there are {sorted(entries)}")
        return dict(sites)
    owners = [name for name, (_, own, _) in entries.items() if own]
    if len(owners) > 1:
        raise ValueError(f"the memories {owners} all have sites of their own: give sites={{memory: {{site: module}}}}")
    return {owners[0] if owners else active: dict(sites)}


def _blank(base: type[PreTrainedModel]) -> PreTrainedModel:
    """An object of the memory class of `base` that nothing was done to yet: pickle fills it."""
    kind = memory_class(base)
    return kind.__new__(kind)
