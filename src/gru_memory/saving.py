"""Memories on disk: `memory_config.json` and `memory_model.safetensors`, the memory alone, never a base weight."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .config import CONFIG_NAME, MemoryConfig

WEIGHTS_NAME = "memory_model.safetensors"
BASE_KEY = "base_model"


def describe_base(model: Any) -> dict[str, Any]:
    """What a memory needs of the model under it."""
    config = model.config.get_text_config()
    return {
        "model_type": config.model_type,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "vocab_size": config.vocab_size,
    }


def read_memory(folder: str | Path) -> tuple[MemoryConfig, dict[str, Any], dict[str, Tensor]]:
    """Config, description of the base model, and weights of a saved memory. Raises ValueError with the reason."""
    folder = Path(folder)
    config_path, weights_path = folder / CONFIG_NAME, folder / WEIGHTS_NAME
    for path in (config_path, weights_path):
        if not path.is_file():
            raise ValueError(
                f"{folder} holds no memory: {path.name} is missing. Write one with model.save_memory({str(folder)!r})"
            )
    try:
        values = json.loads(config_path.read_text(encoding="utf-8"))
        base = values.pop(BASE_KEY)
        config = MemoryConfig.from_dict(values)
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{config_path} is not a memory config ({error}): save the memory again") from error
    try:
        with safe_open(weights_path, "pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(
            f"{weights_path} is damaged or not a safetensors file ({error}): copy or save it again"
        ) from error
    return config, base, weights


class MemorySavingMixin:
    """Saving and loading of the memory alone."""

    def save_memory(self, folder: str | Path) -> None:
        """Write the memory (not the model under it, and not its state) into `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {
            f"{site}.{name}": tensor.detach().cpu().contiguous()
            for site, module in self.memory_sites().items()
            for name, tensor in module.state_dict().items()
        }
        part = folder / f"{WEIGHTS_NAME}.part"
        save_file(weights, part, {"format": "pt"})
        part.replace(folder / WEIGHTS_NAME)
        values = {**self.memory_config.to_dict(), BASE_KEY: describe_base(self)}
        (folder / CONFIG_NAME).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

    def load_memory(self, folder: str | Path) -> None:
        """Replace this model's memory by the one in `folder`; its state starts empty.

        Raises:
            ValueError: no memory there, a damaged one, or one for another base model. The model keeps what it has.
        """
        config, base, weights = read_memory(folder)
        if (mine := describe_base(self)) != base:
            raise ValueError(
                f"the memory in {folder} is for {base}, this model is {mine}: load the model it was trained on"
            )
        sites = {site: self.build_site(config) for site in config.sites}
        for site, module in sites.items():
            own = {k.removeprefix(f"{site}."): v for k, v in weights.items() if k.startswith(f"{site}.")}
            try:
                module.load_state_dict(own)
            except RuntimeError as error:
                raise ValueError(
                    f"the weights in {folder} do not fit its {CONFIG_NAME} ({error}): save it again"
                ) from error
        self.attach_memory(config, sites)
