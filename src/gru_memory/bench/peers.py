"""What the memory is measured against: the same recurrence around `torch.nn.GRUCell`, `torch.nn.GRU`, titans, LoRA."""

from __future__ import annotations

import math
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from ..scan import ScanInputs


class GRUCellLoop(nn.Module):
    """The recurrence of `gru` as one writes it first: a Python loop around one `torch.nn.GRUCell` a head."""

    def __init__(self, num_heads: int, slot_size: int) -> None:
        super().__init__()
        self.cells = nn.ModuleList(nn.GRUCell(slot_size, slot_size) for _ in range(num_heads))

    def forward(self, inputs: ScanInputs, slots: Tensor) -> tuple[Tensor, Tensor]:
        """`inputs.values` (B, T, N, d) before the input half of the cell; otherwise as `scan_reference`."""
        reads = []
        for value, address, write, keep, query in zip(*(part.unbind(1) for part in inputs), strict=True):
            held = keep.unsqueeze(-1) * slots  # (B, N, S, d)
            stored = torch.einsum("bns,bnsd->bnd", address, held)
            content = torch.stack([cell(value[:, n], stored[:, n]) for n, cell in enumerate(self.cells)], dim=1)
            slots = held + write.unsqueeze(-1) * (content.unsqueeze(-2) - held)
            reads.append(torch.einsum("bns,bnsd->bnd", query, slots))
        return torch.stack(reads, dim=1), slots


def missing() -> list[str]:
    """Packages of the `bench` extra that are not installed: their cases are left out."""
    return [name for name in ("titans_pytorch", "peft") if find_spec(name) is None]


def titans_memory(hidden_size: int, chunk_size: int = 64, heads: int = 1, size: int | None = None) -> nn.Module | None:
    """titans-pytorch's `NeuralMemory`; None where it is not installed.

    Args:
        hidden_size: of what it reads and returns.
        chunk_size: tokens between two updates of its weights.
        heads: memories side by side.
        size: each is one matrix of so many rows and columns; the default network over `hidden_size` if None.
    """
    if find_spec("titans_pytorch") is None:
        return None
    from titans_pytorch import MemoryMLP, NeuralMemory

    if size is None:
        return NeuralMemory(dim=hidden_size, chunk_size=chunk_size)
    network = MemoryMLP(size, depth=1)
    memory = NeuralMemory(hidden_size, chunk_size=chunk_size, heads=heads, dim_head=size, model=network)
    for parameter in memory.parameters():  # some are views that share numbers, which no optimiser can step
        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
    return memory


def titans_size(floats: int, heads: int) -> int:
    """The largest `size` whose carried weights and momentum, 2 heads (size^2 + size), are at most `floats` numbers."""
    return int((math.sqrt(1 + 2 * floats / heads) - 1) / 2)


def with_lora(model: nn.Module, rank: int = 8) -> nn.Module | None:
    """PEFT's LoRA on all attention projections; None where peft is not installed."""
    if find_spec("peft") is None:
        return None
    from peft import LoraConfig, get_peft_model

    if model.config.model_type == "gpt2":  # queries, keys and values in one, stored the other way round
        targets = {"target_modules": ["c_attn", "attn.c_proj"], "fan_in_fan_out": True}
    else:
        targets = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    return get_peft_model(model, LoraConfig(r=rank, task_type="CAUSAL_LM", **targets))
