"""Which memory a state belongs to: a digest of the memory's weights, which outlives a cast to another precision."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from .config import MemoryConfig
from .named import NamedMemoriesMixin
from .sharding import is_sharded, local, whole
from .state import MemoryState


class FingerprintMixin(NamedMemoriesMixin):
    """Fingerprints of the memories on a model. Rounded to another precision, a memory keeps the one it had."""

    def memory_fingerprint(self) -> str:
        """Names this model and its active memory, weights included: a state with another one means nothing here.

        It stays when the model is cast to another precision. On the meta device there are no weights to include.
        """
        return self._fingerprint_of(self.active_memory)

    def _fingerprint_of(self, name: str) -> str:
        parameters = self._weights_of(name)
        # `.to()` puts new numbers under the same parameter and version, hence the type and the address.
        versions = tuple((id(p), _version(p), p.dtype, local(p).data_ptr()) for p in parameters)
        versions = (self.config.get_text_config().vocab_size, optimizer_steps(), *versions)
        fingerprints = self.__dict__.setdefault("_fingerprints", {})
        cached = fingerprints.get(name)
        if cached is None or cached[0] != versions:
            digest = self._digest(self.memories[name], parameters)
            cached = (versions, self._cast_from().get(digest, digest))
            fingerprints[name] = cached
        return cached[1]

    def _owner_of(self, state: MemoryState) -> str | None:
        """The memory on this model that made `state`, if that is not the active one."""
        if state.fingerprint is None:
            return None
        others = (name for name in self.memories if name != self.active_memory)
        owner = next((name for name in others if self._fingerprint_of(name) == state.fingerprint), None)
        return None if owner is None or self.memory_fingerprint() == state.fingerprint else owner

    def _weights_of(self, name: str) -> list[nn.Parameter]:
        return [p for site in self._sites_of(name).values() for p in site.parameters()]

    def _is_readable(self, name: str) -> bool:
        return all(map(_readable, self._weights_of(name)))

    def _digest(self, config: MemoryConfig, weights: Sequence[Tensor]) -> str:
        text = self.config.get_text_config()
        base = [text.model_type, text.hidden_size, text.num_hidden_layers, text.vocab_size]
        digest = hashlib.sha256(json.dumps([base, config.meaning()]).encode())
        for weight in (w for w in weights if w.device.type != "meta"):
            # A copy, for FSDP2 could not free what numpy has seen.
            digest.update(whole(weight.detach()).clone().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:32]

    def _bring(
        self, config: MemoryConfig, sites: dict[str, nn.Module], device: torch.device, dtype: torch.dtype
    ) -> None:
        """Bring the sites of a memory that is new here to the place and precision of the model."""
        weights = [p for module in sites.values() for p in module.parameters()]
        known = all(map(_readable, weights)) and any(p.dtype != dtype for p in weights)
        before = [p.detach() for p in weights]
        fingerprint = self._digest(config, before) if known else ""
        for module in sites.values():
            if any((t.device, t.dtype) != (device, dtype) for t in (*module.parameters(), *module.buffers())):
                module.to(device=device, dtype=dtype)
        if known:
            self._note_cast(config, fingerprint, before, [p for m in sites.values() for p in m.parameters()])

    def _apply(self, fn, recurse=True):
        """What `.to()`, `.half()` and the like call. The states that the model keeps move along."""
        held = {}
        for name in filter(self._is_readable, self.memories):
            held[name] = self._fingerprint_of(name), [p.detach() for p in self._weights_of(name)]
        result = super()._apply(fn, recurse)
        for name, (fingerprint, before) in held.items():
            self._note_cast(self.memories[name], fingerprint, before, self._weights_of(name))
        self._move_states()
        return result

    def _note_cast(
        self, config: MemoryConfig, fingerprint: str, before: Sequence[Tensor], after: Sequence[Tensor]
    ) -> None:
        if [p.dtype for p in before] == [p.dtype for p in after] or not all(map(_readable, after)):
            return
        if all(torch.equal(new, old.to(new)) for old, new in zip(before, after, strict=True)):
            digest = self._digest(config, after)
            if digest != fingerprint:
                self._cast_from()[digest] = fingerprint

    def _cast_from(self) -> dict[str, str]:
        """Fingerprints of memories that were cast, by the digests of what their weights became."""
        return self.__dict__.setdefault("_fingerprints_before_casts", {})

    def _lineage_of(self, name: str) -> tuple[str, ...]:
        """Digest and fingerprint of a memory, if a cast came between them; else nothing."""
        if not self._cast_from():
            return ()
        digest, fingerprint = self._digest(self.memories[name], self._weights_of(name)), self._fingerprint_of(name)
        return () if digest == fingerprint else (digest, fingerprint)

    @torch.no_grad()
    def _move_states(self) -> None:
        """The states that the model keeps go where their sites are, and into the types that those make."""
        if self.__dict__.get("_memory_state") is not None:
            self._memory_state = self._fitted(self._memory_state, self.active_memory)
        parked = self.__dict__.get("_parked_states", {})
        for name, state in parked.items():
            parked[name] = None if state is None else self._fitted(state, name)

    def _fitted(self, state: MemoryState, name: str) -> MemoryState:
        models = {site: module.initial_state(1) for site, module in self._sites_of(name).items()}
        place = next((tensor.device for kept in models.values() for tensor in kept.values()), None)
        if place is None or models.keys() != state.sites.keys():
            return state
        state = state.to(place)
        sites = {
            site: {key: tensor.to(models[site].get(key, tensor).dtype) for key, tensor in kept.items()}
            for site, kept in state.sites.items()
        }
        return replace(state, sites=sites)


def _readable(weight: Tensor) -> bool:
    return weight.device.type != "meta" and not is_sharded(weight)


_steps = 0


def optimizer_steps() -> int:
    """How many steps optimizers have made in this process: fused ones write into weights without raising their version."""
    return _steps


def _count_step(*_: object) -> None:
    global _steps
    _steps += 1


register_optimizer_step_post_hook(_count_step)


def _version(weight: Tensor) -> int:
    """How often it was changed in place; torch does not count for a model that was made in inference mode."""
    return 0 if weight.is_inference() else weight._version
