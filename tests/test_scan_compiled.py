"""The recurrence in machine code against the plain one: outputs, gradients, threads, and life without numba."""

import multiprocessing
import threading
import warnings
from types import SimpleNamespace

import pytest
import torch
from scans import FIELDS, assert_same, random_scan, results, run
from tiny import one_thread  # noqa: F401

from gru_memory.scan import CellWeights, ScanInputs, kernels, pick_form, registry, scan, scan_reference
from gru_memory.scan.compiled import scan_compiled
from gru_memory.scan.fused import MIN_CHUNK_TOKENS

CELLS = ("mingru", "gru")
# B, T, N, S, d: one token, one number, less and more than a chunk, few wide slots, many small ones, odd sizes
SHAPES = (
    (1, 1, 1, 1, 1),
    (2, MIN_CHUNK_TOKENS - 1, 1, 3, 2),
    (1, MIN_CHUNK_TOKENS, 2, 16, 128),
    (2, 2 * MIN_CHUNK_TOKENS + 1, 3, 56, 4),
    (1, 90, 2, 37, 7),
)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_gradients_are_those_of_the_reference(cell, shape):
    tensors = random_scan(shape, cell)
    wanted = results(scan_reference, tensors)
    assert_same(results(scan_compiled, tensors), wanted, 1e-12)
    with torch.no_grad():
        reads, after = run(scan_compiled, tensors)
    assert_same({"reads": reads, "slots after": after}, {n: wanted[n] for n in ("reads", "slots after")}, 1e-12)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("keep", ("ticks", "ticks of slots"))
@pytest.mark.parametrize("frozen", (("keep",), ()))
def test_a_decay_that_repeats_itself_is_not_copied_and_gives_the_same(cell, keep, frozen):
    tensors = random_scan((2, 40, 3, 5, 4), cell, keep=keep)
    wanted = results(scan_reference, tensors, frozen)
    assert ("keep" in wanted) == (not frozen)
    assert_same(results(scan_compiled, tensors, frozen), wanted, 1e-12)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("shape", ((4, 150, 4, 112, 8), (2, 150, 4, 16, 128)))
def test_float32_is_as_close_to_float64_as_the_reference_is(cell, shape):
    tensors = random_scan(shape, cell, keep="ticks", sharpness=6.0)
    exact = results(scan_reference, tensors, ("keep",))
    single = [tensor.float() for tensor in tensors]
    got, plain = (results(form, single, ("keep",)) for form in (scan_compiled, scan_reference))
    for name, tensor in exact.items():
        if tensor is None:
            continue
        scale = tensor.abs().max()
        error, plain_error = (((found[name] - tensor).abs().max() / scale).item() for found in (got, plain))
        assert got[name].dtype == torch.float32
        assert error <= max(4 * plain_error, 5e-7), f"{name}: {error:.1e}, the reference {plain_error:.1e}"


@pytest.mark.parametrize("cell", CELLS)
def test_bfloat16_goes_through_float32(cell):
    tensors = [t.bfloat16() for t in random_scan((2, 40, 2, 9, 6), cell, keep="ticks")]
    got = results(scan_compiled, tensors, ("keep",))
    wanted = results(scan_reference, [t.float() for t in tensors], ("keep",))
    for name, tensor in wanted.items():
        if tensor is not None:
            assert got[name].dtype == torch.bfloat16, name
            assert (got[name].float() - tensor).abs().max() <= 2**-8 * tensor.abs().max(), name


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("field", FIELDS)
def test_not_a_number_comes_through(cell, field):
    """Where the reference has NaN and nowhere else."""
    tensors = random_scan((2, 20, 2, 9, 6), cell, torch.float32)
    index = FIELDS.index(field)
    if index >= len(tensors):
        pytest.skip("mingru has no weights")
    tensors[index] = tensors[index].clone()
    tensors[index].view(-1)[tensors[index].numel() // 2] = torch.nan
    got, wanted = run(scan_compiled, tensors), run(scan_reference, tensors)
    assert any(tensor.isnan().any() for tensor in wanted) or (cell, field) == ("mingru", "address")
    for one, other in zip(got, wanted, strict=True):
        assert torch.equal(one.isnan(), other.isnan())


@pytest.mark.parametrize("cell", CELLS)
def test_far_out_gates_saturate(cell):
    tensors = random_scan((1, 20, 2, 9, 6), cell, torch.float32)
    tensors[0] = (1e4 * tensors[0]).clamp(*((-1e4, 1e4) if cell == "gru" else (-1, 1)))
    got, wanted = run(scan_compiled, tensors), run(scan_reference, tensors)
    for one, other in zip(got, wanted, strict=True):
        assert (one - other).abs().max() <= 1e-6
        assert one.abs().max() <= 1 + 1e-6


@pytest.mark.parametrize("cell", CELLS)
def test_any_number_of_threads_gives_the_same_numbers(cell):
    tensors = random_scan((3, 60, 5, 56, 8), cell, torch.float32)
    alone = results(scan_compiled, tensors, ("keep",))
    torch.set_num_threads(4)
    try:
        shared = results(scan_compiled, tensors, ("keep",))
    finally:
        torch.set_num_threads(1)
    for name, tensor in alone.items():
        if name not in ("weight", "bias"):  # those end in sums of torch's own, in an order of its own
            assert shared[name] is tensor is None or torch.equal(shared[name], tensor), name


def test_python_threads_do_not_disturb_each_other():
    cases = [random_scan((2, 60, 4, 16, 8), "gru", torch.float32, seed=seed) for seed in range(6)]
    wanted = [run(scan_compiled, tensors)[0] for tensors in cases]
    got = [None] * len(cases)

    def work(number):
        for _ in range(5):
            got[number] = run(scan_compiled, cases[number])[0]

    torch.set_num_threads(2)
    try:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(len(cases))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        torch.set_num_threads(1)
    for one, other in zip(got, wanted, strict=True):
        assert torch.equal(one, other)


def _scan_in_child(connection, tensors):
    torch.set_num_threads(2)
    connection.send(run(scan_compiled, tensors)[0].sum().item())


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this system cannot fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_scans_too():
    tensors = random_scan((4, 60, 4, 56, 8), "mingru", torch.float32)
    torch.set_num_threads(2)
    try:
        wanted = run(scan_compiled, tensors)[0].sum().item()  # the parent has threads now
    finally:
        torch.set_num_threads(1)
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    child = context.Process(target=_scan_in_child, args=(theirs, tensors))
    child.start()
    try:
        assert ours.poll(60), "the child hangs"
        assert ours.recv() == pytest.approx(wanted, rel=1e-6)
    finally:
        child.kill()
        child.join()


@pytest.mark.parametrize("on", (False, True))
def test_the_handling_of_denormal_numbers_is_left_as_it_was(on):
    torch.set_flush_denormal(on)
    try:
        run(scan_compiled, random_scan((1, 20, 1, 9, 6), "mingru", torch.float32))
        tiny = torch.tensor([1e-38]) * torch.tensor([0.1])
        assert (tiny.item() == 0) == on
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("cell", CELLS)
def test_the_backward_pass_does_not_keep_the_states(cell):
    batch, length, heads, count, size = shape = (1, 1024, 2, 32, 16)
    tensors = [tensor.requires_grad_() for tensor in random_scan(shape, cell, torch.float32)]
    given = {tensor.data_ptr() for tensor in tensors}
    kept = []

    def pack(tensor):
        kept.append(0 if tensor.data_ptr() in given else tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run(scan_compiled, tensors)
    states = batch * length * heads * count * size
    assert 0 < sum(kept) < states / (4 if cell == "gru" else 24)


@pytest.mark.parametrize("cell", CELLS)
def test_scan_takes_it_on_a_cpu(cell):
    tensors = random_scan((1, 5, 2, 3, 4), cell)
    inputs, slots = ScanInputs(*tensors[:5]), tensors[5]
    weights = CellWeights(*tensors[6:]) if cell == "gru" else None
    assert pick_form(inputs, slots, weights) == "compiled"
    assert pick_form(ScanInputs(*(field[:, :1] for field in inputs)), slots, weights) == "one"


def assert_warned_once_and_gone_on(cell, message):
    tensors = random_scan((1, 20, 2, 3, 4), cell)
    with pytest.warns(RuntimeWarning, match=message):
        reads, after = run(scan, tensors)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(scan, tensors)
    wanted = run(scan_reference, tensors)
    assert_same({"reads": reads, "after": after}, dict(zip(("reads", "after"), wanted, strict=True)), 1e-11)


@pytest.mark.parametrize("cell", CELLS)
def test_without_numba_it_warns_once_and_goes_on(cell, monkeypatch):
    monkeypatch.setattr(registry, "find_spec", lambda name: None)
    monkeypatch.setattr(registry, "_warned", set())
    assert_warned_once_and_gone_on(cell, "gru-memory\\[fast\\]")


@pytest.fixture
def broken_numba(monkeypatch):
    """A numba that is there and does not work."""

    def fail():
        raise ImportError("Numba needs NumPy 2.4 or less")

    monkeypatch.setattr(kernels, "try_out", fail)
    monkeypatch.setattr(registry, "_warned", set())
    registry._numba_works.cache_clear()
    yield
    registry._numba_works.cache_clear()


@pytest.mark.parametrize("cell", CELLS)
def test_a_numba_that_does_not_work_is_told_once_and_gone_without(cell, broken_numba):
    assert_warned_once_and_gone_on(cell, "needs NumPy 2.4 or less")


def test_on_a_full_disk_nothing_is_kept(monkeypatch):
    def add(x):
        return x + 1

    assert kernels._compiled(add).stats.cache_path
    monkeypatch.setattr(kernels.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    compiled = kernels._compiled(add)
    assert compiled.stats.cache_path is None and compiled(1) == 2


def test_a_form_can_be_asked_for_by_name():
    tensors = random_scan((1, 20, 2, 3, 4), "mingru")
    inputs, slots = ScanInputs(*tensors[:5]), tensors[5]
    for form in ("compiled", "chunked", "reference"):
        assert (scan(inputs, slots, form=form)[0] - scan_reference(inputs, slots)[0]).abs().max() < 1e-11
    with pytest.raises(ValueError, match="choose one of"):
        scan(inputs, slots, form="fast")
