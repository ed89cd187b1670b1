"""Memory on a Hugging Face causal LM: its sites, the pure forward pass, and the thin stateful shell around it.

A memory model is the base model's own class with `MemoryMixin` in front, so everything that works on the base model
works on it. `forward` is pure: it starts from `memory_state` and returns the new one in its output. Only the shell
(`memory_state`, `reset`, `generate`) remembers anything.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import StaticLayer
from transformers.modeling_layers import GradientCheckpointingLayer

from . import backbones
from .cache import attach, find_layer
from .calls import MemoryCall, disabled, keep_key_states, run_after, run_before, run_with, stretch_of
from .clock import counted, is_2d, last_columns, turn_starts_of, up_to_fed
from .config import MemoryConfig
from .fingerprints import FingerprintMixin
from .generation import MemoryGenerationMixin
from .memory import GRUMemoryWithDecay
from .named import DEFAULT_NAME, NamedMemoriesMixin, check_name
from .outputs import with_memory_state
from .own_sites import check_given
from .placement import computes_on, first_parameter, head_weight, is_fetched, run_where_it_lies
from .rendering import require_text
from .saving import MemorySavingMixin
from .state import MemoryState

_CHECKPOINTS_HOOKS = "__call__" in GradientCheckpointingLayer.__dict__  # before transformers 5.23


def site_of(config: MemoryConfig, width: int, hidden_size: int, embed_size: int) -> GRUMemoryWithDecay:
    """A fresh site of this config in a stream of `width`, beside blocks of `hidden_size` and a head over `embed_size`."""
    return GRUMemoryWithDecay(
        width,
        num_heads=config.num_heads,
        num_slots=config.num_slots,
        slot_size=config.slot_size,
        decay=config.decay,
        decay_every=config.decay_every,
        cell=config.cell,
        gate_init=config.gate_init,
        embed_size=embed_size,
        key_size=hidden_size * len(config.key_layers),
        address_rank=config.address_rank,
        persistent_slots=config.persistent_slots,
        persistent_floor=config.persistent_floor,
        signature_size=config.signature_size,
        addressing=config.addressing,
        tied_queries=config.tied_queries,
        max_strength=config.max_strength,
    )


class MemoryMixin(MemoryGenerationMixin, MemorySavingMixin, FingerprintMixin, NamedMemoriesMixin):
    """What a causal LM gains with a memory. Comes before the model's class in the bases."""

    def __init_subclass__(cls, **kwargs) -> None:
        super().__init_subclass__(**kwargs)
        if "forward" not in cls.__dict__ and issubclass(cls, PreTrainedModel):
            cls.forward = _memory_forward(cls)

    def attach_memory(
        self, config: MemoryConfig, sites: dict[str, nn.Module] | None = None, name: str | None = None
    ) -> None:
        """Build the sites of `config` and hook them in. `sites` replaces the built-in module at the named sites.

        A memory of this name is replaced, the active one if none is given. A further one waits for `set_memory`.
        """
        # All that can fail comes first, so that a refused memory leaves the model as it was.
        name = check_name(name if name is not None else self.active_memory or DEFAULT_NAME)
        blocks = backbones.blocks_of(self)
        places = {site: _site_index(site, len(blocks)) for site in config.sites}
        for layer in config.key_layers:
            if not 0 <= layer < len(blocks):
                raise ValueError(f"key layer {layer} does not exist: this model has blocks 0 to {len(blocks) - 1}")
            if any(place is not None and place <= layer for place in places.values()):
                raise ValueError(f"key layer {layer} must come before every site: {places}")
        given = check_given(sites, config.sites)
        modules = {site: given[site] if site in given else self.build_site(config, site) for site in config.sites}
        head = self.get_output_embeddings()
        place = computes_on(head)
        container = nn.ModuleDict({_module_name(site): module for site, module in modules.items()})
        if place.type != "meta":
            self._bring(config, modules, place, head.weight.dtype)
            for part in container.modules():
                part._is_hf_initialized = True  # transformers initialises no module that says so
        self._install_memory(name, config, container.train(self.training))
        ignored = list(getattr(self.config, "keys_to_ignore_at_inference", None) or [])
        if "memory_state" not in ignored:
            self.config.keys_to_ignore_at_inference = [*ignored, "memory_state"]

    def _activate_memory(self, name: str, state: MemoryState | None) -> None:
        """Hook this memory in instead of the one that was, and go on from its state."""
        config, blocks, last = self.memories[name], backbones.blocks_of(self), backbones.before_head_of(self)
        self._remove_memory_hooks()
        self._active_memory = name
        self._memory_state: MemoryState | None = state
        self._memory_off = getattr(self, "_memory_off", 0)  # another one may be set where memory is disabled
        self._memory_hooks = []
        for layer in config.key_layers:
            self._memory_hooks.append(
                blocks[layer].register_forward_hook(functools.partial(keep_key_states, layer=layer))
            )
        places = {site: _site_index(site, len(blocks)) for site in config.sites}
        # In the order of their depth: where nothing follows the last block, "top" shares it with another site.
        for site, place in sorted(places.items(), key=lambda item: len(blocks) if item[1] is None else item[1]):
            if site == "input":
                self._memory_hooks.append(blocks[0].register_forward_pre_hook(run_before, with_kwargs=True))
            else:
                target = last if place is None else blocks[place]
                self._memory_hooks.append(target.register_forward_hook(functools.partial(run_after, site=site)))

    def build_site(
        self, config: MemoryConfig, site: str = "top", device: torch.device | str | None = None
    ) -> GRUMemoryWithDecay:
        """A fresh module for a site of this config and model, where the model is if `device` is None."""
        embeddings = self.get_output_embeddings().weight
        hidden_size = self.config.get_text_config().hidden_size
        with torch.device(device or computes_on(self.get_output_embeddings())):
            width = embeddings.shape[1] if site == "top" else hidden_size  # a projection may come before the head
            return site_of(config, width, hidden_size, embeddings.shape[1])

    def _remove_memory_hooks(self) -> None:
        for hook in getattr(self, "_memory_hooks", []):
            hook.remove()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The memory has its own initialisation, not the base model's rule. Weights that were loaded stay."""
        owners = {
            part: (config, site)
            for name, config in self.memories.items()
            for site, own in self._sites_of(name).items()
            for part in own.modules()
        }
        if module not in owners:
            super()._init_weights(module)
        elif isinstance(module, GRUMemoryWithDecay):
            # Where the site is: transformers comes here while other weights are still to be loaded.
            fresh = dict(self.build_site(*owners[module], module.gate.device).named_parameters())
            for name, parameter in module.named_parameters():
                if not getattr(parameter, "_is_hf_initialized", False):
                    parameter.copy_(fresh[name].reshape(parameter.shape))

    @property
    def _sites(self) -> dict[str, nn.Module]:
        return self._sites_of(self.active_memory)

    def _sites_of(self, name: str | None) -> dict[str, nn.Module]:
        container = self._container(name)
        return {} if container is None else {site: container[_module_name(site)] for site in self.memories[name].sites}

    def memory_sites(self) -> dict[str, nn.Module]:
        """The modules of the active memory by the name of their site."""
        return dict(self._sites)

    def memory_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters to train: those of the active memory alone."""
        for site in self._sites.values():
            yield from site.parameters()

    def freeze_base(self) -> None:
        """Only the memory learns from here on: gradients off everywhere else."""
        own = {id(p) for p in self.memory_parameters()}
        for parameter in self.parameters():
            parameter.requires_grad_(id(parameter) in own)

    def num_memory_parameters(self) -> int:
        return sum(p.numel() for p in self.memory_parameters())

    def print_trainable_parameters(self) -> None:
        """Print how many parameters learn, as peft does."""
        trainable = sum(p.numel() for p in self.parameters() if p.requires_grad)
        total = sum(p.numel() for p in self.parameters())
        print(  # noqa: T201 (as peft does)
            f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f} "
            f"|| memory params: {self.num_memory_parameters():,}"
        )

    @property
    def memory_state(self) -> MemoryState | None:
        """What `generate` starts from in persistent mode; None before the first `reset` or `generate`."""
        return self._memory_state

    @memory_state.setter
    def memory_state(self, state: MemoryState | None) -> None:
        if state is not None:
            self.check_memory_state(state, getattr(state, "batch_size", 0), whose=True)
        self._memory_state = state

    def reset(self, batch_size: int = 1) -> None:
        """Forget everything: an empty memory for `batch_size` conversations."""
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size is {batch_size!r}: it must be a whole number of at least 1")
        self._memory_state = self.initial_memory_state(batch_size)

    def remember(self, text: str, tokenizer: Any, reply: str | None = None, system: str | None = None) -> None:
        """Read a turn into every conversation of `memory_state` (one that begins, if there is none) without an answer.

        Args:
            text: what the user says.
            tokenizer: of this model.
            reply: what was answered, if anything.
            system: system prompt; None leaves the default of the chat template.

        Raises:
            ValueError: the text is empty.
            RuntimeError: the memory is disabled here, or ephemeral: nothing would ever be read from `memory_state`.
        """
        from .evaluation.batched import BatchReader  # which reads into models

        require_text(text)
        if self.memory_disabled:
            raise RuntimeError("the memory is disabled here, so nothing can be told to it: leave `disable_memory()`")
        if self.memory_config.mode != "persistent":
            raise RuntimeError(
                "an ephemeral memory starts each generate() empty, and would not know it: set memory_config.mode to 'persistent', "
                "or use a Conversation"
            )

        state = self.initial_memory_state(1) if self.memory_state is None else self.memory_state
        self.memory_state = BatchReader(self, tokenizer, system).read(state, [(text, reply)] * state.batch_size)

    @torch.no_grad()
    def initial_memory_state(self, batch_size: int = 1) -> MemoryState:
        """The state of `batch_size` conversations in which nothing was said yet."""
        return self._empty_state(batch_size, self.memory_fingerprint())

    def _empty_state(self, batch_size: int, fingerprint: str | None) -> MemoryState:
        self._refuse_fetched_memory()
        sites = self._sites
        states = {name: site.initial_state(batch_size) for name, site in sites.items()}
        kept = next((tensor for state in states.values() for tensor in state.values()), None)
        device = computes_on(self.get_output_embeddings()) if kept is None else kept.device
        return MemoryState(
            sites=states,
            tokens=torch.zeros(batch_size, dtype=torch.long, device=device),
            turns=torch.zeros(batch_size, dtype=torch.long, device=device),
            pending=torch.zeros(batch_size, dtype=torch.bool, device=device),
            decay_rates={name: site.decay for name, site in sites.items() if isinstance(site, GRUMemoryWithDecay)},
            fingerprint=fingerprint,
            kept_in=self.memory_config.kept_in,
            addressing=self.memory_config.addressing,
        )

    def _refuse_fetched_memory(self) -> None:
        if torch.compiler.is_compiling():
            return
        container = self._container(self.active_memory)
        found = () if container is None else map(first_parameter, container.values())
        first = next((parameter for parameter in found if parameter is not None), None)
        if first is not None and first.device.type == "meta" and is_fetched(container):
            raise ValueError(
                "accelerate keeps the memory's own weights elsewhere and fetches them module by module, which a memory cannot "
                "work with: give them a place (they take a few MB), such as device_map={..., 'gru_memory': 'cpu'}, or add the "
                "memory after the model was dispatched"
            )

    def check_memory_state(self, state: MemoryState, batch_size: int, whose: bool = False) -> None:
        """Raise ValueError unless `state` is one of this memory for `batch_size` rows.

        `whose` also asks for the fingerprint of this very model and memory (states made in training carry none).
        """
        if not isinstance(state, MemoryState):
            raise ValueError(
                f"memory_state is a {type(state).__name__}: pass a MemoryState (model.initial_memory_state())"
            )
        if not torch.compiler.is_compiling() and (owner := self._owner_of(state)) is not None:
            raise ValueError(
                f"this state belongs to the memory {owner!r}, and {self.active_memory!r} is active: call "
                f"model.set_memory({owner!r}) first, or start from model.initial_memory_state()"
            )
        if set(state.sites) != set(self._sites):
            raise ValueError(
                f"this state has sites {sorted(state.sites)}, the model's memory has {sorted(self._sites)}: it belongs to "
                "another memory"
            )
        if state.batch_size != batch_size:
            raise ValueError(
                f"the memory state is for {state.batch_size} conversation(s), the input has {batch_size}: call "
                f"model.reset(batch_size={batch_size}), or pass state.select(...) / MemoryState.cat(...) with that many rows"
            )
        for name, site in self._sites.items():
            if isinstance(site, GRUMemoryWithDecay):
                site.check_state(state.sites[name], batch_size)
        if whose and state.fingerprint not in (None, self.memory_fingerprint()):
            raise ValueError(
                "this state was made by another model or by a memory with other weights: start from "
                "model.initial_memory_state(), or load the memory that made it"
            )

    @contextlib.contextmanager
    def disable_memory(self) -> Iterator[None]:
        """Inside, the model is the base model, bit for bit; memory neither reads nor writes.

        That holds for this thread alone, but code that `torch.compile` made sees one switch for all threads.
        """
        token = disabled.set((*disabled.get(), id(self)))
        self._memory_off += 1
        try:
            yield
        finally:
            self._memory_off -= 1
            disabled.reset(token)

    @property
    def memory_disabled(self) -> bool:
        if torch.compiler.is_compiling():
            return self._memory_off > 0 or not self._sites
        return id(self) in disabled.get() or not self._sites

    def _begin_call(
        self, arguments: dict[str, Any], memory_state: MemoryState | None, memory_mask: Tensor | None
    ) -> MemoryCall:
        input_ids, embeds = arguments.get("input_ids"), arguments.get("inputs_embeds")
        source = _fed(arguments)
        if source is None:
            raise ValueError("pass input_ids or inputs_embeds")
        batch, length = source.shape[:2]
        if not length:
            raise ValueError(f"the input is {tuple(source.shape)}, without a token: pass at least one a row")
        if _CHECKPOINTS_HOOKS and self.training and self.is_gradient_checkpointing and self._hooks_blocks():
            raise RuntimeError(
                "this version of transformers runs hooks again when it recomputes a block, and the memory's gradients would "
                "be lost: use transformers 5.23 or later, or sites=('top',), or model.gradient_checkpointing_disable()"
            )
        self._refuse_fetched_memory()
        cache = arguments.get("past_key_values")
        _refuse_cached_turns(self, arguments)
        layer = find_layer(cache)
        if memory_state is None:
            memory_state = layer.state if layer is not None else None
        if memory_state is None:
            traced = self.training or torch.compiler.is_compiling()
            memory_state = self._empty_state(batch, None if traced else self.memory_fingerprint())
        else:
            self.check_memory_state(memory_state, batch)
        if memory_state.tokens.device != source.device:
            memory_state = memory_state.to(source.device)
        attention_mask, past_length = arguments.get("attention_mask"), 0 if cache is None else cache.get_seq_length()
        self._refuse_what_the_base_gets_wrong(attention_mask, arguments.get("position_ids"), cache)
        if memory_mask is not None and memory_mask.shape[:2] == (batch, length) and not is_2d(attention_mask):
            attention_mask = None  # one that says nothing of padding; here the other one does
        elif memory_mask is not None and is_2d(memory_mask):
            memory_mask = up_to_fed(memory_mask, None if cache is None else past_length, length)
        valid = last_columns(attention_mask, batch, length, source.device)
        visible = valid if memory_mask is None else valid & last_columns(memory_mask, batch, length, source.device)
        starts = turn_starts_of(arguments.get("position_ids"), valid, past_length, attention_mask)
        ticks, state = counted(memory_state, starts, visible)
        told = self._token_embeds(input_ids, embeds)
        call = MemoryCall(self, self._sites, memory_state, state, told, starts, visible, ticks)
        call.recorded = {} if layer is not None and layer.records else None
        return call

    def _hooks_blocks(self) -> bool:
        """Whether some site is hooked to a block, and so lies within what gradient checkpointing runs again."""
        return set(self._sites) != {"top"} or backbones.before_head_of(self) is backbones.blocks_of(self)[-1]

    def _refuse_what_the_base_gets_wrong(
        self, attention_mask: Tensor | None, position_ids: Tensor | None, cache: Cache | None
    ) -> None:
        """Raise ValueError for inputs with which this family computes something else than was asked for, and says nothing."""
        family = self.config.model_type
        packs = (
            position_ids is None or attention_mask is not None or cache is not None or backbones.backbone_of(self).packs
        )
        if not packs and not torch.compiler.is_compiling() and bool((position_ids[:, 1:] == 0).any()):
            raise ValueError(
                f"{family} does not keep attention to one turn where positions restart within a row: pass the turns one after "
                "the other, each with the memory_state that the one before returned"
            )
        if type(cache) is DynamicCache or backbones.takes_static_cache(self):
            return
        if any(isinstance(layer, StaticLayer) for layer in getattr(cache, "layers", ())):
            raise ValueError(
                f"{family} computes something else with a static cache in transformers: leave out cache_implementation, or pass "
                "a DynamicCache"
            )

    def _token_embeds(self, input_ids: Tensor | None, embeds: Tensor | None) -> Tensor | None:
        head = self.get_output_embeddings()
        if input_ids is not None:
            weight = head_weight(head)
            return F.embedding(input_ids.to(weight.device), weight).to(input_ids.device)
        # Input embeddings are what is stored only where the model ties them to its head, and as they are in the head.
        tied = self.get_input_embeddings().weight is head.weight
        if is_fetched(head):
            tied = bool(self.config.get_text_config().tie_word_embeddings)
        return embeds / backbones.embed_scale_of(self) if tied else None

    def _stops_early(self) -> bool:
        """Whether `generate(assistant_early_exit=n)` is drafting with the first blocks alone."""
        return self.config.get_text_config().num_hidden_layers < len(backbones.blocks_of(self))

    def run_site(self, site: str, hidden_states: Tensor, call: MemoryCall) -> Tensor:
        """Let one site read and write; its new state is kept in `call`."""
        module = call.modules[site]
        extra = {}
        if self.memory_config.key_layers and isinstance(module, GRUMemoryWithDecay):
            if not set(self.memory_config.key_layers) <= set(call.key_states) and self._stops_early():
                return hidden_states  # it cannot look anything up; what is drafted here will be checked
            states = [call.key_states[k].to(hidden_states.device) for k in self.memory_config.key_layers]
            extra["key_states"] = torch.cat(states, dim=-1) if len(states) > 1 else states[0]
        if call.recorded is not None:
            call.recorded[site] = module, {"hidden_states": hidden_states, **extra}
        hidden_states, call.new_sites[site] = run_where_it_lies(
            module,
            hidden_states,
            token_embeds=call.token_embeds,
            state=call.state.sites[site],
            mask=call.visible,
            turn_starts=call.ticks,
            **extra,
        )
        return hidden_states


def _memory_forward(cls: type):
    """`forward` of `cls`: that of the base model, with memory. Carries the base's signature plus two arguments."""
    base = next(c for c in cls.__mro__[1:] if "forward" in c.__dict__ and not issubclass(c, MemoryMixin)).forward
    signature = inspect.signature(base)
    names = [name for name in signature.parameters if name != "self"]

    @functools.wraps(base)
    def forward(self, *args, memory_state: MemoryState | None = None, memory_mask: Tensor | None = None, **kwargs):
        arguments = {**dict(zip(names, args)), **kwargs}
        if self.memory_disabled:
            outputs = base(self, *args, **kwargs)
            if (layer := find_layer(arguments.get("past_key_values"))) is not None:
                layer.pass_by(_fed(arguments).shape[1])
            return outputs
        call = self._begin_call(arguments, memory_state, memory_mask)
        outputs = run_with(call, base, args, kwargs)
        state = replace(call.state, sites={**call.state.sites, **call.new_sites})
        parts = outputs if isinstance(outputs, tuple) else outputs.values()
        cache = next((part for part in parts if isinstance(part, Cache)), None)
        if cache is not None:
            layer = attach(cache, self.config.get_text_config().num_hidden_layers)
            state = layer.advance(state, stretch_of(call))
        if isinstance(outputs, tuple):
            return (*outputs, state)
        if torch.compiler.is_compiling():  # no classes are made while a graph is
            outputs["memory_state"] = state
            return outputs
        return with_memory_state(outputs, state)

    extra = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
        for name in ("memory_state", "memory_mask")
    ]
    parameters = list(signature.parameters.values())
    at = len(parameters) - (parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
    forward.__signature__ = signature.replace(parameters=[*parameters[:at], *extra, *parameters[at:]])
    return forward


def _fed(arguments: dict[str, Any]) -> Tensor | None:
    """Token ids or embeddings of a call, (B, T) or (B, T, D)."""
    input_ids = arguments.get("input_ids")
    return arguments.get("inputs_embeds") if input_ids is None else input_ids


def _site_index(site: str, num_blocks: int) -> int | None:
    """Block whose output the site takes; -1 for the input of block 0, None for the final norm."""
    if site == "input":
        return -1
    if site == "top":
        return None
    index = num_blocks // 2 if site == "middle" else int(site.removeprefix("layer:"))
    if index >= num_blocks:
        raise ValueError(f"site {site!r} does not exist: this model has blocks 0 to {num_blocks - 1}")
    return index


def _module_name(site: str) -> str:
    return site.replace(":", "_")


def _refuse_cached_turns(model: nn.Module, arguments: dict[str, Any]) -> None:
    """Raise ValueError where transformers would let attention see across the turns of one row.

    It makes the block-diagonal mask of packed rows only without a mask and without a cache, and says nothing otherwise.
    """
    position_ids, use_cache = arguments.get("position_ids"), arguments.get("use_cache")
    if position_ids is None or arguments.get("attention_mask") is not None or torch.compiler.is_compiling():
        return
    if use_cache is None:
        use_cache = getattr(model.config.get_text_config(), "use_cache", False)
    cached = use_cache or arguments.get("past_key_values") is not None
    if cached and bool((position_ids[..., 1:] == 0).any()):
        raise ValueError(
            "position_ids restart within a row, so it holds several turns; with a key-value cache attention would see across "
            "them: pass use_cache=False (and no past_key_values)"
        )
