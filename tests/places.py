"""Tokens that have to be placed by content, drawn at random: for the tests of every form of addressing."""

import torch

from gru_memory.addressing import Lookup


def drawn(rows, length, heads, slots, size, dtype, seed=0):
    """Keys of which some come again, strengths of which half are 0, a clock that ticks now and then, and slots half full."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    written = normal(rows, length, heads, size).tanh()
    again = length // 3
    written[:, 2 * again : 3 * again] = 0.98 * written[:, :again]
    strength = (2 * uniform(rows, length, heads) - 1).clamp_min(0)
    keep = torch.where(uniform(rows, length, 1, 1) < 0.2, 0.9, 1.0).expand(rows, length, heads, slots)
    asked = normal(rows, length, heads, size).tanh()
    signatures = normal(rows, heads, slots, size).tanh() * uniform(rows, heads, slots, 1)
    signatures[:, :, ::2] = 0
    mask = uniform(rows, length) < 0.8
    strength, keep = strength * mask.unsqueeze(-1), torch.where(mask[..., None, None], keep, 1.0)
    told = uniform(rows, length, heads) * mask.unsqueeze(-1)
    numbers = [part.to(dtype) for part in (written, strength, told, keep, asked, torch.tensor([3.0]))]
    return Lookup(*numbers[:3], mask, *numbers[3:]), signatures.to(dtype), uniform(rows, heads).to(dtype)
