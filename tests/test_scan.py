"""The chunked form of the recurrence against the plain one, and what holds whichever form `scan` picks."""

import pytest
import torch
from tiny import assert_close, one_thread  # noqa: F401

from gru_memory.scan import CellWeights, ScanInputs, chunked, scan, scan_chunked, scan_reference
from gru_memory.scan.chunked import BLOCK_TOKENS, CHUNK_TOKENS

B, N, S, D = 2, 3, 4, 5


def scan_inputs(length, decay=0.97, dtype=torch.float64, width=D, seed=0):
    """Random inputs of a scan, the state before them, and the weights of a gru cell."""
    torch.manual_seed(seed)
    values = torch.randn(B, length, N, width, dtype=dtype).tanh()
    address = torch.randn(B, length, N, S, dtype=dtype).mul(2).softmax(-1)
    write = torch.rand(B, length, N, 1, dtype=dtype) * address
    keep = torch.where(torch.rand(B, length, 1, 1, dtype=dtype) < 0.7, decay, 1.0).expand(B, length, N, S).to(dtype)
    query = torch.randn(B, length, N, S, dtype=dtype).softmax(-1)
    slots = torch.rand(B, N, S, D, dtype=dtype) * 2 - 1
    return ScanInputs(values, address, write, keep, query), slots


def gru_weights(dtype=torch.float64):
    torch.manual_seed(1)
    return CellWeights(torch.randn(N, 3 * D, D, dtype=dtype), torch.randn(N, 3 * D, dtype=dtype))


LENGTHS = (1, 2, CHUNK_TOKENS - 1, CHUNK_TOKENS, CHUNK_TOKENS + 1, 5 * CHUNK_TOKENS + 3)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("decay", (1.0, 0.9, 1e-3))
def test_chunks_give_what_steps_give(length, decay):
    inputs, slots = scan_inputs(length, decay)
    reads, after = scan_chunked(inputs, slots)
    wanted_reads, wanted_after = scan_reference(inputs, slots)
    assert reads.shape == (B, length, N, D)
    assert_close(reads, wanted_reads, 1e-11)
    assert_close(after, wanted_after, 1e-11)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("decay", (1.0, 0.9))
def test_gradients_of_chunks_are_those_of_steps(length, decay):
    def gradients(form):
        inputs, slots = scan_inputs(length, decay)
        leaves = [
            field.detach().clone().requires_grad_() for field in (inputs.values, inputs.write, inputs.query, slots)
        ]
        values, write, query, slots = leaves
        reads, after = form(inputs._replace(values=values, write=write, query=query), slots)
        generator = torch.Generator().manual_seed(5)
        loss = sum((t * torch.randn(t.shape, generator=generator, dtype=t.dtype)).sum() for t in (reads, after))
        return torch.autograd.grad(loss, leaves)

    for got, wanted in zip(gradients(scan_chunked), gradients(scan_reference), strict=True):
        assert wanted.abs().max() > 1e-3
        assert_close(got, wanted, 1e-10)


def test_gradients_of_chunks_are_numerical_gradients(monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK_TOKENS", 2)
    inputs, slots = scan_inputs(5)
    first = ScanInputs(*(field[:1, :, :1] for field in inputs))
    leaves = [
        field.detach().clone().requires_grad_() for field in (first.values, first.write, first.query, slots[:1, :1])
    ]
    assert torch.autograd.gradcheck(
        lambda values, write, query, slots: scan_chunked(
            first._replace(values=values, write=write, query=query), slots
        ),
        leaves,
    )


@pytest.mark.parametrize("decay", (1.0, 0.9))
def test_float32_over_8192_tokens(decay):
    """Outputs and gradients, against float64 step by step."""

    def results(form, dtype):
        inputs, slots = scan_inputs(8 * BLOCK_TOKENS, decay)
        names = ("values", "write", "query")
        leaves = {name: getattr(inputs, name).to(dtype).requires_grad_() for name in names}
        inputs = ScanInputs(*(field.to(dtype) for field in inputs))._replace(**leaves)
        reads, after = scan(inputs, slots.to(dtype), form=form)
        generator = torch.Generator().manual_seed(5)
        loss = sum((t * torch.randn(t.shape, generator=generator).to(dtype)).sum() for t in (reads, after))
        return reads, after, *torch.autograd.grad(loss, list(leaves.values()))

    steps = results("reference", torch.float64)
    for form in ("chunked", "compiled"):
        for got, wanted in zip(results(form, torch.float32), steps, strict=True):
            assert wanted.abs().max() > 1e-3
            assert_close(got.double(), wanted, 2e-5)


@pytest.mark.parametrize("form, tolerance", [("chunked", 2.0**-8), ("one", 0.02)])  # a single step rounds as it goes
def test_bfloat16_is_as_close_as_rounding_allows(form, tolerance):
    inputs, slots = scan_inputs(1 if form == "one" else 5 * CHUNK_TOKENS + 3, 0.9)

    def results(form, dtype):
        leaves = [field.bfloat16().to(dtype).requires_grad_() for field in (*inputs, slots)]
        reads, after = scan(ScanInputs(*leaves[:5]), leaves[5], form=form)
        wanted = [leaves[0], *leaves[2:]]  # `mingru` does not look at the address
        return reads, after, *torch.autograd.grad(reads.sum() + after.square().sum(), wanted)

    for got, wanted in zip(results(form, torch.bfloat16), results("reference", torch.float64), strict=True):
        assert got.dtype == torch.bfloat16
        assert (got - wanted).abs().max() < tolerance * wanted.abs().max()


@pytest.mark.parametrize("cell", ("gru", "mingru"))
def test_no_tokens_leave_the_state_as_it_is(cell):
    inputs, slots = scan_inputs(0, width=3 * D if cell == "gru" else D)
    reads, after = scan(inputs, slots, gru_weights() if cell == "gru" else None)
    assert reads.shape == (B, 0, N, D) and torch.equal(after, slots)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_writes_of_full_strength(dtype):
    inputs, slots = scan_inputs(3 * CHUNK_TOKENS + 5, 0.9, dtype)
    write = inputs.write.clone()
    write[:, ::4] = 1.0
    write[:, CHUNK_TOKENS - 1 : CHUNK_TOKENS + 1] = 1.0  # at a border of chunks
    inputs = inputs._replace(write=write)
    reads, after = scan_chunked(inputs, slots)
    wanted_reads, wanted_after = scan_reference(inputs, slots)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-10
    assert_close(reads, wanted_reads, tolerance)
    assert_close(after, wanted_after, tolerance)
    last = write.clone()
    last[:, -1] = 1.0  # nothing of what was there is left
    _, after = scan_chunked(inputs._replace(write=last), slots)
    assert_close(after, inputs.values[:, -1].unsqueeze(2).expand_as(after), tolerance)


@pytest.mark.parametrize("strength", (3e-5, 1e-3, 0.1, 1.0))
def test_weak_writes_do_not_add_up_beyond_one(strength):
    """What a float32 rounds the same way at every step is what drifts."""
    field = torch.ones(1, 10_000, 1, 1)
    inputs, slots = ScanInputs(field, field, field * strength, field, field), torch.ones(1, 1, 1, 1)
    for _ in range(10):
        _, slots = scan_chunked(inputs, slots)
    assert abs(slots.item() - 1) <= 1e-6


@pytest.mark.parametrize("cell", ("gru", "mingru"))
def test_held_positions_are_as_if_they_were_not_there(cell):
    weights = gru_weights() if cell == "gru" else None
    length = 2 * CHUNK_TOKENS + 3
    inputs, slots = scan_inputs(length, width=3 * D if cell == "gru" else D)
    held = torch.zeros(length, dtype=torch.bool)
    held[[0, 1, 7, CHUNK_TOKENS - 1, CHUNK_TOKENS, length - 1]] = True
    write, keep = inputs.write.clone(), inputs.keep.clone()
    write[:, held], keep[:, held] = 0.0, 1.0
    reads, after = scan(inputs._replace(write=write, keep=keep), slots, weights)
    wanted_reads, wanted_after = scan(ScanInputs(*(field[:, ~held] for field in inputs)), slots, weights)
    assert_close(reads[:, ~held], wanted_reads, 1e-11)
    assert_close(after, wanted_after, 1e-11)


@pytest.mark.parametrize("cell", ("gru", "mingru"))
@pytest.mark.parametrize("length", (1, 2, 37))
def test_scan_is_the_reference_whatever_form_it_picks(cell, length):
    weights = gru_weights() if cell == "gru" else None
    inputs, slots = scan_inputs(length, width=3 * D if cell == "gru" else D)
    reads, after = scan(inputs, slots, weights)
    wanted_reads, wanted_after = scan_reference(inputs, slots, weights)
    assert_close(reads, wanted_reads, 1e-11)
    assert_close(after, wanted_after, 1e-11)


def test_the_chunked_form_refuses_a_gru_cell():
    inputs, slots = scan_inputs(3, width=3 * D)
    with pytest.raises(ValueError, match="mingru"):
        scan_chunked(inputs, slots, gru_weights())
