"""Training with transformers' own Trainer: a row says what a conversation says, and nothing on the way changes the curve."""

import copy
import math

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from rows import sessions
from talking import FAMILIES, talking_base, talking_model, talking_tokenizer
from tiny import one_thread  # noqa: F401 (a fixture)
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from gru_memory import MemoryConfig, add_memory
from gru_memory.conversation import TurnTooLong
from gru_memory.data.sessions import Session, Turn
from gru_memory.rendering import TurnRenderer
from gru_memory.training.collator import SessionCollator

_SETTINGS = TrainingArguments.__dataclass_fields__
CHECKPOINTING = next(name for name in ("activation_checkpointing", "gradient_checkpointing") if name in _SETTINGS)

MIXED = [
    Session((Turn("My boat is called Marigold."), Turn("What is it called?", "Marigold.", learn="answer"))),
    Session((Turn(None, "I live in Porto."), Turn("Where?", "In Porto.", learn="base"), Turn("So?", "Yes.", learn="answer"))),
    Session((Turn("Where do you live?", "I live in Porto."), Turn(None, "My boat is called Marigold.", learn="answer"))),
]  # fmt: skip


def turn_by_turn(model, tokenizer, session):
    """The last turns' logits and the state, one forward pass a turn: what `Conversation` does."""
    renderer, state, met, logits = TurnRenderer(tokenizer), model.initial_memory_state(1), False, []
    for turn in session.turns:
        chat = turn.user is not None
        prefix = renderer.prefix_ids if chat else []
        own = renderer.turn(turn.user, turn.assistant).ids if chat else tokenizer(turn.assistant)["input_ids"]
        ids = torch.tensor([prefix + own])
        seen = torch.ones_like(ids, dtype=torch.bool)
        seen[:, : len(prefix)] = not met
        out = model(ids, memory_state=state, memory_mask=seen, use_cache=False)
        met, state = met or bool(prefix), out.memory_state
        logits.append(out.logits[0])
    return torch.cat(logits), state


def close(got, wanted):
    """Llama's norms and softmax run in float32."""
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_is_the_conversation_turn_by_turn(family, attention):
    """In a batch of rows of different lengths, padded, with a system prompt that memory sees once (Llama) and without."""
    model, tokenizer = talking_model(family), talking_tokenizer(family)
    model.set_attn_implementation(attention)
    batch = SessionCollator(tokenizer)(MIXED)
    out = model(**batch, use_cache=False)
    losses = []
    for row, session in enumerate(MIXED):
        logits, state = turn_by_turn(model, tokenizer, session)
        length = len(logits)
        close(out.logits[row, :length], logits)
        close(out.memory_state.sites["top"]["slots"][row], state.sites["top"]["slots"][0])
        assert out.memory_state.turns[row] == len(session.turns) == state.turns
        assert out.memory_state.tokens[row] == state.tokens
        assert not out.memory_state.pending[row]
        labels = batch["labels"][row, 1:length]
        losses.append(F.cross_entropy(logits[:-1], labels, ignore_index=-100, reduction="none")[labels >= 0])
    close(out.loss, torch.cat(losses).mean().float())  # transformers takes losses in float32
    assert len(batch["input_ids"][0]) > min(
        len(turn_by_turn(model, tokenizer, s)[0]) for s in MIXED
    )  # there was padding


@pytest.mark.parametrize("family", FAMILIES)
def test_labels_are_what_is_marked_to_be_learned(family):
    tokenizer = talking_tokenizer(family)
    batch = SessionCollator(tokenizer)(MIXED)
    learned = [tokenizer.decode(labels[labels >= 0]) for labels in batch["labels"]]
    assert [text.removesuffix("</s>").strip() for text in learned[:2]] == ["Marigold.", "Yes."]
    whole = tokenizer("My boat is called Marigold.")["input_ids"]
    assert batch["labels"][2][batch["labels"][2] >= 0].tolist() == whole[1:]  # nothing comes before its first token
    taught = batch["labels"] >= 0
    assert torch.equal(batch["labels"][taught], batch["input_ids"][taught])
    assert not (taught & (batch["position_ids"] == 0)).any()


def test_rows_sessions_and_their_json_form_are_one():
    collate = SessionCollator(talking_tokenizer("llama"))
    wanted = collate(MIXED)
    for form in ([s.to_json() for s in MIXED], [collate.row(s) for s in MIXED]):
        got = collate(form)
        assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    with pytest.raises(ValueError, match="remove_unused_columns=False"):
        collate([{"meta": {}}])
    with pytest.raises(ValueError, match="no text"):
        collate([Session(())])
    with pytest.raises(ValueError, match="input_ids, but no position_ids, memory_mask: give sessions"):
        collate([{"input_ids": [1, 2], "labels": [1, 2]}])


def test_a_turn_that_is_longer_than_the_tokenizer_says_is_refused():
    tokenizer = copy.deepcopy(talking_tokenizer("llama"))
    longest = max(SessionCollator(tokenizer).row(MIXED[0])["position_ids"]) + 1
    tokenizer.model_max_length = longest
    assert len(SessionCollator(tokenizer).row(MIXED[0])["input_ids"]) > longest  # a row may be
    tokenizer.model_max_length -= 1
    with pytest.raises(TurnTooLong, match=f"needs {longest} positions, .* is {longest - 1}: make it several turns"):
        SessionCollator(tokenizer)(MIXED)


def test_a_row_of_turns_is_refused_with_a_cache():
    """transformers would let attention see across the turns, and say nothing."""
    model, batch = talking_model("llama"), SessionCollator(talking_tokenizer("llama"))(MIXED)
    with pytest.raises(ValueError, match="use_cache=False"):
        model(**batch)
    with pytest.raises(ValueError, match="use_cache=False"):
        model(**batch, past_key_values=model(batch["input_ids"][:, :3]).past_key_values, use_cache=False)
    ids = batch["input_ids"][:1, :6]
    model(ids, position_ids=torch.arange(6)[None])  # one turn may have one


def trainable(family="llama", **config):
    model = talking_model(family, **{"sites": ("middle", "top"), "key_layers": (0,), **config}).float()
    model.freeze_base()
    return model


def train(
    folder,
    model=None,
    data=None,
    steps=6,
    trainer=Trainer,
    resume=None,
    callbacks=(),
    trainer_settings=None,
    **settings,
):
    """The losses of `steps` steps, four sessions each, and the trainer."""
    model = model or trainable()
    settings = {"per_device_train_batch_size": 4, "learning_rate": 3e-3, "max_grad_norm": 1.0, **settings}
    arguments = TrainingArguments(
        str(folder), max_steps=steps, logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, seed=3,
        save_strategy=settings.pop("save_strategy", "no"), **settings,
    )  # fmt: skip
    collate = SessionCollator(talking_tokenizer("llama"))
    run = trainer(
        model=model, args=arguments, train_dataset=data or sessions(), data_collator=collate, callbacks=list(callbacks),
        **(trainer_settings or {}),
    )  # fmt: skip
    run.train(resume_from_checkpoint=resume)
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry], run


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    return train(tmp_path_factory.mktemp("straight"))[0]


def test_the_trainer_trains_the_memory_and_nothing_else(tmp_path):
    model = trainable()
    before = {name: p.clone() for name, p in model.named_parameters()}
    losses, run = train(tmp_path, model, steps=40)
    assert losses[-1] < 0.85 * losses[0]
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != name.startswith("gru_memory"), name
    assert model.memory_state is None  # training leaves no conversation behind
    scores = run.evaluate(sessions(3))
    assert math.isfinite(scores["eval_loss"])


@pytest.mark.parametrize("optimizer_steps", [1, 4])
def test_a_resumed_run_has_the_curve_of_an_uninterrupted_one(tmp_path, straight, optimizer_steps):
    """From a checkpoint: weights, moments of the optimiser, schedule and the order of the data."""
    train(tmp_path, steps=6, save_strategy="steps", save_steps=optimizer_steps, save_only_model=False)
    fresh = talking_model("llama", sites=("middle", "top"), key_layers=(0,), gate_init=5.0).float()
    fresh.freeze_base()
    losses, run = train(tmp_path, fresh, resume=str(tmp_path / f"checkpoint-{optimizer_steps}"))
    assert len(losses) == 6 and run.state.global_step == 6  # the log goes on as well
    assert losses == pytest.approx(straight, rel=1e-6)


@pytest.mark.parametrize("sites", [("top",), ("input", "middle", "top")])
def test_gradient_checkpointing_changes_nothing(tmp_path, sites):
    plain, checkpointed = (
        train(tmp_path, trainable(sites=sites, key_layers=()), steps=4, **{CHECKPOINTING: on})[0]
        for on in (False, True)
    )
    assert checkpointed == pytest.approx(plain, rel=1e-6)


def test_accumulated_batches_are_one_batch(tmp_path, straight):
    losses, _ = train(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    assert losses == pytest.approx(straight, rel=1e-4)


def test_autocast_has_nearly_the_same_curve_and_leaves_weights_and_slots_in_float32(tmp_path, straight):
    model = trainable()
    slots = []
    for site in model.memory_sites().values():
        site.register_forward_hook(lambda module, args, output: slots.append(output[1]["slots"].dtype))
    losses, _ = train(tmp_path, model, bf16=True)
    assert losses == pytest.approx(straight, rel=0.03)
    assert losses != pytest.approx(straight, rel=1e-5)  # it was in bfloat16
    assert set(slots) == {torch.float32}
    assert all(p.dtype == torch.float32 for p in model.memory_parameters())


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_smoothed_loss_is_that_of_the_base(tmp_path, family):
    """The Trainer shifts labels for classes that it knows by name, also inside of peft's."""
    base, ids = talking_base(family), torch.arange(3, 15).repeat(2, 1)
    lora = LoraConfig(target_modules=["c_attn"] if family == "gpt2" else ["q_proj"])
    settings = TrainingArguments(str(tmp_path), label_smoothing_factor=0.1, report_to=[], use_cpu=True)

    def loss(model):
        return Trainer(model, settings).compute_loss(model.eval(), {"input_ids": ids, "labels": ids.clone()})

    wanted = loss(base)
    model = add_memory(base, MemoryConfig(num_heads=1, num_slots=2, slot_size=4))
    assert loss(model) == wanted
    assert loss(get_peft_model(model, lora)) == wanted


class SFTWithMemory(SFTTrainer):
    compute_loss = Trainer.compute_loss


@pytest.mark.parametrize("checkpointing", [False, True])
def test_sft_trainer_has_the_curve_of_the_trainer(tmp_path, straight, checkpointing):
    """TRL's SFTTrainer, as docs/training.md says: rows that are ready, the data collator and the Trainer's loss."""
    collate = SessionCollator(talking_tokenizer("llama"))
    settings = SFTConfig(
        str(tmp_path), max_steps=6, logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, seed=3, bf16=False,
        per_device_train_batch_size=4, learning_rate=3e-3, save_strategy="no", **{CHECKPOINTING: checkpointing},
        dataset_kwargs={"skip_prepare_dataset": True}, remove_unused_columns=False,
    )  # fmt: skip

    def run(trainer):
        model = trainable()
        rows = Dataset.from_list([collate.row(session) for session in sessions()])
        run = trainer(
            model=model,
            args=settings,
            train_dataset=rows,
            data_collator=collate,
            processing_class=talking_tokenizer("llama"),
        )
        run.train()
        return [entry["loss"] for entry in run.state.log_history if "loss" in entry]

    assert run(SFTWithMemory) == pytest.approx(straight, rel=1e-5)
    if hasattr(trl.trainer.utils, "add_fused_lm_head"):
        with pytest.raises(RuntimeError, match="SFTTrainer"):  # or it would train the base model, and never say so
            run(SFTTrainer)


def test_a_backbone_is_not_trained_by_itself_unawares():
    model, ids = trainable().train(), torch.arange(8)[None]
    with pytest.raises(RuntimeError, match="disable_memory"):
        model.model(ids)
    with model.disable_memory():
        model.model(ids)
    with torch.no_grad():
        model.model(ids)
    model.eval().model(ids)
