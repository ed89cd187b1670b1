"""How far each path stands from what the machine allows: bytes that have to be read, and products and sums to be done."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..memory import GRUMemoryWithDecay
from .measure import Plan, Row, side_by_side
from .models import CONTEXT, CONVERSATION, decoding, model_name, prefilling, smollm2
from .scans import HEADS, HIDDEN, SIZE, SLOTS, conversation_site, random_scan, run_pass, run_scan

FLOAT = 4  # bytes
CACHE_BYTES = 100_000_000  # more than any cache keeps: weights that were not used for so long come from memory


class Path(NamedTuple):
    """One way through the code, and what it cannot do without."""

    run: Callable[[], object]
    calls: int  # in one `run`
    bytes: int  # read or written at least, in one call
    operations: int  # products and sums of floating-point numbers in one call


def bench_floor(plan: Plan) -> list[Row]:
    """Each path, and the time that its bytes or its operations would take at the rates measured in the same round."""
    length = 32 if plan.quick else 512
    paths = {f"a site, one token, {name}": _one_token(site, plan) for name, site in _sites(plan).items()}
    paths |= {f"a site, {length} tokens, {name}": _many_tokens(site, length) for name, site in _sites(plan).items()}
    for cell in ("gru", "mingru"):
        for backward in (False, True):
            name = f"scan, {length} tokens, {cell}, {'forward + backward' if backward else 'forward'}"
            paths[name] = _scan(length, cell, backward)
    paths |= _model(length, plan)
    paths = {name: path for name, path in paths.items() if plan.wants(path=name)}

    numbers = torch.ones((1 if plan.quick else 64) * 1_000_000)
    square = torch.randn(*[64 if plan.quick else 1024] * 2)
    cases: dict[str, Callable[[], object]] = {name: path.run for name, path in paths.items()}
    cases |= {"reading": numbers.sum, "multiplying": lambda: square @ square}
    found = side_by_side(cases, plan, turns=1 if plan.quick else 3)
    per_byte = [seconds / (FLOAT * numbers.numel()) for seconds in found["reading"]]
    per_operation = [seconds / (2 * len(square) ** 3) for seconds in found["multiplying"]]
    rows = []
    for name, path in paths.items():
        setting = {"path": name, "MB": round(path.bytes / 1e6, 3), "MFLOP": round(path.operations / 1e6, 3)}
        floor = [max(path.bytes * b, path.operations * o) for b, o in zip(per_byte, per_operation)]
        rows.append(Row("floor", setting, "floor", floor))
        rows.append(Row("floor", setting, "measured", [seconds / path.calls for seconds in found[name]]))
    return rows


def _sites(plan: Plan) -> dict[str, GRUMemoryWithDecay]:
    hidden = 32 if plan.quick else HIDDEN
    sites = {
        cell: GRUMemoryWithDecay(hidden, HEADS, SLOTS, SIZE, cell=cell, decay_every="turn", gate_init=0.1)
        for cell in ("gru", "mingru")
    }
    sites[CONVERSATION] = conversation_site(hidden)
    return {name: site.eval() for name, site in sites.items()}


def scan_operations(heads: int, slots: int, size: int, cell: str, backward: bool) -> int:
    """Products and sums of one token of the recurrence, the input half of a gru cell included, functions left out.

    Forward, for each number of a slot: update 3, read 2, `gru` also content 2; a product with a d x d matrix is 2 d^2, of
    which a gru cell has six. Backward: update again 3, update and read backwards 11, content backwards 4, and each matrix
    product twice, for the vector and for the matrix.
    """
    state, square = slots * size, size * size
    gru = cell == "gru"
    forward = (7 * state + 12 * square) if gru else 5 * state
    back = (18 * state + 24 * square) if gru else 14 * state
    return heads * (forward + (back if backward else 0))


def _given(site: GRUMemoryWithDecay, length: int) -> list[Tensor | None]:
    """What `site` takes, of one row."""
    hidden, embeds = torch.randn(1, length, site.hidden_size), torch.randn(1, length, site.embed_size)
    further = torch.randn(1, length, site.key_size) if site.key_size else None
    starts = torch.zeros(1, length, dtype=torch.bool)
    return [hidden, embeds, site.initial_state(1), torch.ones_like(starts), starts, further]


def _site_costs(site: GRUMemoryWithDecay, length: int) -> tuple[int, int]:
    """Bytes: every weight once, the state in and out, and what goes by. Operations: two a weight and token, and the scan."""
    weights = sum(p.numel() for p in site.parameters())
    linear = sum(m.weight.numel() for m in site.modules() if isinstance(m, nn.Linear))
    slots = site.num_heads * site.num_slots * site.slot_size
    stream = length * (2 * site.hidden_size + site.embed_size + site.key_size)
    scan = scan_operations(site.num_heads, site.num_slots, site.slot_size, site.cell, backward=False)
    if site.addressing == "content":  # every slot's signature against what is asked for
        scan += 2 * site.num_heads * site.num_slots * site.signature_size
    return FLOAT * (weights + 2 * slots + stream), length * (2 * linear + scan)


def _one_token(site: GRUMemoryWithDecay, plan: Plan) -> Path:
    """One token after the other through copies of the site, so many that the weights of each come from memory."""
    size = FLOAT * sum(p.numel() for p in site.parameters())
    sites = [copy.deepcopy(site) for _ in range(2 if plan.quick else -(-CACHE_BYTES // size))]
    given = _given(site, 1)

    @torch.no_grad()
    def run() -> None:
        for one in sites:
            one(*given)

    return Path(run, len(sites), *_site_costs(site, 1))


def _many_tokens(site: GRUMemoryWithDecay, length: int) -> Path:
    given = _given(site, length)
    return Path(torch.no_grad()(lambda: site(*given)), 1, *_site_costs(site, length))


def _scan(length: int, cell: str, backward: bool) -> Path:
    inputs, slots, weights = random_scan(1, length, HEADS, SLOTS, SIZE, cell)
    numbers = (
        sum(t.numel() for t in (inputs.values, inputs.address, inputs.write, inputs.query, *weights)) + slots.numel()
    )
    numbers += length * HEADS * SIZE + slots.numel()  # reads, and the state after
    run = run_pass(partial(run_scan, None), [*inputs, slots, *weights], backward)
    operations = length * scan_operations(HEADS, SLOTS, SIZE, cell, backward)
    return Path(run, 1, FLOAT * numbers * (2 if backward else 1), operations)  # a gradient for each number


def _model(length: int, plan: Plan) -> dict[str, Path]:
    """The model without a memory, for scale: attention, which is little at these lengths, is not counted."""
    model = smollm2(plan)
    weights = sum(p.numel() for p in model.parameters())
    head = model.get_output_embeddings().weight.numel()
    prompt = torch.randint(10, 90, (1, CONTEXT), generator=torch.Generator().manual_seed(0))
    whole = torch.randint(10, 90, (1, length), generator=torch.Generator().manual_seed(0))
    name = model_name(plan)
    return {
        f"{name}, one token": Path(decoding(model, prompt, 1), 1, FLOAT * weights, 2 * weights),
        f"{name}, {length} tokens": Path(
            prefilling(model, whole), 1, FLOAT * weights, 2 * (length * (weights - head) + head)
        ),
    }
