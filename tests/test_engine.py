"""Continuous batching: a row's result is that of the conversation alone, whoever is beside it."""

import threading
import time

import pytest
import torch
from talking import FAMILIES, POSITIONS, talking_model, talking_tokenizer
from tiny import assert_same_state
from transformers.cache_utils import DynamicCache, DynamicLayer

from gru_memory import Conversation
from gru_memory.cache import keeps_every_token
from gru_memory.server.engine import (
    Delta,
    Done,
    Engine,
    EngineLimits,
    Failed,
    Job,
    Overloaded,
    ShuttingDown,
    Started,
    TimedOut,
)
from gru_memory.server.guessing import Guesser
from gru_memory.server.rows import RoomyLayer, _with_room, prefill
from gru_memory.server.sampling import Sampling

TEXTS = [
    "My boat is called Marigold.",
    "I live in Porto.",
    "Where?",
    "What is my boat called? Where do you live?",
    "User",
]


class Watched(Job):
    """A job whose events are kept."""

    def __init__(self, *arguments, **settings):
        self.events, self.over = [], threading.Event()
        super().__init__(*arguments, emit=self._note, **settings)

    def _note(self, event):
        self.events.append(event)
        if isinstance(event, (Done, Failed)):
            self.over.set()

    def wait(self):
        assert self.over.wait(60), self.events
        return self.events[-1]


class Scripted(Sampling):
    """Chooses the given tokens, one after the other, and fails where there are no more."""

    def __init__(self, *tokens, **settings):
        super().__init__(**settings)
        object.__setattr__(self, "tokens", tokens)

    def choose(self, logits, generated, generator):
        return self.tokens[len(generated)]


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request):
    return talking_model(request.param), talking_tokenizer(request.param)


@pytest.fixture
def engine(loaded):
    engine = Engine(*loaded)
    yield engine
    engine.close(0)


def alone(loaded, read, text, **settings):
    conversation = Conversation(*loaded)
    for turn in read:
        conversation.read(*turn)
    return conversation.say(text, **settings), conversation


def test_many_at_once_are_as_each_alone(loaded, engine):
    """Different lengths, histories and ends, joining and leaving at different times."""
    wanted, jobs = [], []
    for number in range(10):
        read = [(TEXTS[(number + n) % 5], "Yes." if n % 2 else None) for n in range(number % 4)]
        text, longest = TEXTS[number % 5], 3 + 2 * number
        wanted.append(alone(loaded, read, text, max_new_tokens=longest))
        jobs.append(Watched(Conversation(*loaded), text, read=list(read), max_new_tokens=longest))
    largest = []
    engine.on_step = lambda rows, tokens: largest.append(rows)
    for job in jobs:
        engine.submit(job)
    for job, (reply, conversation) in zip(jobs, wanted, strict=True):
        done = job.wait()
        assert isinstance(done, Done), done
        assert done.reply == reply
        assert_same_state(job.conversation.state, conversation.state)
        assert job.conversation.turns == conversation.turns
        assert isinstance(job.events[0], Started)
        assert "".join(event.text for event in job.events if isinstance(event, Delta)) == reply
    assert max(largest) >= 5
    assert engine.active == engine.waiting == 0


def test_a_conversation_that_goes_on(loaded, engine):
    _, conversation = alone(loaded, [(TEXTS[0], None)], TEXTS[1], max_new_tokens=4)
    job = Watched(Conversation(*loaded), TEXTS[1], read=[(TEXTS[0], None)], max_new_tokens=4)
    engine.submit(job)
    job.wait()
    again = Watched(job.conversation, TEXTS[2], max_new_tokens=4)
    engine.submit(again)
    assert again.wait().reply == conversation.say(TEXTS[2], max_new_tokens=4)
    assert_same_state(again.conversation.state, conversation.state)


def test_counts_and_ends(loaded, engine):
    job = Watched(Conversation(*loaded), TEXTS[0], read=[(TEXTS[1], "Yes.")], max_new_tokens=3)
    engine.submit(job)
    done = job.wait()
    fresh = Conversation(*loaded)
    wanted = fresh.inputs(TEXTS[1], "Yes.")["input_ids"].shape[1] + fresh.prompt(TEXTS[0])["input_ids"].shape[1]
    assert done.prompt_tokens == wanted
    assert (done.completion_tokens, done.finish_reason) in ((3, "length"), (2, "stop"), (1, "stop"))


def test_a_stop_text_ends_the_reply_and_memory_takes_in_what_the_client_sees(loaded, engine):
    whole, _ = alone(loaded, [], TEXTS[0], max_new_tokens=24)
    stop = whole[len(whole) // 2 :][:3]
    job = Watched(Conversation(*loaded), TEXTS[0], max_new_tokens=24, sampling=Sampling(stop=(stop, "never there")))
    engine.submit(job)
    done = job.wait()
    assert (done.reply, done.finish_reason) == (whole[: whole.index(stop)].strip(), "stop")
    assert "".join(event.text for event in job.events if isinstance(event, Delta)) == done.reply
    read = Conversation(*loaded)
    read.read(TEXTS[0], done.reply or None)
    assert_same_state(job.conversation.state, read.state)


def test_a_seed_repeats_a_draw_and_a_penalty_changes_it(loaded, engine):
    def reply(**sampling):
        job = Watched(Conversation(*loaded), TEXTS[0], max_new_tokens=12, sampling=Sampling(**sampling))
        engine.submit(job)
        return job.wait().reply

    first = reply(temperature=1.5, seed=1)
    assert first == reply(temperature=1.5, seed=1) != reply(temperature=1.5, seed=2)
    assert reply(temperature=1.5, top_p=1e-6) == reply() == alone(loaded, [], TEXTS[0], max_new_tokens=12)[0]


def test_choosing_a_token():
    logits = torch.tensor([1.0, 3.0, 2.0, -5.0])
    generator = Sampling(seed=0).generator()
    assert Sampling().choose(logits, [], generator) == 1
    assert Sampling(frequency_penalty=0.6).choose(logits, [1, 1], generator) == 2
    assert Sampling(frequency_penalty=0.6).choose(logits, [1], generator) == 1
    assert Sampling(presence_penalty=1.5).choose(logits, [1, 1], generator) == 2
    nucleus = Sampling(temperature=1.0, top_p=0.8)
    drawn = {nucleus.choose(logits, [], generator) for _ in range(200)}
    assert drawn == {1, 2}
    assert {Sampling(temperature=2.0).choose(logits, [], generator) for _ in range(400)} >= {0, 1, 2}
    assert Sampling(temperature=1e-320).choose(logits, [], generator) == 1
    assert logits.tolist() == [1.0, 3.0, 2.0, -5.0]


def test_a_full_queue_refuses_and_what_waits_too_long_fails(loaded):
    engine = Engine(*loaded, EngineLimits(max_batch=1, max_waiting=1, wait_seconds=0.2))
    held = threading.Event()
    blocker = engine.call(held.wait)
    first, second = (Watched(Conversation(*loaded), text, max_new_tokens=2) for text in TEXTS[:2])
    while not blocker.running():
        time.sleep(0.001)
    engine.submit(first)
    with pytest.raises(Overloaded, match="1 requests are waiting"):
        engine.submit(second)
    time.sleep(0.3)
    held.set()
    assert isinstance(first.wait().error, TimedOut)
    third = Watched(Conversation(*loaded), TEXTS[2], max_new_tokens=2)
    engine.submit(third)
    assert isinstance(third.wait(), Done)
    engine.close()


def test_what_is_cancelled_or_does_not_fit_leaves_the_others_alone(loaded, engine):
    jobs = [Watched(Conversation(*loaded), text, max_new_tokens=40) for text in TEXTS[:3]]
    jobs[1].emit = lambda event: setattr(jobs[1], "cancelled", True)  # at the first sign of life
    long = Watched(Conversation(*loaded), "boat " * 400, max_new_tokens=2)
    for job in (*jobs, long):
        engine.submit(job)
    assert "positions" in str(long.wait().error)
    for job in (jobs[0], jobs[2]):
        assert job.wait().reply == alone(loaded, [], job.text, max_new_tokens=40)[0]
    assert jobs[1].conversation.turns == 0


def test_a_forward_pass_that_fails_fails_its_jobs_and_the_engine_goes_on(loaded, engine, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr("gru_memory.server.engine.prefill", broken)
        job = Watched(Conversation(*loaded), TEXTS[0], max_new_tokens=2)
        engine.submit(job)
        assert "out of memory" in str(job.wait().error)
    again = Watched(Conversation(*loaded), TEXTS[0], max_new_tokens=2)
    engine.submit(again)
    assert isinstance(again.wait(), Done)


def at_once(engine, *jobs):
    """Submit them so that they are read in one pass."""
    held = threading.Event()
    engine.call(held.wait)
    for job in jobs:
        engine.submit(job)
    held.set()


def test_turns_that_fit_alone_but_not_together_fail_their_job_alone(loaded, engine):
    long = next(
        text
        for n in range(10, 400, 10)
        if Conversation(*loaded).inputs(text := "boat " * n, "Yes.")["input_ids"].shape[1] > 0.6 * POSITIONS
    )
    job = Watched(Conversation(*loaded, context_turns=2), TEXTS[2], read=[(long, "Yes.")] * 2, max_new_tokens=2)
    beside = Watched(Conversation(*loaded), TEXTS[0], max_new_tokens=4)
    at_once(engine, job, beside)
    assert "positions" in str(job.wait().error)
    assert beside.wait().reply == alone(loaded, [], TEXTS[0], max_new_tokens=4)[0]
    assert engine.alive and engine.active == 0


def test_a_reply_that_is_too_long_to_be_read_again_fails_its_job_alone(loaded, engine):
    """A byte that is no character is one token when it is generated, and three when its text is read."""
    tokenizer = loaded[1]
    byte, stop = (tokenizer(text, add_special_tokens=False)["input_ids"][-1] for text in ("€", "M"))
    sampling = Scripted(*[byte] * 130, stop, stop=(tokenizer.decode([stop]),))
    job = Watched(Conversation(*loaded), TEXTS[2], max_new_tokens=200, sampling=sampling)
    beside = Watched(Conversation(*loaded), TEXTS[0], max_new_tokens=4)
    at_once(engine, job, beside)
    assert "positions" in str(job.wait().error)
    assert beside.wait().reply == alone(loaded, [], TEXTS[0], max_new_tokens=4)[0]
    again = Watched(Conversation(*loaded), TEXTS[0], max_new_tokens=2)
    engine.submit(again)
    assert isinstance(again.wait(), Done)


@pytest.mark.parametrize("chosen", [0, 2])
def test_a_token_that_cannot_be_chosen_fails_its_job_alone(loaded, engine, chosen):
    """Be it the first, after the prompt, or a later one."""
    job = Watched(Conversation(*loaded), TEXTS[2], max_new_tokens=8, sampling=Scripted(*[5] * chosen))
    others = [Watched(Conversation(*loaded), text, max_new_tokens=6) for text in TEXTS[:2]]
    at_once(engine, others[0], job, others[1])
    assert isinstance(job.wait().error, IndexError)
    for other in others:
        reply, conversation = alone(loaded, [], other.text, max_new_tokens=6)
        assert other.wait().reply == reply
        assert_same_state(other.conversation.state, conversation.state)


def test_an_error_that_nobody_expected_fails_all_and_stops_the_engine(loaded, engine, monkeypatch):
    def broken():
        raise RuntimeError("no more")

    held = threading.Event()
    blocker = engine.call(held.wait)
    while not blocker.running():
        time.sleep(0.001)
    jobs = [Watched(Conversation(*loaded), text, max_new_tokens=2) for text in TEXTS[:2]]
    for job in jobs:
        engine.submit(job)
    call = engine.call(lambda: None)
    monkeypatch.setattr(engine, "_drop", broken)
    held.set()
    for job in jobs:
        assert "no more" in str(job.wait().error)
    with pytest.raises(RuntimeError, match="no more"):
        call.result(10)
    assert not engine.alive
    with pytest.raises(ShuttingDown):
        engine.submit(jobs[0])


def test_calls_run_between_steps(loaded, engine):
    assert engine.call(lambda: threading.current_thread().name).result(10) == "gru-memory engine"
    with pytest.raises(ZeroDivisionError):
        engine.call(lambda: 1 / 0).result(10)


def test_of_many_calls_one_runs_between_two_steps(loaded):
    steps, held = [], threading.Event()
    engine = Engine(*loaded, on_step=lambda rows, tokens: steps.append(tokens))
    engine.call(held.wait)
    job = Watched(Conversation(*loaded), TEXTS[0], max_new_tokens=8)
    engine.submit(job)
    calls = [engine.call(lambda: len(steps)) for _ in range(3)]
    held.set()
    seen = [call.result(10) for call in calls]
    assert len(set(seen)) == 3
    job.wait()
    engine.close()


def test_closing_finishes_what_was_begun_and_takes_nothing_more(loaded):
    engine = Engine(*loaded)
    job = Watched(Conversation(*loaded), TEXTS[0], max_new_tokens=8)
    engine.submit(job)
    engine.close()
    assert isinstance(job.wait(), Done)
    assert not engine.alive
    with pytest.raises(ShuttingDown):
        engine.submit(job)
    with pytest.raises(ShuttingDown):
        engine.call(lambda: None)


def test_closing_at_once_fails_what_was_begun(loaded):
    engine = Engine(*loaded)
    held = threading.Event()
    engine.call(lambda: held.wait(0.2))
    job = Watched(Conversation(*loaded), TEXTS[0], max_new_tokens=300)
    engine.submit(job)
    engine.close(grace_seconds=0)
    assert isinstance(job.wait().error, ShuttingDown)


def test_closing_passes_over_a_call_that_was_cancelled(loaded):
    engine = Engine(*loaded)
    held = threading.Event()
    blocker = engine.call(lambda: held.wait(0.2))
    while not blocker.running():
        time.sleep(0.001)
    cancelled, waiting = (engine.call(lambda: None) for _ in range(2))
    assert cancelled.cancel()
    job = Watched(Conversation(*loaded), TEXTS[0], max_new_tokens=2)
    engine.submit(job)
    engine.close(grace_seconds=0)
    assert isinstance(waiting.exception(10), ShuttingDown)
    assert isinstance(job.wait().error, ShuttingDown)


def test_a_model_whose_caches_cannot_be_joined_decodes_one_by_one(loaded, monkeypatch):
    monkeypatch.setattr("gru_memory.server.engine.keeps_every_token", lambda model: False)
    engine = Engine(*loaded)
    largest = []
    engine.on_step = lambda rows, tokens: largest.append(rows)
    jobs = [Watched(Conversation(*loaded), text, max_new_tokens=6) for text in TEXTS]
    for job in jobs:
        engine.submit(job)
    for job in jobs:
        assert job.wait().reply == alone(loaded, [], job.text, max_new_tokens=6)[0]
    assert max(largest) == 1
    engine.close()


def test_the_last_token_goes_into_memory_without_the_head(loaded):
    """Nobody asks for the logits after it."""
    counted, head = [], loaded[0].get_output_embeddings()
    hook = head.register_forward_hook(lambda module, inputs, output: counted.append(output.shape[1]))
    engine = Engine(*loaded)
    job = Watched(Conversation(*loaded), TEXTS[0], max_new_tokens=6)
    engine.submit(job)
    done = job.wait()
    engine.close()
    hook.remove()
    assert counted == [1] * done.completion_tokens + [0]
    assert_same_state(job.conversation.state, alone(loaded, [], TEXTS[0], max_new_tokens=6)[1].state)


def test_room_for_tokens_to_come():
    """One more token is written behind those there are; what comes out is what a layer that copies them all has."""
    torch.manual_seed(0)
    roomy, plain = RoomyLayer(), DynamicLayer()
    rooms = set()
    for step in range(200):
        new = [torch.randn(2, 3, 5 if not step else 1, 4) for _ in range(2)]
        for ours, theirs in zip(roomy.update(*new), plain.update(*new), strict=True):
            assert torch.equal(ours, theirs)
        rooms.add(roomy.keys.untyped_storage().data_ptr())
        assert roomy.get_seq_length() == plain.get_seq_length()
        if step == 150:  # what others put there is gone on with, and they keep what they have
            taken = roomy.keys
            roomy.keys, plain.keys = roomy.keys[:, :, :7], plain.keys[:, :, :7]
            before = taken.clone()
        if step > 150:
            assert torch.equal(taken, before)
    assert 1 < len(rooms) < 10


def test_room_is_made_without_a_copy_and_only_where_there_are_keys():
    cache = DynamicCache()
    cache.layers = [DynamicLayer(), DynamicLayer()]
    keys, values = cache.layers[0].update(torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4))
    roomy, empty = _with_room(cache).layers
    assert isinstance(roomy, RoomyLayer) and roomy.keys is keys and roomy.values is values
    assert roomy.get_seq_length() == 5 and not empty.is_initialized


def test_a_step_copies_no_keys(loaded):
    model, tokenizer = loaded
    assert keeps_every_token(model)
    conversation = Conversation(model, tokenizer)
    rows, _ = prefill(model, [conversation.prompt(TEXTS[0])], [conversation.state], 0)
    rows.step(model, [[5]])
    room = rows.cache.layers[0].keys.data_ptr()
    for _ in range(10):
        rows.step(model, [[5]])
    assert rows.cache.layers[0].keys.data_ptr() == room


def passes(engine, job):
    """Tokens that each forward pass of this job fed."""
    fed = []
    engine.on_step = lambda rows, tokens: fed.append(tokens)
    engine.submit(job)
    assert isinstance(job.wait(), Done), job.events[-1]
    return fed


SAID_BEFORE = (7, 8, 9, 7, 8, 9, 7, 8, 5, 7, 8, 9)  # of which much follows what it followed before


@pytest.mark.parametrize("longest", range(1, len(SAID_BEFORE) + 1))
def test_tokens_that_were_guessed_change_nothing_but_the_number_of_passes(loaded, longest):
    """Whatever is guessed right or wrong, last or not, the state is that of the tokens fed one by one."""
    found = []
    for guessed in (0, 1, 2, 5):
        engine = Engine(*loaded, EngineLimits(guessed_tokens=guessed))
        job = Watched(Conversation(*loaded), TEXTS[0], max_new_tokens=longest, sampling=Scripted(*SAID_BEFORE))
        fed = passes(engine, job)
        engine.close(0)
        assert job.tokens == list(SAID_BEFORE[:longest])
        assert max(fed[1:]) <= 1 + guessed
        found.append((len(fed), job))
    (plain, wanted), *others = found
    assert plain == 1 + longest  # the prompt, and every token
    for count, job in others:
        assert count < plain if longest >= 6 else count <= plain
        assert_same_state(job.conversation.state, wanted.conversation.state)
        assert job.events[-1] == wanted.events[-1]
    if longest == len(SAID_BEFORE):
        assert [count for count, _ in others] == sorted((count for count, _ in others), reverse=True)


def test_an_end_that_was_guessed_is_an_end(loaded, monkeypatch):
    """Where the prompt holds such words and an end after them, nothing behind the end stays in memory."""
    engine = Engine(*loaded, EngineLimits(guessed_tokens=4))
    (end,) = engine._ends
    script = (7, 8, end)
    job = Watched(Conversation(*loaded), TEXTS[0], max_new_tokens=8, sampling=Scripted(*script))
    begin = Guesser.__init__
    monkeypatch.setattr(Guesser, "__init__", lambda self, prompt=(): begin(self, [7, 8, end, 11, 12, *prompt]))
    fed = passes(engine, job)
    engine.close(0)
    assert fed[1:] == [1, 1 + 4] and job.tokens == list(script) and job.events[-1].finish_reason == "stop"
    plain = Watched(Conversation(*loaded), TEXTS[0], max_new_tokens=8, sampling=Scripted(*script))
    engine = Engine(*loaded, EngineLimits(guessed_tokens=0))
    passes(engine, plain)
    engine.close(0)
    assert_same_state(job.conversation.state, plain.conversation.state)


def test_what_is_guessed():
    guesser = Guesser([1, 2, 3, 4, 1, 2])
    assert guesser.guess(3) == [3, 4, 1] and guesser.guess(1) == [3] and guesser.guess(0) == []
    guesser.add(9)
    assert guesser.guess(3) == []  # 2, 9 stood nowhere before
    for token in (1, 2):
        guesser.add(token)
    assert guesser.guess(5) == [9, 1, 2, 9, 1]  # the last time counts, and a circle goes on
    assert Guesser([7, 7, 7]).guess(4) == [7] * 4
    assert Guesser([1]).guess(2) == Guesser().guess(2) == []


def test_nothing_is_guessed_where_guesses_are_mostly_wrong_until_they_would_be_right():
    guesser, other = Guesser([1, 2, 3, 1, 2]), 10
    while guesser.guess(1):
        for token in (other, 1, 2):  # never what followed before
            guesser.add(token)
        other += 1
    assert 12 < other < 30
    tries = 0
    while not guesser.guess(1):
        for token in (other, 1, 2):  # always the same now
            guesser.add(token)
        tries += 1
    assert 0 < tries < 10 and guesser.guess(1) == [other]


def test_a_conversation_joins_one_that_guesses_and_a_guess_that_cannot_be_chosen_fails_alone(loaded):
    long, late = list(SAID_BEFORE) * 2, Scripted(7, 8, 9, 5, 6)
    wanted = alone_by_script(loaded, Scripted(*long), len(long)), alone_by_script(loaded, late, 5)
    engine = Engine(*loaded, EngineLimits(guessed_tokens=3))
    first = Watched(Conversation(*loaded), TEXTS[0], max_new_tokens=len(long), sampling=Scripted(*long))
    second = Watched(Conversation(*loaded), TEXTS[0], max_new_tokens=5, sampling=late)
    rows = []

    def step(count, tokens):
        rows.append((count, tokens))
        if len(rows) == 6:  # it has guessed by now
            engine.submit(second)

    engine.on_step = step
    engine.submit(first)
    assert isinstance(second.wait(), Done) and isinstance(first.wait(), Done)
    engine.close(0)
    assert any(count == 1 and tokens > 1 for count, tokens in rows[1:6]) and any(count == 2 for count, _ in rows)
    for job, (tokens, state) in zip((first, second), wanted, strict=True):
        assert job.tokens == tokens
        assert_same_state(job.conversation.state, state)

    engine = Engine(*loaded, EngineLimits(guessed_tokens=3))
    broken = Watched(Conversation(*loaded), TEXTS[0], max_new_tokens=9, sampling=Scripted(7, 8, 9, 7, 8, 9))
    engine.submit(broken)
    assert isinstance(broken.wait(), Failed) and len(broken.tokens) == 6  # there is no seventh
    again = Watched(Conversation(*loaded), TEXTS[0], max_new_tokens=5, sampling=late)
    engine.submit(again)
    assert isinstance(again.wait(), Done)
    engine.close(0)
    assert_same_state(again.conversation.state, wanted[1][1])


def alone_by_script(loaded, sampling, longest):
    engine = Engine(*loaded, EngineLimits(guessed_tokens=0))
    job = Watched(Conversation(*loaded), TEXTS[0], max_new_tokens=longest, sampling=sampling)
    engine.submit(job)
    assert isinstance(job.wait(), Done)
    engine.close(0)
    return job.tokens, job.conversation.state


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.4, "seed": 3, "top_p": 0.9}, {"frequency_penalty": 0.5}])
def test_replies_are_the_same_with_guesses_and_without(loaded, settings):
    """Draws and penalties included, and what ends at a stop text inside a guess."""
    found = []
    for guessed in (0, 3):
        engine = Engine(*loaded, EngineLimits(guessed_tokens=guessed))
        job = Watched(Conversation(*loaded), TEXTS[3], max_new_tokens=30, sampling=Sampling(**settings))
        fed = passes(engine, job)
        stop = job.events[-1].reply[8:10]
        ended = Watched(Conversation(*loaded), TEXTS[3], max_new_tokens=30, sampling=Sampling(**settings, stop=(stop,)))
        passes(engine, ended)
        engine.close(0)
        found.append((job, ended, fed))
    for plain, guessing in zip(found[0][:2], found[1][:2], strict=True):
        assert guessing.events[-1] == plain.events[-1] and guessing.tokens == plain.tokens
        assert_same_state(guessing.conversation.state, plain.conversation.state)
    assert len(found[1][2]) <= len(found[0][2])


def test_a_memory_learns_after_it_served(loaded, engine):
    """The engine runs in inference mode, of which nothing may stay in the memory or in what is kept."""
    model, _ = loaded
    conversation = Conversation(*loaded)
    job = Watched(conversation, TEXTS[0], max_new_tokens=3)
    engine.submit(job)
    assert isinstance(job.wait(), Done)
    state = conversation.state
    assert not any(tensor.is_inference() for site in state.sites.values() for tensor in site.values())
    assert not any(tensor.is_inference() for tensor in (state.tokens, state.turns, state.pending))
    gate = model.memory_sites()["top"].gate
    model(input_ids=torch.tensor([[5, 6, 7]]), memory_state=state).logits.sum().backward()
    assert gate.grad is not None and gate.grad.abs().item() > 0
    model.zero_grad()
    # The decay is made at first use, whoever comes first.
    fresh = talking_model("llama", decay_every="token")
    for site in fresh.memory_sites().values():
        site._decay = None
    with torch.inference_mode():
        fresh(input_ids=torch.tensor([[5, 6]]))
    fresh(input_ids=torch.tensor([[5, 6, 7]])).logits.sum().backward()
    assert fresh.memory_sites()["top"].gate.grad is not None
