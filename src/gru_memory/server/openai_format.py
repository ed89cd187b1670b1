"""Answers in the shapes of OpenAI's interface."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from ..store import TurnRecord
from .engine import Delta, Done, Event
from .protocol import ChatRequest, ResponseRequest

JsonObject = dict[str, Any]


def chat_usage(done: Done) -> JsonObject:
    return {
        "prompt_tokens": done.prompt_tokens,
        "completion_tokens": done.completion_tokens,
        "total_tokens": done.prompt_tokens + done.completion_tokens,
    }


def chat_completion(request: ChatRequest, chat_id: str, created: int, done: Done) -> JsonObject:
    """The answer of /v1/chat/completions, in one piece."""
    message = {"role": "assistant", "content": done.reply, "refusal": None}
    choice = {"index": 0, "message": message, "finish_reason": done.finish_reason, "logprobs": None}
    return {
        "id": chat_id,
        "object": "chat.completion",
        "created": created,
        "model": request.model,
        "choices": [choice],
        "usage": chat_usage(done),
    }


async def chat_chunks(
    request: ChatRequest, chat_id: str, created: int, events: AsyncIterator[Event]
) -> AsyncIterator[bytes]:
    """The same as server-sent events."""
    with_usage = request.stream_options is not None and request.stream_options.include_usage
    base = {"id": chat_id, "object": "chat.completion.chunk", "created": created, "model": request.model}

    def chunk(delta: JsonObject, finish: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
        return sse({**base, "choices": [choice], **({"usage": None} if with_usage else {})})

    yield chunk({"role": "assistant", "content": ""})
    async for event in events:
        if isinstance(event, Delta):
            yield chunk({"content": event.text})
        elif isinstance(event, Done):
            yield chunk({}, event.finish_reason)
            if with_usage:
                yield sse({**base, "choices": [], "usage": chat_usage(event)})
    yield b"data: [DONE]\n\n"


def response_object(
    request: ResponseRequest, response_id: str, created: int, done: Done | None, status: str | None = None
) -> JsonObject:
    """The answer of /v1/responses: complete, or as far as it is known before it is."""
    cut = done is not None and done.finish_reason == "length"
    status = status or ("in_progress" if done is None else "incomplete" if cut else "completed")
    usage = done and {
        "input_tokens": done.prompt_tokens,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": done.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": done.prompt_tokens + done.completion_tokens,
    }
    conversation = request.conversation_name
    return {
        "id": response_id,
        "object": "response",
        "created_at": created,
        "status": status,
        "background": False,
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "model": request.model,
        "output": [] if done is None else [message_item(response_id, done.reply, "incomplete" if cut else "completed")],
        "parallel_tool_calls": request.parallel_tool_calls,
        "previous_response_id": request.previous_response_id,
        "conversation": {"id": conversation} if conversation else None,
        "store": request.store,
        "temperature": request.heat,
        "top_p": request.top_p,
        "text": {"format": {"type": "text"}},
        "tool_choice": request.tool_choice,
        "tools": [],
        "truncation": request.truncation,
        "usage": usage,
        "user": request.user,
        "metadata": request.metadata or {},
    }


def response_about(request: ResponseRequest, response_id: str, created: int, done: Done) -> JsonObject:
    """What has to be kept of a response, beside its text, for it to be shown again."""
    return {k: v for k, v in response_object(request, response_id, created, done).items() if k not in ("id", "output")}


def kept_response(response_id: str, about: JsonObject, text: str | None) -> JsonObject:
    """A response as it was, without its text where none is kept."""
    output = [] if text is None else [message_item(response_id, text, about["status"])]
    return {"id": response_id, **about, "output": output}


def message_item(response_id: str, text: str | None, status: str) -> JsonObject:
    """The one output item of a response; None for text that has not begun."""
    return {
        "id": f"msg_{response_id.partition('_')[2]}",
        "type": "message",
        "role": "assistant",
        "status": status,
        "content": [] if text is None else [text_part(text)],
    }


def turn_items(turn: TurnRecord, user: str | None, reply: str | None) -> list[JsonObject]:
    """The messages of a turn as items of its conversation; the reply has the id that it has in its response."""
    if user is None:
        return []
    said = {
        "id": f"msg_user_{turn.id.partition('_')[2]}",
        "type": "message",
        "role": "user",
        "status": "completed",
        "content": [{"type": "input_text", "text": user}],
    }
    status = turn.about["status"] if turn.about else "completed"
    return [said] if reply is None else [said, message_item(turn.id, reply, status)]


def item_list(items: list[JsonObject], more: bool) -> JsonObject:
    """A page of items; `more` says whether others follow it."""
    ends = {"first_id": items[0]["id"], "last_id": items[-1]["id"]} if items else {"first_id": None, "last_id": None}
    return {"object": "list", "data": items, **ends, "has_more": more}


def text_part(text: str) -> JsonObject:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


async def response_events(
    request: ResponseRequest, response_id: str, created: int, events: AsyncIterator[Event]
) -> AsyncIterator[bytes]:
    """The same as server-sent events, in the order OpenAI sends them."""
    number = 0
    item = message_item(response_id, None, "in_progress")
    place = {"item_id": item["id"], "output_index": 0, "content_index": 0}

    def event(kind: str, **values: Any) -> bytes:
        nonlocal number
        number += 1
        return sse({"type": kind, "sequence_number": number - 1, **values}, kind)

    begun = response_object(request, response_id, created, None)
    yield event("response.created", response=begun)
    yield event("response.in_progress", response=begun)
    yield event("response.output_item.added", output_index=0, item=item)
    yield event("response.content_part.added", **place, part=text_part(""))
    async for happened in events:
        if isinstance(happened, Delta):
            yield event("response.output_text.delta", **place, delta=happened.text, logprobs=[])
        elif isinstance(happened, Done):
            whole = response_object(request, response_id, created, happened)
            yield event("response.output_text.done", **place, text=happened.reply, logprobs=[])
            yield event("response.content_part.done", **place, part=text_part(happened.reply))
            yield event("response.output_item.done", output_index=0, item=whole["output"][0])
            yield event(f"response.{whole['status']}", response=whole)


def sse(value: JsonObject, name: str | None = None) -> bytes:
    """One server-sent event."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(value, ensure_ascii=False)}\n\n".encode()
