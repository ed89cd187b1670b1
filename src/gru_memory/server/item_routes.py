"""OpenAI's routes for the items of a conversation: the messages of its turns, as the store's transcript has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request

from ..store import Session, SessionNotFound, TurnRecord
from .errors import ApiError
from .http import while_there
from .openai_format import item_list, turn_items
from .protocol import ItemsRequest, conversation_of
from .service import Service, in_thread


def item_router(service: Service, owner: Callable[..., str]) -> APIRouter:
    """The routes, for conversations of whoever `owner` says a request is from."""
    router = APIRouter(prefix="/v1/conversations/{conversation}/items", tags=["openai"])
    store, Owner = service.store, Depends(owner)

    def items(conversation: str, owner: str) -> list[dict[str, Any]]:
        """The messages that led to where the conversation is, oldest first."""
        turns = store.transcript(store.get(conversation, owner))
        return [item for turn in turns for item in turn_items(turn, turn.user, turn.reply)]

    def find(conversation: str, item: str, owner: str) -> dict[str, Any]:
        for known in items(conversation, owner):
            if known["id"] == item:
                return known
        raise SessionNotFound("this conversation has no such item")

    @router.get("")
    async def list_items(
        conversation: str,
        owner: str = Owner,
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
    ) -> dict[str, Any]:
        """The messages of a conversation, a page at a time. Where text is not kept, or not any more, there are none."""

        def page() -> dict[str, Any]:
            found = items(conversation, owner)
            if order == "desc":
                found.reverse()
            begin = 0
            if after is not None:
                places = [place for place, item in enumerate(found) if item["id"] == after]
                if not places:
                    raise SessionNotFound("this conversation has no such item")
                begin = places[0] + 1
            return item_list(found[begin : begin + limit], more=begin + limit < len(found))

        return await in_thread(page)

    @router.post("")
    async def create_items(
        request: Request, conversation: str, body: ItemsRequest, owner: str = Owner
    ) -> dict[str, Any]:
        """Take messages into memory, up to 20 at a time. Nothing is answered."""
        system, turns = conversation_of(body.items)
        with service.reserved(owner, conversation):
            session = await in_thread(store.get, conversation, owner)
            if session.head is None:
                talk = service.new_conversation(system)
            else:
                session, talk = await in_thread(service.head_of, conversation, owner)
                if system is not None:
                    talk.use_system(system)
            await while_there(request, service.read(talk, turns))

            def keep() -> list[TurnRecord]:
                state = talk.to_bytes(session.keep_text)
                kept: Session = store.commit(session, turns, state, session.head).session
                return store.transcript(kept)[-len(turns) :]

            records = await in_thread(keep)
        made = zip(records, turns, strict=True)
        return item_list([item for record, turn in made for item in turn_items(record, *turn)], more=False)

    @router.get("/{item}")
    async def show_item(conversation: str, item: str, owner: str = Owner) -> dict[str, Any]:
        """One message."""
        return await in_thread(find, conversation, item, owner)

    @router.delete("/{item}")
    async def delete_item(conversation: str, item: str, owner: str = Owner) -> dict[str, Any]:
        """Always refused: memory has taken the message in, and what a single one has left there cannot be told apart."""
        await in_thread(find, conversation, item, owner)
        raise ApiError(
            409,
            "memory has taken this message in, and cannot give back a single one exactly. POST "
            "/v1/memory/{session}/forget with its text takes out what it wrote, as far as that goes; DELETE "
            "/v1/responses/{id} removes the text of its turn; POST /v1/memory/{session}/fork with an earlier response as "
            "`at` goes on as if it had not been said",
            "taken_in",
        )

    return router
