"""Truncated back-propagation: the state is carried over the cut, gradients stop exactly there."""

import pytest
import torch
from rows import sessions
from talking import FAMILIES, talking_model, talking_tokenizer
from test_trainer import train, trainable
from tiny import assert_close, assert_same_state, one_thread  # noqa: F401 (a fixture)
from transformers import TrainerCallback

from gru_memory import MemoryState
from gru_memory.data.sessions import Session, Turn
from gru_memory.training.collator import SessionCollator
from gru_memory.training.truncated import TruncatedTrainer, segments

CUT = 60  # tokens: one to three of our turns


def long_sessions(count=6):
    """Sessions of two to six turns, two short ones after each other."""
    short = sessions(count + 2)
    return [Session(sum((s.turns for s in short[i : i + 1 + i % 2]), ())) for i in range(count)]


def batch(family="llama", count=4):
    return SessionCollator(talking_tokenizer(family))(long_sessions(count))


@torch.no_grad()
@pytest.mark.parametrize("cut", [1, CUT, 10_000])
@pytest.mark.parametrize("family", FAMILIES)
def test_segments_say_what_the_whole_rows_say(family, cut):
    model, rows = talking_model(family), batch(family)
    parts, state, loss = segments(rows, cut), None, 0.0
    assert (len(parts) == 1) == (cut == 10_000)
    assert cut > 1 or len(parts) == max(len(s.turns) for s in long_sessions(4))
    count = (rows["labels"] >= 0).sum()
    for part in parts:
        assert part["input_ids"].shape[1] <= max(cut, 60)  # no turn is longer
        out = model(**part, memory_state=state, use_cache=False, num_items_in_batch=count)
        state, loss = out.memory_state, loss + out.loss
    whole = model(**rows, use_cache=False, num_items_in_batch=count)
    assert_same_state(state, whole.memory_state, 1e-5)  # Llama's norms run in float32
    assert_close(loss, whole.loss, 1e-5)
    for row in range(4):  # and no token is lost on the way
        met = torch.cat([part["input_ids"][row][part["memory_mask"][row]] for part in parts])
        assert torch.equal(met, rows["input_ids"][row][rows["memory_mask"][row]])


def test_segments_that_are_asked_for_beyond_the_end_change_nothing():
    model, rows = talking_model("llama"), batch()
    parts = segments(rows, CUT)
    padded = segments(rows, CUT, count=len(parts) + 2)
    assert len(padded) == len(parts) + 2
    before = model(**rows, use_cache=False).memory_state
    out = model(**padded[-1], memory_state=before, use_cache=False, num_items_in_batch=7)
    assert_same_state(out.memory_state, before)
    assert out.loss == 0 and not padded[-1]["memory_mask"].any()


def test_batches_of_another_kind_are_refused():
    with pytest.raises(ValueError, match="attention_mask.*SessionCollator"):
        segments({**batch(), "attention_mask": torch.ones(1)}, CUT)
    with pytest.raises(ValueError, match="max_tokens is 0"):
        segments(batch(), 0)


class Gradients(TrainerCallback):
    """The gradients of the first step, as they were before it was taken, and what each forward pass embedded."""

    def __init__(self, model):
        self.model, self.first, self.embedded = model, None, []
        model.get_input_embeddings().register_forward_hook(self.watch)

    def watch(self, module, args, output):
        if self.first is None:
            output.requires_grad_()
            output.retain_grad()
            self.embedded.append(output)

    def on_pre_optimizer_step(self, *args, **kwargs):
        if self.first is None:
            self.first = {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}


def first_step(folder, data, **settings):
    """Gradients of one step over all of `data`, without clipping, in float64."""
    model = trainable(sites=("middle", "top")).double()
    seen = Gradients(model)
    train(
        folder,
        model,
        data,
        steps=1,
        per_device_train_batch_size=len(data),
        max_grad_norm=0.0,
        callbacks=[seen],
        **settings,
    )
    return seen


def truncated(folder, model, data=None, cut=CUT, **settings):
    return train(folder, model, data, trainer=TruncatedTrainer, trainer_settings={"segment_tokens": cut}, **settings)


def assert_gradients_agree(got, wanted, tolerance=1e-5):
    assert set(got) == set(wanted)
    for name, gradient in wanted.items():
        torch.testing.assert_close(
            got[name], gradient, rtol=tolerance, atol=tolerance * float(gradient.abs().max()) + 1e-12
        )


def reference_gradients(data, cut):
    """By a way of its own: every segment starts from numbers, the state that a pass over all before it ends in."""
    model = trainable(sites=("middle", "top")).double()
    rows = SessionCollator(talking_tokenizer("llama"))(data)
    parts, count = segments(rows, cut), (rows["labels"] >= 0).sum()
    for k, part in enumerate(parts):
        state = None
        with torch.no_grad():
            for before in parts[:k]:
                state = model(**before, memory_state=state, use_cache=False).memory_state
        if state is not None:  # numbers, with no way back to a graph
            sites = {
                s: {n: torch.tensor(t.tolist(), dtype=t.dtype) for n, t in v.items()} for s, v in state.sites.items()
            }
            state = MemoryState(**{**state.__dict__, "sites": sites})
        model(**part, memory_state=state, use_cache=False, num_items_in_batch=count).loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_gradients_are_those_of_segments_that_start_from_numbers(tmp_path):
    data = long_sessions(4)
    whole = first_step(tmp_path / "a", data).first
    uncut = first_step(
        tmp_path / "b", data, trainer=TruncatedTrainer, trainer_settings={"segment_tokens": 10_000}
    ).first
    cut = first_step(tmp_path / "c", data, trainer=TruncatedTrainer, trainer_settings={"segment_tokens": CUT}).first
    assert_gradients_agree(uncut, whole)
    assert_gradients_agree(cut, reference_gradients(data, CUT))
    with pytest.raises(AssertionError):
        assert_gradients_agree(cut, whole, 1e-2)  # there was something to cut off


def test_gradients_reach_back_to_the_cut_and_not_beyond(tmp_path):
    """Four turns, cut in the middle, one question at the end: it reaches the third turn and nothing of the first two."""
    tell, talk, ask = Turn("My boat is called Ada."), Turn("Where?", "In Porto."), sessions(1)[0].turns[-1]
    data = [Session((tell, talk, tell, ask))]
    row = SessionCollator(talking_tokenizer("llama"))(data)
    starts = (row["position_ids"][0] == 0).nonzero().flatten().tolist()
    cut = max(starts[2], row["input_ids"].shape[1] - starts[2])
    seen = first_step(tmp_path, data, trainer=TruncatedTrainer, trainer_settings={"segment_tokens": cut})
    before, after = seen.embedded
    assert (before.shape[1], after.shape[1]) == (starts[2], row["input_ids"].shape[1] - starts[2])
    assert before.grad is None or not before.grad.any()
    assert after.grad[0, 0].abs().max() > 0  # through the memory, for attention sees one turn
    (whole,) = first_step(tmp_path, data).embedded
    assert whole.grad[0, 0].abs().max() > 0  # uncut, they reach the first token of all


def test_a_truncated_run_learns_evaluates_and_resumes(tmp_path):
    losses, run = truncated(tmp_path, trainable(), long_sessions(), steps=6, save_strategy="steps", save_steps=3)
    again, _ = truncated(tmp_path, trainable(), long_sessions(), steps=6, resume=str(tmp_path / "checkpoint-3"))
    assert again == pytest.approx(losses, rel=1e-6)
    assert losses[-1] < losses[0]
    whole = train(tmp_path, run.model, long_sessions(), steps=1)[1]
    assert run.evaluate(long_sessions(3))["eval_loss"] == pytest.approx(
        whole.evaluate(long_sessions(3))["eval_loss"], rel=0.1
    )
