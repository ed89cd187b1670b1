"""A thousand damaged files: each is refused in one line, or is a conversation that can go on. Nothing else happens."""

import random
import warnings

import pytest
from talking import talking_model, talking_tokenizer

from gru_memory import Conversation

MUTATIONS = 1_000


@pytest.fixture(scope="module")
def conversation():
    conversation = Conversation(talking_model("llama"), talking_tokenizer("llama"))
    conversation.read("My boat is called Marigold.", "Lovely.")
    return conversation


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


def test_damaged_states_are_refused_or_harmless(conversation):
    draw, refused = random.Random(7), 0
    data = conversation.to_bytes()
    other = Conversation(conversation.model, conversation.tokenizer)
    for _ in range(MUTATIONS):
        before = other.state
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                other.load(mutate(data, draw))
        except ValueError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 1_000
            assert other.state is before
        else:
            assert other.state.is_finite()
            other.model.check_memory_state(other.state, 1, whose=True)
    assert refused > MUTATIONS / 2
    other.load(data)
    other.read("I live in Porto.")
