"""Continuous batching: one thread that runs the model, and conversations that come and go between its steps."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch

from ..cache import keeps_every_token
from ..conversation import Conversation
from ..prefix import kept_prefix
from .guessing import Guesser
from .rows import Rows, prefill
from .sampling import Sampling

logger = logging.getLogger(__name__)

Turn = tuple[str, "str | None"]


class Overloaded(Exception):
    """No room for another request now."""


class ShuttingDown(Exception):
    """No request is taken any more."""


class TimedOut(Exception):
    """The request took longer than it may."""


def positive(settings: Any, *names: str) -> None:
    """Raise ValueError unless every named setting is a finite number above 0."""
    for name in names:
        value = getattr(settings, name)
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} is {value}: it must be a number above 0")


@dataclass(frozen=True)
class EngineLimits:
    """How much the engine takes on. Times in seconds."""

    max_batch: int = field(default=32, metadata={"help": "conversations in one forward pass"})
    max_waiting: int = field(default=64, metadata={"help": "requests that may wait; further ones get 429"})
    prefill_tokens: int = field(default=2048, metadata={"help": "tokens of prompts in one forward pass"})
    wait_seconds: float = field(default=30.0, metadata={"help": "longest wait for a place in the batch"})
    request_seconds: float = field(default=300.0, metadata={"help": "longest life of a request"})
    guessed_tokens: int = field(
        default=2, metadata={"help": "tokens guessed ahead of a conversation that decodes alone; 0 for none"}
    )

    def __post_init__(self) -> None:
        positive(self, "max_batch", "max_waiting", "prefill_tokens", "wait_seconds", "request_seconds")
        if self.guessed_tokens < 0:
            raise ValueError(f"guessed_tokens is {self.guessed_tokens}: it must be 0 or more")


@dataclass(frozen=True)
class Started:
    """The request has a place, and fits."""

    prompt_tokens: int  # of the turn; turns that were taken in before it are in `Done.prompt_tokens`


@dataclass(frozen=True)
class Delta:
    """More of the reply."""

    text: str


@dataclass(frozen=True)
class Done:
    """The reply is complete, and so is the state of the job's conversation."""

    reply: str
    finish_reason: str  # "stop" or "length"
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Failed:
    """There is no reply. The job's conversation is of no use any more; nothing else happened."""

    error: BaseException


Event = Started | Delta | Done | Failed


@dataclass(eq=False)
class Job:
    """One turn of one conversation.

    Attributes:
        conversation: its own; nobody else may touch it until the job is done.
        text: what the user says.
        read: turns to take in first.
        max_new_tokens: longest reply; None is as many as `default_new_tokens`, or fewer if fewer fit.
        emit: told every event, from the engine's thread. Must not wait.
    """

    conversation: Conversation
    text: str
    emit: Callable[[Event], None]
    read: list[Turn] = field(default_factory=list)
    max_new_tokens: int | None = None
    default_new_tokens: int = 256
    sampling: Sampling = field(default_factory=Sampling)
    created: float = field(default_factory=time.monotonic)
    cancelled: bool = False  # set it to have the job dropped
    # Of the engine's own
    begun: float | None = None
    prompt_tokens: int = 0
    tokens: list[int] = field(default_factory=list)
    sent: str = ""
    finish: str | None = None
    reread: str | None = None  # a reply that ended at a stop text, to be taken in as the client sees it
    generator: torch.Generator | None = None
    prompt: torch.Tensor | None = None  # (L,) what attention sees before the reply
    guesser: Guesser | None = None


class Engine:
    """Runs the model for many conversations at once, each with its own memory.

    New conversations are read in while others decode; every step feeds one token to each, and to one that decodes alone those
    that `guessing` guesses as well. A row's result does not depend on the rows beside it.

    Args:
        model: a causal LM with memory.
        tokenizer: its tokenizer.
        limits: see `EngineLimits`.
        on_step: told (rows in the batch, tokens fed) after each forward pass.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        limits: EngineLimits | None = None,
        on_step: Callable[[int, int], None] = lambda rows, tokens: None,
    ) -> None:
        self.model, self.tokenizer, self.limits, self.on_step = model, tokenizer, limits or EngineLimits(), on_step
        self.shares_batches = keeps_every_token(model)
        known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self._pad = next(token for token in known if token is not None)
        ends = model.generation_config.eos_token_id
        ends = tokenizer.eos_token_id if ends is None else ends
        self._ends = set(ends if isinstance(ends, (list, tuple)) else [ends])
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._calls: deque[tuple[Callable[[], Any], Future]] = deque()
        self._reading: list[Job] = []
        self._batches: list[tuple[Rows, list[Job]]] = []
        self._accepting, self._running = True, True
        self._thread = threading.Thread(target=self._run, name="gru-memory engine", daemon=True)
        self._thread.start()

    # For other threads

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def active(self) -> int:
        return len(self._reading) + sum(len(jobs) for _, jobs in self._batches)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and self._accepting

    def submit(self, job: Job) -> None:
        """Queue a job. Its events come from the engine's thread.

        Raises:
            Overloaded: the queue is full.
            ShuttingDown: `close` was called.
        """
        with self._changed:
            if not self._accepting:
                raise ShuttingDown("the server is shutting down")
            if len(self._waiting) >= self.limits.max_waiting:
                raise Overloaded(f"{len(self._waiting)} requests are waiting already: try again later")
            self._waiting.append(job)
            self._changed.notify()

    def call(self, function: Callable[[], Any]) -> Future:
        """Run `function` between two steps, when nothing else uses the model; of several, one between two steps."""
        future: Future = Future()
        with self._changed:
            if not self._accepting:
                raise ShuttingDown("the server is shutting down")
            if len(self._calls) >= self.limits.max_waiting:
                raise Overloaded(f"{len(self._calls)} requests are waiting already: try again later")
            self._calls.append((function, future))
            self._changed.notify()
        return future

    def close(self, grace_seconds: float = 30.0) -> None:
        """Take no more jobs, finish those there are, and stop; what is not done after `grace_seconds` fails."""
        with self._changed:
            self._accepting = False
            self._changed.notify()
        self._thread.join(timeout=grace_seconds)
        with self._changed:
            self._running = False
            self._changed.notify()
        self._thread.join(timeout=30.0)

    # The engine's thread

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:  # nobody would hear of it, and every later job would wait for ever
            logger.exception("the engine has stopped")
            with self._changed:
                self._accepting = self._running = False
            self._fail_all(error)

    def _work(self) -> None:
        while True:
            with self._changed:
                while self._running and not (self._waiting or self._calls or self._reading or self._batches):
                    if not self._accepting:
                        return
                    self._changed.wait()
                if not self._running:
                    self._fail_all(ShuttingDown("the server is shutting down"))
                    return
                call = self._calls.popleft() if self._calls else None  # one, so that replies go on beside many
            if call is not None:
                self._answer(*call)
            self._drop()
            self._admit()
            if chosen := self._next_readers():
                self._guarded(self._read_step, [job for job, _ in chosen], [segment for _, segment in chosen])
            for batch in list(self._batches):
                self._guarded(self._decode_step, batch[1], batch[0])

    def _answer(self, function: Callable[[], Any], future: Future) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(function())
        except Exception as error:
            future.set_exception(error)

    def _guarded(self, step: Callable[..., None], jobs: list[Job], *arguments: Any) -> None:
        """One forward pass; if it fails, so do its jobs, and no others."""
        try:
            step(jobs, *arguments)
        except Exception as error:
            logger.exception("a forward pass failed", extra={"rows": len(jobs)})
            for job in jobs:
                self._fail(job, error)
            self._reading = [job for job in self._reading if job not in jobs]
            self._batches = [(rows, others) for rows, others in self._batches if others is not jobs]

    def _drop(self) -> None:
        """Let go of what was cancelled or took too long."""
        now = time.monotonic()

        def over(job: Job) -> bool:
            if job.cancelled:
                return True
            late = now - job.created > self.limits.request_seconds
            stuck = job.begun is None and now - job.created > self.limits.wait_seconds
            if late or stuck:
                self._fail(
                    job, TimedOut("the request waited too long for its turn" if stuck else "the reply took too long")
                )
            return late or stuck

        with self._changed:
            self._waiting = deque(job for job in self._waiting if not over(job))
        self._reading = [job for job in self._reading if not over(job)]
        for number, (rows, jobs) in enumerate(self._batches):
            stay = [row for row, job in enumerate(jobs) if not over(job)]
            if len(stay) < len(jobs):
                self._batches[number] = (rows.select(stay) if stay else rows, [jobs[row] for row in stay])
        self._batches = [(rows, jobs) for rows, jobs in self._batches if jobs]

    def _admit(self) -> None:
        while self.active < self.limits.max_batch:
            with self._changed:
                if not self._waiting:
                    return
                job = self._waiting.popleft()
            try:
                self._begin(job)
            except Exception as error:
                self._fail(job, error)
            else:
                self._reading.append(job)

    def _begin(self, job: Job) -> None:
        """See that everything fits before anything is done; what turns read before will leave in sight is seen later."""
        for turn in job.read:
            job.conversation.inputs(*turn)
        prompt = job.conversation.prompt(job.text, job.max_new_tokens or 1)["input_ids"].shape[1]
        job.begun, job.generator = time.monotonic(), job.sampling.generator()
        job.emit(Started(prompt))

    def _segment(self, job: Job) -> dict[str, torch.Tensor]:
        """What the job has to read next. Raises ValueError if it does not fit."""
        if job.read:
            return job.conversation.inputs(*job.read[0])
        if job.reread is not None:
            return job.conversation.inputs(job.text, job.reread or None)
        inputs = job.conversation.prompt(job.text, job.max_new_tokens or 1)
        if job.max_new_tokens is None:
            longest = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
            room = job.default_new_tokens if longest is None else longest - inputs["input_ids"].shape[1]
            job.max_new_tokens = min(job.default_new_tokens, room)
        return inputs

    def _next_readers(self) -> list[tuple[Job, dict[str, torch.Tensor]]]:
        """Those that read in the next pass, as many as may, and what; one whose part does not fit fails by itself."""
        chosen: list[tuple[Job, dict[str, torch.Tensor]]] = []
        longest = 0
        for job in list(self._reading):
            try:
                segment = self._segment(job)
            except Exception as error:
                self._reading.remove(job)
                self._fail(job, error)
                continue
            longest = max(longest, segment["input_ids"].shape[1])
            full = longest * (len(chosen) + 1) > self.limits.prefill_tokens
            if chosen and (full or not self.shares_batches):
                break
            chosen.append((job, segment))
        return chosen

    def _read_step(self, jobs: list[Job], segments: list[dict[str, torch.Tensor]]) -> None:
        conversations = [job.conversation for job in jobs]
        begun = [conversation.repeated_prefix() for conversation in conversations]
        kept = {ids: kept_prefix(self.model, ids) for ids in dict.fromkeys(begun)}  # most begin alike
        states = [conversation.state for conversation in conversations]
        rows, logits = prefill(self.model, segments, states, self._pad, [kept[ids] for ids in begun])
        self.on_step(len(jobs), sum(segment["input_ids"].shape[1] for segment in segments))
        decoding = []
        for row, job in enumerate(jobs):
            state = rows.state.select(row)
            if not state.is_finite():
                self._reading.remove(job)
                self._fail(job, FloatingPointError("the memory became NaN or infinite on this turn"))
                continue
            if job.reread is None:
                job.prompt_tokens += segments[row]["input_ids"].shape[1]
            if job.read:
                job.conversation.commit(state, *job.read.pop(0))
            elif job.reread is not None:
                self._reading.remove(job)
                self._done(job, state, job.reread)
            else:
                self._reading.remove(job)
                job.prompt = segments[row]["input_ids"][0]
                if self._next_token(job, logits[row]):
                    decoding.append((row, job))
        if not decoding:
            return
        new = rows.select([row for row, _ in decoding]), [job for _, job in decoding]
        if self._batches and self.shares_batches:
            old_rows, old_jobs = self._batches[0]
            new = old_rows.join(new[0]), [*old_jobs, *new[1]]
            self._batches[0] = new
        else:
            self._batches.append(new)

    def _decode_step(self, jobs: list[Job], rows: Rows) -> None:
        ends = all(job.finish is not None for job in jobs)
        guesses = self._guesses(jobs)
        logits = rows.step(self.model, [[job.tokens[-1], *guesses] for job in jobs], ends)
        self.on_step(len(jobs), len(jobs) * (1 + len(guesses)))
        stay = []
        for row, job in enumerate(jobs):
            if job.finish is None:
                chosen, fed = self._next_tokens(job, logits[row], guesses)
                if guesses:
                    rows.take_back(len(guesses) - fed)
                if not chosen:
                    continue
                if job.finish is None or fed < chosen:
                    stay.append(row)
                    continue
            state = rows.state.select(row)  # the last token is in it now
            if not state.is_finite():
                self._fail(job, FloatingPointError("the memory became NaN or infinite on this turn"))
            elif job.reread is not None:
                self._reading.append(job)
            else:
                self._done(job, state, self._text(job))
        place = next(n for n, (_, others) in enumerate(self._batches) if others is jobs)
        if len(stay) == len(jobs):
            return
        if stay:
            self._batches[place] = rows.select(stay), [jobs[row] for row in stay]
        else:
            del self._batches[place]

    def _guesses(self, jobs: list[Job]) -> list[int]:
        """What to feed behind the last token: only where one row is all there is, since a pass over many has no time to spare."""
        job, most = jobs[0], self.limits.guessed_tokens
        if len(jobs) > 1 or job.finish is not None or not most or not self.shares_batches:
            return []
        if job.guesser is None:
            job.guesser = Guesser([*job.prompt.tolist(), *job.tokens])
        return job.guesser.guess(min(most, job.max_new_tokens - len(job.tokens)))

    def _next_tokens(self, job: Job, logits: torch.Tensor, guesses: list[int]) -> tuple[int, int]:
        """Choose tokens by logits (K, V) as long as they are those that were guessed: how many were chosen, of which fed already.

        Nothing was chosen where that failed, for this job alone.
        """
        for fed, row in enumerate(logits):
            if not self._next_token(job, row):
                return 0, fed
            if guesses[fed : fed + 1] != job.tokens[-1:]:
                return fed + 1, fed
            if job.finish is not None:
                return fed + 1, fed + 1
        raise AssertionError("the last of the logits has no guess behind it")

    def _next_token(self, job: Job, logits: torch.Tensor) -> bool:
        """Choose a token, and tell what can be told of the text so far. False if that cannot be done, for this job alone."""
        try:
            self._say(job, logits)
        except Exception as error:
            logger.exception("a token could not be chosen")
            self._fail(job, error)
            return False
        return True

    def _say(self, job: Job, logits: torch.Tensor) -> None:
        token = job.sampling.choose(logits, job.tokens, job.generator)
        job.tokens.append(token)
        if job.guesser is not None:
            job.guesser.add(token)
        text = self._text(job)
        stops = [at for stop in job.sampling.stop if (at := text.find(stop)) >= 0]
        if stops:
            job.finish, job.reread = "stop", text[: min(stops)].strip()
            self._send(job, job.reread)
        elif token in self._ends:
            job.finish = "stop"
            self._send(job, text)
        elif len(job.tokens) >= job.max_new_tokens:
            job.finish = "length"
            self._send(job, text)
        else:
            # What may yet change is held back: half a character, the beginning of a stop text.
            held = max((_overlap(text, stop) for stop in job.sampling.stop), default=0)
            safe = text[: len(text) - held].rstrip("\ufffd").rstrip()
            self._send(job, safe)

    def _text(self, job: Job) -> str:
        return self.tokenizer.decode(job.tokens, skip_special_tokens=True).strip()

    def _send(self, job: Job, text: str) -> None:
        if text.startswith(job.sent) and len(text) > len(job.sent):
            job.emit(Delta(text[len(job.sent) :]))
            job.sent = text

    def _done(self, job: Job, state: Any, reply: str) -> None:
        job.conversation.commit(state, job.text, reply)
        job.emit(Done(reply, job.finish, job.prompt_tokens, len(job.tokens)))

    def _fail(self, job: Job, error: BaseException) -> None:
        job.emit(Failed(error))

    def _fail_all(self, error: BaseException) -> None:
        jobs = [*self._waiting, *self._reading, *(job for _, jobs in self._batches for job in jobs)]
        self._waiting.clear()
        self._reading, self._batches = [], []
        for job in jobs:
            self._fail(job, error)
        for _, future in self._calls:
            if future.set_running_or_notify_cancel():
                future.set_exception(error)
        self._calls.clear()


def _overlap(text: str, stop: str) -> int:
    """How many of the last characters of `text` might be the beginning of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
