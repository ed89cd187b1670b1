"""OpenAI's routes for what is kept: responses by their ids, conversations by theirs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Depends, Request

from ..store import Session, SessionNotFound, TurnRecord
from .http import while_there
from .openai_format import kept_response
from .protocol import ConversationRequest, MetadataRequest, conversation_of
from .service import Service, in_thread, response_id


def kept_router(service: Service, owner: Callable[..., str]) -> APIRouter:
    """The routes, for what belongs to whoever `owner` says a request is from."""
    router = APIRouter(prefix="/v1", tags=["openai"])
    store, Owner = service.store, Depends(owner)

    def find(identity: str, owner: str) -> TurnRecord:
        turn = store.find_turn(identity, owner)
        if turn.about is None:  # a snapshot, but none that /v1/responses made
            raise SessionNotFound("this is no response")
        return turn

    @router.get("/responses/{response}")
    async def show_response(response: str, owner: str = Owner) -> dict[str, Any]:
        """A response that was kept; without its text where none is kept."""
        turn = await in_thread(find, response, owner)
        return kept_response(turn.id, turn.about, turn.reply)

    @router.delete("/responses/{response}")
    async def delete_response(response: str, owner: str = Owner) -> dict[str, Any]:
        """Let go of a response: its id, its text, and the state to go on from. A conversation it was part of goes on."""

        def remove() -> None:
            find(response, owner)
            store.forget_turn(response, owner)

        await in_thread(remove)
        return {"id": response, "object": "response", "deleted": True}

    @router.post("/conversations")
    async def new_conversation(request: Request, body: ConversationRequest, owner: str = Owner) -> dict[str, Any]:
        """A conversation under a name that is made up; `items` are taken into its memory."""
        name, settings = response_id("conv"), {"metadata": body.metadata}
        system, turns = conversation_of(body.items)
        conversation = service.new_conversation(system)
        await while_there(request, service.read(conversation, turns))

        def keep() -> Session:
            if not turns:
                return store.create(name, owner, service.keep_text, settings)
            session = store.get_or_begin(name, owner, service.keep_text, settings)
            return store.commit(session, turns, conversation.to_bytes(session.keep_text), None).session

        return _conversation(await in_thread(keep))

    @router.get("/conversations/{conversation}")
    async def show_conversation(conversation: str, owner: str = Owner) -> dict[str, Any]:
        """A conversation, whether it was made here or on first use."""
        return _conversation(await in_thread(store.get, conversation, owner))

    @router.post("/conversations/{conversation}")
    async def update_conversation(conversation: str, body: MetadataRequest, owner: str = Owner) -> dict[str, Any]:
        """Other metadata in the place of what there was."""

        def change() -> Session:
            session = store.get(conversation, owner)
            return store.use_settings(session, {**session.settings, "metadata": body.metadata})

        return _conversation(await in_thread(change))

    @router.delete("/conversations/{conversation}")
    async def delete_conversation(conversation: str, owner: str = Owner) -> dict[str, Any]:
        """Remove a conversation with all that is kept of it, its responses included."""
        await in_thread(store.delete, conversation, owner)
        return {"id": conversation, "object": "conversation.deleted", "deleted": True}

    return router


def _conversation(session: Session) -> dict[str, Any]:
    return {
        "id": session.name,
        "object": "conversation",
        "created_at": int(session.created_at),
        "metadata": session.settings.get("metadata") or {},
    }
