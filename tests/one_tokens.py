"""Small sites and single tokens for them, by the short path and by the general one."""

import itertools

import torch

from gru_memory import GRUMemoryWithDecay, one_token

D, E, N, S, SIZE = 20, 12, 3, 5, 8
EXTRA = 7  # width of further key states


def make(dtype=torch.float64, **changes):
    """A site of which no weight is zero."""
    settings = {"cell": "gru", "decay": 0.9, "decay_every": "turn", "embed_size": E, "key_size": EXTRA} | changes
    torch.manual_seed(3)
    site = GRUMemoryWithDecay(D, N, S, SIZE, **settings)
    with torch.no_grad():
        for parameter in site.parameters():
            parameter.add_(torch.randn_like(parameter) / max(1, parameter.shape[-1]) ** 0.5)
    return site.to(dtype).eval()


def one(site, batch=3, seed=0):
    """Inputs of one token in the middle of a text."""
    generator = torch.Generator().manual_seed(seed)
    dtype = site.gate.dtype

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    state = site.initial_state(batch)
    state = {name: (tensor + normal(*tensor.shape)).clamp(-1, 1) for name, tensor in state.items()}
    given = {"hidden_states": normal(batch, 1, D), "token_embeds": normal(batch, 1, E), "state": state}
    given["mask"] = torch.ones(batch, 1, dtype=torch.bool)
    given["turn_starts"] = torch.rand(batch, 1, generator=generator) < 0.5
    given["key_states"] = normal(batch, 1, site.key_size) if site.key_size else None
    return given


def both(site, given):
    """The short path's outputs and state, flat, and those of the general one."""
    with torch.no_grad():
        assert one_token.can_run(site, given["hidden_states"])
        short = one_token.run_one(site, **given)
        general = site.run(**given)[:2]
    return [[hidden, *(state[name] for name in sorted(state))] for hidden, state in (short, general)]


def single(given):
    """The same inputs in float32."""
    return {
        name: single(value) if isinstance(value, dict) else value.float() if value.is_floating_point() else value
        for name, value in given.items()
        if value is not None
    }


def assert_same(short, general, tolerance):
    for got, wanted in zip(short, general, strict=True):
        assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)
        assert torch.equal(got.isnan(), wanted.isnan())
        assert (got - wanted).nan_to_num().abs().max() <= tolerance


SETTINGS = [
    {"cell": cell, "decay": decay, "decay_every": every, "address_rank": rank, "persistent_slots": persistent, **signed}
    for (cell, every), (decay, rank, persistent, signed) in itertools.product(
        (("gru", "turn"), ("mingru", "token")),
        (
            (0.9, 0, 0, {}),
            ([0.9, 0.8, 0.7], 6, 0, {"signature_size": 3, "tied_queries": False, "max_strength": 0.75}),
            ([0.9, 0.8, 0.7, 0.6, 0.5], 0, 4, {}),
            ([[0.5] * S] * N, 6, 4, {"signature_size": 2}),
        ),
    )
] + [
    {"cell": "mingru", "addressing": "content", "address_rank": 6, "signature_size": 3, "decay_every": every, **more}
    for every, more in (
        ("turn", {"persistent_slots": 4}),
        ("turn", {"persistent_slots": 4, "persistent_floor": 0.25}),
        ("token", {"decay": [[0.5, 0.6, 0.7, 0.8, 0.9]] * N, "max_strength": 0.75}),
    )
]
