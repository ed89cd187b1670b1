"""Where the parts of a causal LM are: one row a model family."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter

from torch import nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Backbone:
    """Attribute paths of the parts of one family of models, from the causal LM down."""

    blocks: str
    final_norm: str


_BACKBONES: dict[str, Backbone] = {
    "gpt2": Backbone(blocks="transformer.h", final_norm="transformer.ln_f"),
    "llama": Backbone(blocks="model.layers", final_norm="model.norm"),
}


def register_backbone(model_type: str, backbone: Backbone) -> None:
    """Teach the library a further family: `config.model_type` and where its blocks and final norm are."""
    _BACKBONES[model_type] = backbone


def supported_model_types() -> list[str]:
    return sorted(_BACKBONES)


def backbone_of(model: PreTrainedModel) -> Backbone:
    """The row for this model. Raises ValueError for a family that is not in the table."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model.config.is_encoder_decoder:
        raise ValueError(f"{model_type} is an encoder-decoder model: memory needs a causal language model")
    if model_type not in _BACKBONES:
        raise ValueError(
            f"no backbone is known for model_type {model_type!r} (known: {', '.join(supported_model_types())}). Register it: "
            f"gru_memory.register_backbone({model_type!r}, gru_memory.Backbone(blocks='path.to.layers', final_norm='path.to.norm'))"
        )
    if model.get_output_embeddings() is None:
        raise ValueError(
            f"{type(model).__name__} has no language-model head: load it as a causal LM (AutoModelForCausalLM)"
        )
    return _BACKBONES[model_type]


def blocks_of(model: PreTrainedModel) -> Sequence[nn.Module]:
    """The transformer blocks, first to last."""
    return attrgetter(backbone_of(model).blocks)(model)


def final_norm_of(model: PreTrainedModel) -> nn.Module:
    """The norm whose output enters the LM head."""
    return attrgetter(backbone_of(model).final_norm)(model)
