"""The small world: its answers follow from its statements, noise goes between them, states from the cache are the model's own."""

from random import Random

import pytest
import torch
from talking import talking_base, talking_tokenizer
from tiny import one_thread  # noqa: F401 (a fixture)

from gru_memory.data.sessions import Session, read_jsonl
from gru_memory.evaluation import babi
from gru_memory.evaluation.asking import as_kept
from gru_memory.evaluation.babi import (
    MEAN,
    BabiConfig,
    _cache,
    _told_live,
    _training_stories,
    evaluate_babi,
    make_tests,
    read_cached,
    train_memory,
)
from gru_memory.evaluation.babi_world import PEOPLE, PLACES, TASKS, THINGS, answer_in, spread, story
from gru_memory.evaluation.batched import BatchReader
from gru_memory.rendering import TurnRenderer
from gru_memory.training.features import PREFIX
from gru_memory.training.rows import make_batch

SMALL = BabiConfig(turns=(0, 3), stories=10, most_noise=1, talk=4, steps=1, rows=2, tests=3, seed=3, max_new_tokens=2)


def replay(statements: list[str]) -> dict:
    """What is so after these sentences, by reading their words."""
    place: dict[str, str] = {}
    trail: dict[str, list[str]] = {}
    carrier: dict[str, str] = {}
    for text in statements:
        words = text.rstrip(".").split()
        person, last = words[0], words[-1]
        if last in PLACES:
            place[person] = last
            for thing in (thing for thing, who in carrier.items() if who == person):
                trail[thing].append(last)
        elif words[1] in ("picked", "took", "grabbed"):
            carrier[last] = person
            trail.setdefault(last, [place[person]])
            assert trail[last][-1] == place[person]  # nobody takes what is elsewhere
        else:
            assert carrier.pop(last) == person
    return {"place": place, "trail": trail, "carrier": carrier}


@pytest.mark.parametrize("seed", range(40))
def test_answers_follow_from_the_statements(seed):
    rng = Random(seed)
    *told, asked = story(1, rng)
    person = asked.user.removeprefix("Where is ").rstrip("?")
    assert replay([turn.user for turn in told])["place"][person] == asked.value == answer_in(asked.assistant)

    *told, asked = story(2, rng)
    now = replay([turn.user for turn in told])
    thing = asked.user.removeprefix("Where is the ").rstrip("?")
    assert now["trail"][thing][-1] == asked.value == answer_in(asked.assistant)
    assert now["carrier"].get(thing, "nobody") in asked.assistant

    *told, asked = story(3, rng)
    trail = replay([turn.user for turn in told])["trail"]
    thing, place = asked.user.removeprefix("Where was the ").rstrip("?").split(" before the ")
    assert trail[thing].count(place) == 1
    assert trail[thing][trail[thing].index(place) - 1] == asked.value == answer_in(asked.assistant)

    *told, asked = story(4, rng)
    words = [turn.user.rstrip(".").split() for turn in told]
    relations = [(one[1], one[3], one[6]) for one in words]
    question = asked.user.rstrip("?").split()
    if question[-1] == "of":  # What is the kitchen north of?
        wanted = {c for a, side, c in relations if (a, side) == (question[3], question[4])}
    else:
        wanted = {a for a, side, c in relations if (side, c) == (question[2], question[5])}
    assert wanted == {asked.value} == {answer_in(asked.assistant)}

    *told, asked = story(5, rng)
    giver, _, _, thing, _, taker = told[-1].user.rstrip(".").split()
    wanted = {"Who gave": giver, "Who did": taker, "What did": thing}[" ".join(asked.user.split()[:2])]
    assert wanted == asked.value == answer_in(asked.assistant)


@pytest.mark.parametrize("task", TASKS)
def test_every_fact_that_a_reply_finds_was_told_under_its_name(task):
    rng = Random(task)
    for _ in range(50):
        latest: dict[str, str] = {}
        *told, asked = story(task, rng)
        assert asked.marks
        for turn in [*told, asked]:
            if turn.learn == "answer":
                assert all(latest[mark.fact] == mark.value and mark.value in turn.assistant for mark in turn.marks)
            tells = turn.notes if turn.learn == "answer" else turn.marks
            assert all(mark.value in (turn.assistant or turn.user) for mark in tells)
            latest |= {mark.fact: mark.value for mark in tells}


def test_notes_say_what_follows_from_statements():
    rng = Random(5)
    for _ in range(50):
        *told, _ = story(3, rng)
        for number, turn in enumerate(told):
            person, last = turn.user.split()[0], turn.user.rstrip(".").split()[-1]
            before = replay([turn.user for turn in told[:number]])["place"].get(person)
            if last in PLACES:
                wanted = (
                    f"{person} came to the {last} from the {before or 'unknown'}, and is now in the {last}, as told."
                )
            elif turn.user.split()[1] in ("picked", "took", "grabbed"):
                wanted = f"{person} took it, so the {last} is with {person}, who took it."
            else:
                wanted = (f"{person} left it, so the {last} is with nobody, since it was left by {person}, "
                          f"and lies in the {before}, as told.")  # fmt: skip
            assert turn.assistant == wanted


def test_noise_goes_between_the_facts_and_the_question():
    rng = Random(0)
    turns, noise = story(1, rng), [story(4, rng)[0] for _ in range(20)]
    session = spread(turns, noise, rng)
    assert len(session.turns) == len(turns) + 20
    assert [turn for turn in session.turns if turn in turns] == turns
    assert session.turns[0] is turns[0] and session.turns[-1] is turns[-1]


def test_the_last_word_that_can_be_an_answer_counts():
    assert answer_in("The milk is with Mary. Mary is in the office.") == "office"
    assert answer_in("I do not know.") is None
    assert answer_in("kitchens") is None
    assert {answer_in(word + "!") for word in (*PEOPLE, *PLACES, *THINGS)} == {*PEOPLE, *PLACES, *THINGS}


def test_tests_are_the_same_stories_for_every_number_of_turns_of_noise():
    tests = make_tests(SMALL)
    assert set(tests) == {(task, turns) for task in TASKS for turns in (0, 3)}
    for task in TASKS:
        without = [set(session.turns) for session in tests[task, 0]]
        assert all(turns <= set(session.turns) for turns, session in zip(without, tests[task, 3], strict=True))
        assert [len(session.turns) for session in tests[task, 3]] == [len(s.turns) + 3 for s in tests[task, 0]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    work = tmp_path_factory.mktemp("babi")
    model, tokenizer = talking_base("llama"), talking_tokenizer("llama")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gru_memory.training.run._VALIDATION_SESSIONS", 2)  # its tokens are letters, stories are long
        return train_memory(model, tokenizer, SMALL, work, lambda *_: None), tokenizer, work


def test_nothing_that_is_known_by_heart_is_left_out(trained):
    assert trained[0].memory_config.persistent_floor == trained[0].memory_sites()["top"].persistent_floor == 0


def test_states_read_from_the_cache_are_those_that_the_model_reads(trained):
    model, tokenizer, work = trained
    sessions = make_tests(SMALL)[2, 3]
    turns = [session.turns[:-1] for session in sessions]
    reader, cache = BatchReader(model, tokenizer), _cache(model, tokenizer, sessions, work)
    begin = read_cached(model, [some[:2] for some in turns], cache, reader.start(len(turns)))
    states = read_cached(model, [some[2:] for some in turns], cache, begin)
    wanted = reader.read_all(
        reader.start(len(turns)), [[(turn.user, turn.assistant) for turn in some] for some in turns]
    )
    assert states.tokens.tolist() == wanted.tokens.tolist()
    assert states.turns.tolist() == wanted.turns.tolist()
    for name, tensor in wanted.sites["top"].items():
        torch.testing.assert_close(states.sites["top"][name], tensor, rtol=0.02, atol=0.02)  # cached in half precision
    assert wanted.sites["top"]["slots"].abs().max() > 0.1


def test_notes_are_the_models_own(trained):
    model, tokenizer, work = trained
    sessions = make_tests(SMALL)[2, 3]
    reader, cache = BatchReader(model, tokenizer), _cache(model, tokenizer, sessions, work)
    states, wrong = _told_live(reader, sessions, cache, max_new_tokens=3)
    for row, session in enumerate(sessions):
        state, other = reader.start(1), []
        for turn in session.turns[:-1]:
            if turn.learn == "answer":
                (reply,), state = reader.ask(state, [turn.user], max_new_tokens=3)
                other += [reply] if reply != turn.assistant else []
            else:
                state = reader.read(state, [(turn.user, turn.assistant)])
        assert [note["reply"] for note in wrong[row]] == other
        assert states.turns[row] == state.turns[0] == len(session.turns) - 1
        slots = states.sites["top"]["slots"][row]
        torch.testing.assert_close(slots, state.sites["top"]["slots"][0], rtol=0.02, atol=0.02)


def test_training_and_test_share_neither_stories_nor_talk(trained):
    _, _, work = trained
    seen = list(read_jsonl(work / f"memory-{SMALL.seed}" / "stories.jsonl"))
    tests = [session for sessions in make_tests(SMALL).values() for session in sessions]

    def parts(sessions, noise):
        return {tuple(t.user for t in s.turns if (t.kind == "talk") == noise) for s in sessions} - {()}

    assert len(seen) == SMALL.stories
    assert not parts(seen, False) & parts(tests, False)
    words = [{text for texts in parts(sessions, True) for text in texts} for sessions in (seen, tests)]
    assert all(words) and not words[0] & words[1]


@pytest.mark.parametrize("seed", [1234, 1235])
def test_no_story_of_the_test_is_one_of_training(seed):
    """At the size of the command, where some would be."""
    config = BabiConfig(turns=(0,), talk=10, seed=seed)
    known = {tuple(turn.user for turn in turns) for turns, _ in _training_stories(config)}
    tests = make_tests(config)
    assert all(len(sessions) == config.tests for sessions in tests.values())
    assert not known & {tuple(turn.user for turn in one.turns) for sessions in tests.values() for one in sessions}


def test_what_is_asked_and_how_it_counts(trained, monkeypatch):
    """States are those of a conversation that was kept; tasks weigh the same in the mean; published figures are shares."""
    model, tokenizer, _ = trained
    asked = []

    def ask_all(reader, states, rows, questions, *_):
        again = as_kept(states)
        assert all(torch.equal(again.sites["top"][name], tensor) for name, tensor in states.sites["top"].items())
        task, turns = list(make_tests(SMALL))[len(asked)]
        asked.append([session.turns[-1] for session in make_tests(SMALL)[task, turns]])
        assert list(questions) == [turn.user for turn in asked[-1]] and len(rows) == states.batch_size
        return [turn.assistant if task == 1 else "I do not know." for turn in asked[-1]]

    monkeypatch.setattr(babi, "train_memory", lambda *_: model)
    monkeypatch.setattr(babi, "ask_all", ask_all)
    outcome = evaluate_babi(model, tokenizer, SMALL)
    found = {(row["task"], row["turns"]): row for row in outcome.rows}
    assert set(found) == {(task, turns) for task in (*TASKS, MEAN) for turns in (0, 3)}
    for (task, _), row in found.items():
        assert row["accuracy"] == pytest.approx({1: 1.0, MEAN: 1 / 5}.get(task, 0.0))
        assert row["questions"] == (15 if task == MEAN else 3)
    assert found[1, 0]["published"] == 0.996
    assert found[MEAN, 3]["published"] == pytest.approx(0.72780)
    assert [reply["value"] for reply in outcome.details["replies"]] == [t.value for turns in asked for t in turns]


def test_a_value_can_be_written_at_other_tokens_than_its_own(trained):
    model, tokenizer, work = trained
    rng = Random(1)
    turn = next(t for t in story(5, rng) if len(t.marks) == 3)
    cache = _cache(model, tokenizer, [Session((turn,))], work)
    batch = make_batch([Session((turn,))], cache)
    tokens = TurnRenderer(tokenizer).turn(turn.user).ids
    pieces = [tokenizer.decode([token]) for token in tokens]
    start = len(cache.tokens(cache.find(PREFIX)))
    told = batch.told[0, start:].tolist()
    marked = [i for i, number in enumerate(told) if number]
    full_stop = max(i for i, piece in enumerate(pieces) if "." in piece)
    assert full_stop in marked and batch.value[0, start + full_stop] != 0
    # The giver's name comes first in the sentence; it is written at its end and not there.
    assert not told[pieces.index(next(piece for piece in pieces if piece.strip()))]


@pytest.mark.parametrize(("settings", "message"), [({"tasks": (1, 9)}, "tasks has 9"), ({"tests": 0}, "tests is 0")])
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        BabiConfig(**settings)
