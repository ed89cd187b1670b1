"""A session as one file: safetensors, with every state as bytes and everything else as JSON, a tensor of bytes, too."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from ..state import MemoryState
from .digests import DIGEST_BYTES, turn_digest, user_digest
from .errors import LimitExceeded
from .records import Limits, Session, is_edit
from .settings import check_metadata, check_strings

FORMAT_VERSION = 2  # 1: the JSON was in the header, of which safetensors reads no more than 100 MB
_KIND = "gru-memory session"
_ABOUT = "session"  # of the header in version 1, a tensor since
MAX_FILE_BYTES = 1 << 30  # read no further


def pack(session: Session, rows: Sequence[Any]) -> bytes:
    """The bytes of a file that holds the session and its rows.

    Raises:
        LimitExceeded: it would be larger than `unpack` reads.
    """
    place = {row["id"]: number for number, row in enumerate(rows)}
    about = {
        "name": session.name,
        "keep_text": session.keep_text,
        "settings": session.settings,
        "fingerprint": session.fingerprint,
        "salt": session.salt.hex(),
        "head": place.get(session.head),
        "rows": [
            {
                "parent": place.get(row["parent"]),
                "created_at": row["created_at"],
                "turn_digest": row["turn_digest"].hex(),
                "user_digest": row["user_digest"].hex(),
                "user": row["user_text"],
                "reply": row["reply_text"],
                "turns": row["turns"],
                "tokens": row["tokens"],
                "edited": is_edit(row["id"]),
            }
            for row in rows
        ],
    }
    contents = {_ABOUT: json.dumps(about).encode()}
    contents |= {f"state/{number}": row["state"] for number, row in enumerate(rows) if row["state"] is not None}
    if (size := sum(map(len, contents.values()))) > MAX_FILE_BYTES:
        raise LimitExceeded(
            f"the session has {size} bytes, and a file at most {MAX_FILE_BYTES}: fork it from an early turn"
        )
    tensors = {name: torch.frombuffer(bytearray(content), dtype=torch.uint8) for name, content in contents.items()}
    return save(tensors, {"kind": _KIND, "version": str(FORMAT_VERSION)})


def pack_turns(name: str, turns: Sequence[tuple[str | None, str | None]], state: bytes, keep_text: bool) -> bytes:
    """The bytes of a file that holds a session of these turns, and its memory after them.

    Args:
        turns: user message and reply; None is a text that is not known.
        state: `Conversation.to_bytes`.
        keep_text: False writes the digests of messages alone.
    """
    now, salt, held = time.time(), secrets.token_bytes(16), MemoryState.from_bytes(state)
    rows = [
        {
            "id": number,
            "parent": number - 1,  # of the first there is none
            "created_at": now,
            "turn_digest": turn_digest(salt, user or "", reply),
            "user_digest": user_digest(salt, user or ""),
            "user_text": user if keep_text else None,
            "reply_text": reply if keep_text else None,
            "turns": int(held.turns),
            "tokens": int(held.tokens),
            "state": state if number == len(turns) - 1 else None,
        }
        for number, (user, reply) in enumerate(turns)
    ]
    counts = (int(held.turns), int(held.tokens), len(state))
    session = Session(
        "", "", name, 0, len(turns) - 1, keep_text, {}, *counts, held.fingerprint, now, now, None, salt
    )  # fmt: skip
    return pack(session, rows)


def unpack(
    data: bytes, check_state: Callable[[bytes], dict[str, Any]], limits: Limits
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What `pack` wrote: what is to be known of the session, and its rows; `id`, `parent` and `head` are places.

    Raises:
        ValueError: not such a file, damaged, or from a newer version of the library.
        LimitExceeded: something in it is larger than `limits` allow.
    """
    if len(data) > MAX_FILE_BYTES:
        raise LimitExceeded(f"the file has {len(data)} bytes: no session is that large")
    tensors, header = _open(data)
    if header.get("kind") != _KIND:
        raise ValueError("this file is no session: write one with `gru-memory sessions export`")
    if not (version := header.get("version", "")).isdecimal() or int(version) > FORMAT_VERSION:
        raise ValueError("this session was exported by a newer version of gru-memory: upgrade to read it")
    try:
        about = json.loads(header[_ABOUT] if int(version) == 1 else _bytes(tensors.pop(_ABOUT)).decode())
        rows = [_row(number, row, limits) for number, row in enumerate(about["rows"])]
        about = _about(about, len(rows))
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, OverflowError) as error:
        raise ValueError(_damaged(f"{type(error).__name__}: {error}")) from error
    for name, tensor in tensors.items():
        number = name.removeprefix("state/")
        if number == "none":  # in version 1, which wrote no file without a tensor
            continue
        if not number.isdecimal() or int(number) >= len(rows) or not _is_bytes(tensor):
            raise ValueError(_damaged(f"{name} is not a state of it"))
        if tensor.numel() > limits.max_state_bytes:
            raise LimitExceeded(f"a state has {tensor.numel()} bytes: at most {limits.max_state_bytes} are kept")
        state = _bytes(tensor)
        held = check_state(state)
        if held["fingerprint"] != about["fingerprint"]:
            raise ValueError(_damaged("its states are not of one memory"))
        rows[int(number)] |= {"state": state, "turns": held["turns"], "tokens": held["tokens"]}
    if not _is_within(rows, about["head"], limits):
        raise LimitExceeded(f"the session has {len(rows)} turns: at most {limits.max_turns} are kept")
    if rows and (about["head"] is None or rows[about["head"]]["state"] is None):
        raise ValueError(_damaged("the state to go on from is missing"))
    return about, rows


def _is_within(rows: Sequence[dict[str, Any]], head: int | None, limits: Limits) -> bool:
    """Whether there are no more turns than `retention.let_go` leaves: the head and ends of branches stay, however old."""
    parents = {row["parent"] for row in rows}
    continued = {row["parent"] for row in rows if row["state"] is not None or row["id"] in parents}
    old = rows[: max(0, len(rows) - int(limits.max_turns))]
    return all(row["id"] == head or (row["state"] is not None and row["id"] not in continued) for row in old)


def _open(data: bytes) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    try:
        tensors = load(data)  # checks every length and offset first
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(_damaged(error)) from error
    return tensors, header


def _is_bytes(tensor: torch.Tensor) -> bool:
    return tensor.dtype == torch.uint8 and tensor.dim() == 1


def _bytes(tensor: torch.Tensor) -> bytes:
    if not _is_bytes(tensor):
        raise TypeError("a tensor is not bytes")
    return bytes(tensor.numpy())


def _row(number: int, row: dict[str, Any], limits: Limits) -> dict[str, Any]:
    texts = (row["user"], row["reply"])
    if not all(text is None or isinstance(text, str) for text in texts):
        raise TypeError("a message is not text")
    check_strings(texts, "a message")
    if any(len((text or "").encode()) > limits.max_text_bytes for text in texts):
        raise LimitExceeded(f"a message is too large: at most {limits.max_text_bytes} bytes are kept")
    parent = row["parent"]
    if parent is not None and not (isinstance(parent, int) and 0 <= parent < number):
        raise TypeError("a turn follows one that is not before it")
    return {
        "id": number,
        "parent": parent,
        "created_at": _time(row["created_at"]),
        "turn_digest": _hex(row["turn_digest"], DIGEST_BYTES),
        "user_digest": _hex(row["user_digest"], DIGEST_BYTES),
        "user_text": row["user"],
        "reply_text": row["reply"],
        "turns": _count(row["turns"]),
        "tokens": _count(row["tokens"]),
        "edited": row.get("edited") is True,  # not there in version 1
        "state": None,
    }


def _about(about: dict[str, Any], rows: int) -> dict[str, Any]:
    head, fingerprint = about["head"], about["fingerprint"]
    if head is not None and not (isinstance(head, int) and 0 <= head < rows):
        raise TypeError("the turn to go on from is not in it")
    if not isinstance(about["settings"], dict) or not isinstance(about["keep_text"], bool):
        raise TypeError("settings of the wrong types")
    check_strings(about["settings"], "the settings")
    if (metadata := about["settings"].get("metadata")) is not None:
        check_metadata(metadata)
    if fingerprint is not None and (not isinstance(fingerprint, str) or len(fingerprint) > 64):
        raise TypeError("the fingerprint is not one")
    check_strings(fingerprint, "the fingerprint")
    if not isinstance(about["name"], str):
        raise TypeError("the name is not text")
    return {
        "name": about["name"],
        "keep_text": about["keep_text"],
        "settings": about["settings"],
        "fingerprint": fingerprint,
        "salt": _hex(about["salt"], 16),
        "head": head,
    }


def _hex(text: str, length: int) -> bytes:
    value = bytes.fromhex(text)
    if len(value) != length:
        raise TypeError(f"{length} bytes were expected")
    return value


def _time(value: Any) -> float:
    if not 0 <= (seconds := float(value)) < 1 << 40:  # neither NaN nor infinite
        raise TypeError("a time is out of range")
    return seconds


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 31:
        raise TypeError("a count is out of range")
    return value


def _damaged(reason: object) -> str:
    return f"this file is no session or is damaged ({reason}): export it again"
