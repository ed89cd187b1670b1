"""Damaged files: each is refused in one line, or is a conversation that can go on. Nothing else happens."""

from __future__ import annotations

import random
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from talking import talking_model, talking_tokenizer

from gru_memory import Conversation
from gru_memory.store import SessionStore, StoreError

from .result import Result
from .victim import tiny


def mutate(data: bytes, draw: random.Random) -> bytes:
    """Some bytes changed, cut out, put in or swapped; half of the time in the header, where it matters most."""
    changed = bytearray(data)
    header = 8 + int.from_bytes(data[:8], "little")
    for _ in range(draw.choice((1, 1, 2, 8))):
        if not changed:
            break
        at = draw.randrange(min(header, len(changed)) if draw.random() < 0.5 else len(changed))
        kind = draw.randrange(5)
        if kind == 0:
            changed[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del changed[at : at + draw.randrange(1, 64)]
        elif kind == 2:
            changed[at:at] = draw.randbytes(draw.randrange(1, 64))
        elif kind == 3:
            changed[at : at + 8] = b"\xff" * 8  # NaN, and lengths beyond all bounds
        else:
            changed = changed[:at]
    return bytes(changed)


def run(mutations: int, seed: int = 7) -> Result:
    """Load `mutations` damaged states, and import as many damaged session files.

    Args:
        mutations: of each kind.
        seed: of the damage.
    """
    result, draw = Result(), random.Random(seed)
    conversation = Conversation(*tiny())
    conversation.read("My boat is called Marigold.", "Lovely.")
    data = conversation.to_bytes()
    other = Conversation(conversation.model, conversation.tokenizer)

    def load(damaged: bytes) -> None:
        other.load(damaged)
        result.expect(other.state.is_finite(), "a state that is not finite was taken in")
        other.model.check_memory_state(other.state, 1, whose=True)

    refused = _damage(data, mutations, draw, load, result)
    result.expect(refused > mutations / 2, f"only {refused} of {mutations} states were refused")
    for what, foreign in _foreign(conversation).items():
        before = other.state
        result.expect(_refused(lambda foreign=foreign: other.load(foreign), result), f"{what} was taken in")
        result.expect(other.state is before, f"{what} was refused, and changed the conversation")
    with tempfile.TemporaryDirectory(prefix="gru-chaos-") as folder, SessionStore(f"{folder}/s.sqlite3") as store:
        session = store.create("whole")
        store.commit(session, [("My boat is called Marigold.", "Lovely.")], data, None)
        file = store.export(store.get("whole"))

        def take_in(damaged: bytes) -> None:
            store.import_file(damaged, name="damaged")
            Conversation(conversation.model, conversation.tokenizer).load(store.head(store.get("damaged")).state)
            store.delete("damaged")

        files = _damage(file, mutations, draw, take_in, result)
        left = [session.name for session in store.list() if session.name != "damaged"]
        result.expect(left == ["whole"], f"the store holds {left}")
        huge = Path(folder) / "huge"
        with huge.open("wb") as hole:
            hole.truncate(2 << 30)
        result.expect(_refused(lambda: store.import_path(huge), result), "a file of 2 GiB was read")
    other.load(data)
    other.read("I live in Porto.")
    result.figures = {
        "damaged states": f"{mutations:,}, {refused:,} refused, the others whole conversations",
        "damaged session files": f"{mutations:,}, {files:,} refused, the others whole sessions",
        "states that are foreign, not finite or oversized": "all refused",
    }
    return result


def _damage(data: bytes, mutations: int, draw: random.Random, use: Callable[[bytes], None], result: Result) -> int:
    refused = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(mutations):
            damaged = mutate(data, draw)
            refused += _refused(lambda damaged=damaged: use(damaged), result)
    return refused


def _refused(use: Callable[[], None], result: Result) -> bool:
    """Whether it raised what it may raise; anything else than one line is noted."""
    try:
        use()
    except (ValueError, StoreError) as error:
        said = str(error)
        result.expect("\n" not in said and 0 < len(said) < 1_000, f"this is not one line: {said[:200]}")
        return True
    return False


def _foreign(conversation: Conversation) -> dict[str, bytes]:
    """States that are whole, and wrong."""
    another = Conversation(talking_model("llama", num_slots=5), talking_tokenizer("llama"))
    another.read("I live in Porto.")
    kept, broken = conversation.state, Conversation(conversation.model, conversation.tokenizer)
    broken.read("I live in Porto.")
    site = next(iter(kept.sites))
    found = {"the state of another memory": another.to_bytes(), "nothing": b"", "text": b"My boat is called Marigold."}
    for number in (float("nan"), float("inf")):
        slots = torch.full_like(kept.sites[site]["slots"], number)
        state = broken.state.clone()
        state.sites[site]["slots"].copy_(slots)
        found[f"a state full of {number}"] = state.to_bytes(None, metadata={"conversation": _about(conversation)})
    length = (1 << 40).to_bytes(8, "little")
    found["a header of a terabyte"] = length + conversation.to_bytes()[8:]
    return found


def _about(conversation: Conversation) -> str:
    from gru_memory import MemoryState

    return MemoryState.read_metadata(conversation.to_bytes())["conversation"]
