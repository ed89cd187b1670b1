"""A server without keys answers under its own names, and no page from elsewhere."""

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

import httpx2 as httpx
from clients import model_and_tokenizer  # noqa: F401 (a fixture)
from serving import MODEL, running

from gru_memory.server import ServerSettings

EVIL = "http://evil.example"


@pytest.fixture
def asking(loaded, tmp_path):
    """Requests to a server without keys, made with these settings."""

    def ask(headers, method="GET", path="/v1/memory", **settings):
        with running(tmp_path / "s", loaded, api_keys=settings.pop("api_keys", ()), **settings) as server:
            headers = {name: value.replace("PORT", server.url.rpartition(":")[2]) for name, value in headers.items()}
            return httpx.request(method, server.url + path, headers=headers)

    return ask


@pytest.mark.parametrize("host", ["127.0.0.1:PORT", "localhost:PORT", "LOCALHOST", "127.9.9.9", "[::1]:PORT"])
def test_the_names_of_the_machine_itself_are_let_in(asking, host):
    assert asking({"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:PORT", "127.0.0.1.evil.example", "localhost.evil.example", "[", ""]
)
def test_other_names_are_not(asking, host):
    answer = asking({"host": host})
    assert answer.status_code in (400, 403)
    if answer.status_code == 403:
        assert "--allow-host" in answer.json()["error"]["message"]


def test_a_name_is_let_in_that_was_allowed(asking):
    allowed = {"hosts": ("Chat.example",)}
    assert asking({"host": "chat.example:8000"}, **allowed).status_code == 200
    assert asking({"host": "evil.example"}, **allowed).status_code == 403
    assert asking({"host": "evil.example"}, hosts=("*",)).status_code == 200


def test_pages_from_elsewhere_are_refused(asking):
    """A form needs no leave of the server's to be sent."""
    planting = {"method": "POST", "path": "/v1/memory/import?name=planted"}
    for origin in (EVIL, "null", "http://127.0.0.1:1", "http://evil.example:PORT"):
        answer = asking({"origin": origin, "content-type": "text/plain"}, **planting)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "origin_not_allowed")
    assert asking({"origin": "http://127.0.0.1:PORT"}).status_code == 200
    assert asking({"origin": EVIL}, cors_origins=(EVIL,)).status_code == 200


def test_with_keys_names_do_not_matter(asking):
    keys = {"api_keys": ("ada-0123456789abcdef",)}
    own = {"host": "evil.example", "origin": EVIL, "authorization": "Bearer ada-0123456789abcdef"}
    assert asking(own, **keys).status_code == 200
    assert asking({"host": "evil.example"}, **keys).status_code == 401


@pytest.mark.parametrize(
    "settings",
    [{"context_turns": 0}, {"default_new_tokens": -5}, {"grace_seconds": float("inf")}, {"body_seconds": float("nan")}],
)
def test_settings_with_which_nothing_would_work_are_refused(settings):
    (name,) = settings
    with pytest.raises(ValueError, match=name):
        ServerSettings(model_name=MODEL, **settings)
