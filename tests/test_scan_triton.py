"""The recurrence, and addressing by content, in Triton: in its interpreter, or on a GPU if there is one."""

import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from places import drawn
from scans import assert_same, random_scan, results, run
from tiny import one_thread  # noqa: F401

from gru_memory import addressing
from gru_memory.addressing import Lookup
from gru_memory.scan import CellWeights, ScanInputs, pick_form, registry, scan_reference
from gru_memory.scan.fused import MIN_CHUNK_TOKENS

pytest.importorskip("triton", reason="Triton is not installed: pip install 'gru-memory[gpu]' (Linux)")

from gru_memory.scan import triton_form
from gru_memory.scan.triton_form import COLUMNS, scan_triton

CELLS = ("mingru", "gru")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# B, T, N, S, d: powers of two and not, fewer tokens than a chunk, exactly one, and several, more columns than a program has
SHAPES = (
    (1, 1, 1, 1, 1),
    (2, MIN_CHUNK_TOKENS, 1, 3, 2),
    (1, 2 * MIN_CHUNK_TOKENS + 1, 2, 5, 8),
    (1, MIN_CHUNK_TOKENS + 2, 2, 3, COLUMNS + 5),
)


def on_device(tensors):
    moved = [tensor.to(DEVICE) for tensor in tensors]
    moved[3] = tensors[3][:, :, :1, :1].to(DEVICE).expand(tensors[3].shape) if 0 in tensors[3].stride() else moved[3]
    return moved


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("keep", ("everywhere", "ticks"))
def test_outputs_and_gradients_are_those_of_the_reference(cell, shape, keep):
    frozen = ("keep",) if keep == "ticks" else ()
    tensors = on_device(random_scan(shape, cell, keep=keep))
    wanted = results(scan_reference, tensors, frozen)
    assert_same(results(scan_triton, tensors, frozen), wanted, 1e-11)
    with torch.no_grad():
        reads, after = run(scan_triton, tensors)
    assert_same({"reads": reads, "slots after": after}, {n: wanted[n] for n in ("reads", "slots after")}, 1e-11)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_lower_precisions_go_through_float32(cell, dtype):
    tensors = on_device(random_scan((2, 20, 1, 4, 16), cell, dtype, keep="ticks"))
    got = results(scan_triton, tensors, ("keep",))
    wanted = results(scan_reference, [tensor.float() for tensor in tensors], ("keep",))
    for name, tensor in wanted.items():
        if tensor is not None:
            tolerance = 2**-8 if dtype == torch.bfloat16 else 2e-6
            assert got[name].dtype == dtype
            assert (got[name].float() - tensor).abs().max() <= tolerance * max(1e-3, tensor.abs().max()), name


class Launches:
    """A kernel that counts how often it is launched."""

    def __init__(self, kernel):
        self.kernel, self.count = kernel, 0

    def __getitem__(self, grid):
        self.count += 1
        return self.kernel[grid]


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("shape", ((1, 3, 1, 2, 2), (2, 40, 2, 3, 4)))
def test_a_pass_is_one_launch_whatever_its_size(cell, shape, monkeypatch):
    from gru_memory.scan import triton_kernels

    forward, backward = Launches(triton_kernels.scan_forward), Launches(triton_kernels.scan_backward)
    monkeypatch.setattr(triton_kernels, "scan_forward", forward)
    monkeypatch.setattr(triton_kernels, "scan_backward", backward)
    tensors = on_device(random_scan(shape, cell, keep="ticks"))
    with torch.no_grad():
        run(scan_triton, tensors)
    assert (forward.count, backward.count) == (1, 0)
    results(scan_triton, tensors, ("keep",))
    assert (forward.count, backward.count) == (2, 1)


@pytest.mark.parametrize("cell", CELLS)
def test_not_a_number_comes_through(cell):
    tensors = on_device(random_scan((2, 6, 2, 4, 8), cell, torch.float32))
    tensors[0] = tensors[0].clone()
    tensors[0][1, 2, 0, 3] = torch.nan
    for one, other in zip(run(scan_triton, tensors), run(scan_reference, tensors), strict=True):
        assert other.isnan().any()
        assert torch.equal(one.isnan(), other.isnan())


@pytest.mark.parametrize("sizes", ((2, 40, 2, 5, 8), (1, 1, 1, 7, 3), (3, 30, 1, 64, 32), (1, 9, 1, 224, 128)))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
def test_places_are_those_found_step_by_step(sizes, dtype):
    lookup, *before = drawn(*sizes, dtype)
    lookup, before = Lookup(*(field.to(DEVICE) for field in lookup)), [tensor.to(DEVICE) for tensor in before]
    wanted = addressing.find_places_step_by_step(lookup, *before)
    for name, got, other in zip(wanted._fields, addressing.find_places_triton(lookup, *before), wanted, strict=True):
        assert got.dtype == dtype and got.shape == other.shape
        assert (got - other).abs().max() <= (1e-10 if dtype == torch.float64 else 1e-4), name


@pytest.mark.parametrize("gru", (False, True))
def test_it_is_trusted_only_after_it_gave_what_the_reference_gives(gru, monkeypatch):
    check = triton_form.works.__wrapped__
    assert check(torch.device(DEVICE), gru)

    def broken(inputs, slots, cell=None):
        reads, after = scan_reference(inputs, slots, cell)
        return reads * 1.01, after

    monkeypatch.setattr(triton_form, "scan_triton", broken)
    with pytest.warns(RuntimeWarning, match="results are off"):
        assert not check(torch.device(DEVICE), gru)

    def failing(inputs, slots, cell=None):
        raise RuntimeError("no kernel image is available for execution on the device")

    monkeypatch.setattr(triton_form, "scan_triton", failing)
    with pytest.warns(RuntimeWarning, match="no kernel image"):
        assert not check(torch.device(DEVICE), gru)


def test_places_are_trusted_only_after_they_were_those_found_step_by_step(monkeypatch):
    check = addressing.works_on.__wrapped__
    assert check(torch.device(DEVICE))

    def broken(lookup, signatures, replacing):
        places = addressing.find_places_step_by_step(lookup, signatures, replacing)
        return places._replace(address=places.address.roll(1, dims=-1))

    monkeypatch.setattr(addressing, "find_places_triton", broken)
    with pytest.warns(RuntimeWarning, match="results are off"):
        assert not check(torch.device(DEVICE))


def test_what_does_not_fit_in_registers_is_left_to_other_forms():
    def slots(count, size):
        return torch.empty(1, 1, count, size)

    weights = CellWeights(torch.empty(1, 1, 1), torch.empty(1, 1))
    assert triton_form.fits(slots(16, 128), weights)
    assert triton_form.fits(slots(4_096, 1_024), None)
    assert not triton_form.fits(slots(4_097, 8), None)
    assert not triton_form.fits(slots(16, 256), weights)
    assert not triton_form.fits(slots(33, 128), weights)
    assert addressing.fits_a_gpu(slots(224, 128))
    assert not addressing.fits_a_gpu(slots(257, 128))


COMPILE = """
import os, subprocess, sys, tempfile
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from gru_memory import addressing
from gru_memory.scan import triton_form, triton_kernels, triton_place_kernels

tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
cases = [(triton_place_kernels.find, "place", addressing.launch_options(torch.empty(1, 1, 224, 128)))]
for kernel, own in ((triton_kernels.scan_forward, "SAVE"), (triton_kernels.scan_backward, "KEEP")):
    for count, size, gru in ((16, 128, False), (16, 128, True), (112, 8, False), (112, 8, True), (224, 224, False)):
        options = {own: False, **triton_form.grid_and_options(torch.empty(1, 1, count, size), gru)[1]}
        cases.append((kernel, f"{count} {size} {gru}", options))
for kernel, name, constants in cases:
    warps = constants.pop("num_warps")
    whole = {"T", "N", "chunk", "keep_b", "keep_t", "keep_n", "keep_s"}
    kinds = {n: "constexpr" if n in constants else "i32" if n in whole else "*fp32" for n in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=kinds, constexprs=places)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    print(kernel.__name__, name, next(w for w in usage.stdout.split() if w.startswith("STACK:")))
"""


@pytest.mark.slow
def test_it_compiles_for_a_gpu_and_keeps_its_state_in_registers():
    """The whole way down to machine code, which takes no GPU. What spills lies on the stack."""
    import triton

    if not (Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump").exists():
        pytest.skip("this build of triton has no tools for NVIDIA's machine code")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 11
    assert [line for line in lines if not line.endswith("STACK:0")] == []


@pytest.mark.skipif(DEVICE == "cpu", reason="there is no GPU")
@pytest.mark.parametrize("cell", CELLS)
def test_it_is_picked_on_a_gpu(cell):
    tensors = on_device(random_scan((1, 5, 2, 3, 4), cell, torch.float32))
    weights = CellWeights(*tensors[6:]) if cell == "gru" else None
    assert pick_form(ScanInputs(*tensors[:5]), tensors[5], weights) == "triton"


def test_it_is_not_picked_on_a_cpu(monkeypatch):
    monkeypatch.setattr(registry, "find_spec", lambda name: None if name == "numba" else object())
    monkeypatch.setattr(registry, "_warned", set())
    tensors = random_scan((1, 5, 2, 3, 4), "mingru")
    with pytest.warns(RuntimeWarning, match="numba"):
        assert pick_form(ScanInputs(*tensors[:5]), tensors[5]) == "chunked"


def test_a_gpu_without_triton_is_told_once(monkeypatch):
    monkeypatch.setattr(registry, "find_spec", lambda name: None)
    monkeypatch.setattr(registry, "_warned", set())
    tensor = SimpleNamespace(device=torch.device("cuda"), numel=lambda: 3)
    with pytest.warns(RuntimeWarning, match=r"gru-memory\[gpu\]"):
        assert not registry.can_triton(tensor)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not registry.can_triton(tensor)


def test_a_gru_cell_that_is_too_large_for_it_is_told(monkeypatch):
    monkeypatch.setattr(registry, "can_triton", lambda tensor: True)
    monkeypatch.setattr(registry, "_warned", set())
    tensors = random_scan((1, 5, 1, 2, 2 * triton_form.MAX_GRU_SIZE), "gru")
    with pytest.warns(RuntimeWarning, match="token by token"):
        assert not registry._can_triton(ScanInputs(*tensors[:5]), tensors[5], CellWeights(*tensors[6:]))
