"""The recurrence on a GPU: the Triton form against the step-by-step form and cuDNN's GRU. Needs a GPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from .measure import Plan, Row, side_by_side
from .scans import EQUAL_STATE, HEADS, HIDDEN, PEERS, SIZE, SLOTS, random_scan, run_pass, run_scan


def bench_gpu(plan: Plan) -> list[Row]:
    """Both cells in bfloat16. A quick round runs anywhere, in the form that is picked there; otherwise no GPU is no rows."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not plan.quick:
        return []
    batch, length = (2, 16) if plan.quick else (8, 2048)
    heads, slots, size = (2, 4, 8) if plan.quick else (HEADS, SLOTS, SIZE)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    rows = []
    for backward in (False, True):
        setting = {"device": name, "batch": batch, "tokens": length, "dtype": "bfloat16"}
        setting["pass"] = "forward + backward" if backward else "forward"
        if plan.wants(**setting):
            cases = _cases(device, batch, length, heads, slots, size, backward)
            for case, seconds in side_by_side(cases, plan, peers=PEERS).items():
                rows.append(Row("gpu", setting, case, seconds, batch * length))
    return rows


def _cases(
    device: torch.device, batch: int, length: int, heads: int, slots: int, size: int, backward: bool
) -> dict[str, Callable[[], object]]:
    cases = {}
    fused = "triton" if device.type == "cuda" else None
    for cell in ("gru", "mingru"):
        inputs, state, weights = random_scan(batch, length, heads, slots, size, cell)
        tensors = [tensor.to(device, torch.bfloat16) for tensor in (*inputs, state, *weights)]
        forms = {"triton": fused, "reference": "reference"} | ({"chunked": "chunked"} if cell == "mingru" else {})
        for name, form in forms.items():
            cases[f"{cell}, {name}"] = run_pass(partial(run_scan, form), tensors, backward)
    gru = nn.GRU(HIDDEN, heads * slots * size, batch_first=True).to(device, torch.bfloat16)
    hidden = torch.randn(batch, length, HIDDEN, device=device, dtype=torch.bfloat16)
    cases[EQUAL_STATE] = run_pass(lambda x: gru(x)[0], [hidden], backward, gru.parameters())
    return cases
