"""A run of training: it can be stopped anywhere, ends with the right weights, and learns."""

import json
import math
import random
from dataclasses import asdict, replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_training import (
    cache_of_turns,  # noqa: F401 (a fixture)
    facts_and_talk,  # noqa: F401 (a fixture)
    make_memory,
    small_model,  # noqa: F401 (a fixture)
    tokenizer_of_letters,  # noqa: F401 (a fixture)
)

from gru_memory.data.vocabulary import split_of
from gru_memory.training.calibration import calibrate
from gru_memory.training.objective import compute_loss, read
from gru_memory.training.pools import session_pools
from gru_memory.training.request import TrainRequest, conversation_memory
from gru_memory.training.rows import make_batch
from gru_memory.training.run import _about
from gru_memory.training.trainer import MemoryTrainer, TrainingConfig, check_resumable


def run(memory, model, pool, cache, folder, steps, **settings):
    log = []
    config = TrainingConfig(
        steps=steps, rows=3, validate_every=4, warmup_steps=2, curriculum_steps=4, max_facts=3, **settings
    )
    batch = make_batch([pool.session(random.Random(9), 2, 0)], cache)
    head = model.get_output_embeddings().weight.detach()
    trainer = MemoryTrainer(memory, head, pool, cache, {"seen": [batch]}, config, folder, log.append)
    trainer.train()
    return [entry["answer_loss"] for entry in log if "step" in entry]


@pytest.mark.parametrize("older", [False, True])
def test_resumed_run_has_the_curve_of_an_uninterrupted_one(model, pool, build, tmp_path, monkeypatch, older):
    cache, settings = build(pool.turns()), {"floor_from": 1.0} if older else {}
    straight = run(make_memory(), model, pool, cache, tmp_path / "a", 8, **settings)

    calls = []

    def stop(self):
        original(self)
        calls.append(self.step)
        raise KeyboardInterrupt

    original = MemoryTrainer._checkpoint
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(MemoryTrainer, "_checkpoint", stop)
        run(make_memory(), model, pool, cache, tmp_path / "b", 8, **settings)
    assert calls == [4]
    if older:  # gates were numbers, shape (), and no learned slot was ever left out
        with safe_open(tmp_path / "b" / "last.safetensors", "pt") as file:
            metadata = file.metadata()
        progress = json.loads(metadata["progress"])
        assert progress["config"].pop("floor_from") == 1.0
        metadata["progress"] = json.dumps(progress)
        tensors = load_file(tmp_path / "b" / "last.safetensors")
        gate = [name for name, _ in make_memory().named_parameters()].index("gate")
        for name in ("memory.gate", f"optimizer.exp_avg.{gate}", f"optimizer.exp_avg_sq.{gate}"):
            tensors[name] = tensors[name].reshape(())
        save_file(tensors, tmp_path / "b" / "last.safetensors", metadata)
    fresh = make_memory(gate=7.0)  # its own weights are replaced
    resumed = run(fresh, model, pool, cache, tmp_path / "b", 8, **settings)
    assert len(straight) == 8
    assert resumed == pytest.approx(straight[4:], rel=1e-4)
    with pytest.raises(ValueError, match="rows"):
        trainer_config = TrainingConfig(steps=8, rows=99)
        MemoryTrainer(make_memory(), torch.zeros(1, 1), pool, cache, {}, trainer_config, tmp_path / "b").train()


@pytest.mark.parametrize("by_replies", [False, True])
def test_training_ends_with_the_last_checkpoint_or_the_one_with_most_whole_replies(
    model, pool, build, tmp_path, monkeypatch, by_replies
):
    scores = iter([{"seen": 0.9, "seen_replies": 0.8}, {"seen": 0.5, "seen_replies": 0.1}])
    monkeypatch.setattr(MemoryTrainer, "validate", lambda self: next(scores))
    cache, config = build(pool.turns()), TrainingConfig(steps=2, rows=2, validate_every=1, warmup_steps=1, max_facts=2)
    batch = make_batch([pool.session(random.Random(9), 2, 0)], cache)
    head = model.get_output_embeddings().weight.detach()
    trainer = MemoryTrainer(make_memory(), head, pool, cache, {"seen": [batch]}, config, tmp_path, None, by_replies)
    (tmp_path / "best.safetensors").write_text("of another run, which counts for nothing")
    assert trainer.train() == (0.8 if by_replies else 0.5)
    last = {k.removeprefix("memory."): v for k, v in load_file(tmp_path / "last.safetensors").items()}
    same = all(torch.equal(v, last[k]) for k, v in trainer.memory.state_dict().items())
    assert same == (not by_replies)


@pytest.mark.parametrize("mode", (False, True))
def test_it_is_trained_in_training_mode_at_first_and_judged_as_it_will_be_used(
    model, pool, build, tmp_path, monkeypatch, mode
):
    """What `persistent_floor` leaves out is heard while slots learn what to say, and no longer when that is done."""
    memory = make_memory(address_rank=12, signature_size=3, persistent_slots=2, persistent_floor=0.4).train(mode)
    modes = []

    def spy(memory, *arguments, **settings):
        modes.append((torch.is_grad_enabled(), memory.training))
        return compute_loss(memory, *arguments, **settings)

    monkeypatch.setattr("gru_memory.training.trainer.compute_loss", spy)
    run(memory, model, pool, build(pool.turns()), tmp_path, 4, floor_from=0.5)
    assert [training for learns, training in modes if learns] == [True, True, False, False]
    assert {training for learns, training in modes if not learns} == {False}
    assert memory.training is mode
    batch = make_batch([pool.session(random.Random(0), 2, 1)], build(pool.turns()))
    modes.clear()
    monkeypatch.setattr(
        "gru_memory.training.calibration.read", lambda memory, *a: modes.append(memory.training) or read(memory, *a)
    )
    calibrate(memory, model.get_output_embeddings().weight.detach(), [batch])
    assert modes == [False] and memory.training is mode


@pytest.mark.parametrize(("cell", "steps"), [("mingru", 60), ("gru", 25)])
def test_training_learns(model, pool, build, tmp_path, cell, steps):
    memory = make_memory(gate=20.0, cell=cell)
    losses = run(
        memory,
        model,
        pool,
        build(pool.turns()),
        tmp_path,
        steps,
        learning_rate=3e-2,
        base_weight=0.0,
        speech_weight=0.0,
    )
    assert sum(losses[-5:]) < 0.85 * sum(losses[:5])


@pytest.mark.parametrize("blocks", (1, 2, 3, 12, 30, 48))
def test_conversations_have_a_memory_for_models_of_any_depth(blocks):
    config = conversation_memory(blocks)
    assert config.key_layers and max(config.key_layers) < blocks


@pytest.mark.parametrize("count", (0, 40))
def test_memory_learns_to_leave_general_questions_to_the_model(count):
    """With the model's own replies, and what calibration and validations read is held out."""

    class Frozen:
        def replies(self, name, users, max_new_tokens):
            return [f"{user} So many: {max_new_tokens}." for user in users]

    request = TrainRequest(out="", pool_facts=6, pool_talk=3, pool_untold=2, replied=0, pool_general=count)
    pool, validation = session_pools(request, Frozen())
    general = pool.talk[3:]
    assert len({turn.user for turn in general}) == len(general) == count
    for turns, split in ((general, "train"), *((kept.talk[60:], "test") for kept in validation.values())):
        assert bool(turns) == bool(count)
        for turn in turns:
            assert (turn.assistant, turn.learn) == (f"{turn.user} So many: 24.", "base")
            assert (turn.kind, split_of(turn.user)) == ("talk", split)


def test_what_makes_another_run_is_refused_unless_its_checkpoint_says_nothing_of_it(tmp_path):
    def kept(about, data):
        progress = {"step": 1, "config": asdict(TrainingConfig()), "about": about}
        save_file({"x": torch.zeros(1)}, tmp_path / data / "last.safetensors", {"progress": json.dumps(progress)})

    sessions = tmp_path / "sessions.jsonl"
    sessions.write_text("one")
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "a.txt").write_text("text")
    of_facts = {
        "pool_facts": 1,
        "pool_talk": 1,
        "pool_untold": 1,
        "pool_general": 1,
        "corrected": 0.9,
        "replied": 0,
        "pages": 3,
    }
    for data, others in (("facts", of_facts | {"bfloat16": False}), ("file", {"bfloat16": False})):
        (tmp_path / data).mkdir()
        request = TrainRequest(
            str(tmp_path / data), data=str(sessions) if data == "file" else data, books=str(tmp_path / "books")
        )
        kept(_about(request, "digest"), data)
        assert check_resumable(request.out, request.training, _about(request, "digest"))["step"] == 1
        assert check_resumable(request.out, request.training, _about(request))["step"] == 1
        changes = [(name, _about(replace(request, **{name: value}))) for name, value in others.items()]
        if data == "file":
            sessions.write_text("two")
            changes.append(("sessions", _about(request)))
        for name, about in (*changes, ("model", _about(request, "other"))):
            with pytest.raises(ValueError, match=f"other settings .*{name}"):
                check_resumable(request.out, request.training, about)
        kept({name: _about(request)[name] for name in ("data", "memory", "books")}, data)
        for _, about in changes:
            assert check_resumable(request.out, request.training, about)


def test_numbers_that_nothing_can_be_trained_with_are_refused():
    wrong = {
        "rows": 0,
        "max_facts": 0,
        "validate_every": 0,
        "steps": -1,
        "max_between": -1,
        "warmup_steps": -3,
        "keep": 1.5,
    }
    for name, value in (wrong | {"learning_rate": math.nan, "key_dropout": 1, "floor_from": -0.1}).items():
        with pytest.raises(ValueError, match=f"{name} is {value}: "):
            TrainingConfig(**{name: value})
    for name, value in {
        "pool_facts": 0,
        "passages": 0,
        "pool_talk": -1,
        "replied": -1,
        "pages": -2,
        "corrected": 2,
    }.items():
        with pytest.raises(ValueError, match=f"{name} is {value}: "):
            TrainRequest("out", **{name: value})
    assert TrainingConfig(steps=0, max_between=0, keep=1).steps == 0


def test_sessions_with_turns_between_need_something_to_talk_about():
    nothing = {"pool_talk": 0, "pool_general": 0}
    for given in (nothing, nothing | {"books": "books", "pages": 0}):
        with pytest.raises(ValueError, match="nothing to talk about .* pool_talk"):
            TrainRequest("out", **given)
    for enough in (
        {"pool_general": 1},
        {"books": "books"},
        {"data": "books"},
        {"training": TrainingConfig(max_between=0)},
    ):
        TrainRequest("out", **nothing | enough)
