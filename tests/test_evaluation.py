"""The evaluations: batches equal single conversations, replies are marked right, baselines are what they say."""

import json

import pytest
import torch
from talking import FAMILIES, talking_model, talking_tokenizer
from tiny import assert_close, assert_same_state
from torch.nn import functional as F

from gru_memory import Conversation
from gru_memory.data.sessions import Session, Turn, write_jsonl
from gru_memory.evaluation import (
    BatchReader,
    HarmConfig,
    RecallConfig,
    contains,
    evaluate_harm,
    evaluate_recall,
    standard_suite,
    wilson_interval,
)
from gru_memory.evaluation import full_history as full_history_module
from gru_memory.evaluation.full_history import ask_with_history
from gru_memory.evaluation.harm import Comparison, compare_book
from gru_memory.evaluation.report import write_report

TALKS = [
    [("My boat is called Marigold.", "Lovely."), ("I live in Porto.", None), ("What is two and two?", "Four.")],
    [("I like tea.", "Good to know, I will remember it.")],
    [("Where do you live?", "Nowhere."), ("Oh.", None)],
]
QUESTIONS = ["What is my boat called?", "Where do I live, as far as you remember?", "Well?"]
SMALL = {"facts": 2, "between": 2, "sessions": 3, "max_new_tokens": 4, "batch_size": 2}


@pytest.fixture(scope="module", params=FAMILIES)
def reader(request):
    return BatchReader(talking_model(request.param), talking_tokenizer(request.param))


@pytest.fixture(scope="module")
def llama():
    return talking_model("llama"), talking_tokenizer("llama")


def test_a_batch_reads_and_answers_as_single_conversations_do(reader):
    states = reader.read_all(reader.start(3), TALKS)
    replies, after = reader.ask(states, QUESTIONS, max_new_tokens=6)
    for row, turns in enumerate(TALKS):
        alone = Conversation(reader.model, reader.tokenizer, max_new_tokens=6)
        for user, reply in turns:
            alone.read(user, reply)
        assert_same_state(states.select(row), alone.state)
        assert replies[row] == alone.say(QUESTIONS[row])
        assert_same_state(after.select(row), alone.state)


def test_a_question_to_an_empty_memory_takes_the_prefix_in(reader):
    replies, after = reader.ask(reader.start(2), QUESTIONS[:2], max_new_tokens=3)
    alone = Conversation(reader.model, reader.tokenizer, max_new_tokens=3)
    assert replies[1] == alone.say(QUESTIONS[1])
    assert_same_state(after.select(1), alone.state)


def test_a_turn_that_does_not_fit_is_refused(reader):
    with pytest.raises(ValueError, match="make it shorter"):
        reader.read(reader.start(1), [("boat " * 400, None)])


@pytest.mark.parametrize("history", [[], TALKS[0]], ids=["question alone", "full history"])
def test_the_base_model_answers_from_what_is_in_its_context(reader, history):
    answers = ask_with_history(reader, history, QUESTIONS, max_new_tokens=6)
    assert answers.dropped_turns == 0
    tokenizer, template = reader.tokenizer, reader.renderer.template
    messages = [m for user, reply in history for m in _messages(user, reply)]
    for question, got in zip(QUESTIONS, answers.replies):
        text = tokenizer.apply_chat_template(
            [*messages, *_messages(question)], tokenize=False, add_generation_prompt=True, chat_template=template
        )
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        with reader.model.disable_memory():
            out = reader.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=1
            )
        assert got == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()
    config = reader.model.config
    per_token = config.num_hidden_layers * 2 * config.hidden_size * 8  # keys and values in float64
    assert answers.kv_bytes == per_token * answers.history_tokens


def test_a_history_that_does_not_fit_loses_its_oldest_turns(reader):
    turn = ("boat " * 12, "Porto " * 12)
    answers = ask_with_history(reader, [turn] * 30, QUESTIONS, max_new_tokens=4)
    assert 0 < answers.dropped_turns < 30
    kept = ask_with_history(reader, [turn] * (30 - answers.dropped_turns), QUESTIONS, max_new_tokens=4)
    assert answers.replies == kept.replies
    with pytest.raises(ValueError, match="fewer new tokens"):
        ask_with_history(reader, [], QUESTIONS, max_new_tokens=1000)


@pytest.mark.parametrize(
    ("reply", "value", "right"),
    [
        ("It is Marigold.", "marigold", True),
        ("It is MARI\n GOLD", "Mari  Gold", True),
        ("Your code is 47.", "47", True),
        ("Your code is 4471.", "47", False),
        ("It costs 47.50.", "47", False),
        ("At 1:47 exactly.", "47", False),
        ("At 7:30, as ever.", "7:30", True),
        ("At 17:30.", "7:30", False),
        ("$1,200 a month", "$1,200", True),
        ("Anna's boat", "Anna", True),
        ("Annabel", "Anna", False),
        ("It is blue-green.", "blue", False),
        ("It\u2019s O\u2019Neill", "O'Neill", True),
        ("a (red) one", "red", True),
        ("C++ of course", "c++", True),
        ("", "red", False),
        ("anything", " ", False),
    ],
)
def test_a_reply_is_right_if_the_value_stands_in_it(reply, value, right):
    assert contains(reply, value) is right


def test_wilson_intervals():
    assert wilson_interval(0, 0) == (0.0, 1.0)
    low, high = wilson_interval(8, 10)
    assert (round(low, 4), round(high, 4)) == (0.4902, 0.9433)  # Newcombe's tables
    assert wilson_interval(0, 100)[0] == 0.0
    assert 0.03 < wilson_interval(0, 100)[1] < 0.04
    assert wilson_interval(100, 100)[1] == 1.0
    with pytest.raises(ValueError, match="not a share"):
        wilson_interval(3, 2)


def test_recall_counts_what_the_replies_say(llama, tmp_path, monkeypatch):
    model, tokenizer = llama
    seen = []
    result = evaluate_recall(model, tokenizer, RecallConfig(**SMALL), progress=lambda *step: seen.append(step))
    assert len(result.replies) == 6 == result.memory.total == result.floor.total == result.full_history.total
    for method in ("memory", "floor", "full_history"):
        said = sum(contains(getattr(entry, method), entry.value) for entry in result.replies)
        assert getattr(result, method).hits == said
    assert {("memory", 3, 3), ("floor", 6, 6), ("full history", 3, 3)} <= set(seen)
    assert result.old_value is None
    assert 900 < result.state_bytes < result.kv_bytes
    write_report(tmp_path / "sub" / "r.json", "gru-memory eval recall", 1, [result])
    written = json.loads((tmp_path / "sub" / "r.json").read_text())
    assert written["results"][0]["replies"][0]["question"] == result.replies[0].question
    assert written["environment"]["versions"]["torch"] == torch.__version__


def test_recall_asks_every_question_of_the_memory_of_its_own_session(llama, monkeypatch):
    """A memory that repeats everything it was told is right about everything, and one mixed up between rows is not."""
    model, tokenizer = llama
    told: dict[tuple, str] = {}

    def key(state):
        return tuple(state.sites["top"]["slots"].half().flatten().tolist())  # as it is kept

    def read_all(self, states, conversations):
        states = real_read_all(self, states, conversations)
        for row, turns in enumerate(conversations):
            told[key(states.select(row))] = " ".join(user for user, _ in turns)
        return states

    real_read_all = BatchReader.read_all
    monkeypatch.setattr(BatchReader, "read_all", read_all)

    def ask(self, states, questions, **generation):
        return [told[key(states.select(row))] for row in range(len(questions))], states

    monkeypatch.setattr(BatchReader, "ask", ask)
    config = RecallConfig(**{**SMALL, "corrected": True, "sessions": 5})
    result = evaluate_recall(model, tokenizer, config, floor=False, full_history=False)
    assert result.memory.share == 1.0
    assert result.old_value["memory"].share == 1.0
    assert all(entry.old_value and entry.old_value != entry.value for entry in result.replies)
    assert result.floor is None and result.full_history is None and result.kv_bytes is None


def test_full_history_holds_every_turn_of_the_session_and_no_other(llama, monkeypatch):
    model, tokenizer = llama
    histories = []
    real = full_history_module._split_ids

    def spy(reader, history, questions):
        histories.append(history)
        return real(reader, history, questions)

    monkeypatch.setattr(full_history_module, "_split_ids", spy)
    config = RecallConfig(**{**SMALL, "sessions": 2, "between": 1})
    evaluate_recall(model, tokenizer, config, floor=False)
    wanted = [[(t.user, t.assistant) for t in s.turns if t.kind != "ask"] for s in config.make_sessions(tokenizer)]
    assert [h for h in histories if len(h) == 3] == wanted


def test_the_rows_of_the_suite_draw_from_the_side_of_the_split_they_name():
    tokenizer = talking_tokenizer("llama")
    rows = standard_suite(sessions=2, seed=7)
    assert len({row.label for row in rows}) == len(rows) == 9
    for row in rows:
        assert row.seed == 7
        sessions = row.make_sessions(tokenizer)
        assert sessions == row.make_sessions(tokenizer)
        for session in sessions:
            kinds = [turn.kind for turn in session.turns]
            assert kinds.count("ask") == row.facts
            assert kinds.count("talk") == row.between
            assert kinds.count("correct") == row.facts * row.corrected
            if row.values == "multi":
                values = [turn.value for turn in session.turns if turn.kind == "ask"]
                assert all(len(tokenizer(f" {value}")["input_ids"]) >= 2 for value in values)


@pytest.mark.parametrize("wrong", [{"values": "some"}, {"phrasings": "test"}, {"facts": 0}, {"between": -1}])
def test_wrong_recall_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        RecallConfig(**wrong)


def test_harm_is_loss_and_kl_against_the_base_model(llama, tmp_path):
    model, tokenizer = llama
    (tmp_path / "a.txt").write_text("My boat is called Marigold. " * 60)
    (tmp_path / "a.py").write_text("boat = {'name': 'Marigold'}\n" * 20)
    chat = Session((Turn("Where do you live?", "In Porto."), Turn("Oh.", None), Turn("I see.", "Yes.")))
    write_jsonl(tmp_path / "chats.jsonl", [chat])
    config = HarmConfig(
        str(tmp_path), tokens=100, conversations=3, turns=2, facts=2, batch_size=2, code=str(tmp_path),
        chats=str(tmp_path / "chats.jsonl"),
    )  # fmt: skip
    results = {result.text: result for result in evaluate_harm(model, tokenizer, config)}
    kinds = ["books", "code", "small talk: replies", "small talk: all tokens", "chats: replies", "chats: all tokens"]
    assert list(results) == [
        *kinds,
        *(f"{k} after 2 facts{colon}{part}" for k, colon, part in (x.partition(":") for x in kinds)),
    ]
    for kind in kinds:
        name, colon, part = kind.partition(":")
        empty, full = results[kind], results[f"{name} after 2 facts{colon}{part}"]
        assert empty.tokens == full.tokens
        assert empty.base_loss == pytest.approx(full.base_loss)
        assert empty.memory_loss != full.memory_loss
    assert results["small talk: replies"].tokens < results["small talk: all tokens"].tokens
    assert results["code"].tokens == results["books"].tokens == 99
    assert all(result.kl_mean > 0 for result in results.values())

    with torch.no_grad():
        model = talking_model("llama")
        model.memory_sites()["top"].gate.zero_()
    for result in evaluate_harm(model, tokenizer, config):
        assert result.memory_loss == result.base_loss
        assert result.kl_mean == result.kl_median == result.changed_top1 == 0


def test_code_is_of_pythons_own_library_where_no_folder_is_named(tmp_path):
    first = HarmConfig(code_files=2, tokens=2000).code_paths()
    assert len(first) == 2
    assert all(path.suffix == ".py" and path.stat().st_size > 8000 for path in first)
    assert first == HarmConfig(code_files=2, tokens=2000).code_paths() != HarmConfig(code_files=2, seed=5).code_paths()
    with pytest.raises(FileNotFoundError, match="chats in the sessions' format"):
        HarmConfig(chats=str(tmp_path / "none.jsonl"))
    with pytest.raises(ValueError, match="nothing to read"):
        HarmConfig(conversations=0, code_files=0)


@torch.no_grad()
def test_a_book_is_read_in_windows_with_one_memory(llama):
    model, tokenizer = llama
    ids = torch.tensor(tokenizer("I live in Porto. " * 20)["input_ids"])
    comparison = Comparison()
    compare_book(model, ids, comparison, window=32)

    state, losses, kls = model.initial_memory_state(1), [], []
    for piece in ids.split(32):
        output = model(input_ids=piece[None], memory_state=state)
        state = output.memory_state
        with model.disable_memory():
            p = model(input_ids=piece[None]).logits[0, :-1].float().log_softmax(-1)
        q = output.logits[0, :-1].float().log_softmax(-1)
        losses.append(F.cross_entropy(output.logits[0, :-1].float(), piece[1:], reduction="none"))
        kls.append((p.exp() * (p - q)).sum(-1))
    assert_close(torch.cat(comparison.memory_loss), torch.cat(losses), 1e-5)
    assert_close(torch.cat(comparison.kl), torch.cat(kls), 1e-4)


def test_books_that_are_not_there_are_refused_at_once(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no \.txt"):
        HarmConfig(str(tmp_path))


def _messages(user, reply=None):
    answered = [] if reply is None else [{"role": "assistant", "content": reply}]
    return [{"role": "user", "content": user}, *answered]
