"""Beams with a memory: each of several replies comes with the memory as it would be after that reply.

    python examples/beams.py

The fact is told in one turn and asked for in another, and only the memory carries it over.
"""

import torch

from gru_memory import Conversation
from gru_memory.shipped import load_with_memory


def main() -> None:
    model, tokenizer = load_with_memory()
    conversation = Conversation(model, tokenizer, max_new_tokens=24)
    conversation.read("My sister's boat is called Marigold.", "That is a lovely name for a boat.")

    question = "What is my sister's boat called?"
    prompt = conversation.prompt(question)
    output = model.generate(
        **prompt,
        memory_state=conversation.state,
        num_beams=4,
        num_return_sequences=3,
        do_sample=False,
        max_new_tokens=24,
        return_dict_in_generate=True,
        output_scores=True,
    )
    replies = output.sequences[:, prompt["input_ids"].shape[1] :]
    texts = [text.strip() for text in tokenizer.batch_decode(replies, skip_special_tokens=True)]
    for text, score, tokens in zip(texts, output.sequences_scores, output.memory_state.tokens, strict=True):
        print(f"{score:7.3f}  {text}   (the memory has seen {int(tokens)} tokens)")

    # Go on with the reply that was chosen: its row of the state is the memory after it.
    best = int(torch.argmax(output.sequences_scores))
    conversation.commit(output.memory_state.select(best), question, texts[best])
    print("and then:", conversation.say("And what is the name of my sister's boat?"))


if __name__ == "__main__":
    main()
