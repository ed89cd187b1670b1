"""Guess several tokens, check them in one pass, take the wrong ones back: the same text and memory in fewer passes.

    python examples/assisted_decoding.py [--draft NAME]

Guesses come from the prompt itself (prompt lookup), from the model's own first blocks (early exit), and from a smaller
model with the same tokens if one is named.
"""

import argparse
import time

from gru_memory import Conversation
from gru_memory.embedded import load_model
from gru_memory.shipped import load_with_memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draft", help="a smaller model: a folder, a .gguf file or a hub name")
    parser.add_argument("--tokens", type=int, default=40, help="length of the reply")
    arguments = parser.parse_args()
    model, tokenizer = load_with_memory()
    conversation = Conversation(model, tokenizer)
    conversation.read("My sister's boat is called Marigold.", "That is a lovely name for a boat.")
    prompt = conversation.prompt(
        "Correct the spelling: 'The boat of my sister has a red hull, a wite sail and a red mast, and the red hull has "
        "a wite line.' Reply with the corrected sentence only."
    )

    ways = {
        "no guesses": {},
        "prompt lookup": {"prompt_lookup_num_tokens": 6},
        "early exit": {"assistant_early_exit": 24},
    }
    if arguments.draft:
        ways["draft model"] = {"assistant_model": load_model(arguments.draft)[0]}
    passes, plain = [], None
    model.model.layers[-1].register_forward_hook(
        lambda *_: passes.append(1)
    )  # the last block: early exits do not count
    print(f"{'':15}{'passes':>7}{'seconds':>9}  same text, largest difference in the memory")
    for name, settings in ways.items():
        passes.clear()
        begin = time.perf_counter()
        output = model.generate(
            **prompt,
            **settings,
            memory_state=conversation.state,
            max_new_tokens=arguments.tokens,
            do_sample=False,
            return_dict_in_generate=True,
        )
        seconds = time.perf_counter() - begin
        plain = plain or output
        same = output.sequences.tolist() == plain.sequences.tolist()
        apart = max(
            float((kept[key] - plain.memory_state.sites[site][key]).abs().max())
            for site, kept in output.memory_state.sites.items()
            for key in kept
        )
        print(f"{name:15}{len(passes):7}{seconds:9.1f}  {same}, {apart:.1e}")
    print(tokenizer.decode(plain.sequences[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).strip())


if __name__ == "__main__":
    main()
