"""Continual learning: rivals train, weights come back as they were, and R is what is answered after which set."""

import pytest
import torch
from repeating import repeat_what_was_told
from talking import talking_model, talking_tokenizer

pytest.importorskip("peft")

from gru_memory.evaluation import continual
from gru_memory.evaluation.batched import BatchReader
from gru_memory.evaluation.continual import METHODS, ContinualConfig, evaluate_continual, lora, make_stream, summary

SMALL = {"sets": 2, "facts": 2, "steps": 2, "rows": 2, "replayed": 2, "wordings": 2, "max_new_tokens": 3}


@pytest.fixture(scope="module")
def tokenizer():
    return talking_tokenizer("llama")


def test_the_figures_of_a_matrix_are_those_of_the_papers():
    matrix = [[1.0, 0.0, 0.0], [0.5, 0.75, 0.0], [0.25, 0.5, 1.0]]
    assert summary(matrix) == {
        "average": pytest.approx(1.75 / 3),
        "learned": pytest.approx(2.75 / 3),
        "backward": pytest.approx((-0.75 - 0.25) / 2),
        "forgetting": pytest.approx((0.75 + 0.25) / 2),
    }
    assert summary([[0.5, 0.0], [1.0, 0.0]])["backward"] == 0.5


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_lora_trains_and_leaves_the_model_as_it_was(family):
    model, reader = talking_model(family), BatchReader(talking_model(family), talking_tokenizer(family))
    reader.model = model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    fingerprint = model.memory_fingerprint()
    turns = [fact.tells[0] for fact in make_stream(ContinualConfig(**SMALL))[0]]
    with lora(model, 2, 0) as parameters:
        assert parameters and all(p.shape.count(2) for p in parameters)
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        losses = []
        for _ in range(12):
            loss = continual._loss(reader, turns)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0] - 0.1
        assert all(parameter.grad is None for parameter in model.memory_parameters())
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == wanted
    assert model.memory_fingerprint() == fingerprint


def test_loss_is_on_answers_of_questions_and_on_all_of_what_is_told(tokenizer):
    reader = BatchReader(talking_model("llama"), tokenizer)
    fact = make_stream(ContinualConfig(**SMALL))[0][0]
    for turn in (fact.tells[0], fact.asks[0]):
        rendered = reader.renderer.turn(turn.user, turn.assistant)
        ids = torch.tensor([reader.renderer.prefix_ids + rendered.ids])
        first = len(reader.renderer.prefix_ids) + (rendered.reply_start if turn.kind == "ask" else 0)
        with torch.no_grad(), reader.model.disable_memory():
            logits = reader.model(ids).logits[0].float()
            wanted = torch.nn.functional.cross_entropy(logits[first - 1 : -1], ids[0, first:])
            assert continual._loss(reader, [turn]).item() == pytest.approx(wanted.item(), rel=1e-5)


def test_facts_of_a_stream_differ_and_their_test_question_is_not_trained_on():
    stream = make_stream(ContinualConfig(sets=3, facts=3, wordings=3))
    facts = [turns for facts in stream for turns in facts]
    assert len({turns.fact.attribute for turns in facts}) == len({turns.fact.value for turns in facts}) == 9
    assert all(turns.asks[-1] not in turns.asks[:-1] for turns in facts)


def test_the_memory_knows_the_sets_it_has_read_and_no_others(tokenizer, monkeypatch):
    model = talking_model("llama")
    repeat_what_was_told(monkeypatch)
    result = evaluate_continual(model, tokenizer, ContinualConfig(**{**SMALL, "sets": 3}, methods=("memory", "base")))
    assert result.details["R"][METHODS["memory"]] == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    memory, base = result.rows
    assert (memory["average"], memory["backward"], memory["forgetting"]) == (1, 0, 0)
    assert (base["seconds"], base["kept"]) == (0, 0)
    assert memory["kept"] == 6 * memory["bytes"] > 0


def test_every_method_is_asked_after_every_set(tokenizer, monkeypatch):
    """Replies made of what a LoRA was last trained on: only replay still has the first set in the second."""
    model, seen = talking_model("llama"), []
    loss = continual._loss

    def spy(reader, turns):
        seen.append(turns)
        return loss(reader, turns)

    monkeypatch.setattr(continual, "_loss", spy)
    monkeypatch.setattr(
        continual,
        "_ask_base",
        lambda reader, questions, config: [" ".join(t.value for t in seen[-1]) if seen else ""] * len(questions),
    )
    monkeypatch.setattr(continual, "Random", lambda name: _InTurn())
    config = ContinualConfig(**{**SMALL, "facts": 1, "rows": 4, "replayed": 4}, methods=("base", "lora", "replay"))
    rows = {row["method"]: row for row in evaluate_continual(model, tokenizer, config).rows}
    assert rows[METHODS["base"]]["average"] == 0
    assert (rows[METHODS["lora"]]["average"], rows[METHODS["lora"]]["forgetting"]) == (0.5, 1)
    assert (rows[METHODS["replay"]]["average"], rows[METHODS["replay"]]["forgetting"]) == (1, 0)
    assert rows[METHODS["replay"]]["kept"] > rows[METHODS["lora"]]["kept"] > 0


def test_an_unknown_method_is_named():
    with pytest.raises(ValueError, match="methods has magic: choose of memory, lora, replay, base"):
        ContinualConfig(methods=("memory", "magic"))


class _InTurn:
    """A generator that draws the entries of a list one after the other."""

    def __init__(self):
        self.count = 0

    def choice(self, entries):
        self.count += 1
        return entries[self.count % len(entries)]
