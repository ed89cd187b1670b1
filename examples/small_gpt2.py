"""GPT-2 from nothing, and a memory for it: tokenizer, model, memory, and what the memory then recalls, as plots.

    python examples/small_gpt2.py --books FOLDER --out runs/small-gpt2      # within 30 minutes on two cores
    python examples/small_gpt2.py                                           # tiny, to see that it runs

A `GPT2LMHeadModel` with a byte-level BPE tokenizer is trained on books and on plain dialogues of facts, as a script of
"User:" and "Assistant:". Then `gru-memory train` makes a memory for it, just as for `gpt2` from the hub.
"""

import argparse
import math
import tempfile
import time
from pathlib import Path
from random import Random

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from gpt2_gru_memory import GPT2WithGRUMemory
from gru_memory.data import FactGenerator
from gru_memory.drawing import MARKERS, PALETTE, panels, save
from gru_memory.evaluation import RecallConfig, evaluate_recall
from gru_memory.evaluation.fading import FadingConfig, evaluate_fading, plot_fading
from gru_memory.evaluation.scoring import contains
from gru_memory.rendering import TurnRenderer
from gru_memory.training.request import TrainRequest
from gru_memory.training.run import train
from gru_memory.training.trainer import TrainingConfig

END = "<|endoftext|>"
ROWS, WINDOW = 4, 256  # of a step of training: rows, and tokens in each; most questions find their answer in the row
RATE = 2e-3
KEY_LAYERS = (0, 1, 2)  # of four blocks; what is asked for is clearest in the lower ones
ASKED_AFTER = (0, 1, 2, 5, 10, 20)  # turns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--books", help="folder of plain-text books (.txt); dialogues alone if not given")
    parser.add_argument("--out", help="folder for model, memory and plots; all of it is dropped if not given")
    parser.add_argument("--model-steps", type=int, default=3000, help="training steps of the model")
    parser.add_argument("--dialogues", type=int, default=24_000, help="distinct ones, to train the model on")
    parser.add_argument("--steps", type=int, default=500, help="training steps of the memory")
    parser.add_argument("--facts", type=int, default=8000, help="distinct facts, to train the memory on")
    parser.add_argument("--sessions", type=int, default=20, help="conversations that each figure is measured on")
    arguments = parser.parse_args()
    if arguments.out is None:
        arguments.model_steps, arguments.dialogues, arguments.steps = 4, 60, 2
        arguments.facts, arguments.sessions = 12, 2
    with tempfile.TemporaryDirectory() as scratch:
        run(Path(arguments.out or scratch), arguments)


def run(out: Path, arguments: argparse.Namespace) -> None:
    """All of it; what is there already is not made again."""
    tiny = arguments.out is None
    base, memory = out / "model", out / "memory"
    if not (base / "config.json").exists():
        make_model(
            base, arguments, width=48 if tiny else 192, layers=2 if tiny else 4, vocabulary=600 if tiny else 4096
        )
    request = TrainRequest(
        out=str(memory),
        model=str(base),
        training=TrainingConfig(
            steps=arguments.steps, validate_every=max(1, arguments.steps // 7), floor_from=1.0, base_weight=1.5
        ),
        memory={"num_heads": 4, "num_slots": 8} if tiny else {"key_layers": KEY_LAYERS, "persistent_floor": 0.1},
        pool_facts=arguments.facts,
        pool_talk=max(8, arguments.facts // 8),
        replied=0,
        pool_general=0,
        books=arguments.books,
        pages=arguments.facts // 30,
        bfloat16=False,
    )
    began = time.perf_counter()
    train(request, report=_tell_validation)
    print(f"memory trained in {time.perf_counter() - began:.0f} s")

    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    model = GPT2WithGRUMemory.from_pretrained_with_memory(base, memory=memory).eval()
    rows = [{}, {"between": 50}, {"facts": 6}, {"values": "seen"}, {"corrected": True}]
    for row in rows[: 1 if tiny else None]:
        config = RecallConfig(**{"facts": 3, "between": 2 if tiny else 12, "sessions": arguments.sessions, **row})
        found = evaluate_recall(model, tokenizer, config, full_history=False)
        print(
            f"{config.label}: {_shown(found.memory)}; question alone {_shown(found.floor)}; {found.state_bytes:,} bytes"
        )

    turns = (0, 1) if tiny else ASKED_AFTER
    config = FadingConfig(decays=(0.9, 0.97, 0.998), turns=turns, sessions=max(2, arguments.sessions // 2))
    plot_fading([evaluate_fading(model, tokenizer, config).to_json()], out / "fading.png", "fading, small GPT-2")
    shares = {
        mode: recall_by_turns(model, tokenizer, mode, turns, arguments.sessions) for mode in ("persistent", "ephemeral")
    }
    plot_modes(shares, turns, out / "modes.png")
    for mode, found in shares.items():
        print(f"{mode}: " + ", ".join(f"{share:.0%} after {n} turns" for n, share in zip(turns, found)))


def make_model(folder: Path, arguments: argparse.Namespace, width: int, layers: int, vocabulary: int) -> None:
    """A tokenizer and a GPT-2, trained from scratch."""
    rng = Random(0)
    texts = (
        [path.read_text(encoding="utf-8") for path in sorted(Path(arguments.books).glob("*.txt"))]
        if arguments.books
        else []
    )
    facts = FactGenerator(0, corrected=0.1)
    sessions = [facts.session(rng.randint(1, 4), rng.randint(0, 2), shuffle=True) for _ in range(arguments.dialogues)]
    tokenizer = make_tokenizer(
        [*texts, *(turn.user for session in sessions[:4000] for turn in session.turns)], vocabulary
    )
    renderer = TurnRenderer(tokenizer)
    # Rows of dialogues begin where a turn does, as all do that the memory will see; those of books anywhere.
    turns = [turn for session in sessions for turn in session.turns]
    turns = [renderer.turn(turn.user, turn.assistant).ids + renderer.separator_ids for turn in turns]
    begins = torch.tensor([0, *map(len, turns)]).cumsum(0)[:-1]
    streams = [(torch.tensor([token for ids in turns for token in ids]), begins)]
    if texts:
        read = torch.cat([torch.tensor(tokenizer(text, verbose=False)["input_ids"]) for text in texts])
        streams.append((read, torch.arange(len(read))))
    print("tokens of dialogues, of books: " + ", ".join(f"{len(stream):,}" for stream, _ in streams))

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=1024, n_embd=width, n_layer=layers, n_head=4,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    print(f"{model.num_parameters():,} parameters")
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    began = time.perf_counter()
    for step in range(arguments.model_steps):
        for group in optimizer.param_groups:
            decayed = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / arguments.model_steps))
            group["lr"] = RATE * min(1, (step + 1) / 100) * decayed
        kind = 1 if len(streams) == 2 and step % 8 == 7 else 0  # one step in eight is books
        stream, begins = streams[kind]
        starts = begins[begins <= len(stream) - WINDOW]
        starts = starts[torch.randint(len(starts), (ROWS,))].tolist()
        ids = torch.stack([stream[start : start + WINDOW] for start in starts])
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 200 >= 198:
            name = ("dialogues", "books")[kind]
            print(f"step {step + 1}, {time.perf_counter() - began:.0f} s: loss {loss.item():.3f} ({name})", flush=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as GPT-2's, of so many tokens."""
    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    fast.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=fast, bos_token=END, eos_token=END, model_max_length=1024)


@torch.no_grad()
def recall_by_turns(model, tokenizer, mode: str, turns: tuple[int, ...], count: int) -> list[float]:
    """Shares of `count` facts recalled after so many other turns, by `generate()` alone: the shell that keeps `memory_state`."""
    model.memory_config.mode = mode
    renderer, facts = TurnRenderer(tokenizer), FactGenerator(77, values="test")
    right = {n: 0 for n in turns}
    for _ in range(count):
        session = facts.session(1, max(turns))
        model.reset(batch_size=1)
        asked = next(turn for turn in session.turns if turn.kind == "ask")
        for number, turn in enumerate(turn for turn in session.turns if turn.kind != "ask"):
            _generate(model, renderer, turn.user, 1)
            if number in right:
                kept = model.memory_state
                right[number] += contains(_generate(model, renderer, asked.user, 24), asked.value)
                model.memory_state = kept
    model.memory_config.mode = "persistent"
    return [right[n] / count for n in turns]


def _generate(model, renderer: TurnRenderer, text: str, new_tokens: int) -> str:
    ids = torch.tensor([renderer.prompt(text)])
    end = renderer.tokenizer.eos_token_id
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False, pad_token_id=end
    )
    return renderer.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def plot_modes(shares: dict[str, list[float]], turns: tuple[int, ...], path: Path) -> None:
    figure, (axes,) = panels(1, width=6.0)
    for number, (mode, found) in enumerate(shares.items()):
        axes.plot(turns, [100 * share for share in found], color=PALETTE[number], marker=MARKERS[number], label=mode)
    axes.set(xlabel="turns since the fact was told", ylabel="facts recalled (%)", ylim=(-3, 103))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_title("Persistent and ephemeral memory, small GPT-2", loc="left", fontweight="bold")
    axes.legend(frameon=False)
    save(figure, path)


def _shown(rate) -> str:
    return f"{rate.share:.0%} ({rate.low:.0%}-{rate.high:.0%} of {rate.total})"


def _tell_validation(values: dict) -> None:
    if scores := values.get("validation"):
        shown = ", ".join(f"{name} {score:.2f}" for name, score in scores.items() if isinstance(score, float))
        print(f"memory, step {scores['step']}: {shown}", flush=True)


if __name__ == "__main__":
    main()
