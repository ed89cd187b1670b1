"""Everything that can be set about a server."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path

from ..store import Limits
from .engine import EngineLimits, positive

MIN_KEY = 16  # characters


@dataclass(frozen=True)
class ServerSettings:
    """See the help of each field."""

    model_name: str = field(default="gru-memory", metadata={"help": "name of the model for clients"})
    api_keys: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": 'names under which a server without keys answers, besides those of the loopback; "*" for any'
        },
    )
    context_turns: int = field(default=1, metadata={"help": "turns that attention sees, the current one included"})
    default_new_tokens: int = field(
        default=256, metadata={"help": "longest reply, in tokens, where a request does not say"}
    )
    most_new_tokens: int = field(default=2048, metadata={"help": "longest reply, in tokens, that may be asked for"})
    keep_text: bool = field(
        default=True, metadata={"help": "keep the messages of new sessions, not their memory alone"}
    )
    max_body_bytes: int = field(default=2 << 20, metadata={"help": "largest request, in bytes"})
    max_import_bytes: int = field(default=64 << 20, metadata={"help": "largest session file, in bytes"})
    body_seconds: float = field(
        default=30.0, metadata={"help": "longest wait for a request, and a second more for every 64 KB"}
    )
    grace_seconds: float = field(default=30.0, metadata={"help": "time that replies have to end when the server stops"})
    purge_seconds: float = field(default=300.0, metadata={"help": "how often expired sessions are removed"})
    engine: EngineLimits = field(default_factory=EngineLimits)
    limits: Limits = field(default_factory=lambda: Limits(max_sessions=100_000, ttl_seconds=30 * 86_400))

    def __post_init__(self) -> None:
        positive(
            self, "context_turns", "default_new_tokens", "most_new_tokens", "max_body_bytes", "max_import_bytes", "body_seconds",
            "purge_seconds",
        )  # fmt: skip
        if self.default_new_tokens > self.most_new_tokens:
            raise ValueError(
                f"the longest reply where a request does not say is {self.default_new_tokens} tokens: give at most "
                f"{self.most_new_tokens}, the longest that may be asked for"
            )
        if not 0 <= self.grace_seconds < 86_400:
            raise ValueError(f"grace_seconds is {self.grace_seconds}: it must be 0 to a day")
        for key in self.api_keys:
            if len(key) < MIN_KEY or not key.isascii() or not key.isprintable() or " " in key:
                raise ValueError(f"an API key has at least {MIN_KEY} printable ASCII characters without spaces")
        if len(set(self.api_keys)) < len(self.api_keys):
            raise ValueError("an API key is given twice")


def read_keys(path: str | Path) -> tuple[str, ...]:
    """API keys from a file, one a line; # begins a comment, at the start of a line or after white space."""
    lines = [re.split(r"(?:^|\s)#", line, maxsplit=1)[0].strip() for line in Path(path).read_text().splitlines()]
    keys = tuple(line for line in lines if line)
    if not keys:
        raise ValueError(f"{path} holds no API key: write one a line")
    return keys


def owner_of(key: str) -> str:
    """Whose sessions a key opens. The key cannot be found from it."""
    return hashlib.sha256(f"gru-memory owner {key}".encode()).hexdigest()[:32]
