"""Sessions, and the rows made of them: what is learned, told and asked at which token."""

import json
import random
from dataclasses import replace

import pytest
import torch
from small_training import (
    cache_of_turns,  # noqa: F401 (a fixture)
    facts_and_talk,  # noqa: F401 (a fixture)
    small_model,  # noqa: F401 (a fixture)
    tokenizer_of_letters,  # noqa: F401 (a fixture)
)

from gru_memory.data.facts import UNTOLD, FactGenerator, FactPool
from gru_memory.data.sessions import Mark, Session, Turn, write_jsonl
from gru_memory.training.features import PREFIX
from gru_memory.training.pools import FilePool, book_pages
from gru_memory.training.rows import make_batch

# What a row marks


def test_labels_are_the_reply_and_nothing_else(tokenizer, pool, build):
    session = pool.session(random.Random(1), 2, 1)
    batch = make_batch([session], build(pool.turns()))
    taught = batch.labels[batch.labels >= 0]
    replies = [turn.assistant for turn in session.turns if turn.learn == "answer"]
    assert tokenizer.decode(taught) == "</s>".join(replies) + "</s>"
    position = (batch.labels[0] >= 0).nonzero()[0].item()
    assert batch.labels[0, position] == batch.tokens[0, position + 1]


def test_what_is_told_of_a_value_ends_with_the_token_after_it(tokenizer, pool, build):
    turns = pool.facts[0]
    batch = make_batch([Session((turns.tells[0], turns.asks[0]))], build(pool.turns()))
    value = turns.fact.old_value or turns.fact.value
    told = batch.tokens[batch.told > 0]
    assert tokenizer.decode(told[:-1]) == f" {value}"
    if not turns.fact.old_value:  # then the same value is asked for, and the reply goes on with a full stop
        asked = batch.labels[batch.asked > 0]
        assert tokenizer.decode(asked) == f" {value}."
        assert batch.asked[batch.asked > 0].tolist() == batch.told[batch.told > 0].tolist()


def test_a_space_of_its_own_before_a_value_is_told_and_asked_for(tokenizer, build):
    """Tokenizers that take digits one by one begin " 46" with it, and a value in quotes has none."""
    after, quoted = (
        Turn(text, "Noted.", kind="tell", value="46", fact="f1") for text in ("My number is 46.", 'My number is "46".')
    )
    ask = Turn("What is my number?", "It's 46.", learn="answer", kind="ask", value="46", fact="f1")
    cache = build([after, quoted, ask])
    for tell, wanted in ((after, " 46"), (quoted, "46")):
        batch = make_batch([Session((tell, ask))], cache)
        told, asked = (numbers[numbers > 0].tolist() for numbers in (batch.told, batch.asked))
        assert tokenizer.decode(batch.tokens[batch.told > 0][:-1]) == wanted
        assert tokenizer.decode(batch.labels[batch.asked > 0]) == " 46."
        assert asked[-3:] == told[-3:]  # 4, 6 and what ends it are the same tokens, space or not
        assert (asked[0] == told[0]) == (tell is after)


def test_a_reply_may_ask_and_tell(build, tokenizer):
    """What is asked for is found where the reply says it first, what is told where the turn says it last."""
    asks, tells = (Mark("old", "Rex"),), (Mark("new", "Max"), Mark("way", "Rex"))
    turn = Turn("Rex, not Max!", "Rex left, Max came for Rex.", learn="answer", kind="tell", more=asks, notes=tells)
    session = Session((turn,))
    assert Session.from_json(json.loads(json.dumps(session.to_json()))) == session
    batch = make_batch([session], build([turn]))
    text = tokenizer.decode(batch.tokens[0])  # a token a letter, but for <s> and </s>
    letters = list(text.replace("<s>", "[").replace("</s>", "]"))

    def marked(column):
        return "".join(letters[i] for i in column[0].nonzero().flatten().tolist())

    assert marked(batch.told) == " Max  Rex." and marked(batch.asked) == " Rex"  # asked: the positions before "Rex "
    reply = "".join(letters).index("Rex left")
    assert batch.asked[0].nonzero()[0].item() == reply - 1
    assert batch.fact[0].unique().numel() == 3 and batch.asked_fact[0].unique().numel() == 2
    assert not batch.unknown.any()


def test_a_reply_that_says_a_value_again_is_not_where_it_is_told(build):
    turn = Turn("My boat is called Ara.", "Ara is a lovely name.", kind="tell", value="Ara", fact="f1")
    answer = Turn("Is it Ara?", "Yes, it is Ara.", learn="answer", kind="ask", value="Ara", fact="f1")
    said = Turn("Do you know more?", "Ara is a boat.", kind="tell", value="Ara", fact="f2")
    cache = build([turn, answer, said])
    starts = {t: cache.reply_start(cache.find((t.user, t.assistant))) for t in (turn, answer, said)}
    batch = make_batch([Session((t,)) for t in (turn, answer, said)], cache)
    prefix = len(cache.tokens(cache.find(PREFIX)))
    assert (batch.told[0] > 0).nonzero().max() < prefix + starts[turn]
    assert (batch.asked[1] > 0).nonzero().min() >= prefix + starts[answer] - 1
    assert (batch.told[2] > 0).nonzero().min() >= prefix + starts[said] - 1  # with the space before


# Rows that leave positions out


def test_thinned_rows_keep_what_is_told_and_answered(pool, build):
    sessions = [pool.session(random.Random(i), 2, 3, shuffle=False) for i in range(3)]
    cache = build(pool.turns())
    whole, thin = make_batch(sessions, cache), make_batch(sessions, cache, keep=0.1, rng=random.Random(0))
    assert thin.num_tokens < 0.8 * whole.num_tokens
    for row in range(3):
        for name in ("told", "asked"):
            for column in ("tokens", "labels", "fact", "value", "asked_fact", "asked_value", name):
                before, after = (getattr(b, column)[row][getattr(b, name)[row] > 0] for b in (whole, thin))
                assert torch.equal(before, after)
        assert int(whole.turn_starts[row].sum()) == int(thin.turn_starts[row].sum())
        # A key comes from the position before: that one has to be there as well.
        position = (thin.told[row] > 0).nonzero().flatten()
        there = (whole.told[row] > 0).nonzero().flatten()
        assert torch.equal(thin.features[row, position - 1], whole.features[row, there - 1])
    assert make_batch(sessions, cache, keep=1.0).num_tokens == whole.num_tokens


def test_positions_that_were_left_out_count_all_the_same(pool, build):
    """What a thinned row keeps of the rest stands for all of it."""
    cache = build(pool.turns())
    for facts, talk, keep in ((3, 4, 0.3), (3, 4, 0.9), (4, 0, 0.2), (1, 6, 0.1), (4, 0, 0.001)):
        session = pool.session(random.Random(1), facts, talk)
        whole, thinned = make_batch([session], cache), make_batch([session], cache, keep=keep, rng=random.Random(2))
        assert thinned.num_tokens < whole.num_tokens and (whole.stands_for == 1).all()
        assert (thinned.stands_for[(thinned.told > 0) | (thinned.labels >= 0)] == 1).all()
        assert len(thinned.stands_for[thinned.mask].unique()) == 2
        assert thinned.stands_for[thinned.mask].sum().item() == pytest.approx(whole.num_tokens)


# Where sessions come from


def test_questions_about_things_never_told_ask_for_nothing_that_was(build):
    pool = FactPool(FactGenerator(0), 30, 4, 1, 1, num_untold=40)
    rng, met = random.Random(0), 0
    for _ in range(60):
        session = pool.session(rng, 4, 1, num_untold=3)
        asked = {turn.user for turn in session.turns if turn.assistant == UNTOLD}
        told = {fact.fact.attribute for fact in pool.facts for turn in session.turns if turn in fact.tells}
        assert not told & {question.attribute for question in pool.untold if question.turn.user in asked}
        met += len(asked)
    assert met > 100


def test_sessions_of_a_file(tmp_path):
    path = tmp_path / "sessions.jsonl"
    ask = Turn("What is it?", "It is red.", learn="answer", kind="ask", value="red", fact="it")
    sessions = [
        Session(
            (
                Turn("It is red.", kind="tell", value="red", fact="it"),
                Turn(None, "A page of a book.", learn="base"),
                ask,
            )
        )
    ]
    write_jsonl(path, sessions)
    assert json.loads(path.read_text())["messages"][1]["role"] == "text"
    assert FilePool(path).session(random.Random(0), 1, 0) == sessions[0]
    write_jsonl(path, [Session((Turn("Hello."),))])
    with pytest.raises(ValueError, match="nothing to learn"):
        FilePool(path)
    write_jsonl(path, [Session((Turn("A.", kind="tell"), Turn("B?", "C.", learn="answer")))])
    with pytest.raises(ValueError, match='give "value" and "fact"'):
        FilePool(path)


def test_values_that_are_not_where_a_file_says_are_named_with_their_lines(tmp_path):
    path = tmp_path / "sessions.jsonl"
    ask = Turn("What is it?", "It is red.", learn="answer", value="red", fact="it")
    tell = Turn("It is red.", value="red", fact="it")
    told_at = Turn("It is red.", more=(Mark("it", "red", "."), Mark("who", "nobody", "is")))
    noted = replace(ask, notes=(Mark("asked", "What"), Mark("said", "red")))
    write_jsonl(path, [Session((tell, ask)), Session((told_at, noted))])
    assert len(FilePool(path)) == 2
    wrong = [replace(tell, value="Red"), replace(ask, value="it?"), replace(told_at, more=(Mark("it", "red", "!"),))]
    wrong.append(replace(noted, notes=(Mark("said", "blue"),)))
    write_jsonl(path, [Session((tell, ask)), *(Session((turn,)) for turn in wrong)])
    with pytest.raises(
        ValueError, match=r'line 2: "Red" is not in "It is red\."; line 3: "it\?" .*; line 4: "!" .*; and 1 more'
    ):
        FilePool(path)


def test_the_session_in_the_documents_can_be_trained_on(repository, tmp_path):
    text = (repository / "docs" / "training.md").read_text()
    example = json.loads(text[text.index("```json") + 7 :].partition("```")[0])
    (tmp_path / "one.jsonl").write_text(json.dumps(example))
    (session,) = FilePool(tmp_path / "one.jsonl").sessions
    assert [turn.learn for turn in session.turns] == [None, "base", "answer"]


def test_pages_come_from_the_books(tmp_path):
    (tmp_path / "a.txt").write_text("word " * 5000)
    pages = book_pages(tmp_path, 5, random.Random(0))
    assert len(pages) == 5 and all(100 < len(page) <= 1500 for page in pages)
    with pytest.raises(FileNotFoundError, match=r"\.txt"):
        book_pages(tmp_path / "nothing", 1, random.Random(0))
