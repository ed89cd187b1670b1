"""Keys, their owners, and sessions that nobody else sees."""

import pytest

pytest.importorskip("openai")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

import openai
from clients import (
    ADA,
    BOAT,
    HOME,
    WHERE,
    chat,
    client_of_ada,  # noqa: F401 (a fixture)
    model_and_tokenizer,  # noqa: F401 (a fixture)
    plain_http,  # noqa: F401 (a fixture)
    shared_server,  # noqa: F401 (a fixture)
)
from serving import KEYS, MODEL

from gru_memory.server.errors import ApiError
from gru_memory.server.http import Keys
from gru_memory.server.settings import ServerSettings, owner_of, read_keys


@pytest.fixture(scope="module", autouse=True)
def talk(server):
    """A session that is Ada's."""
    server.store.create("talk", ADA)


# Keys


def test_a_wrong_key_opens_nothing(server, http):
    for headers in ({"authorization": "Bearer wrong"}, {"authorization": ""}, {"authorization": f"Basic {KEYS[0]}"}):
        for path in ("/v1/models", "/v1/memory", "/v1/memory/talk"):
            answer = http.get(path, headers=headers)
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
    with server.client("wrong") as client, pytest.raises(openai.AuthenticationError):
        chat(client, BOAT)


@pytest.mark.parametrize("size", [10, 3_000_000, 9_000_000])
def test_a_wrong_key_is_said_whatever_the_size_of_the_body(http, size):
    answer = http.post("/v1/chat/completions", content=b"x" * size, headers={"authorization": "Bearer wrong"})
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")


def test_every_key_has_its_owner():
    keys = Keys(KEYS, owner_of)
    assert [keys.owner(f"Bearer {key}") for key in KEYS] == [owner_of(key) for key in KEYS]
    assert keys.owner(f"bearer  {KEYS[1]} ") == owner_of(KEYS[1])
    assert Keys((), owner_of).owner(None) == ""
    assert KEYS[0] not in owner_of(KEYS[0])


def test_a_key_takes_as_long_as_any_other_right_or_wrong(monkeypatch):
    """Every known key is compared, by digests of one length, wherever the right one stands and if there is none."""
    compared = []

    def compare(known, given):
        compared.append((len(known), len(given)))
        return known == given

    monkeypatch.setattr("gru_memory.server.http.hmac.compare_digest", compare)
    keys = Keys((*KEYS, "yet another key"), owner_of)
    for key, known in (
        (KEYS[0], True),
        ("yet another key", True),
        ("wrong", False),
        ("", False),
        ("k" * 10_000, False),
    ):
        compared.clear()
        if known:
            assert keys.owner(f"Bearer {key}") == owner_of(key)
        else:
            with pytest.raises(ApiError, match="valid API key"):
                keys.owner(f"Bearer {key}")
        assert compared == [(32, 32)] * (len(KEYS) + 1)


@pytest.mark.parametrize("keys", [("short",), ("has a space in it 123",), (KEYS[0], KEYS[0]), ("ü" * 20,)])
def test_keys_that_are_none(keys):
    with pytest.raises(ValueError, match="API key"):
        ServerSettings(api_keys=keys)


def test_keys_from_a_file(tmp_path):
    (tmp_path / "keys").write_text(f"# ours\n{KEYS[0]}  # Ada\n\n{KEYS[1]}\n")
    assert read_keys(tmp_path / "keys") == KEYS
    (tmp_path / "keys").write_text("  # ours\n0123456789abcdef#Zq8pL2\t# Ada\n")
    assert read_keys(tmp_path / "keys") == ("0123456789abcdef#Zq8pL2",)
    (tmp_path / "none").write_text("# nothing\n")
    with pytest.raises(ValueError, match="no API key"):
        read_keys(tmp_path / "none")


# Sessions


def test_nobody_sees_another_s_sessions(server, client, http):
    first = client.responses.create(model=MODEL, input=BOAT, conversation="private")
    with server.client(KEYS[1]) as bob:
        with pytest.raises(openai.NotFoundError) as replayed:
            bob.responses.create(model=MODEL, input=WHERE, previous_response_id=first.id)
        with pytest.raises(openai.NotFoundError) as made_up:
            bob.responses.create(model=MODEL, input=WHERE, previous_response_id="resp_0")
        assert replayed.value.body == made_up.value.body
        bob.responses.create(model=MODEL, input=HOME, conversation="private")  # one of his own
    headers = {"authorization": f"Bearer {KEYS[1]}"}
    texts = http.get("/v1/memory/private/transcript", headers=headers).json()["data"]
    assert [turn["user"] for turn in texts] == [HOME]
    there, nowhere = (http.get(f"/v1/memory/{name}", headers=headers) for name in ("talk", "nothing at all"))
    assert (there.status_code, there.json()) == (nowhere.status_code, nowhere.json())
    assert http.delete("/v1/memory/talk", headers=headers).status_code == 404
