"""Where weights are when a model lies on several devices, or is kept elsewhere and fetched module by module.

`from_pretrained(..., device_map=...)` has accelerate hang hooks on modules (`AlignDevicesHook`), which move what comes in, and
fetch weights from the CPU or the disk for as long as a module runs. Outside it, such weights are on the meta device.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from .sharding import whole


def device_for(name: str | None = None) -> torch.device:
    """The device of that name; without one a GPU if torch can use one here, else the CPU.

    Raises:
        ValueError: torch knows no such device, or cannot use it here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # no such name or card, or torch was built without it
        reason = str(error).splitlines()[0] if str(error) else "not available"
        raise ValueError(
            f"device is {name!r}, which torch cannot use here ({reason}): choose 'cpu', or 'cuda' on a machine with a GPU "
            "and a torch built for it"
        ) from error
    if device.type == "meta":
        raise ValueError(
            "device is 'meta', which holds no numbers, so nothing can be computed there: choose 'cpu', or 'cuda'"
        )
    return device


def head_weight(head: nn.Module) -> Tensor:
    """(V, E) weight of the LM head, wherever it is kept: on the meta device only if the model as a whole is."""
    if head.weight.device.type == "meta":
        for hook in _hooks_of(head):
            if getattr(hook, "offload", False) and hook.weights_map is not None:
                return hook.weights_map["weight"]
    return whole(head.weight)


def first_parameter(module: nn.Module) -> nn.Parameter | None:
    """The first of `module.parameters()`, found without a list of its parts: this is asked for at every token."""
    own = next((parameter for parameter in module._parameters.values() if parameter is not None), None)
    return next(module.parameters(), None) if own is None else own


def computes_on(module: nn.Module) -> torch.device:
    """The device that a module with weights computes on, also while they are kept elsewhere."""
    device = next(module.parameters()).device
    for hook in _hooks_of(module) if device.type == "meta" else ():
        if getattr(hook, "execution_device", None) is not None:
            return torch.empty(0, device=hook.execution_device).device  # it may be a number or a name
    return device


def fed_on(model: nn.Module) -> torch.device:
    """The device that a causal LM takes token ids on, also while accelerate keeps its embeddings elsewhere.

    `model.device` is that of the first weight: the meta device, where those are fetched.
    """
    return computes_on(model.get_input_embeddings())


def is_fetched(module: nn.Module) -> bool:
    """Whether accelerate keeps weights of this module elsewhere, and fetches them whenever it runs."""
    return any(getattr(hook, "offload", False) for part in module.modules() for hook in _hooks_of(part))


def refuse_replaced_forward(model: nn.Module) -> None:
    """Raise ValueError if something else than accelerate's hooks stands before `forward`: it would go on calling the old one."""
    if "forward" in model.__dict__ and not hasattr(model, "_hf_hook"):
        raise ValueError(
            "this model's forward was replaced (by torch.compile(model.forward), accelerator.prepare or the like): add the memory "
            "first, then do that"
        )


def renew_hook(model: nn.Module) -> None:
    """Have accelerate's hook on the model itself, if it has one, call the `forward` of its present class."""
    if hasattr(model, "_hf_hook"):
        from accelerate.hooks import add_hook_to_module

        model._old_forward = MethodType(type(model).forward, model)
        add_hook_to_module(model, model._hf_hook)


def run_where_it_lies(module: nn.Module, hidden_states: Tensor, **given: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """A site on its own device, which need be neither that of the hidden states nor that of the mask and the state.

    Returns the hidden states where they were, and the state where the mask is.
    """
    here, home = hidden_states.device, given["mask"].device
    parameter = first_parameter(module)
    there = here if parameter is None else parameter.device
    if here == there == home:
        return module(hidden_states, **given)
    given = {name: _moved(value, there) for name, value in given.items()}
    hidden_states, state = module(hidden_states.to(there), **given)
    return hidden_states.to(here), _moved(state, home)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, dict):
        return {name: _moved(part, device) for name, part in value.items()}
    return value.to(device) if isinstance(value, Tensor) else value


def _hooks_of(module: nn.Module) -> Iterator[Any]:
    hook = getattr(module, "_hf_hook", None)
    yield from getattr(hook, "hooks", (hook,)) if hook is not None else ()
