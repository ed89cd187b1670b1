"""Generated sessions: reproducible, split cleanly, well formed, and right about who was told what."""

import json
import random
import re
import subprocess
import sys

import pytest

pytest.importorskip("faker")
pytest.importorskip("wonderwords")

from gru_memory.data import FactGenerator, FactPool, Session, Turn, read_jsonl, write_jsonl
from gru_memory.data import attributes as attrs
from gru_memory.data import phrasings as p
from gru_memory.data.attribute_lists import COMMON
from gru_memory.data.general_questions import GENERAL_QUESTIONS
from gru_memory.data.general_talk import general_questions
from gru_memory.data.sessions import Mark
from gru_memory.data.small_talk import sample_talk
from gru_memory.data.vocabulary import CLOSED_KINDS, MAKERS, sample_value, split_of

NUMBER = 300


def facts(number=NUMBER, **kwargs):
    generator = FactGenerator(**kwargs)
    return [generator.fact() for _ in range(number)]


SPLITS = [
    {"values": "train", "phrasings": "train", "attributes": "all"},
    {"values": "test", "phrasings": "test", "attributes": "all"},
]


def test_the_same_seed_gives_the_same_session_in_another_process():
    code = (
        "import json\nfrom gru_memory.data import FactGenerator\n"
        "s = FactGenerator(3, corrected=0.5).session(5, 5, shuffle=True)\nprint(json.dumps(s.to_json()))"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    mine = FactGenerator(3, corrected=0.5).session(5, 5, shuffle=True)
    assert json.loads(other) == mine.to_json()
    assert FactGenerator(4, corrected=0.5).session(5, 5, shuffle=True) != mine


@pytest.mark.parametrize("kind", sorted(set(MAKERS) - CLOSED_KINDS))
def test_values_of_the_two_splits_are_disjoint(kind):
    rng = random.Random(0)
    train, test = ({sample_value(kind, rng, split).lower() for _ in range(60)} for split in ("train", "test"))
    assert train and test and not train & test


def test_closed_kinds_are_not_offered_as_unseen():
    with pytest.raises(ValueError, match="no held-out values"):
        sample_value("weekday", random.Random(0), "test")
    assert not {fact.kind for fact in facts(values="test", attributes="all")} & CLOSED_KINDS


def test_accept_narrows_values_down_and_says_when_nothing_is_left():
    assert all(" " in fact.value for fact in facts(50, accept=lambda value: " " in value))
    with pytest.raises(ValueError, match="was accepted"):
        sample_value("weekday", random.Random(0), accept=lambda value: False)


def test_attributes_have_unique_ids_and_two_disjoint_sides():
    ids = [base.id for base in attrs.bases()]
    assert len(ids) == len(set(ids))
    train, test = ({base.id for base in attrs.bases(split)} for split in ("train", "test"))
    assert not train & test and train | test == set(ids)
    assert 0.08 < len(test) / len(ids) < 0.25
    told = {fact.attribute.split("/")[0] for fact in facts(attributes="test")}
    assert told <= test


def test_phrasings_of_the_two_splits_are_disjoint():
    for frames in (p.TELL, p.ASK, p.CORRECT, p.ACKNOWLEDGE):
        assert not set(frames["train"]) & set(frames["test"])
    for base in attrs.bases():
        attribute = attrs.attribute(base, base.owners[-1])
        for cores in (attribute.tells, attribute.asks, attribute.corrections):
            assert cores["train"] and cores["test"] and not set(cores["train"]) & set(cores["test"])


def test_the_value_follows_the_words_that_name_the_attribute():
    for base in attrs.bases():
        for owner in {"", base.owners[-1]}:
            attribute = attrs.attribute(base, owner)
            sentences = [s for split in ("train", "test") for s in attribute.tells[split]]
            for sentence in sentences:
                named = sentence[: sentence.index("{v}")]
                assert owner in named, sentence
                if base.family != "verb":
                    assert base.row[0] in named, sentence


def test_the_noun_of_a_correction_comes_before_its_value():
    for base in attrs.bases():
        if base.family != "verb":
            corrections = attrs.attribute(base).corrections
            for sentence in corrections["train"] + corrections["test"]:
                assert base.row[0] in sentence[: sentence.index("{v}")], sentence


@pytest.mark.parametrize("splits", SPLITS, ids=["train", "test"])
def test_values_are_told_and_answered_but_never_leaked(splits):
    for fact in facts(corrected=0.5, **splits):
        told = fact.old_value if fact.correction else fact.value
        assert told in fact.tell.user and fact.tell.value == told
        assert fact.ask.assistant.endswith(f"{fact.value}.") and fact.ask.learn == "answer"
        assert fact.ask.value == fact.value and fact.ask.fact == fact.tell.fact == fact.id
        assert fact.value.lower() not in (fact.tell.assistant or "").lower()
        if fact.correction:
            assert fact.value in fact.correction.user and fact.correction.value == fact.value
            assert fact.value.lower() != fact.old_value.lower()


@pytest.mark.parametrize("splits", SPLITS, ids=["train", "test"])
def test_texts_are_well_formed(splits):
    generator = FactGenerator(corrected=0.5, **splits)
    turns = [t for f in (generator.fact() for _ in range(NUMBER)) for t in (f.tell, f.correction, f.ask) if t]
    for turn in turns + [generator.talk() for _ in range(NUMBER)]:
        for text in filter(None, (turn.user, turn.assistant)):
            assert not re.search(r"[{}]|[.?!,:] ?[.?!,:]|  | [.?!,:]|\bi\b(?!')", text), text
            assert text[0].isupper() or text[0].isdigit() or text[0] == '"', text
            assert text.rstrip('"')[-1] in ".?!", text


def test_small_talk_is_wide_and_split():
    rng = random.Random(0)
    train = {sample_talk(rng, "train").user for _ in range(2000)}
    test = {sample_talk(rng, "test").user for _ in range(200)}
    assert len(train) > 1200 and not train & test
    assert all(split_of(user) == "test" for user in test)


def test_general_questions_of_training_are_wide_well_formed_and_none_that_evaluation_asks():
    train = general_questions(random.Random(0), 1500, "train")
    test = general_questions(random.Random(0), 200, "test")
    assert len(set(train)) == 1500 and train == general_questions(random.Random(0), 1500, "train")
    assert not set(train) & set(test)
    assert {split_of(question) for question in train} == {"train"} and {split_of(q) for q in test} == {"test"}
    asked = {p.american(question).lower() for question in GENERAL_QUESTIONS}
    for question in train + test:
        assert not re.search(r"[{}/|]|[.?!,] ?[.?!,:]|  |\ba [aeio]", question) and question[-1] in ".?", question
        bare = re.sub(r"^(Quick one|Something else|Next|A different question|Just curious|Okay, next): ", "", question)
        assert p.american(bare).lower() not in asked, question
    assert not any(question.startswith("What is my ") for question in train)
    yours = [question for question in train if re.search(r"\b(you|your)\b", question)]
    assert len(yours) > 0.25 * len(train)
    assert not any(re.search(r"\b(am|was) you\b|\byou (am|has|is)\b", question) for question in yours)
    assert any(re.match(r"(Where|When|Who|Which|What) (do|did|are|were) you ", question) for question in yours)
    with pytest.raises(ValueError, match="ask for fewer than 1000000"):
        general_questions(random.Random(0), 1_000_000, "test")


def check_order(session):
    """Every ask asks for the value told last, and everything told is asked in the end."""
    known, asked = {}, {}
    for turn in session.turns:
        if turn.kind in ("tell", "correct"):
            assert (turn.kind == "correct") == (turn.fact in known)
            known[turn.fact] = turn.value
        elif turn.kind == "ask":
            assert turn.value == known[turn.fact]
            asked[turn.fact] = turn.value
    assert asked == known
    assert len({value.lower() for value in known.values()}) == len(known)


@pytest.mark.parametrize("shuffle", [False, True])
def test_asks_want_the_latest_value_told(shuffle):
    generator = FactGenerator(corrected=0.5)
    pool = FactPool(generator, num_facts=60, num_talk=20)
    for i in range(20):
        session = generator.session(5, 4, shuffle)
        check_order(session)
        check_order(pool.session(random.Random(i), 5, 4, shuffle))
        if not shuffle:
            kinds = " ".join(turn.kind for turn in session.turns)
            assert re.fullmatch(r"(tell |correct )+(talk ){4}(ask ?){5}", kinds)


def test_shuffled_sessions_ask_for_the_old_value_before_its_correction():
    generator = FactGenerator(corrected=1.0)
    sessions = [generator.session(4, 0, shuffle=True) for _ in range(20)]
    kinds = [(turn.kind, turn.fact) for session in sessions for turn in session.turns]
    assert any(("ask", fact) in kinds[: kinds.index(("correct", fact))] for kind, fact in kinds if kind == "correct")


def test_a_pool_makes_sessions_of_its_own_turns_only():
    pool = FactPool(FactGenerator(corrected=0.3), num_facts=30, num_talk=10)
    turns = list(pool.turns())
    assert len(turns) == len(set(turns))
    for seed in range(10):
        assert set(pool.session(random.Random(seed), 6, 5).turns) <= set(turns)
    assert pool.session(random.Random(1), 6, 5) == pool.session(random.Random(1), 6, 5)
    with pytest.raises(ValueError, match="ask for fewer"):
        pool.session(random.Random(0), 31, 0)


def test_a_pool_draws_sessions_of_facts_that_are_alike():
    pool = FactPool(FactGenerator(), 1000, 0, alike=1.0)
    kind_of = {turns.fact.id: turns.fact.kind for turns in pool.facts}
    drawn = [{kind_of[t.fact] for t in pool.session(random.Random(i), 2, 0).turns} for i in range(60)]
    one_kind = sum(len(kinds) == 1 for kinds in drawn)
    assert one_kind > 20  # kinds of fewer than 20 facts are not drawn from
    for i in range(200):  # a kind of few values, such as weekdays, is no kind for many facts
        assert len(pool.session(random.Random(i), 8, 0).turns) >= 16
    pool.alike = 0.0
    drawn = [{kind_of[t.fact] for t in pool.session(random.Random(i), 2, 0).turns} for i in range(60)]
    assert sum(len(kinds) == 1 for kinds in drawn) < one_kind / 2


def test_a_pool_draws_sessions_of_values_that_begin_alike():
    pool = FactPool(FactGenerator(), 1000, 0, begun_alike=1.0)

    def pairs() -> int:
        """Sessions in which two values are different and begin alike."""
        found = 0
        for i in range(40):
            values = {turn.value for turn in pool.session(random.Random(i), 3, 0).turns}
            assert len(values) == 3
            found += len({value[:4] for value in values if len(value) > 4}) < sum(len(value) > 4 for value in values)
        return found

    assert pairs() > 30  # a pair of one attribute cannot be told in one session
    assert len(pool.session(random.Random(0), 1, 0).turns) == 2
    pool.begun_alike = 0.0
    assert pairs() < 12
    few = FactPool(FactGenerator(), 2, 0, begun_alike=1.0)  # there is no such pair
    assert len(few.session(random.Random(0), 2, 0).turns) == 4


def test_sessions_survive_jsonl(tmp_path):
    generator = FactGenerator(corrected=0.5)
    sessions = [generator.session(3, 2, shuffle=True) for _ in range(5)]
    marked = Turn(
        "Anna took the key.", kind="tell", value="key", fact="f", more=(Mark("g", "Anna", "."), Mark("h", "key"))
    )
    sessions.append(Session((marked,)))
    write_jsonl(tmp_path / "data.jsonl", sessions)
    assert list(read_jsonl(tmp_path / "data.jsonl")) == sessions
    assert [mark.fact for mark in marked.marks] == ["f", "g", "h"]


def one_turn(reply=None, **keys):
    """A line with one turn."""
    messages = [{"role": "user", "content": "Hi", "turn": 0, **keys}]
    if reply is not None:
        messages.append({"role": "assistant", "content": "Hello.", "turn": 0, **reply})
    return json.dumps({"messages": messages})


def test_a_byte_order_mark_and_keys_without_a_value_are_no_matter(tmp_path):
    path = tmp_path / "data.jsonl"
    line = one_turn({"learn": "base", "value": None}, learn=None, kind=None, more=None, notes=None, name=None)
    path.write_text(f"{line}\n\n{line}\n", encoding="utf-8-sig")
    assert list(read_jsonl(path)) == [Session((Turn("Hi", "Hello.", learn="base"),))] * 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", "line 2"),
        ('{"meta": {}}', 'line 2: a session needs a list under "messages"'),
        ('{"messages": [{"role": "user", "content": "Hi"}]}', "line 2: every message needs its turn number"),
        (
            '{"messages": [{"role": "assistant", "content": "Hi", "turn": 0}]}',
            "line 2: turn 0 has a 'assistant'",
        ),
        (
            '{"messages": [{"role": "user", "content": "Hi", "turn": 0, "learn": "all"}]}',
            "line 2: turn 0: learn is",
        ),
        ('{"messages": [{"role": "user", "content": "Hi", "turn": 0, "more": [["fact"]]}]}', "line 2: turn 0: "),
        (
            '{"messages": [{"role": "text", "content": "A page.", "turn": 0}, {"role": "user", "content": "Hi", "turn": 0}]}',
            "line 2: turn 0 has a 'user' message; a turn is one user message, then at most one reply, or one text",
        ),
        (
            '{"messages": [{"role": "user", "content": "Hi", "turn": 0}, {"role": "text", "content": "A page.", "turn": 0}]}',
            "line 2: turn 0 has a 'text' message",
        ),
        (one_turn(value=42, fact="boat"), 'line 2: turn 0: "value" is 42: give a text'),
        (one_turn(value="red", fact=["boat"]), "line 2: turn 0: \"fact\" is ['boat']: give a text"),
        (one_turn(value="red", fact=""), "line 2: turn 0: \"fact\" is ''"),
        (one_turn(more=["ab"]), "line 2: turn 0: \"more\" is ['ab']: give a list of [fact, value]"),
        (one_turn(more=[["boat", 5]]), 'line 2: turn 0: "more" is'),
        (one_turn(notes={"fact": "a", "value": "b"}), 'line 2: turn 0: "notes" is'),
        (one_turn(notes=[["a", "b", 1]]), 'line 2: turn 0: "notes" is'),
        (one_turn(vlaue="red"), 'line 2: turn 0 has a message with "vlaue"; use "role", "content"'),
        (one_turn(reply={}, learn="answer"), 'line 2: turn 0 has "learn" on the user\'s message: give it to the reply'),
        (one_turn(reply={"value": "red"}), 'line 2: turn 0 has "value" on its reply'),
        ("\udce9", "line 2 is not UTF-8 (byte 1 of the line)"),
    ],
)
def test_an_unreadable_line_is_named(tmp_path, line, message):
    path = tmp_path / "data.jsonl"
    write_jsonl(path, [Session((Turn("Hi."),))])
    with open(path, "a", encoding="utf-8", errors="surrogateescape") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        list(read_jsonl(path))
    assert str(path) in str(error.value)


def test_plain_questions_are_asked_in_the_first_words_of_their_attribute():
    plain = FactGenerator(3, plain=1.0)
    for _ in range(20):
        fact = plain.fact()
        direct = plain._attributes[fact.attribute].asks["train"][0].direct
        assert (
            fact.ask.user.lower().replace("olor", "olour").replace("avorite", "avourite").replace("eighbor", "eighbour")
            == (direct + "?").lower()
        )
    some = FactGenerator(3, plain=0.5)
    direct = [fact.ask.user.lower() for fact in (some.fact() for _ in range(40))]
    assert 0 < sum(user.startswith(("what is", "where do", "what's")) for user in direct) < 40
    for wrong in ({"plain": 1.5}, {"plain": 0.5, "phrasings": "test"}):
        with pytest.raises(ValueError, match="plain"):
            FactGenerator(0, **wrong)


def test_plain_facts_are_often_what_people_tell_first():
    assert set(COMMON) <= {base.id for base in attrs.bases()}
    plain, other = (FactGenerator(2, plain=share) for share in (1.0, 0.0))
    common = [sum(g.fact().attribute.removesuffix("/me") in COMMON for _ in range(100)) for g in (plain, other)]
    assert common[0] > 35 > 20 > common[1]


def test_a_session_on_many_lines_is_refused_in_words(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"messages": [\n]}\n')
    with pytest.raises(ValueError, match=r"line 1 is not JSON .*: a session stands on one line"):
        list(read_jsonl(path))
