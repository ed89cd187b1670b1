"""What a memory costs on a GPU: Triton kernels against the plain forms and cuDNN's GRU, models with a memory against without."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from ..addressing import Lookup, find_places_step_by_step, find_places_triton
from .measure import Plan, Row, left_out, side_by_side
from .models import decoding, prefilling, smollm2, variants
from .scans import EQUAL_STATE, HEADS, HIDDEN, PEERS, SIZE, SLOTS, random_scan, run_pass, run_scan

Cases = dict[str, Callable[[], object]]


def bench_gpu(plan: Plan) -> list[Row]:
    """A quick round runs anywhere, in the forms that are picked there; otherwise no GPU is no rows."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not plan.quick:
        return []
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    rows = []

    def measure(units: int, make: Callable[[], Cases], **setting: str | int) -> None:
        setting = {"device": name, **setting}
        if plan.wants(**setting):
            for case, seconds in side_by_side(make(), plan, peers=PEERS).items():
                rows.append(Row("gpu", setting, case, seconds, units, left_out=left_out(seconds, plan)))

    batch, length = (2, 16) if plan.quick else (8, 2048)
    for backward in (False, True):
        passed = {"pass": "forward + backward" if backward else "forward", "dtype": "bfloat16"}
        make = partial(_recurrence, device, batch, length, backward, plan.quick)
        measure(batch * length, make, batch=batch, tokens=length, **passed)
    batch, length = (2, 8) if plan.quick else (8, 512)
    make = partial(_places, device, batch, length, plan.quick)
    measure(batch * length, make, batch=batch, tokens=length, dtype="float32", **{"pass": "places by content"})
    _models(plan, device, measure)
    return rows


def _recurrence(device: torch.device, batch: int, length: int, backward: bool, quick: bool) -> Cases:
    heads, slots, size = (2, 4, 8) if quick else (HEADS, SLOTS, SIZE)
    cases = {}
    fused = "triton" if device.type == "cuda" else None
    for cell in ("gru", "mingru"):
        inputs, state, weights = random_scan(batch, length, heads, slots, size, cell)
        tensors = [tensor.to(device, torch.bfloat16) for tensor in (*inputs, state, *weights)]
        forms = {"triton": fused, "reference": "reference"} | ({"chunked": "chunked"} if cell == "mingru" else {})
        for name, form in forms.items():
            cases[f"{cell}, {name}"] = run_pass(partial(run_scan, form), tensors, backward)
    gru = nn.GRU(HIDDEN, heads * slots * size, batch_first=True).to(device, torch.bfloat16)
    gru.flatten_parameters()
    hidden = torch.randn(batch, length, HIDDEN, device=device, dtype=torch.bfloat16)
    cases[EQUAL_STATE] = run_pass(lambda x: gru(x)[0], [hidden], backward, gru.parameters())
    return cases


def _places(device: torch.device, batch: int, length: int, quick: bool) -> Cases:
    """Where tokens are written and read in the shape that conversations use; a third of them writes."""
    slots, size = (6, 8) if quick else (224, 128)
    generator = torch.Generator().manual_seed(0)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator).to(device)

    lookup = Lookup(
        written=2 * uniform(batch, length, 1, size) - 1,
        strength=(3 * uniform(batch, length, 1) - 2).clamp_min(0),
        told=uniform(batch, length, 1),
        mask=torch.ones(batch, length, dtype=torch.bool, device=device),
        keep=torch.where(uniform(batch, length, 1, 1) < 0.03, 0.998, 1.0).expand(batch, length, 1, slots),
        asked=2 * uniform(batch, length, 1, size) - 1,
        sharpness=torch.tensor([3.0], device=device),
    )
    before = torch.zeros(batch, 1, slots, size, device=device), torch.ones(batch, 1, device=device)
    forms = {"places, step by step": find_places_step_by_step}
    if device.type == "cuda":
        forms["places, triton"] = find_places_triton
    return {name: run_pass(lambda *given, form=form: form(Lookup(*given[:7]), *given[7:]), [*lookup, *before], False)
            for name, form in forms.items()}  # fmt: skip


def _models(plan: Plan, device: torch.device, measure: Callable[..., None]) -> None:
    """Prompts and single tokens of SmolLM2-135M, or for a quick round of a tiny model."""
    model = smollm2(plan).to(device, torch.float32 if plan.quick else torch.bfloat16)
    models = {name: one.to(device) for name, one in variants(model).items()}
    dtype = str(model.dtype).removeprefix("torch.")

    def cases(run: Callable[..., Callable[[], object]], batch: int, length: int, *more: int) -> Cases:
        ids = torch.randint(10, 90, (batch, length), generator=torch.Generator().manual_seed(0)).to(device)
        return {name: run(one, ids, *more) for name, one in models.items()}

    for batch, length in ((1, 16),) if plan.quick else ((1, 512), (1, 2048), (8, 512)):
        make = partial(cases, prefilling, batch, length)
        measure(batch * length, make, batch=batch, tokens=length, dtype=dtype, **{"pass": "prompt"})
    tokens = 2 if plan.quick else 16
    for batch in (1, 8):
        make = partial(cases, decoding, batch, 16, tokens)
        measure(batch * tokens, make, batch=batch, tokens=tokens, dtype=dtype, **{"pass": "decoding"})
