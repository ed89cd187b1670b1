"""The recurrence of one memory site: a plain reference and fast forms, one signature.

This is the only package that knows how the recurrence is run. Shapes: B batch, T tokens, N heads, S slots a head,
d slot size. For every head on its own, with `keep` the decay of the step (1 where the clock does not tick):

    H~_s = keep_{t,s} * H_{t-1,s}                       decay
    C_t  = cell(value_t, sum_s a_{t,s} H~_s)            new content, given what is stored where we write
    H_s  = H~_s + z_{t,s} (C_t - H~_s)                  convex update, z = strength * address: |H| <= 1 for ever
    o_t  = sum_s r_{t,s} H_{t,s}                        read

The `gru` cell is a GRU cell on the addressed content, i.e. on what a Neural Turing Machine (arXiv:1410.5401) would
read where it is about to write. The `mingru` cell is `C_t = tanh(value_t)` with z as its update gate: no gate looks at
H (arXiv:2410.01201), so the recurrence is linear in H and runs in chunks of matrix products, as gated linear attention
does (arXiv:2312.06635).

`scan` picks a form for the device, the shapes and what is installed; each form is a file and equals `scan_reference`.
"""

from .chunked import scan_chunked
from .reference import gru_cell, scan_reference, step
from .registry import FORMS, Form, can_compile, can_triton, pick_form, scan
from .types import CellWeights, ScanInputs

__all__ = [
    "FORMS",
    "CellWeights",
    "Form",
    "ScanInputs",
    "can_compile",
    "can_triton",
    "gru_cell",
    "pick_form",
    "scan",
    "scan_chunked",
    "scan_reference",
    "step",
]
