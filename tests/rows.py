"""Sessions for the tests of training: few, short, of different lengths and marks."""

from gru_memory.data.sessions import Session, Turn

NAMES = ("Marigold", "Porto", "Finch", "Juniper", "Ada", "Bruno", "Clover", "Dora")


def sessions(count=8):
    """Facts that are told, and asked for one or two turns later."""
    made = []
    for i in range(count):
        name, between = NAMES[i % len(NAMES)], "Where do you live?" if i % 3 else None
        turns = [Turn(f"My boat is called {name}.", kind="tell")]
        if between:
            turns.append(Turn(between, "I live in Porto.", learn="base" if i % 2 else None))
        turns.append(Turn("What is my boat called?", f"It is called {name}.", learn="answer", kind="ask"))
        made.append(Session(tuple(turns)))
    return made
