"""Checkpoints of a memory beside a peft adapter, for `transformers.Trainer`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback

from ..modeling import MemoryMixin
from ..saving import read_memory
from ..sharding import has_shards

FOLDER = "memory"


class MemoryCheckpoints(TrainerCallback):
    """Keeps the memory in the `memory` folder of every checkpoint, and takes it from there when a run is resumed.

    The Trainer saves a peft model as its adapter alone, so without this the memory beside it would be lost. (Without
    peft a checkpoint is the whole model, memory included.) Only the active memory is kept. With `load_best_model_at_end`
    it ends as that of the best checkpoint, as the adapter does.
    """

    def on_save(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        memory_model = find_memory_model(model)
        if state.is_world_process_zero or has_shards(memory_model):
            memory_model.save_memory(_folder(args, state))

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        if state.global_step == 0 and not args.load_best_model_at_end:
            return
        if has_shards(find_memory_model(model)):
            raise RuntimeError(
                "a memory beside an adapter cannot be read back under FSDP: resume in one process, or with DDP, and leave out "
                "load_best_model_at_end"
            )
        if state.global_step == 0:
            return
        folder = _folder(args, state)
        if not folder.exists():
            raise FileNotFoundError(
                f"the run goes on from step {state.global_step}, but there is no memory in {folder}: was it saved without "
                "MemoryCheckpoints, or with another output_dir?"
            )
        _read_into(model, folder)

    def on_train_end(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        if args.load_best_model_at_end and state.best_model_checkpoint:
            _read_into(model, Path(state.best_model_checkpoint, FOLDER))


def find_memory_model(model: nn.Module) -> MemoryMixin:
    """The model with memory inside whatever wraps it, such as a `PeftModel` or `DistributedDataParallel`."""
    for module in model.modules():
        if isinstance(module, MemoryMixin):
            return module
    raise ValueError(f"{type(model).__name__} has no memory: give it one with gru_memory.add_memory(model)")


def _folder(args: Any, state: Any) -> Path:
    return Path(args.output_dir, f"checkpoint-{state.global_step}", FOLDER)


def _read_into(model: nn.Module, folder: Path) -> None:
    sites = find_memory_model(model).memory_sites()
    wanted = {f"{site}.{key}": t.shape for site, module in sites.items() for key, t in module.state_dict().items()}
    weights = read_memory(folder).read_weights(wanted)
    for site, module in sites.items():  # in place, as the optimiser holds these very parameters
        prefix = f"{site}."
        module.load_state_dict({k.removeprefix(prefix): t for k, t in weights.items() if k.startswith(prefix)})
