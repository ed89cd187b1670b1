"""Where the parts of a causal LM are: one row a model family."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Backbone:
    """Where one family of models has its parts: attribute paths from the causal LM down.

    Args:
        blocks: the list of transformer blocks, which run in order on hidden states of one size.
        final_norm: the norm after the last block. Where a model of the family has None there, its last block comes last.
        projection: a layer between the final norm and the LM head, for models of the family that have one.
        embed_scale: what the input embeddings are multiplied by before block 0 (a number or tensor), where they are.
        packs: whether positions that restart at 0 within a row keep attention to one turn.
        static_cache: whether the model computes the same with a static cache as with a growing one.
    """

    blocks: str
    final_norm: str
    projection: str | None = None
    embed_scale: str | None = None
    packs: bool = True
    static_cache: bool = True


_LLAMA = Backbone(blocks="model.layers", final_norm="model.norm")  # and many families after it
_GPT = Backbone(blocks="transformer.h", final_norm="transformer.ln_f")
_GEMMA = Backbone(blocks="model.layers", final_norm="model.norm", embed_scale="model.embed_tokens.embed_scale")

# What lies between the last block and the logits, read from transformers 5.17 and 5.23: nothing but these parts and the
# head. GPT-J's and Phi's heads have a bias, and Gemma 2 caps the logits (final_logit_softcapping), both after the head;
# tests/test_backbones.py checks every row.
_BACKBONES: dict[str, Backbone] = {
    "falcon": Backbone(blocks="transformer.h", final_norm="transformer.ln_f", packs=False),
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "gpt2": _GPT,
    "gpt_neo": Backbone(blocks="transformer.h", final_norm="transformer.ln_f", static_cache=False),
    "gpt_neox": Backbone(blocks="gpt_neox.layers", final_norm="gpt_neox.final_layer_norm"),
    "gptj": _GPT,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _LLAMA,
    "olmo2": _LLAMA,
    "opt": Backbone(
        blocks="model.decoder.layers",
        final_norm="model.decoder.final_layer_norm",
        projection="model.decoder.project_out",
        packs=False,
    ),
    "phi": Backbone(blocks="model.layers", final_norm="model.final_layernorm"),
    "phi3": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "stablelm": _LLAMA,
}


def register_backbone(model_type: str, backbone: Backbone) -> None:
    """Teach the library a further family: `config.model_type` and where its parts are. docs/backbones.md shows how."""
    _BACKBONES[model_type] = backbone


def supported_model_types() -> list[str]:
    """Every `config.model_type` that has a row, those registered included."""
    return sorted(_BACKBONES)


def backbone_of(model: PreTrainedModel) -> Backbone:
    """The row for this model. Raises ValueError for a model that cannot have a memory, and says what to do."""
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{model_type} is an encoder-decoder model: memory needs a causal (decoder-only) language model, one that "
            "AutoModelForCausalLM loads"
        )
    if model_type not in _BACKBONES:
        raise ValueError(
            f"no backbone is known for model_type {model_type!r} (known: {', '.join(supported_model_types())}). Register it: "
            f"gru_memory.register_backbone({model_type!r}, gru_memory.Backbone(blocks='path.to.layers', final_norm='path.to.norm'))"
            ", with the paths that print(model) shows; gru_memory.check_backbone(model) then tells whether memory works there"
        )
    if model.get_output_embeddings() is None:
        raise ValueError(
            f"{type(model).__name__} has no language-model head: load it as a causal LM (AutoModelForCausalLM)"
        )
    if getattr(config, "layerdrop", 0):
        raise ValueError(
            f"this model drops blocks at random while it is trained (layerdrop={config.layerdrop}), and its memory with them: "
            "load it with layerdrop=0.0"
        )
    return _BACKBONES[model_type]


def blocks_of(model: PreTrainedModel) -> Sequence[nn.Module]:
    """The transformer blocks, first to last."""
    return _part(model, "blocks")


def before_head_of(model: PreTrainedModel) -> nn.Module:
    """The module whose output enters the LM head: the final norm, in nearly every family."""
    backbone = backbone_of(model)
    projection = None if backbone.projection is None else _part(model, "projection")
    if projection is not None:
        return projection
    norm = _part(model, "final_norm")
    return blocks_of(model)[-1] if norm is None else norm


def embed_scale_of(model: PreTrainedModel) -> float | Tensor:
    """What the model multiplies its input embeddings by: `model.get_input_embeddings()(ids)` is scaled by it already."""
    return 1.0 if backbone_of(model).embed_scale is None else _part(model, "embed_scale")


def takes_static_cache(model: PreTrainedModel) -> bool:
    """Whether a static cache changes nothing. With ALiBi, Falcon makes its biases for the tokens and not for the cache."""
    return backbone_of(model).static_cache and not getattr(model.config, "alibi", False)


@torch.no_grad()
def check_backbone(model: PreTrainedModel) -> None:
    """Run a few tokens through a model and see whether memory can work where its row says its parts are.

    Raises:
        ValueError: the row does not describe this model: the blocks do not run once each, in order, each on what the one
            before returned; or the LM head does not read what comes before it unchanged.
    """
    row, blocks, last, head = backbone_of(model), blocks_of(model), before_head_of(model), model.get_output_embeddings()
    entered: list[tuple[int, Tensor]] = []
    left: list[Tensor] = []
    ends: dict[str, Tensor] = {}

    def enter(index: int):
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if not args and "hidden_states" not in kwargs:
                raise ValueError(f"{row.blocks} take no hidden_states: these are not the blocks of the model")
            entered.append((index, args[0] if args else kwargs["hidden_states"]))

        return hook

    hooks = []
    try:
        for index, block in enumerate(blocks):
            hooks.append(block.register_forward_pre_hook(enter(index), with_kwargs=True))
            hooks.append(
                block.register_forward_hook(lambda module, args, output: left.append(hidden_states_in(output)))
            )
        hooks.append(
            last.register_forward_hook(lambda module, args, output: ends.update(last=hidden_states_in(output)))
        )
        hooks.append(head.register_forward_pre_hook(lambda module, args: ends.update(head=args[0])))
        # Several tokens, since that of padding may be nothing but zeros in every layer
        model(torch.arange(min(8, len(head.weight)), device=head.weight.device)[None], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    if [index for index, _ in entered] != list(range(len(blocks))):
        raise ValueError(f"the modules in {row.blocks} do not run once each and in order: they are not the blocks")
    for index, (_, given) in enumerate(entered[1:]):
        if given.shape != left[index].shape or not torch.equal(given, left[index]):
            raise ValueError(f"block {index + 1} of {row.blocks} does not read what block {index} returned")
    if set(ends) != {"last", "head"}:
        raise ValueError(
            f"{row.final_norm} or the LM head does not run in a forward pass: give the path of the right norm"
        )
    if ends["last"].shape != ends["head"].shape or not torch.equal(ends["last"], ends["head"]):
        raise ValueError(
            f"the LM head does not read what {row.final_norm} returns: give the path of what comes right before the head, as "
            "final_norm, or as projection if a layer follows the norm"
        )


def hidden_states_in(output: Any) -> Tensor:
    """The hidden states in what a block or norm returned: the output, or the first of several."""
    return output[0] if isinstance(output, tuple) else output


def _part(model: PreTrainedModel, name: str) -> Any:
    backbone = backbone_of(model)
    path = getattr(backbone, name)
    try:
        return attrgetter(path)(model)
    except AttributeError as error:
        raise ValueError(
            f"{type(model).__name__} has no {path!r}, which the backbone of {model.config.model_type!r} names as its {name} "
            f"({error}): register the right path with gru_memory.register_backbone"
        ) from error
