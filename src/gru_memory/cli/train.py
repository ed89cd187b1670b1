"""`gru-memory train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.markup import escape

from ..config import MemoryConfig
from ..training.request import TrainRequest
from ..training.run import train
from ..training.trainer import TrainingConfig
from .output import console, one_line_errors, option, progress, set_threads


@one_line_errors
def train_command(
    out: Annotated[Path, option(TrainRequest, "out")],
    model: Annotated[str, option(TrainRequest, "model")] = TrainRequest.model,
    data: Annotated[str, option(TrainRequest, "data")] = TrainRequest.data,
    addressing: Annotated[Optional[str], option(MemoryConfig, "addressing")] = None,  # noqa: UP045
    num_heads: Annotated[Optional[int], option(MemoryConfig, "num_heads")] = None,  # noqa: UP045
    num_slots: Annotated[Optional[int], option(MemoryConfig, "num_slots")] = None,  # noqa: UP045
    slot_size: Annotated[Optional[int], option(MemoryConfig, "slot_size")] = None,  # noqa: UP045
    address_rank: Annotated[Optional[int], option(MemoryConfig, "address_rank")] = None,  # noqa: UP045
    signature_size: Annotated[Optional[int], option(MemoryConfig, "signature_size")] = None,  # noqa: UP045
    persistent_slots: Annotated[Optional[int], option(MemoryConfig, "persistent_slots")] = None,  # noqa: UP045
    persistent_floor: Annotated[Optional[float], option(MemoryConfig, "persistent_floor")] = None,  # noqa: UP045
    max_strength: Annotated[Optional[float], option(MemoryConfig, "max_strength")] = None,  # noqa: UP045
    cell: Annotated[Optional[str], option(MemoryConfig, "cell")] = None,  # noqa: UP045
    decay: Annotated[Optional[float], option(MemoryConfig, "decay")] = None,  # noqa: UP045 (typer on Python 3.10)
    decay_every: Annotated[Optional[str], option(MemoryConfig, "decay_every")] = None,  # noqa: UP045
    key_layers: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="blocks whose output joins keys and queries, such as 10,20; '' for none"),
    ] = None,
    steps: Annotated[int, option(TrainingConfig, "steps")] = TrainingConfig.steps,
    rows: Annotated[int, option(TrainingConfig, "rows")] = TrainingConfig.rows,
    learning_rate: Annotated[float, option(TrainingConfig, "learning_rate")] = TrainingConfig.learning_rate,
    max_facts: Annotated[int, option(TrainingConfig, "max_facts")] = TrainingConfig.max_facts,
    max_between: Annotated[int, option(TrainingConfig, "max_between")] = TrainingConfig.max_between,
    max_untold: Annotated[int, option(TrainingConfig, "max_untold")] = TrainingConfig.max_untold,
    curriculum_steps: Annotated[int, option(TrainingConfig, "curriculum_steps")] = TrainingConfig.curriculum_steps,
    address_weight: Annotated[float, option(TrainingConfig, "address_weight")] = TrainingConfig.address_weight,
    apart_weight: Annotated[float, option(TrainingConfig, "apart_weight")] = TrainingConfig.apart_weight,
    write_weight: Annotated[float, option(TrainingConfig, "write_weight")] = TrainingConfig.write_weight,
    speech_weight: Annotated[float, option(TrainingConfig, "speech_weight")] = TrainingConfig.speech_weight,
    margin: Annotated[float, option(TrainingConfig, "margin")] = TrainingConfig.margin,
    opening_weight: Annotated[float, option(TrainingConfig, "opening_weight")] = TrainingConfig.opening_weight,
    key_dropout: Annotated[float, option(TrainingConfig, "key_dropout")] = TrainingConfig.key_dropout,
    base_weight: Annotated[float, option(TrainingConfig, "base_weight")] = TrainingConfig.base_weight,
    floor_from: Annotated[float, option(TrainingConfig, "floor_from")] = TrainingConfig.floor_from,
    validate_every: Annotated[int, option(TrainingConfig, "validate_every")] = TrainingConfig.validate_every,
    keep: Annotated[float, option(TrainingConfig, "keep")] = TrainingConfig.keep,
    seed: Annotated[int, option(TrainingConfig, "seed")] = TrainingConfig.seed,
    pool_facts: Annotated[int, option(TrainRequest, "pool_facts")] = TrainRequest.pool_facts,
    pool_talk: Annotated[int, option(TrainRequest, "pool_talk")] = TrainRequest.pool_talk,
    pool_untold: Annotated[int, option(TrainRequest, "pool_untold")] = TrainRequest.pool_untold,
    pool_general: Annotated[int, option(TrainRequest, "pool_general")] = TrainRequest.pool_general,
    corrected: Annotated[float, option(TrainRequest, "corrected")] = TrainRequest.corrected,
    replied: Annotated[int, option(TrainRequest, "replied")] = TrainRequest.replied,
    books: Annotated[Optional[str], option(TrainRequest, "books")] = TrainRequest.books,  # noqa: UP045
    pages: Annotated[int, option(TrainRequest, "pages")] = TrainRequest.pages,
    passages: Annotated[int, option(TrainRequest, "passages")] = TrainRequest.passages,
    cache: Annotated[Optional[str], option(TrainRequest, "cache")] = TrainRequest.cache,  # noqa: UP045
    bfloat16: Annotated[bool, option(TrainRequest, "bfloat16")] = TrainRequest.bfloat16,
    device: Annotated[Optional[str], option(TrainRequest, "device")] = None,  # noqa: UP045
    threads: Annotated[Optional[int], typer.Option(help="threads of torch")] = None,  # noqa: UP045
) -> None:
    """Train a memory for a frozen model; a run that was interrupted goes on where it stopped."""
    chosen = {
        "num_heads": num_heads,
        "addressing": addressing,
        "num_slots": num_slots,
        "slot_size": slot_size,
        "address_rank": address_rank,
        "signature_size": signature_size,
        "persistent_slots": persistent_slots,
        "persistent_floor": persistent_floor,
        "max_strength": max_strength,
        "cell": cell,
        "decay": decay,
        "decay_every": decay_every,
        "key_layers": None if key_layers is None else _layers(key_layers),
    }
    chosen = {name: value for name, value in chosen.items() if value is not None}
    training = TrainingConfig(
        steps=steps,
        rows=rows,
        learning_rate=learning_rate,
        max_facts=max_facts,
        max_between=max_between,
        key_dropout=key_dropout,
        base_weight=base_weight,
        address_weight=address_weight,
        apart_weight=apart_weight,
        write_weight=write_weight,
        speech_weight=speech_weight,
        margin=margin,
        opening_weight=opening_weight,
        max_untold=max_untold,
        curriculum_steps=curriculum_steps,
        floor_from=floor_from,
        validate_every=validate_every,
        keep=keep,
        seed=seed,
    )
    request = TrainRequest(
        out=str(out),
        model=model,
        data=data,
        memory=chosen,
        training=training,
        pool_facts=pool_facts,
        pool_talk=pool_talk,
        pool_untold=pool_untold,
        pool_general=pool_general,
        corrected=corrected,
        replied=replied,
        books=books,
        pages=pages,
        passages=passages,
        cache=cache,
        bfloat16=bfloat16,
        device=device,
    )
    set_threads(threads)
    with progress() as report:

        def tell(values: dict) -> None:
            if scores := values.get("validation"):
                shown = ", ".join(f"{name} {score:.3f}" for name, score in scores.items() if isinstance(score, float))
                console.print(f"step {scores['step']}: {escape(shown)}", highlight=False)
            else:
                report("training", values["step"], values["steps"])

        folder = train(request, tell, report)
    console.print(f"The memory is in {folder}", highlight=False)


def _layers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise ValueError(f"key_layers is {text!r}: give numbers of blocks, such as 10,20") from error
