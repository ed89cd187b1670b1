"""The page at `/`: three static files, which use the same interface as every other client."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse, Response
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

FOLDER = Path(__file__).parent / "page"
# Nothing from elsewhere, no script in the page itself: text that a model wrote could not run if it got there.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
_HEADERS = {"content-security-policy": _POLICY, "x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}


class _Parts(StaticFiles):
    """What the page loads. The page itself is at `/` alone, where its links lead to them."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        if path == "index.html":
            raise HTTPException(404)
        answer = await super().get_response(path, scope)
        answer.headers.update(_HEADERS)
        return answer


def add_page(app: FastAPI) -> None:
    """Serve the page."""

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(FOLDER / "index.html", headers=_HEADERS)

    app.mount("/page", _Parts(directory=FOLDER), name="page")
