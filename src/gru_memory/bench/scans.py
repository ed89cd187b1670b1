"""The recurrence by itself: every form, its peers, and how its cost grows."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..memory import GRUMemoryWithDecay
from ..scan import CellWeights, ScanInputs, scan
from .measure import Plan, Row, peak_bytes, side_by_side
from .peers import GRUCellLoop, titans_memory

HEADS, SLOTS, SIZE = 4, 16, 128
HIDDEN = 576  # of SmolLM2-135M
EQUAL_STATE, TITANS = "nn.GRU, equal state", "titans NeuralMemory"
PEERS = (EQUAL_STATE, TITANS)  # those that can take minutes


def bench_scan(plan: Plan) -> list[Row]:
    """Both cells in every form that runs here, against the peers; forward, and forward with backward."""
    rows: list[Row] = []
    slow: dict[bool, set[str]] = {False: set(), True: set()}
    for batch in (1,) if plan.quick else (1, 8):
        for length in (32,) if plan.quick else (128, 512, 2048):
            for backward in (False, True):
                setting = {"batch": batch, "tokens": length, "pass": "forward + backward" if backward else "forward"}
                if not plan.wants(**setting):
                    continue
                cases = scan_cases(batch, length, backward, slow[backward] | _too_slow(rows, setting, plan.patience))
                found = side_by_side(cases, plan, peers=PEERS)
                slow[backward] |= cases.keys() - found.keys()
                rows += [Row("scan", setting, name, seconds, batch * length) for name, seconds in found.items()]
    return rows


def _too_slow(rows: list[Row], setting: dict[str, Any], patience: float) -> set[str]:
    """Cases of which one call would take longer, by what a token of the same pass took at smaller sizes."""
    tokens = setting["batch"] * setting["tokens"]
    same = [row for row in rows if row.setting["pass"] == setting["pass"]]
    return {row.case for row in same if row.median / row.units * tokens > patience}


def scan_cases(
    batch: int, length: int, backward: bool, without: Collection[str] = ()
) -> dict[str, Callable[[], object]]:
    """Calls of every form and every peer, but for those named in `without`."""
    cases: dict[str, Callable[[], object]] = {}
    for cell in ("gru", "mingru"):
        inputs, slots, extra = random_scan(batch, length, HEADS, SLOTS, SIZE, cell)
        for form in ("compiled", "chunked", "reference"):
            if form == "chunked" and cell == "gru":
                continue
            cases[f"{cell}, {form}"] = run_pass(partial(run_scan, form), [*inputs, slots, *extra], backward)
    inputs, slots, _ = random_scan(batch, length, HEADS, SLOTS, SIZE, "gru")
    loop = GRUCellLoop(HEADS, SIZE)
    cases["loop around nn.GRUCell"] = run_pass(
        lambda *t: loop(ScanInputs(*t[:5]), t[5]), [*inputs, slots], backward, loop.parameters()
    )
    hidden = torch.randn(batch, length, HIDDEN)
    embeds = torch.randn(batch, length, HIDDEN)
    for cell in ("gru", "mingru"):
        site = GRUMemoryWithDecay(HIDDEN, HEADS, SLOTS, SIZE, cell=cell, gate_init=1.0)
        run = lambda x, e, site=site: site(x, e)[0]  # noqa: E731
        cases[f"whole site, {cell}"] = run_pass(run, [hidden, embeds], backward, site.parameters())
    narrow = nn.GRU(HIDDEN, HEADS * SIZE, batch_first=True)
    cases["nn.GRU, as wide as a read"] = run_pass(lambda x: narrow(x)[0], [hidden], backward, narrow.parameters())
    if batch == 1 and length == 128:  # 200 million weights, which every token reads: 10 s a pass, 30 s with backward
        wide = nn.GRU(HIDDEN, HEADS * SLOTS * SIZE, batch_first=True)
        cases[EQUAL_STATE] = run_pass(lambda x: wide(x)[0], [hidden], backward, wide.parameters())
    titans = titans_memory(HIDDEN)
    if titans is not None:
        cases[TITANS] = run_pass(lambda x: titans(x)[0], [hidden], backward, titans.parameters())
    return {name: case for name, case in cases.items() if name not in without}


def random_scan(
    batch: int, length: int, heads: int, slots: int, size: int, cell: str, seed: int = 0
) -> tuple[ScanInputs, Tensor, list[Tensor]]:
    """Inputs as a trained memory makes them: sharp addresses, a tick every 20 tokens. Values come before the input
    half of a gru cell, whose weights (W_ih, b_ih, W_hh, b_hh) are the third result."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    address = (4 * normal(batch, length, heads, slots)).softmax(-1)
    write = torch.rand(batch, length, heads, 1, generator=generator) * address
    keep = torch.ones(batch, length, 1, 1)
    keep[:, ::20] = 0.97
    inputs = ScanInputs(
        normal(batch, length, heads, size).tanh(),
        address,
        write,
        keep.expand(batch, length, heads, slots),
        (4 * normal(batch, length, heads, slots)).softmax(-1),
    )
    weights = []
    if cell == "gru":
        for shape in ((heads, 3 * size, size), (heads, 3 * size)) * 2:
            weights.append(normal(*shape) / size**0.5)
    return inputs, 2 * torch.rand(batch, heads, slots, size, generator=generator) - 1, weights


def run_scan(form: str | None, *tensors: Tensor) -> tuple[Tensor, Tensor]:
    """The recurrence, the input half of a gru cell included."""
    inputs, slots, weights = ScanInputs(*tensors[:5]), tensors[5], tensors[6:]
    if not weights:
        return scan(inputs, slots, form=form)
    values = torch.einsum("btnd,nkd->btnk", inputs.values, weights[0]) + weights[1]
    return scan(inputs._replace(values=values), slots, CellWeights(*weights[2:]), form)


def run_pass(
    run: Callable[..., Any], tensors: list[Tensor], backward: bool, parameters: Any = ()
) -> Callable[[], object]:
    """A call of `run` on the tensors; with `backward`, gradients for those that hold numbers of their own."""
    if not backward:

        @torch.no_grad()
        def forward() -> object:
            return run(*tensors)

        return forward
    leaves = [t if 0 in t.stride() else t.clone().requires_grad_() for t in tensors]
    wanted = [*(t for t in leaves if t.requires_grad), *parameters]

    def both() -> object:
        outputs = run(*leaves)
        outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        return torch.autograd.grad(outputs, wanted, [torch.ones_like(o) for o in outputs], allow_unused=True)

    return both


def bench_growth(plan: Plan) -> list[Row]:
    """How time and memory of a training pass grow: one size at a time, the others as in the middle of each list."""
    sizes = {
        "tokens": (64, 128) if plan.quick else (512, 2048, 8192, 32768),
        "slots": (8, 16) if plan.quick else (16, 64, 256),
        "size": (16, 32) if plan.quick else (64, 128, 256, 512),
        "batch": (1, 2) if plan.quick else (1, 4, 16, 64),
    }
    usual = {"tokens": 64 if plan.quick else 512, "slots": 16, "size": 16 if plan.quick else 64, "batch": 1}
    rows = []
    for cell in ("gru", "mingru"):
        for axis, values in sizes.items():
            for value in values:
                shape = {**usual, axis: value}
                if not plan.wants(axis=axis, cell=cell):
                    continue
                inputs, slots, weights = random_scan(
                    shape["batch"], shape["tokens"], HEADS, shape["slots"], shape["size"], cell
                )
                tensors = [*inputs, slots, *weights]
                case = run_pass(partial(run_scan, None), tensors, backward=True)
                case()
                peak = peak_bytes(case)
                seconds = side_by_side({"pass": case}, plan)["pass"]
                setting = {"axis": axis, **shape}
                rows.append(Row("growth", setting, cell, seconds, shape["batch"] * shape["tokens"], peak))
    return rows
