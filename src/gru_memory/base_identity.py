"""Which base model a memory belongs to: its family and sizes, its name, and a digest of its weights."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

import torch

from .sharding import whole

SIZES = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
SAMPLES = 1 << 14  # weights that the digest looks at, spread over all matrices
REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def describe_base(model: Any) -> dict[str, Any]:
    """What a saved memory says of the model under it."""
    config = model.config.get_text_config()
    return {
        "name": base_name(model),
        "weights": weights_digest(model),
        **{name: getattr(config, name) for name in SIZES},
    }


def base_name(model: Any) -> str | None:
    """The hub name that the model was loaded by; None for a folder, which would tell where somebody keeps their files."""
    name = str(getattr(model.config, "_name_or_path", "") or "")
    return name if REPO_ID.fullmatch(name) and not Path(name).exists() else None


@torch.no_grad()
def weights_digest(model: Any) -> str | None:
    """A digest of the signs of some thousand base weights, spread over all matrices; None if they cannot be read.

    Signs survive rounding to half precision, so one model has one digest in float32, bfloat16 and float16. Training does
    not leave them alone: where a weight moves by a share e of its size, about e / pi of all signs flip, so a change of one
    in a thousand flips five of those looked at. And a digest of signs gives no weight away.
    """
    added = _adapter_parameters(model)
    matrices = [
        p
        for name, p in model.named_parameters()
        if not name.startswith("gru_memory") and id(p) not in added and p.dim() > 1 and _readable(p)
    ]
    if not matrices or any(p.device.type == "meta" for p in matrices):
        return None
    digest = hashlib.sha256()
    each = max(1, SAMPLES // len(matrices))
    for matrix in matrices:
        # A step of the golden section spreads few samples evenly, and never along one column.
        step = int(matrix.numel() * 0.6180339887) | 1
        places = torch.arange(min(each, matrix.numel()), device=matrix.device) * step % matrix.numel()
        values = whole(matrix.detach()).flatten()[places].float()
        digest.update((values > 0).cpu().numpy().tobytes())
    return digest.hexdigest()[:32]


def check_base(saved: dict[str, Any], model: Any, where: str, weights: bool = True) -> None:
    """Raise ValueError unless a memory saved with the base model `saved` fits the base of `model`.

    Args:
        saved: what `describe_base` said when the memory was saved. Without a digest the weights are not compared.
        model: the model it is to be loaded on.
        where: of the saved memory, for the message.
        weights: whether other weights of the same family and sizes are refused.
    """
    mine = describe_base(model)
    different = [name for name in SIZES if saved.get(name) != mine[name]]
    if different:
        wanted, found = ({name: base.get(name) for name in different} for base in (saved, mine))
        raise ValueError(
            f"the memory in {where} is for another base model, {saved.get('name') or saved.get('model_type')!r} with "
            f"{wanted}; this one has {found}: load the model it was trained on"
        )
    digests = saved.get("weights"), mine["weights"]
    if weights and None not in digests and digests[0] != digests[1]:
        names = [f"{base['name']!r}" if base.get("name") else "a model without a hub name" for base in (saved, mine)]
        raise ValueError(
            f"the memory in {where} was saved with other weights under it (of {names[0]}) than this model has ({names[1]}), "
            "though the sizes are the same: another fine-tune, or a coarser quantisation. Load the model it was trained on, or "
            "pass check_base=False to use it here all the same"
        )


def _adapter_parameters(model: Any) -> set[int]:
    """The ids of what peft has put into a model: everything in its layers but the layer that each of them wraps."""
    added = set()
    for module in model.modules():
        if hasattr(module, "adapter_layer_names"):
            wrapped = getattr(module, "base_layer", getattr(module, "original_module", None))
            kept = set() if wrapped is None else {id(p) for p in wrapped.parameters()}
            added |= {id(p) for p in module.parameters()} - kept
    return added


def _readable(parameter: torch.Tensor) -> bool:
    return parameter.is_floating_point() and parameter.numel() > 0
