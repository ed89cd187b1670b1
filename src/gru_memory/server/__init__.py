"""An OpenAI-compatible server whose conversations have a memory."""

from .app import create_app
from .settings import ServerSettings

__all__ = ["ServerSettings", "create_app"]
