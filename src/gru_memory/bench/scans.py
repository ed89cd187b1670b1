"""The recurrence by itself: every form, its peers, and how its cost grows."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..memory import GRUMemoryWithDecay
from ..modeling import site_of
from ..scan import CellWeights, ScanInputs, scan
from ..training.request import conversation_memory
from .measure import Plan, Row, left_out, peak_bytes, side_by_side
from .models import CONVERSATION
from .peers import GRUCellLoop, titans_memory

HEADS, SLOTS, SIZE = 4, 16, 128
HIDDEN = 576  # of SmolLM2-135M
GRU_CELL_LOOP = "loop around nn.GRUCell"  # what the others are compared with
EQUAL_STATE, TITANS = "nn.GRU, equal state", "titans NeuralMemory"
PEERS = (EQUAL_STATE, TITANS)  # those that can take minutes
PROBE = 64  # tokens


def bench_scan(plan: Plan) -> list[Row]:
    """Both cells in every form that runs here, against the peers; forward, and forward with backward."""
    rows: list[Row] = []
    for batch in (1,) if plan.quick else (1, 8):
        for length in (32,) if plan.quick else (128, 512, 2048):
            for backward in (False, True):
                setting = {"batch": batch, "tokens": length, "pass": "forward + backward" if backward else "forward"}
                if not plan.wants(**setting):
                    continue
                slow = too_slow(rows + _probe(rows, setting), setting, plan.patience)
                cases = scan_cases(batch, length, backward, slow, plan.quick)
                found = side_by_side(cases, plan, peers=PEERS) | {name: [] for name in slow}
                for name, seconds in found.items():
                    rows.append(Row("scan", setting, name, seconds, batch * length, left_out=left_out(seconds, plan)))
    return rows


def _probe(rows: Sequence[Row], setting: Mapping[str, Any]) -> list[Row]:
    """A call of each peer on few tokens, before the many of a setting of whose batch and pass nothing was measured."""
    same = [row for row in rows if all(row.setting[name] == setting[name] for name in ("batch", "pass"))]
    if same or setting["tokens"] <= 2 * PROBE:
        return []
    found = []
    for name, case in _peers(setting["batch"], PROBE, setting["pass"] != "forward").items():
        seconds = 0.0
        for _ in range(2):  # a first call can be long for other reasons; a long one is not
            if seconds < 1:
                began = time.perf_counter()
                case()
                seconds = time.perf_counter() - began
        found.append(Row("scan", {**setting, "tokens": PROBE}, name, [seconds]))
    return found


def too_slow(rows: Sequence[Row], setting: Mapping[str, Any], patience: float) -> list[str]:
    """Peers of which one call would take longer, by the nearest smaller setting of the same pass that was measured.

    In the same batch a call takes as long as it has tokens. Rows side by side cost a loop over tokens little: where only a
    smaller batch was measured, a call is taken to last as long as there, which it does at least.
    """
    slow = []
    for case in PEERS:
        smaller = [
            row for row in rows
            if row.case == case and row.setting["pass"] == setting["pass"]
            and row.setting["batch"] <= setting["batch"] and row.setting["tokens"] <= setting["tokens"]
        ]  # fmt: skip
        if smaller:
            near = max(smaller, key=lambda row: (row.setting["batch"], row.setting["tokens"]))
            # What was left out there would be here.
            if near.left_out or near.median * setting["tokens"] / near.setting["tokens"] > patience:
                slow.append(case)
    return slow


def scan_cases(
    batch: int, length: int, backward: bool, without: Collection[str] = (), quick: bool = False
) -> dict[str, Callable[[], object]]:
    """Calls of every form and every peer, but for those of `PEERS` that are named in `without`."""
    cases: dict[str, Callable[[], object]] = {}
    for cell in ("gru", "mingru"):
        inputs, slots, extra = random_scan(batch, length, HEADS, SLOTS, SIZE, cell)
        for form in ("compiled", "chunked", "reference"):
            if form == "chunked" and cell == "gru":
                continue
            cases[f"{cell}, {form}"] = run_pass(partial(run_scan, form), [*inputs, slots, *extra], backward)
    inputs, slots, _ = random_scan(batch, length, HEADS, SLOTS, SIZE, "gru")
    loop = GRUCellLoop(HEADS, SIZE)
    cases[GRU_CELL_LOOP] = run_pass(
        lambda *t: loop(ScanInputs(*t[:5]), t[5]), [*inputs, slots], backward, loop.parameters()
    )
    hidden = torch.randn(batch, length, HIDDEN)
    embeds = torch.randn(batch, length, HIDDEN)
    for cell in ("gru", "mingru"):
        site = GRUMemoryWithDecay(HIDDEN, HEADS, SLOTS, SIZE, cell=cell, gate_init=1.0)
        run = lambda x, e, site=site: site(x, e)[0]  # noqa: E731
        cases[f"whole site, {cell}"] = run_pass(run, [hidden, embeds], backward, site.parameters())
    shipped = conversation_site(HIDDEN).train(backward)
    run = lambda x, e, k: shipped(x, e, key_states=k)[0]  # noqa: E731
    given = [hidden, embeds, torch.randn(batch, length, shipped.key_size)]
    cases[f"whole site, {CONVERSATION}"] = run_pass(run, given, backward, shipped.parameters())
    narrow = nn.GRU(HIDDEN, HEADS * SIZE, batch_first=True)
    cases["nn.GRU, as wide as a read"] = run_pass(lambda x: narrow(x)[0], [hidden], backward, narrow.parameters())
    return cases | _peers(batch, length, backward, without, quick)


def _peers(
    batch: int, length: int, backward: bool, without: Collection[str] = (), quick: bool = False
) -> dict[str, Callable[[], object]]:
    """Those of `PEERS` that are installed."""
    cases, hidden = {}, torch.randn(batch, length, HIDDEN)
    if EQUAL_STATE not in without:  # 200 million weights, which every token reads
        wide = nn.GRU(HIDDEN, HEADS * SLOTS * (8 if quick else SIZE), batch_first=True)
        cases[EQUAL_STATE] = run_pass(lambda x: wide(x)[0], [hidden], backward, wide.parameters())
    titans = None if TITANS in without else titans_memory(HIDDEN)
    if titans is not None:
        cases[TITANS] = run_pass(lambda x: titans(x)[0], [hidden], backward, titans.parameters())
    return cases


def conversation_site(hidden_size: int) -> GRUMemoryWithDecay:
    """One site of the shape that conversations use, beside a model of 30 blocks."""
    return site_of(conversation_memory(30, gate_init=0.1), hidden_size, hidden_size, hidden_size)


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
