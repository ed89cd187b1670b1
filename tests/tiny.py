"""Tiny models with a memory that speaks up: what the invariants are tested on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import pytest
import torch
from families import BOS, CONFIGS, EOS, HIDDEN, LAYERS, PAD, VOCABULARY
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from gru_memory import GRUMemoryWithDecay, MemoryConfig, MemoryState, add_memory

__all__ = ["BOS", "EOS", "HIDDEN", "LAYERS", "PAD", "VOCABULARY"]  # of families.py, for those who import them from here

FAMILIES = ("gpt2", "llama", "qwen2")  # one with tied embeddings of each kind, and one without; matrix.py has them all
CELLS = ("gru", "mingru")
CLOCKS = ("token", "turn")
# Every pair of family, cell and clock is among these; "content" is the mingru cell in slots that are found by their content.
KINDS = [
    ("gpt2", "gru", "token"),
    ("gpt2", "mingru", "turn"),
    ("llama", "gru", "turn"),
    ("llama", "mingru", "token"),
    ("qwen2", "gru", "token"),
    ("qwen2", "mingru", "turn"),
    ("gpt2", "content", "turn"),
    ("llama", "content", "token"),
    ("qwen2", "content", "turn"),
]

_MEMORY = {"sites": ("input", "middle", "top"), "num_heads": 2, "num_slots": 4, "slot_size": 8, "decay": 0.9}
_MINGRU = {
    "address_rank": 6,
    "signature_size": 3,
    "persistent_slots": 2,
    "max_strength": 0.75,
    "cell": "mingru",
}  # the two cells are tested with two ways to address
_CONTENT = {
    **_MINGRU,
    "addressing": "content",
    "num_slots": 6,
    "slot_size": 10,
    "signature_size": 5,
    "persistent_floor": 0.3,
    "max_strength": 1.0,
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """For modules that import it: with tensors this small, threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def base_model(family: str = "gpt2", seed: int = 0) -> PreTrainedModel:
    """A causal LM with random weights, large enough for every token to matter. Tied embeddings except for Llama."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(CONFIGS[family]()).eval()


def wake(model: PreTrainedModel, seed: int = 1) -> PreTrainedModel:
    """Random numbers where an untrained memory has zeros, so that every path of it is heard."""
    generator = torch.Generator().manual_seed(seed)
    for site in model.memory_sites().values():
        if not isinstance(site, GRUMemoryWithDecay):
            continue
        with torch.no_grad():
            for parameter in site.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)
                parameter += noise / max(1, parameter.shape[-1] if parameter.dim() else 1) ** 0.5
            site.gate.fill_(0.8)
    return model


def memory_model(family: str = "gpt2", seed: int = 0, **config) -> PreTrainedModel:
    """A tiny model with an open memory at three sites, in float64."""
    form = {"mingru": _MINGRU, "content": _CONTENT}.get(config.get("cell"), {})
    if config.get("cell") == "content":
        config["cell"] = "mingru"
    return wake(add_memory(base_model(family, seed), MemoryConfig(**{**_MEMORY, **form, **config}))).double()


def random_ids(rows: int = 2, length: int = 20, seed: int = 0) -> torch.Tensor:
    """(rows, length) token ids without the special ones."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def padded(ids, left=0, right=0):
    """`ids` between pad tokens, with the mask and positions that go with them."""
    ids = F.pad(ids, (left, right), value=PAD)
    mask = torch.zeros_like(ids)
    mask[:, left : ids.shape[1] - right] = 1
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}


_tolerance: ContextVar[float] = ContextVar("tolerance", default=1e-9)


@contextlib.contextmanager
def tolerance_of(tolerance: float) -> Iterator[None]:
    """For models that compute in float32, or compute a part of themselves in it."""
    token = _tolerance.set(tolerance)
    try:
        yield
    finally:
        _tolerance.reset(token)


def assert_close(got: torch.Tensor, wanted: torch.Tensor, tolerance: float | None = None) -> None:
    tolerance = _tolerance.get() if tolerance is None else tolerance
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


def assert_same_state(got: MemoryState, wanted: MemoryState, tolerance: float | None = None) -> None:
    """Slots, last keys and counters of all sites agree."""
    assert set(got.sites) == set(wanted.sites)
    for site, kept in wanted.sites.items():
        assert set(got.sites[site]) == set(kept)
        for key, tensor in kept.items():
            assert_close(got.sites[site][key], tensor, tolerance)
    assert got.tokens.tolist() == wanted.tokens.tolist()
    assert got.turns.tolist() == wanted.turns.tolist()
    assert got.pending.tolist() == wanted.pending.tolist()


def assert_differ(first: MemoryState, second: MemoryState) -> None:
    """The slots of at least one site are far apart: guards a test against comparing nothing."""
    apart = [(kept["slots"] - second.sites[site]["slots"]).abs().max() for site, kept in first.sites.items()]
    assert max(apart) > 1e-3


def loss_of(logits, seed=6):
    """A number that depends on every logit."""
    generator = torch.Generator().manual_seed(seed)
    return (logits.log_softmax(-1) * torch.randn(logits.shape, generator=generator, dtype=logits.dtype)).sum()


def gradients(model, loss):
    """By the names of the parameters that have one."""
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(got, wanted, tolerance=1e-8):
    assert set(got) == set(wanted)
    for name, gradient in wanted.items():
        assert (got[name] - gradient).abs().max() <= tolerance * (1 + gradient.abs().max()), name


class SumSite(nn.Module):
    """A memory of a user's own: it adds up what it sees and gives the mean back."""

    def __init__(self, width: int = HIDDEN) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((width,), 0.1))

    def initial_state(self, batch_size: int) -> dict[str, torch.Tensor]:
        zeros = torch.zeros(batch_size, len(self.scale), dtype=self.scale.dtype, device=self.scale.device)
        return {"sum": zeros, "count": torch.zeros_like(zeros[:, 0])}

    def forward(self, hidden_states, token_embeds, state, mask, turn_starts):
        seen = torch.where(mask[..., None], hidden_states, 0)
        sums = state["sum"].unsqueeze(1) + seen.cumsum(dim=1)
        counts = state["count"].unsqueeze(1) + mask.to(sums).cumsum(dim=1)
        mean = sums / counts.clamp_min(1).unsqueeze(-1)
        return hidden_states + self.scale * mean, {"sum": sums[:, -1], "count": counts[:, -1]}


def own_site_model(family: str) -> PreTrainedModel:
    """A tiny model with such a site in the middle, in float64."""
    config = MemoryConfig(sites=("middle", "top"), num_heads=2, num_slots=4, slot_size=8)
    return wake(add_memory(base_model(family), config, {"middle": SumSite()})).double()
