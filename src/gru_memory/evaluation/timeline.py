"""A conversation as its memory lived it: writes, reads and strength, slot by slot and token by token, as an interactive page;
and the exact contribution of each written token to an answer, by replaying without it."""

from __future__ import annotations

import html
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.facts import FactGenerator
from ..data.sessions import Session, read_jsonl
from ..drawing import PALETTE
from ..inspection import Trace, trace
from ..limits import at_least
from ..placement import fed_on
from .asking import asked
from .batched import BatchReader, Pair
from .outcome import Evaluation, Figure, Outcome, Progress
from .variants import memory_sites, unwritten

VIEWS = {
    "writes": "strength × address",
    "reads": "address of the read",
    "strength": "share of the slot that is written",
}


@dataclass(frozen=True)
class TimelineConfig:
    """Which conversation."""

    facts: int = field(default=2, metadata={"help": "facts told"})
    between: int = field(default=3, metadata={"help": "unrelated turns between telling and asking"})
    sessions: str | None = field(
        default=None, metadata={"help": "JSONL file of sessions, the first of which is taken instead"}
    )
    tokens: int = field(
        default=32, metadata={"help": "tokens that the conversation is replayed without, one at a time"}
    )
    heads: int = field(default=4, metadata={"help": "heads that are drawn"})
    site: str = field(default="top", metadata={"help": "which memory is drawn"})
    seed: int = field(default=1234, metadata={"help": "of the conversation"})
    max_new_tokens: int = field(default=24, metadata={"help": "longest reply, in tokens"})
    batch_size: int = field(default=16, metadata={"help": "replays at once"})

    def __post_init__(self) -> None:
        at_least(self, 1, "facts", "tokens", "heads", "max_new_tokens", "batch_size")
        at_least(self, 0, "between")
        if self.sessions is not None and not Path(self.sessions).is_file():
            raise FileNotFoundError(f"there is no file {self.sessions}: name one of sessions, one a line")

    def conversation(self) -> Session:
        """The first session of the file, or one made with the seed. Raises ValueError if nothing is asked in it."""
        if self.sessions is None:
            return FactGenerator(self.seed, values="test").session(self.facts, self.between)
        for session in read_jsonl(self.sessions):
            if asked(session) and all(turn.user is not None for turn in session.turns):
                return session
        raise ValueError(f'no session in {self.sessions} is a chat in which something is asked (kind "ask")')


@torch.no_grad()
def evaluate_timeline(model: Any, tokenizer: Any, config: TimelineConfig, progress: Progress | None = None) -> Outcome:
    """Read a conversation, ask for one of its facts, and find out which written tokens the answer is owed to."""
    sites = memory_sites(model)
    if config.site not in sites:
        raise ValueError(f"there is no memory at site {config.site!r}: it has {sorted(sites)}")
    began, tell = time.perf_counter(), progress or (lambda *_: None)
    session = config.conversation()
    turns = [(turn.user, turn.assistant) for turn in session.turns if turn.kind != "ask"]
    question = asked(session)[0]
    seen = trace(model, tokenizer, turns, site=config.site)
    reader = BatchReader(model, tokenizer)
    (reply,), _ = reader.ask(seen.state, [question.user], max_new_tokens=config.max_new_tokens)
    strength = seen.strength.mean(dim=1)
    strongest = strength.argsort(descending=True, stable=True)[: config.tokens].sort().values.tolist()
    places = [place for place in strongest if strength[place] > 0] or strongest  # the others would change nothing
    found = contributions(reader, turns, seen, places, question.user, reply, config.batch_size, tell)
    left = seen.left.sum(dim=(1, 2))
    rows = [
        {
            "conversation": config.seed,
            "position": i,
            "turn": seen.turns[i] + 1,
            "token": repr(seen.tokens[i])[1:-1],
            "strength": float(strength[i]),
            "left": float(left[i]),
            "contribution": value,
        }
        for i, value in sorted(zip(places, found, strict=True), key=lambda pair: -pair[1])
    ]
    writes = seen.strength.unsqueeze(-1) * seen.address  # (T, N, S)
    details = {
        "question": question.user, "reply": reply, "value": question.value, "tokens": seen.tokens, "turns": seen.turns,
        "views": {
            "writes": _rounded(writes[:, : config.heads]),
            "reads": _rounded(seen.read_address[:, : config.heads]),
            "strength": _rounded(filled(writes, seen.keep)[:, : config.heads]),
        },
        "left_of_turns": left_of_turns(writes, seen.keep, seen.turns).tolist(),
    }  # fmt: skip
    return Outcome(config, rows, time.perf_counter() - began, details)


@torch.no_grad()
def contributions(
    reader: BatchReader,
    turns: Sequence[Pair],
    seen: Trace,
    places: Sequence[int],
    question: str,
    reply: str,
    batch_size: int = 16,
    tell: Progress = lambda *_: None,
) -> list[float]:
    """What each of some tokens adds to the log-probability of a reply, in nats: with its write, minus without it.

    The whole conversation is replayed for every token, with nothing written at that token at any site and everything else
    as it was; so this is exact, whatever the memory is. Contributions need not add up.

    Args:
        reader: of the model and its tokenizer.
        turns: the conversation, as it was traced from an empty memory.
        seen: its trace.
        places: numbers of tokens in the trace.
        question, reply: the turn whose reply is scored, its end included.
        batch_size: replays at once.
        tell: told how far it is.
    """
    rows: list[int | None] = [None, *places]  # the first is whole
    scores: list[float] = []
    for start in range(0, len(rows), batch_size):
        tell("replays", start, len(rows))
        part = rows[start : start + batch_size]
        states = reader.start(len(part))
        for number, turn in enumerate(turns):
            before = reader.prefix_fed(states)
            with unwritten(reader.model, [_columns(before, seen, place, number) for place in part]):
                states = reader.read(states, [turn] * len(part))
        scores += _scores(reader, states, question, reply)
    tell("replays", len(rows), len(rows))
    return [scores[0] - score for score in scores[1:]]


def _columns(before: int, seen: Trace, place: int | None, turn: int) -> list[int]:
    """Where a traced token stands in the forward pass of a turn, `before` tokens in front of it; [] if it is in another."""
    if place is None or max(seen.turns[place], 0) != turn:
        return []
    if turn == 0:  # memory takes the prefix in with the first turn
        return [place]
    return [before + place - seen.turns.index(turn)]


def _scores(reader: BatchReader, states: Any, question: str, reply: str) -> list[float]:
    """Log-probability of the reply and its end, for every row."""
    turn = reader.renderer.turn(question, reply)
    answer = torch.tensor(turn.ids[turn.reply_start :], device=fed_on(reader.model))  # (R,)
    inputs = reader.inputs(states, [turn.ids] * states.batch_size, left=False)
    output = reader.model(**inputs, memory_state=states, logits_to_keep=len(answer) + 1, use_cache=False)
    chosen = output.logits[:, :-1].float().log_softmax(-1).gather(2, answer.expand(states.batch_size, -1).unsqueeze(2))
    return chosen.double().sum(dim=(1, 2)).tolist()


def filled(writes: Tensor, keep: Tensor) -> Tensor:
    """(T, N, S) share of every slot that is written at each token: of its content, with `mingru`, the sum of weights."""
    now, course = torch.zeros_like(writes[0]), []
    for write, kept in zip(writes, keep, strict=True):
        now = kept * now * (1 - write) + write
        course.append(now)
    return torch.stack(course)


def left_of_turns(writes: Tensor, keep: Tensor, turns: Sequence[int]) -> Tensor:
    """(T, K) share of what each of K turns has written that is left at each token; 0 before it."""
    count = max(turns) + 1
    now, course = writes.new_zeros(count, *writes.shape[1:]), []  # (K, N, S)
    for write, kept, turn in zip(writes, keep, turns, strict=True):
        now = kept * now * (1 - write)
        if turn >= 0:
            now[turn] += write
        course.append(now.sum(dim=(1, 2)))
    course = torch.stack(course)
    return course / course.amax(dim=0).clamp_min(1e-12)


def _rounded(view: Tensor) -> list[list[list[float]]]:
    return [[[round(x, 4) for x in slots] for slots in heads] for heads in view.tolist()]


def plot_timeline(runs: Sequence[dict[str, Any]], path: Any, title: str) -> None:
    """A page of its own (plotly's script is inside): heat maps to switch between, fading curves, contributions."""
    try:
        from plotly import graph_objects as go
        from plotly.subplots import make_subplots
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error}; the page needs: pip install 'gru-memory[html]'", name=error.name
        ) from error
    details = runs[0]["details"]
    tokens, turns = details["tokens"], details["turns"]
    across = list(range(len(tokens)))
    names = [html.escape(repr(token)[1:-1], quote=False).strip() or "␣" for token in tokens]
    figure = make_subplots(
        rows=3, cols=1, shared_xaxes=True, vertical_spacing=0.06, row_heights=[0.22, 0.56, 0.22],
        subplot_titles=("contribution to the answer (nats)", "slots of each head", "left of what each turn wrote"),
    )  # fmt: skip
    rows = runs[0]["rows"]
    figure.add_trace(
        go.Bar(
            x=[row["position"] for row in rows], y=[row["contribution"] for row in rows], marker_color=PALETTE[0],
            customdata=[[row["strength"], row["left"]] for row in rows], showlegend=False, name="contribution",
            hovertemplate="%{text}<br>%{y:.3f} nats<br>written %{customdata[0]:.2f}, left %{customdata[1]:.2f}<extra></extra>",
            text=[names[row["position"]] for row in rows], textposition="none",
        ), row=1, col=1,
    )  # fmt: skip
    slots = len(details["views"]["writes"][0][0])
    labels = [
        f"head {head}, slot {slot}" for head in range(len(details["views"]["writes"][0])) for slot in range(slots)
    ]
    hover = [[f"{names[t]} (turn {turns[t] + 1})" for t in across]] * len(labels)
    for number, (view, meaning) in enumerate(VIEWS.items()):
        cells = [[value for head in token for value in head] for token in details["views"][view]]  # (T, N S)
        figure.add_trace(
            go.Heatmap(
                z=[list(slot) for slot in zip(*cells, strict=True)], x=across, y=labels, customdata=hover, name=view,
                colorscale="Cividis", zmin=0, zmax=1, visible=number == 0,
                colorbar={"title": {"text": meaning, "side": "right"}, "len": 0.5, "y": 0.5},
                hovertemplate="%{customdata}<br>%{y}<br>%{z:.3f}<extra>" + view + "</extra>",
            ), row=2, col=1,
        )  # fmt: skip
    for turn, left in enumerate(zip(*details["left_of_turns"], strict=True)):
        shown = [value if value > 0 else None for value in left]
        line = {"color": PALETTE[turn % len(PALETTE)], "dash": "solid" if turn < len(PALETTE) else "dot"}
        figure.add_trace(go.Scatter(x=across, y=shown, mode="lines", line=line, name=f"turn {turn + 1}"), row=3, col=1)
    for at in across[1:]:
        if turns[at] != turns[at - 1]:
            figure.add_vline(x=at - 0.5, line_width=1, line_color=PALETTE[1])
    curves = len(details["left_of_turns"][0])
    buttons = [
        {
            "label": view,
            "method": "update",
            "args": [{"visible": [True, *(other == view for other in VIEWS), *[True] * curves]}],
        }
        for view in VIEWS
    ]
    asked_for = html.escape(f"{details['question']} → {details['reply']}", quote=False)
    figure.update_layout(
        title={"text": f"{html.escape(title)}<br><sup>{asked_for}</sup>"}, height=1000, template="plotly_white",
        updatemenus=[{"type": "buttons", "direction": "right", "buttons": buttons, "x": 1, "xanchor": "right", "y": 1.07}],
        legend={"y": 0.02, "yanchor": "bottom"}, bargap=0.1,
    )  # fmt: skip
    figure.update_xaxes(tickvals=across, ticktext=names, tickangle=-90, tickfont={"size": 9}, row=3, col=1)
    figure.update_yaxes(
        tickvals=[labels[head * slots + slots // 2] for head in range(len(labels) // slots)],
        ticktext=[f"head {head}" for head in range(len(labels) // slots)], row=2, col=1,
    )  # fmt: skip
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.write_html(path, include_plotlyjs=True, full_html=True)


TIMELINE = Evaluation(
    name="timeline",
    about="What each written token adds to an answer, by replaying without it; writes, reads and strength as a page.",
    config=TimelineConfig,
    run=evaluate_timeline,
    labels={"conversation": "seed", "position": "token no.", "turn": "turn", "token": "token"},
    figures={
        "contribution": Figure("contribution (nats)", "change"),
        "strength": Figure("written", "share"),
        "left": Figure("left (slots)", "number"),
    },
    plot=plot_timeline,
    suffix=".html",
)
