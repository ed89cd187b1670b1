"""Recall, grown: grids, things never told, two people, batches. A memory that repeats what it was told must come out right."""

import pytest
from repeating import repeat_what_was_told
from talking import talking_model, talking_tokenizer

from gru_memory.evaluation import contains
from gru_memory.evaluation.batched import BatchReader
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
