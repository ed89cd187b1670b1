"""Books: what is marked as worth carrying, and a memory that learns to carry it."""

import copy
import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_training import (
    KEY_LAYERS,
    cache_of_turns,  # noqa: F401 (a fixture)
    small_model,  # noqa: F401 (a fixture)
    tokenizer_of_letters,  # noqa: F401 (a fixture)
)

from gru_memory import AutoModelWithGRUMemory
from gru_memory.memory import GRUMemoryWithDecay
from gru_memory.training.passages import (
    PASSAGES,
    PassagePool,
    PassageTrainer,
    Vocabulary,
    held_out_passages,
    passages_batch,
    passages_loss,
    recurring,
)
from gru_memory.training.request import TrainRequest
from gru_memory.training.run import _training_gate, train, train_loaded
from gru_memory.training.trainer import TrainingConfig

NAMES = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789@#$%&*+=<>~^"  # a letter is a token: rare ones


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two books, each of chapters that are about two names."""
    folder, rng = tmp_path_factory.mktemp("books"), random.Random(0)
    for title in ("one", "two"):
        chapters = []
        for _ in range(26):
            names = rng.sample(NAMES, 2)
            chapters.append(" ".join(f"and then {rng.choice(names)} said that it was so," for _ in range(90)))
        (folder / f"{title}.txt").write_text("\n".join(chapters))
    return folder


def test_passages_follow_each_other_and_none_is_held_out(folder):
    books = [path.read_text() for path in sorted(folder.glob("*.txt"))]
    pool = PassagePool(folder, 80, random.Random(0))
    assert len(pool.stretches) == 80 // PASSAGES
    for stretch in pool.stretches:
        text = "".join(turn.assistant for turn in stretch.turns)
        (at,) = [book.find(text) for book in books if text in book]
        assert 0.04 * len(books[0]) < at < at + len(text) < 0.89 * len(books[0])
        assert len(stretch.turns) == PASSAGES and all(400 < len(turn.assistant) < 2100 for turn in stretch.turns)
        assert all(turn.assistant[0].isspace() for turn in stretch.turns[1:])  # no word is cut
    for stretch in held_out_passages(folder, random.Random(0)).stretches:
        text = "".join(turn.assistant for turn in stretch.turns)
        assert any(book.find(text) >= 0.87 * len(book) for book in books)
    assert len(list(pool.turns())) == len({turn for stretch in pool.stretches for turn in stretch.turns})


def test_folders_without_books_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no .txt file"):
        PassagePool(tmp_path, 8, random.Random(0))
    (tmp_path / "short.txt").write_text("word " * 100)
    with pytest.raises(ValueError, match="too short"):
        PassagePool(tmp_path, 8, random.Random(0))


def test_what_comes_again_in_a_later_passage_is_told_and_asked_for():
    #                  0  1  2  3 | 4  5  6 | 7  8  9
    tokens = np.array([5, 7, 1, 7, 8, 7, 1, 7, 8, 7])
    passage = np.array([0, 0, 0, 0, 1, 1, 1, 2, 2, 2])
    carried = np.ones(10, dtype=bool)
    carried[1] = False  # too common
    columns = recurring(tokens, passage, carried)
    # Told where it comes again in a later passage, each occurrence by its own number.
    assert columns["told"].tolist() == [0, 2, 0, 4, 5, 6, 0, 0, 0, 0]
    assert (columns["value"] == columns["told"]).all()
    assert columns["fact"].tolist() == [0, 8, 0, 8, 9, 8, 0, 0, 0, 0]
    # Asked for one position before, by the number of the last one in an earlier passage; never across a beginning.
    assert columns["asked"].tolist() == [0, 0, 0, 0, 4, 0, 0, 5, 6, 0]
    assert (columns["asked"] == columns["asked_value"]).all()
    assert columns["asked_fact"].tolist() == [0, 0, 0, 0, 8, 0, 0, 9, 8, 0]


def batch_of(folder, build, count=2):
    pool = PassagePool(folder, count * PASSAGES, random.Random(1))
    cache = build(pool.turns())
    vocabulary = Vocabulary.of(cache, 258)
    return passages_batch(pool.stretches, cache, vocabulary.carried), vocabulary, cache, pool


def test_a_batch_says_of_every_token_what_is_to_be_learned(folder, build):
    batch, vocabulary, cache, pool = batch_of(folder, build)
    assert set(vocabulary.ids.tolist()) == {int(t) for i in range(len(cache)) for t in cache.tokens(i)}
    assert (vocabulary.number[vocabulary.ids] == torch.arange(len(vocabulary.ids))).all()
    for row, stretch in enumerate(pool.stretches):
        length = int(batch.mask[row].sum())
        starts = [*batch.turn_starts[row].nonzero().flatten().tolist(), length]
        assert len(starts) == PASSAGES + 1
        first, second = starts[:2]
        assert (batch.labels[row, :second] == -100).all()  # there is nothing to recall yet
        for begin, end in zip(starts[1:], starts[2:], strict=False):
            assert (batch.labels[row, begin : end - 1] == batch.tokens[row, begin + 1 : end]).all()
            assert batch.labels[row, end - 1] == -100
        text = cache.tokenizer.decode(batch.tokens[row, first:length])
        assert text == "".join(turn.assistant for turn in stretch.turns)
    carried = torch.from_numpy(vocabulary.carried)
    learned = batch.labels >= 0
    expected = learned & carried[batch.labels.clamp_min(0)]
    assert ((batch.unknown | ((batch.asked > 0) & learned)) == expected).all()
    assert not (batch.unknown & (batch.asked > 0)).any()


def test_the_loss_is_that_of_all_tokens(folder, build, model):
    """Those that were left out are stood for, though others, which are all looked at, are much likelier."""
    batch, vocabulary, *_ = batch_of(folder, build, 1)
    head = model.get_output_embeddings().weight.detach()
    recurs = (batch.asked > 0) & (batch.labels >= 0)
    batch.features[..., :32][recurs] = 300 * head[batch.labels[recurs]]
    memory = content_memory(gate_init=0.0)

    def report(seed, **settings):
        return passages_loss(memory, head, vocabulary, batch, torch.Generator().manual_seed(seed), **settings)

    whole = report(0, others=1.0)
    where = batch.labels >= 0
    logits = batch.features[..., :32][where] @ head[vocabulary.ids].t()
    each = torch.nn.functional.cross_entropy(logits, vocabulary.number[batch.labels[where]], reduction="none")
    assert each[recurs[where]].mean() < 0.5 * each[~recurs[where]].mean()
    assert whole.text_loss == pytest.approx(each.mean().item(), rel=0.005)
    parts = [report(seed).text_loss for seed in range(8)]
    assert np.mean(parts) == pytest.approx(whole.text_loss, rel=0.01)
    assert whole.gain == pytest.approx(0.0, abs=1e-6)  # a silent memory
    with torch.no_grad():
        assert report(0, others=1.0).text_loss == pytest.approx(whole.text_loss, rel=1e-5)  # in parts


def content_memory(**settings):
    torch.manual_seed(1)
    form = {"num_slots": 24, "slot_size": 24, "signature_size": 12, "address_rank": 12, "addressing": "content"}
    return GRUMemoryWithDecay(
        32,
        num_heads=1,
        cell="mingru",
        decay=0.99,
        decay_every="turn",
        key_size=32 * len(KEY_LAYERS),
        **form,
        **settings,
    )


def test_a_memory_learns_to_carry_names(folder, build, model, tmp_path):
    """The text becomes likelier, and a run that was stopped goes on where it was."""
    rng, log = random.Random(2), []
    pool, held_out = PassagePool(folder, 160, rng), held_out_passages(folder, rng)
    cache, kept = build(pool.turns()), build(held_out.turns())
    head = model.get_output_embeddings().weight.detach()

    def trainer(steps, where):
        memory = content_memory(gate_init=_training_gate(head, 12))
        memory.match_embeddings(head)
        config = TrainingConfig(steps=steps, rows=8, validate_every=10, warmup_steps=5, key_dropout=0.0)
        return PassageTrainer(memory, head, pool, cache, {"held_out": (held_out, kept)}, config, where, log.append)

    first = trainer(10, tmp_path)
    first.begin(len(KEY_LAYERS))
    first.train()
    second = trainer(30, tmp_path)
    assert second.resume() and second.step == 10
    score = second.train()
    gains = [entry["gain"] for entry in log if "gain" in entry]
    assert len(gains) == 30 and np.mean(gains[-10:]) > 0.004 > np.mean(gains[:10]), gains
    assert score == log[-1]["validation"]["held_out_gain"] > 0


def test_a_memory_of_books_from_the_command_s_request_to_a_folder(folder, model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    shape = {"num_slots": 8, "slot_size": 16, "signature_size": 8, "address_rank": 8, "key_layers": (1,)}
    request = TrainRequest(
        out=str(tmp_path / "memory"), model=str(tmp_path / "base"), data="books", books=str(folder), passages=32,
        memory=shape, training=TrainingConfig(steps=2, rows=4), bfloat16=False,
    )  # fmt: skip
    told = []
    train(request, progress=lambda what, done, total: told.append(what))
    assert {"hidden states: training", "hidden states: held-out passages", "aligning: gate"} <= set(told)
    loaded = AutoModelWithGRUMemory.from_pretrained(tmp_path / "base", memory=tmp_path / "memory")
    assert loaded.memory_config.persistent_slots == 0 and loaded.memory_config.addressing == "content"
    log = (tmp_path / "memory" / "log.jsonl").read_text().splitlines()
    assert json.loads(log[-1])["step"] == 2 and "held_out_gain" in json.loads(log[-1])
    others = {"passages": 40}, {"data": "facts"}, {"memory": {**shape, "num_slots": 9}}, {"bfloat16": True}
    for other in others:
        with pytest.raises(ValueError, match=f"other settings .*{'|'.join(other)}"):
            train(replace(request, model="nowhere", **other))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "memory").rglob("*")}
    stranger = copy.deepcopy(model)
    with torch.no_grad():
        stranger.lm_head.weight.neg_()
    with pytest.raises(ValueError, match=r"other settings \(model\)"):
        train_loaded(stranger, tokenizer, request)
    assert not hasattr(stranger, "memory_config")
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "memory").rglob("*")}


def test_requests_that_name_no_books_are_refused_before_anything_is_loaded(tmp_path, folder):
    for settings, message in (
        ({}, "--books"),
        ({"books": str(tmp_path)}, "no .txt file"),
        ({"books": str(folder), "memory": {"addressing": "learned"}}, "--addressing learned"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            train(TrainRequest(out=str(tmp_path / "out"), model="nowhere", data="books", **settings))
    (tmp_path / "short").mkdir()
    (tmp_path / "short" / "a.txt").write_text("word " * 5000)  # 25,000 characters, of which a tenth are held out
    for settings, message in (
        ({"books": str(tmp_path / "short")}, "too short"),
        ({"books": str(folder), "passages": 7}, "8 make a stretch"),
    ):
        with pytest.raises(ValueError, match=message):
            train(TrainRequest(out=str(tmp_path / "out"), model="nowhere", data="books", **settings))
    assert not (tmp_path / "out").exists()


def test_texts_without_words(tmp_path):
    (tmp_path / "blank.txt").write_text(" " * 100_000)
    with pytest.raises(ValueError, match="nothing but white space"):
        PassagePool(tmp_path, 8, random.Random(0))
    (tmp_path / "blank.txt").write_text("x" * 100_000)
    for stretch in PassagePool(tmp_path, 80, random.Random(0)).stretches:
        assert all(len(turn.assistant) <= 2_200 for turn in stretch.turns)


def test_books_in_which_nothing_comes_again_are_refused(folder, build, model, tmp_path):
    pool = PassagePool(folder, 16, random.Random(0))
    cache = build(pool.turns())
    head = model.get_output_embeddings().weight.detach()
    config = TrainingConfig(steps=1)
    trainer = PassageTrainer(content_memory(), head, pool, cache, {}, config, tmp_path)
    trainer.vocabulary.carried[:] = False
    with pytest.raises(ValueError, match="nothing that is rare comes again"):
        trainer.begin(1)


def test_the_few_numbers_that_have_far_to_go_learn_faster(folder, build, model, tmp_path):
    pool = PassagePool(folder, 16, random.Random(0))
    cache, head = build(pool.turns()), model.get_output_embeddings().weight.detach()
    memory = content_memory()
    trainer = PassageTrainer(memory, head, pool, cache, {}, TrainingConfig(steps=1), tmp_path)
    shares = {id(group["params"][0]): group["share"] for group in trainer.optimizer.param_groups}
    fast = {name for name, parameter in memory.named_parameters() if shares[id(parameter)] > 1}
    assert fast == {"gate", "sharpness", "trust", "strength_key.bias", "read_gate.bias"}
