"""What a token, a prompt and a step of training cost in operations and bytes: guards that need no clock."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from scans import random_scan, run
from tiny import CELLS, LAYERS, base_model, one_thread  # noqa: F401
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from gru_memory import MemoryConfig, add_memory, one_token
from gru_memory.bench.models import sharing_weights
from gru_memory.bench.peers import GRUCellLoop
from gru_memory.scan import CellWeights, ScanInputs, scan, scan_reference
from gru_memory.training.request import conversation_memory

# At most, of a site and token; `torch.compile` makes fewer of them.
KERNELS = {"gru": 89, "mingru": 60}
# None of them computes or copies: other views of what is there, and what type a result would have.
_FREE = (
    *("view", "detach", "t", "transpose", "slice", "select", "unsqueeze", "squeeze", "expand", "alias", "split"),
    "_unsafe_view",
    "promote_types",
)


class Counted(TorchDispatchMode):
    """Counts the operations that compute something, and the bytes of what they return."""

    def __init__(self):
        super().__init__()
        self.operations, self.bytes = Counter(), 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        name = operation.overloadpacket.__name__
        if name not in _FREE:
            self.operations[name] += 1
            for tensor in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(tensor, torch.Tensor):
                    self.bytes += tensor.numel() * tensor.element_size()
        return result


def decoding(model, batch=1):
    """What one token costs in the middle of a text."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        for length in (5, 1, 1):
            model(torch.ones(batch, length, dtype=torch.long), past_key_values=cache, use_cache=True)
        with Counted() as counted:
            model(torch.ones(batch, 1, dtype=torch.long), past_key_values=cache, use_cache=True)
    return counted


def with_memory(base, sites, cell, **changes):
    return add_memory(sharing_weights(base), MemoryConfig(sites=sites, cell=cell, decay_every="turn", **changes)).eval()


def site_and_call(base, remember):
    """What a decoded token takes of each site, and of a call whatever its sites. `remember(sites)` is `base` with a memory."""
    alone = decoding(base).operations.total()
    one, three = (
        decoding(remember(sites)).operations.total() for sites in (("top",), ("middle", f"layer:{LAYERS - 1}", "top"))
    )
    site = (three - one) / 2
    return site, one - alone - site


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_a_decoded_token_takes_few_operations(cell, dtype):
    base = base_model("llama").to(dtype)
    site, call = site_and_call(base, lambda sites: with_memory(base, sites, cell))
    assert site == 4, "of a site: what it returns is allocated, and nothing else"
    assert 0 < call <= 8, "of a call of the model with a memory, whatever its sites"


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("key_layers", ((0,), (0, 1)))
def test_a_decoded_token_of_a_conversation_takes_few_operations(key_layers, dtype):
    base = base_model("llama").to(dtype)
    config = conversation_memory(LAYERS)
    site, call = site_and_call(
        base,
        lambda sites: add_memory(sharing_weights(base), replace(config, sites=sites, key_layers=key_layers)).eval(),
    )
    assert config.addressing == "content"
    assert site == 6 + (len(key_layers) > 1), "of a site: what it returns, and what it addresses by as one row"
    assert 0 < call <= 8


@pytest.mark.parametrize("cell", CELLS)
def test_a_decoded_token_takes_a_bounded_number_of_kernels_on_a_gpu(cell, monkeypatch):
    """There every operation is a kernel that is launched, and one token takes the general path."""
    monkeypatch.setattr(one_token, "can_run", lambda *args: False)
    base = base_model("llama")
    one, three = (
        decoding(with_memory(base, sites, cell)).operations.total() for sites in (("top",), ("input", "middle", "top"))
    )
    assert 0 < (three - one) / 2 <= KERNELS[cell]


@pytest.mark.parametrize("cell", CELLS)
def test_a_prompt_takes_as_many_operations_whatever_its_length(cell):
    model = with_memory(base_model("llama"), ("top",), cell)

    def count(length):
        with torch.no_grad(), Counted() as counted:
            model(torch.ones(1, length, dtype=torch.long), use_cache=True)
        return counted.operations.total()

    count(20)
    assert count(20) == count(90)


@pytest.mark.parametrize("cell", CELLS)
def test_a_decoded_token_takes_as_many_in_a_batch_and_with_any_number_of_slots(cell):
    base = base_model("llama")
    few = decoding(with_memory(base, ("top",), cell, num_slots=4, num_heads=1)).operations
    assert decoding(with_memory(base, ("top",), cell, num_slots=64, num_heads=8), batch=8).operations == few


@pytest.mark.parametrize("cell", CELLS)
def test_a_decoded_token_allocates_its_state_once(cell):
    """Twice the slots are twice the state, and nothing else that is as large."""
    base = base_model("llama")
    small, large = (
        decoding(with_memory(base, ("top",), cell, num_slots=slots, num_heads=2, slot_size=64)).bytes
        for slots in (64, 128)
    )
    more = 2 * 64 * 64 * 4  # heads, slots, size, bytes
    assert more <= large - small <= 1.15 * more


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("backward", (False, True))
def test_a_scan_is_as_many_operations_for_any_number_of_tokens(cell, backward):
    def count(length):
        tensors = random_scan((2, length, 3, 8, 4), cell, torch.float32, keep="ticks")
        if backward:
            tensors = [tensor if i == 3 else tensor.requires_grad_() for i, tensor in enumerate(tensors)]
        with Counted() as counted:
            reads, after = run(scan, tensors)
            if backward:
                (reads.sum() + after.sum()).backward()
        return counted.operations

    count(20)  # while numba compiles it holds on to gradients, which are copied then
    short, long = count(20), count(500)
    assert short == long
    assert short.total() <= (40 if backward else 4)


@pytest.mark.parametrize("cell", CELLS)
def test_what_a_training_pass_keeps_grows_with_the_inputs_not_with_the_states(cell):
    """Chunks grow as the root of the length, so twice the tokens are less than 1.5 times what is kept of states."""

    def kept(length):
        tensors = [t.requires_grad_() for t in random_scan((1, length, 1, 64, 16), cell, torch.float32)]
        given, found = {t.data_ptr() for t in tensors}, []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t) or t, lambda t: t):
            run(scan, tensors)
        per_token = 6 * 16 if cell == "gru" else 0  # the gates of the cell
        return sum(t.numel() for t in found if t.data_ptr() not in given) - length * per_token

    assert kept(2048) < 1.5 * kept(1024)
    assert kept(2048) < 2048 * 64 * 16 / 30


def test_a_loop_over_tokens_allocates_in_proportion_to_them():
    """The gradient of `field[:, t]` is as large as all of `field`."""

    def allocated(loop, length, cell):
        *fields, slots, weight, bias = random_scan((1, length, 2, 3, 16), "gru", torch.float32)
        fields[0] = fields[0][..., :16] if cell is None else fields[0]
        inputs = ScanInputs(*(field.clone().requires_grad_() for field in fields))
        with Counted() as counted:
            reads, after = loop(inputs, slots) if cell is None else loop(inputs, slots, CellWeights(weight, bias))
            (reads.sum() + after.sum()).backward()
        return counted.bytes

    for loop, cell in ((scan_reference, "gru"), (GRUCellLoop(2, 16), None)):
        assert allocated(loop, 256, cell) < 4.5 * allocated(loop, 64, cell)
