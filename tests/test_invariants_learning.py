"""Gradients: of the memory alone, through chunks, states and checkpoints."""

import pytest
import torch
import transformers
from decoding import some_state
from packaging.version import Version
from shared_models import no_state_stays, one_a_family, one_of_each_kind  # noqa: F401 (fixtures)
from tiny import (
    FAMILIES,
    assert_close,
    assert_same_gradients,
    gradients,
    loss_of,
    memory_model,
    one_thread,  # noqa: F401 (a fixture)
    random_ids,
)
from torch.nn import functional as F

from gru_memory import scan as recurrence


def test_only_the_memory_learns(model):
    found = gradients(model, loss_of(model(random_ids(), use_cache=False).logits))
    assert set(found) == {name for name, _ in model.named_parameters() if name.startswith("gru_memory.")}
    assert all(gradient.abs().max() > 0 for gradient in found.values())
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in model.memory_parameters()}


def test_trainable_parameters_are_counted(family_model, capsys):
    family_model.print_trainable_parameters()
    assert f"{family_model.num_memory_parameters():,}" in capsys.readouterr().out


def test_gradients_of_chunks_are_those_of_the_whole(model):
    ids = random_ids(2, 12)
    wanted = gradients(model, loss_of(model(ids, use_cache=False).logits))
    cache, parts = None, []
    for part in ids.split([5, 1, 6], dim=1):
        output = model(part, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        parts.append(output.logits)
    assert_same_gradients(gradients(model, loss_of(torch.cat(parts, 1))), wanted)


def test_gradients_are_those_of_the_plain_recurrence(model, monkeypatch):
    ids, start = random_ids(2, 21), some_state(model)
    got = gradients(model, loss_of(model(ids, memory_state=start, use_cache=False).logits))
    monkeypatch.setattr(recurrence, "scan", recurrence.scan_reference)
    assert_same_gradients(got, gradients(model, loss_of(model(ids, memory_state=start, use_cache=False).logits)))


def test_gradients_flow_through_the_state(family_model):
    """From a later turn into how an earlier one was written, unless the state is detached."""
    first = family_model(random_ids(), use_cache=False).memory_state
    later = random_ids(seed=4)
    loss_of(family_model(later, memory_state=first, use_cache=False).logits).backward()
    through = family_model.memory_sites()["top"].value_embed.weight.grad.clone()
    family_model.zero_grad()
    loss_of(family_model(later, memory_state=first.detach(), use_cache=False).logits).backward()
    assert (through - family_model.memory_sites()["top"].value_embed.weight.grad).abs().max() > 1e-6
    family_model.zero_grad()


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")  # but new in 5.23 is its heir
@pytest.mark.parametrize("reentrant", (False, True))
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("sites", "key_layers"),
    [(("input", "middle", "top"), ()), (("middle", "layer:3", "top"), (1,)), (("top",), (1,))],
)
def test_gradient_checkpointing_changes_nothing(family, reentrant, sites, key_layers):
    model, ids = memory_model(family, sites=sites, key_layers=key_layers).train(), random_ids()
    start = some_state(model).detach()

    def run():
        loss = loss_of(model(ids, memory_state=start, use_cache=False).logits)
        return loss, gradients(model, loss)

    loss, wanted = run()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if sites != ("top",) and Version(transformers.__version__) < Version("5.23"):
        with pytest.raises(RuntimeError, match="5.23"):
            run()
        return
    checkpointed, got = run()
    assert_close(checkpointed, loss, 1e-10)
    assert_same_gradients(got, wanted)


def test_a_loss_from_labels(family_model):
    ids = random_ids()
    output = family_model(ids, labels=ids)
    wanted = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert_close(output.loss.double(), wanted, 1e-6)  # transformers computes the loss in float32
