"""Site modules of a user's own: what they need, how a file names them, and how they are built again from one.

A file names a kind and its arguments. Only kinds that the running program has registered are built: nothing is imported because
a file says so.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .memory import GRUMemoryWithDecay

OWN_SITES_KEY = "own_sites"

_KINDS: dict[str, type[nn.Module]] = {}


def register_site(kind: str, module: type[nn.Module]) -> None:
    """Let saved memories with site modules of your own be loaded without `sites=`.

    Args:
        kind: what files call the class; yours to choose, and to keep.
        module: the class. `site_config()` of an instance returns the arguments that make another one like it, as a dict of
            values that JSON knows: `module(**arguments)`, to which the saved weights are then given.

    Raises:
        ValueError: a class that lacks a method.
    """
    if not isinstance(kind, str) or not kind:
        raise ValueError(f"the kind of a site is {kind!r}: give it a name, which files will carry")
    _check_methods(module, ("forward", "initial_state", "site_config"), f"a site of kind {kind!r}")
    _KINDS[kind] = module


def check_given(given: Any, sites: Sequence[str]) -> dict[str, nn.Module]:
    """The modules that are given for some of the `sites` of a memory, by site; none for None.

    Raises:
        ValueError: what is given is no dict, for another site, or no module that can be one.
    """
    if not isinstance(given, dict | None):
        raise ValueError(
            f"sites is {given!r}: it takes modules of your own by site, {{'top': module}}; where a memory hooks in is said by "
            "MemoryConfig(sites=...)"
        )
    if unknown := set(given or ()) - set(sites):
        raise ValueError(f"modules were given for sites {sorted(unknown)} that are not in config.sites {tuple(sites)}")
    for site, module in (given or {}).items():
        _check_own_site(site, module)
    return given or {}


def _check_own_site(site: str, module: Any) -> None:
    if not isinstance(module, nn.Module):
        raise ValueError(f"site {site!r} is given a {type(module).__name__}: it must be a torch.nn.Module")
    _check_methods(type(module), ("forward", "initial_state"), f"the module of site {site!r}")


def describe_own_sites(sites: dict[str, nn.Module]) -> dict[str, Any]:
    """What a config says of the modules among `sites` that are not this library's.

    Raises:
        ValueError: a registered module whose `site_config()` JSON cannot hold.
    """
    return {site: _describe(site, module) for site, module in sites.items() if type(module) is not GRUMemoryWithDecay}


def build_own_sites(
    named: dict[str, Any], given: dict[str, nn.Module], where: str, device: torch.device | str = "cpu"
) -> dict[str, nn.Module]:
    """The modules of all sites that are somebody's own: those `given`, and those of registered kinds made anew.

    Args:
        named: what `describe_own_sites` said when the memory was saved.
        given: modules by site; they come before what is registered.
        where: the memory was saved, for messages.
        device: of the modules that are made.

    Raises:
        ValueError: a site that is neither given nor of a registered kind, or one that its class does not make.
    """
    return {**{site: _build(site, entry, where, device) for site, entry in named.items() if site not in given}, **given}


def own_tensors(sites: nn.ModuleDict) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers of the modules among `sites` that are not this library's, by name."""
    for site, module in sites.items():
        if type(module) is not GRUMemoryWithDecay:
            for name, tensor in itertools.chain(module.named_parameters(), module.named_buffers()):
                yield f"{site}.{name}", tensor


def _describe(site: str, module: nn.Module) -> Any:
    cls = type(module)
    name = f"{cls.__module__}.{cls.__qualname__}"
    kind = next((kind for kind, known in _KINDS.items() if known is cls), None)
    if kind is None:
        return name
    arguments = module.site_config()
    try:
        same = isinstance(arguments, dict) and json.loads(json.dumps(arguments)) == arguments
    except (TypeError, ValueError):
        same = False
    if not same:
        raise ValueError(
            f"site_config() of site {site!r} ({name}) returned {arguments!r}: it must be a dict with text as keys "
            "and values that JSON gives back as they were (numbers, text, lists, dicts)"
        )
    return {"kind": kind, "class": name, "arguments": arguments}


def _build(site: str, entry: Any, where: str, device: torch.device | str) -> nn.Module:
    described = isinstance(entry, dict)
    kind, cls = (entry.get("kind"), entry.get("class")) if described else (None, entry)
    if not isinstance(kind, str) or kind not in _KINDS:
        how = f"of the kind {kind!r} ({cls}), which is not registered" if described else f"({cls})"
        remedy = (
            f"gru_memory.register_site({kind or 'name'!r}, TheClass) before loading{'' if described else ' and saving'}"
        )
        raise ValueError(
            f"site {site!r} of {where} is a module of somebody's own {how}, which cannot be built from a file alone: "
            f"call {remedy}, or pass sites={{{site!r}: module}} with one made as the saved one was; its weights are then read "
            "into it"
        )
    arguments = entry.get("arguments")
    try:
        with torch.device(device):
            return _KINDS[kind](**arguments)
    except Exception as error:
        raise ValueError(
            f"site {site!r} of {where} is of the kind {kind!r}, and {_KINDS[kind].__qualname__} cannot be made with {arguments!r} "
            f"({type(error).__name__}: {error}): register the class as it was when the memory was saved"
        ) from error


def _check_methods(cls: Any, names: tuple[str, ...], what: str) -> None:
    if not isinstance(cls, type) or not issubclass(cls, nn.Module):
        raise ValueError(f"{what} is {cls!r}: it must be a class of torch.nn.Module")
    missing = [name for name in names if not callable(getattr(cls, name, None)) or getattr(cls, name) is _NO_FORWARD]
    if missing:
        raise ValueError(f"{what} has no {', '.join(missing)}: docs/memory.md (Sites) says what each must do")


_NO_FORWARD = nn.Module.forward
