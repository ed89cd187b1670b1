"""Recall, grown: grids, things never told, two people, batches. A memory that repeats what it was told must come out right."""

import pytest
import torch
from repeating import repeat_what_was_told
from talking import talking_model, talking_tokenizer

from gru_memory.data.facts import FactGenerator, FactPool
from gru_memory.data.general_questions import GENERAL_QUESTIONS
from gru_memory.evaluation import contains, doubt, general
from gru_memory.evaluation.batched import BatchReader
from gru_memory.evaluation.doubt import DoubtConfig, evaluate_doubt, trust_shifted
from gru_memory.evaluation.general import GeneralConfig, evaluate_general
from gru_memory.evaluation.grid import GridConfig, evaluate_grid
from gru_memory.evaluation.isolation import IsolationConfig, evaluate_isolation
from gru_memory.evaluation.people import PeopleConfig, evaluate_people, make_sessions
from gru_memory.evaluation.untold import UntoldConfig, declines, evaluate_untold


@pytest.fixture(scope="module")
def loaded():
    return talking_model("llama"), talking_tokenizer("llama")


def test_every_cell_asks_the_state_of_its_turn(loaded, monkeypatch):
    told = repeat_what_was_told(monkeypatch)
    config = GridConfig(facts=(1, 3), turns=(2, 0), sessions=3, questions=2, batch_size=2, max_new_tokens=2)
    result = evaluate_grid(*loaded, config)
    assert [(row["facts"], row["turns"], row["questions"]) for row in result.rows] == [
        (1, 0, 3), (1, 2, 3), (3, 0, 6), (3, 2, 6),
    ]  # fmt: skip
    assert all(row["recall"] == 1 for row in result.rows)
    for reply in result.details["replies"]:  # the facts, and the turns since, are what was read by then
        read = [turns for turns in told.values() if " ".join(turns) == reply["reply"]]
        assert len(read[0]) == reply["facts"] + reply["turns"]


def test_things_never_told_are_not_in_any_state_that_is_asked(loaded, monkeypatch):
    repeat_what_was_told(monkeypatch)
    config = UntoldConfig(facts=(0, 2), between=1, questions=2, sessions=3, batch_size=2, max_new_tokens=3)
    result = evaluate_untold(*loaded, config)
    empty, full = result.rows
    assert (empty["facts"], full["facts"]) == (0, 2)
    assert empty["questions"] == full["questions"] == 6
    assert empty["leaks"] == 0 and full["leaks"] == 1  # it repeats every value that was told
    assert full["more"] == full["invents"] - full["base_invents"]
    halves = result.details["replies"][:6], result.details["replies"][6:]
    assert [r["question"] for r in halves[0]] == [r["question"] for r in halves[1]]
    assert [r["base"] for r in halves[0]] == [r["base"] for r in halves[1]]


def test_general_questions_are_asked_of_one_memory(loaded, monkeypatch):
    repeat_what_was_told(monkeypatch)
    result = evaluate_general(
        *loaded, GeneralConfig(facts=(0, 2), between=1, questions=5, batch_size=2, max_new_tokens=3)
    )
    empty, full = result.rows
    assert (empty["facts"], full["facts"], empty["questions"], full["questions"]) == (0, 2, 5, 5)
    assert empty["leaks"] == 0 and full["leaks"] == 1  # it repeats every value that was told
    halves = result.details["replies"][:5], result.details["replies"][5:]
    for half in halves:
        assert [reply["question"] for reply in half] == list(GENERAL_QUESTIONS[:5])
    # The later ones have the facts, too.
    assert all(one["memory"] in other["memory"] != one["memory"] for one, other in zip(*halves))
    assert [r["base"] for r in halves[0]] == [r["base"] for r in halves[1]]


def test_a_general_question_is_taken_for_one_about_the_user_where_the_base_model_answers(loaded, monkeypatch):
    said = {True: "From what you told me, it's unknown.", False: "It is blue."}
    for base in (True, False):
        for memory in (True, False):
            monkeypatch.setattr(general, "ask_alone", lambda *given, reply=said[base]: [reply])
            monkeypatch.setattr(general, "ask_all", lambda *given, reply=said[memory]: [reply])
            row = evaluate_general(*loaded, GeneralConfig(facts=(0,), between=0, questions=1)).rows[0]
            assert (row["takes"], row["same"]) == (memory and not base, memory == base)


def test_no_general_question_is_asked_twice_or_in_training():
    assert len(set(GENERAL_QUESTIONS)) == len(GENERAL_QUESTIONS) == 100
    pool = FactPool(FactGenerator(0), 12, 3000, 1, 1)
    assert not {turn.user for turn in pool.turns()} & set(GENERAL_QUESTIONS)


def test_a_silent_memory_invents_what_the_base_model_does(loaded):
    model = talking_model("llama")
    model.memory_sites()["top"].gate.data.zero_()
    config = UntoldConfig(facts=(0, 1), between=0, questions=1, sessions=3, batch_size=2, max_new_tokens=4)
    for row in evaluate_untold(model, loaded[1], config).rows:
        assert (row["same"], row["more"]) == (1, 0)


@pytest.mark.parametrize(
    ("reply", "declined"),
    [
        ("I don't know what your boat is called.", True),
        ("I\u2019m sorry, but I do not have that information.", True),
        ("You haven't told me.", True),
        ("As an AI, I have no access to it.", True),
        ("Could you please provide more details?", True),
        ("What is your boat?", True),
        ("", True),
        ("Your boat is called Marigold.", False),
        ("It is the Sorry Swan, known to all.", False),
        ("You told me it is 47.", False),
        ("I'd be happy to help. What is the name of your boat?", True),
        ("Let me know what your boat is called.", True),
        ("I don't know, but your boat is not in my records.", True),
        ("Your locker code is 1234. Let me know if you need it.", False),
        ("Your boat is called Marigold. Is that right?", False),
        ("I don't have a boat, but your boat is called the Marigold.", False),
    ],
)
def test_a_reply_that_does_not_know_invents_nothing(reply, declined):
    assert declines(reply) is declined


def test_two_people_tell_the_same_things_with_other_values():
    config = PeopleConfig(facts=2, between=1, sessions=4)
    sessions = make_sessions(config)
    assert sessions == make_sessions(config)
    for told, talk, questions in sessions:
        assert (len(told), len(talk), len(questions)) == (4, 1, 4)
        for question in questions:
            mine, other = told[question.person :: 2], told[1 - question.person :: 2]
            name = question.text.split()[0]
            assert all(user.startswith(f"{name} here. ") for user, _ in mine)
            assert not any(user.startswith(name) for user, _ in other)
            assert sum(contains(user, question.value) for user, _ in mine) == 1
            assert sum(contains(user, question.of_other) for user, _ in other) == 1
            assert not any(contains(user, question.value) for user, _ in other)


def test_people_are_asked_together_and_each_alone(loaded, monkeypatch):
    repeat_what_was_told(monkeypatch)
    config = PeopleConfig(facts=2, between=1, sessions=3, batch_size=2, max_new_tokens=2)
    result = evaluate_people(*loaded, config)
    assert [(row["conversation"], row["speaker"]) for row in result.rows] == [
        ("both in one", "first"), ("both in one", "second"), ("each alone", "first"), ("each alone", "second"),
    ]  # fmt: skip
    assert all(row["right"] == 1 and row["confused"] == 0 and row["questions"] == 6 for row in result.rows)
    for reply in result.details["replies"]:
        assert contains(reply["reply"], reply["of_other"]) == (reply["conversation"] == "both in one")


def test_the_value_of_the_other_is_confusion(loaded, monkeypatch):
    config = PeopleConfig(facts=1, between=0, sessions=2, max_new_tokens=2)
    others = {q.text: q.of_other for _, _, questions in make_sessions(config) for q in questions}
    monkeypatch.setattr(BatchReader, "ask", lambda self, s, questions, **_: ([others[q] for q in questions], s))
    assert all((row["right"], row["confused"]) == (0, 1) for row in evaluate_people(*loaded, config).rows)


def test_rows_of_a_batch_answer_as_alone(loaded):
    result = evaluate_isolation(*loaded, IsolationConfig(facts=2, between=2, rows=(2, 4), max_new_tokens=4))
    assert [row["batch"] for row in result.rows] == [1, 2, 4]
    for row in result.rows:
        assert row["same"] == 1
        assert row["apart"] < 1e-9  # float64
        assert row["questions"] == 2 * max(4 if row["batch"] == 1 else row["batch"], 1)


def test_a_batch_whose_rows_are_mixed_up_is_found_out(loaded, monkeypatch):
    repeat_what_was_told(monkeypatch)
    clean = evaluate_isolation(*loaded, IsolationConfig(facts=1, between=1, rows=(3,), max_new_tokens=2)).rows[-1]
    assert (clean["right"], clean["same"], clean["leaks"]) == (1, 1, 0)
    ask = BatchReader.ask

    def mixed(self, states, questions, **generation):
        return ask(self, states.select([*range(1, states.batch_size), 0]), questions, **generation)

    monkeypatch.setattr(BatchReader, "ask", mixed)
    row = evaluate_isolation(*loaded, IsolationConfig(facts=1, between=1, rows=(3,), max_new_tokens=2)).rows[-1]
    assert (row["right"], row["same"], row["leaks"]) == (0, 0, 1)


def test_every_shift_of_trust_asks_the_same_of_the_same_states(monkeypatch, small_books):
    told = repeat_what_was_told(monkeypatch)
    model, tokenizer = talking_model("llama", address_rank=8, signature_size=4), talking_tokenizer("llama")
    before = model.memory_sites()["top"].trust.clone()
    trusts = []
    ask = BatchReader.ask

    def spy(self, states, questions, **generation):
        trusts.append(model.memory_sites()["top"].trust.tolist())
        return ask(self, states, questions, **generation)

    books_from, compare = [], doubt.compare_book

    def read_book(model, ids, comparison, state):
        books_from.append(state)
        compare(model, ids, comparison, state=state)

    monkeypatch.setattr(BatchReader, "ask", spy)
    monkeypatch.setattr(doubt, "compare_book", read_book)
    config = DoubtConfig(
        shifts=(-30.0, 0.0, 30.0), facts=3, between=1, questions=2, untold=1, sessions=3, books=str(small_books), tokens=60,
        batch_size=2, max_new_tokens=2,
    )  # fmt: skip
    result = evaluate_doubt(model, tokenizer, config)
    assert [row["shift"] for row in result.rows] == [-30, 0, 30]
    assert all((row["questions"], row["untold"]) == (6, 3) for row in result.rows)
    assert all((row["recall"], row["declined"], row["wrong"]) == (1, 0, 0) for row in result.rows)
    doubtful, _, trusting = (row["change"] for row in result.rows)
    assert abs(doubtful) < 1e-9 < abs(trusting)  # a memory that never trusts itself is silent
    assert all(state.tokens.item() > 50 for state in books_from)  # the facts of a session were told to it
    assert torch.equal(model.memory_sites()["top"].trust, before)
    assert sorted({round(c_3 - before[2].item()) for *_, c_3 in trusts}) == [-30, 0, 30]
    by_kind = {kind: [r for r in result.details["replies"] if r["kind"] == kind] for kind in ("told", "untold")}
    assert all(r["value"] in r["reply"] for r in by_kind["told"])
    assert len(told) and len(by_kind["untold"]) == 9
    for r in by_kind["untold"]:  # nothing in a state is about it
        assert r["value"] is None and r["question"] not in r["reply"]


def test_what_doubt_declines_is_neither_recalled_nor_wrong(monkeypatch):
    model, tokenizer = talking_model("llama", address_rank=8, signature_size=4), talking_tokenizer("llama")

    def ask(self, states, questions, **_):
        doubts = model.memory_sites()["top"].trust[2] < -10
        return ["I don't know." if doubts or not n else "It is Nothing." for n, _ in enumerate(questions)], states

    monkeypatch.setattr(BatchReader, "ask", ask)
    config = DoubtConfig(shifts=(-30.0, 30.0), facts=2, between=0, questions=2, untold=2, sessions=2, max_new_tokens=2)
    sure, bold = evaluate_doubt(model, tokenizer, config).rows
    assert (sure["recall"], sure["declined"], sure["wrong"], sure["invents"]) == (0, 1, 0, 0)
    assert (bold["recall"], bold["declined"], bold["wrong"], bold["invents"]) == (0, 0.25, 0.75, 0.75)


def test_a_memory_without_trust_has_none_to_shift(loaded):
    with pytest.raises(ValueError, match="no trust to shift"), trust_shifted(loaded[0], 1.0):
        pass
    with pytest.raises(ValueError, match="no trust to shift"):
        evaluate_doubt(*loaded, DoubtConfig(sessions=1))
