"""Replies word by word, to the terminal and out of a thread, with a memory that goes on from turn to turn.

    python examples/streaming.py

What the first turn tells, the second one asks for: only the memory carries it over.
"""

import threading

from transformers import TextIteratorStreamer, TextStreamer

from gru_memory import Conversation
from gru_memory.shipped import load_with_memory


def main() -> None:
    model, tokenizer = load_with_memory()
    conversation = Conversation(model, tokenizer, max_new_tokens=24)

    # `TextStreamer` prints each word as soon as it is certain.
    terminal = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    conversation.say("My dog is called Biscuit.", streamer=terminal)

    # `TextIteratorStreamer` hands the words to whoever iterates over it, while `say` decodes in a thread. The
    # conversation has the new memory once the thread is done.
    words = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=120)
    question = "What is my dog called?"
    thread = threading.Thread(target=conversation.say, args=(question,), kwargs={"streamer": words})
    thread.start()
    for word in words:
        print(word, end="", flush=True)
    thread.join()
    print(
        f"\n{conversation.turns} turns, {int(conversation.state.tokens)} tokens in {conversation.state.num_bytes} bytes"
    )


if __name__ == "__main__":
    main()
