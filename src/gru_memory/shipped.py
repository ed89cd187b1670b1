"""The memories that come with the library, and a model with one of them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from .config import CONFIG_NAME
from .embedded import EMBEDDED_NAME, load_model
from .models import add_memory
from .saving import read_memory

SHIPPED = {EMBEDDED_NAME: "smollm2-135m-instruct"}  # model -> folder under adapters/

_PACKAGE = Path(__file__).resolve().parent


def shipped_memory(model: str = EMBEDDED_NAME) -> Path:
    """The folder of the trained memory for `model`: inside the installed package, or at the root of a checkout.

    Raises:
        FileNotFoundError: none ships for this model, or this copy of the library came without it.
    """
    if model not in SHIPPED:
        raise FileNotFoundError(
            f"no trained memory ships for {model!r} (only for {', '.join(SHIPPED)}): name the folder of yours, "
            "or train one with `gru-memory train`"
        )
    for root in (_PACKAGE, _PACKAGE.parents[1]):
        folder = root / "adapters" / SHIPPED[model]
        if (folder / CONFIG_NAME).is_file():
            return folder
    raise FileNotFoundError(
        f"the trained memory for {model!r} is not part of this copy of the library: name the folder of a memory, "
        "or train one with `gru-memory train`"
    )


def load_with_memory(
    model: str = EMBEDDED_NAME,
    memory: str | os.PathLike[str] | None = None,
    device: str | torch.device | None = None,
) -> tuple[Any, Any]:
    """A model with a trained memory, and its tokenizer.

    Args:
        model: "smollm2", a folder, a `.gguf` file or a hub name; see `load_model`.
        memory: folder of a saved memory, or its hub name ("user/repo"); None takes the one that ships for this model.
        device: where it is put; the CPU if not given.
    """
    folder = shipped_memory(model) if memory is None else memory
    read_memory(folder)  # a wrong folder is refused before the model takes its time
    base, tokenizer = load_model(model)
    base = add_memory(base)
    base.load_memory(folder)
    base.freeze_base()
    return base if device is None else base.to(device), tokenizer
