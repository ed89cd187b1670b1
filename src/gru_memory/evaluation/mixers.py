"""Small sequence models that differ in one layer alone, how tokens meet: attention to all tokens or the last ones, our memory,
RMT's memory tokens, titans.

All have the same frame: embeddings, `layers` times a short convolution and the layer in question, a norm, and a head tied to the
embeddings. The convolution lets every kind see the token before, as those of Mamba and H3 do (Arora et al. 2023, 2312.04927).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..bench.peers import titans_memory, titans_size
from ..memory import GRUMemoryWithDecay

KERNEL = 3  # tokens that a convolution sees
HEADS = 4
SLOT_SIZE = 16  # of our memory
TITANS_HEADS, TITANS_CHUNK = 2, 8  # memories a layer, and tokens between two updates of one
TITANS_MISSING = "titans-pytorch is not installed: pip install 'gru-memory[bench]'"
KINDS = ("gru", "mingru", "rmt", "titans", "window", "attention")


def build(kind: str, vocabulary: int, width: int, layers: int, state_bytes: int, segment: int) -> Mixer:
    """A model whose state between two tokens takes at most `state_bytes`; that of `attention` grows instead.

    `window` is attention to as many of the last tokens as have keys and values in so many bytes.

    Args:
        kind: one of `KINDS`.
        vocabulary: tokens.
        width: of the hidden states, a multiple of 8.
        layers: of that kind.
        state_bytes: of the state in float32, all layers together. The last tokens that a convolution keeps, the same for
            all, are not counted; nor is the segment that attention of RMT sees.
        segment: tokens of a segment of RMT.

    Raises:
        ValueError: an unknown kind, or a state too small for its least shape.
        ModuleNotFoundError: titans-pytorch is not installed.
    """
    if kind == "attention":
        return Mixer(vocabulary, width, [CausalAttention(width) for _ in range(layers)])
    if kind == "rmt":
        tokens = state_bytes // (4 * width)
        _enough(tokens, kind, state_bytes)
        return RecurrentMemoryTransformer(
            vocabulary, width, [CausalAttention(width) for _ in range(layers)], tokens, segment
        )
    floats = state_bytes // (4 * layers)
    if kind == "window":
        tokens = floats // (2 * width)
        _enough(tokens, kind, state_bytes)
        return Mixer(vocabulary, width, [CausalAttention(width, tokens) for _ in range(layers)])
    if kind == "titans":
        return Mixer(vocabulary, width, [Titans(width, floats) for _ in range(layers)])
    if kind not in ("gru", "mingru"):
        raise ValueError(f"{kind!r} is no kind of model: choose of {', '.join(KINDS)}")
    slots = (floats // HEADS - 1) // (SLOT_SIZE + 1)  # a slot, its share of the next address, and one strength a head
    _enough(slots, kind, state_bytes)
    return Mixer(vocabulary, width, [Remembering(width, slots, kind) for _ in range(layers)])


def _enough(count: int, kind: str, state_bytes: int) -> None:
    if count < 1:
        raise ValueError(f"{state_bytes} bytes are too few for a state of {kind}: give more, or fewer layers")


class Mixer(nn.Module):
    """Next-token logits for token ids (B, T): (B, T, V)."""

    def __init__(self, vocabulary: int, width: int, parts: list[nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        nn.init.normal_(self.embed.weight, std=width**-0.5)
        self.convolutions = nn.ModuleList(ShortConvolution(width) for _ in parts)
        self.parts = nn.ModuleList(parts)
        self.norm = nn.RMSNorm(width)

    def forward(self, ids: Tensor) -> Tensor:
        embeds = self.embed(ids)
        return self.head(self.through(embeds, embeds))

    def through(self, x: Tensor, embeds: Tensor) -> Tensor:
        """Hidden states (B, T, D) after all layers."""
        for convolution, part in zip(self.convolutions, self.parts, strict=True):
            x = part(x + convolution(x), embeds)
        return x

    def head(self, x: Tensor) -> Tensor:
        return self.norm(x) @ self.embed.weight.t()

    def state_bytes(self, tokens: int) -> int:
        """What one row carries on after so many tokens, in float32."""
        return sum(part.state_bytes(tokens) for part in self.parts)


class RecurrentMemoryTransformer(Mixer):
    """Attention within segments; memory tokens go from one to the next (Bulatov et al. 2022, 2207.06881).

    A segment is read as [memory, tokens, memory]: its tokens see the first, and the last becomes the memory after it.
    """

    def __init__(self, vocabulary: int, width: int, parts: list[nn.Module], tokens: int, segment: int) -> None:
        super().__init__(vocabulary, width, parts)
        self.memory, self.segment = nn.Parameter(torch.randn(tokens, width) * width**-0.5), segment

    def forward(self, ids: Tensor) -> Tensor:
        memory = self.memory.expand(len(ids), -1, -1)  # (B, m, D)
        logits = []
        for part in self.embed(ids).split(self.segment, dim=1):
            whole = torch.cat([memory, part, memory], dim=1)
            out = self.through(whole, whole)
            read, memory = out[:, memory.shape[1] : -memory.shape[1]], out[:, -memory.shape[1] :]
            logits.append(self.head(read))
        return torch.cat(logits, dim=1)

    def state_bytes(self, tokens: int) -> int:
        return 4 * self.memory.numel()


class ShortConvolution(nn.Module):
    """A causal convolution of every channel on its own, over the last `KERNEL` tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.mix = nn.Conv1d(width, width, KERNEL, groups=width, padding=KERNEL - 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(self.norm(x).transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)


class CausalAttention(nn.Module):
    """Softmax attention of `HEADS` heads, to all earlier tokens or to the last `window` of them, and to the token itself."""

    def __init__(self, width: int, window: int | None = None) -> None:
        super().__init__()
        self.norm, self.width, self.window = nn.RMSNorm(width), width, window
        self.project = nn.Linear(width, 3 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, embeds: Tensor) -> Tensor:
        parts = self.project(self.norm(x)).chunk(3, dim=-1)
        query, key, value = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts)  # (B, H, T, D/H)
        seen = self._seen(x.shape[1]) if self.window else None
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=seen, is_causal=seen is None)
        return x + self.output(mixed.transpose(1, 2).flatten(2))

    def _seen(self, length: int) -> Tensor:
        """(T, T): whether a token (row) sees another one (column)."""
        place = torch.arange(length)
        ago = place[:, None] - place
        return (ago >= 0) & (ago <= self.window)

    def state_bytes(self, tokens: int) -> int:
        return 4 * 2 * min(tokens, self.window or tokens) * self.width


class Remembering(nn.Module):
    """One site of our memory, which keeps all that it is told (no decay)."""

    def __init__(self, width: int, slots: int, cell: str) -> None:
        super().__init__()
        self.site = GRUMemoryWithDecay(
            width, HEADS, slots, SLOT_SIZE, decay=1.0, cell=cell, gate_init=1.0, embed_size=width
        )

    def forward(self, x: Tensor, embeds: Tensor) -> Tensor:
        return self.site(x, embeds)[0]

    def state_bytes(self, tokens: int) -> int:
        return sum(4 * tensor.numel() for tensor in self.site.initial_state(1).values())


class Titans(nn.Module):
    """titans-pytorch's `NeuralMemory` (Behrouz et al. 2024, 2501.00663): matrices that are trained while they read.

    What it carries is the change of its weights and their momentum, so `floats` of them make two matrices a head.
    """

    def __init__(self, width: int, floats: int) -> None:
        super().__init__()
        size = titans_size(floats, TITANS_HEADS)
        _enough(size, "titans", 4 * floats)
        memory = titans_memory(width, TITANS_CHUNK, TITANS_HEADS, size)
        if memory is None:
            raise ModuleNotFoundError(TITANS_MISSING)
        self.norm, self.memory = nn.RMSNorm(width), memory

    def forward(self, x: Tensor, embeds: Tensor) -> Tensor:
        return x + self.memory(self.norm(x))[0]

    def state_bytes(self, tokens: int) -> int:
        weights = sum(parameter.numel() for parameter in self.memory.memory_model.parameters())
        return 4 * 2 * TITANS_HEADS * weights
