"""A persistent memory for any causal language model: it learns, recalls and fades."""

from .backbones import Backbone, check_backbone, register_backbone, supported_model_types
from .config import MemoryConfig
from .conversation import Conversation
from .memory import GRUMemoryWithDecay
from .models import AutoModelWithGRUMemory, GPT2WithGRUMemory, add_memory
from .own_sites import register_site
from .state import MemoryState

__version__ = "0.1.0"

__all__ = [
    "AutoModelWithGRUMemory",
    "Backbone",
    "Conversation",
    "GPT2WithGRUMemory",
    "GRUMemoryWithDecay",
    "MemoryConfig",
    "MemoryState",
    "add_memory",
    "check_backbone",
    "register_backbone",
    "register_site",
    "supported_model_types",
]
