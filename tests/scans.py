"""Random scans, and what a form makes of them: for the tests of every form of the recurrence."""

import torch

from gru_memory.scan import CellWeights, ScanInputs

FIELDS = ("values", "address", "write", "keep", "query", "slots", "weight", "bias")


def random_scan(shape, cell, dtype=torch.float64, keep="everywhere", sharpness=3.0, seed=0):
    """All inputs of a scan in one list, in the order of `FIELDS`."""
    batch, length, heads, count, size = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    values = normal(batch, length, heads, 3 * size if cell == "gru" else size)
    address = (sharpness * normal(batch, length, heads, count)).softmax(-1)
    kept = {
        "everywhere": lambda: 1 - 0.3 * uniform(batch, length, heads, count),
        "ticks": lambda: torch.where(uniform(batch, length, 1, 1) < 0.2, 0.9, 1.0),
        "ticks of slots": lambda: torch.where(uniform(batch, length, 1, 1) < 0.2, 1 - 0.3 * uniform(count), 1.0),
    }[keep]()
    tensors = [
        values if cell == "gru" else values.tanh(),
        address,
        uniform(batch, length, heads, 1) * address,
        kept.double(),
        (sharpness * normal(batch, length, heads, count)).softmax(-1),
        2 * uniform(batch, heads, count, size) - 1,
    ]
    if cell == "gru":
        tensors += [normal(heads, 3 * size, size) / size**0.5, normal(heads, 3 * size)]
    tensors = [tensor.to(dtype) for tensor in tensors]
    tensors[3] = tensors[3].expand(batch, length, heads, count)
    return tensors


def run(form, tensors):
    return form(ScanInputs(*tensors[:5]), tensors[5], CellWeights(*tensors[6:]) if len(tensors) > 6 else None)


def results(form, tensors, frozen=()):
    """Reads, slots, and the gradients of a random combination of both with respect to everything not `frozen`."""
    names = FIELDS[: len(tensors)]
    leaves = [t if n in frozen else t.detach().clone().requires_grad_() for n, t in zip(names, tensors, strict=True)]
    outputs = run(form, leaves)
    generator = torch.Generator().manual_seed(5)
    loss = 0.0
    for out in outputs:  # weights that every precision can hold
        loss = loss + (out * torch.randn(out.shape, generator=generator).bfloat16().to(out)).double().sum()
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
    found = dict(zip([n for n in names if n not in frozen], gradients, strict=True))
    return {"reads": outputs[0].detach(), "slots after": outputs[1].detach(), **found}


def assert_same(got, wanted, tolerance):
    """To `tolerance` of the largest number in each tensor."""
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        if tensor is None:
            assert got[name] is None, name
            continue
        assert (got[name].shape, got[name].dtype) == (tensor.shape, tensor.dtype), name
        scale = max(1e-3, tensor.abs().max().item())
        assert (got[name] - tensor).abs().max().item() <= tolerance * scale, name
