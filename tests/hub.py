"""A stand-in for the model hub on this machine: what huggingface_hub asks of it to make repositories, push and fetch."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


class Hub:
    """Repositories by name, their branches by name, files by path. `requests` remembers (method, path, token)."""

    def __init__(self) -> None:
        self.url = ""
        self.clear()

    def clear(self) -> None:
        """A hub that nobody has used yet."""
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        self.private: dict[str, bool] = {}
        self.commits: list[dict] = []
        self.requests: list[tuple[str, str, str | None]] = []

    def post(self, path: str, body: bytes) -> dict | None:
        """The answer to a POST, None for what is not known here."""
        parts = path.strip("/").split("/")
        if parts == ["api", "repos", "create"]:
            values = json.loads(body)
            name = f"{values['organization']}/{values['name']}" if values.get("organization") else values["name"]
            self.repositories.setdefault(name, {"main": {}})
            self.private.setdefault(name, values.get("private") or values.get("visibility") == "private")
            return {"url": f"{self.url}/{name}", "id": name, "name": name}
        if parts == ["api", "validate-yaml"]:
            return {"errors": [], "warnings": []}
        if parts[:2] != ["api", "models"] or len(parts) != 6:
            return None
        branches, action, revision = self.repositories["/".join(parts[2:4])], parts[4], unquote(parts[5])
        if action == "branch":
            branches.setdefault(revision, dict(branches["main"]))
            return {}
        if action == "preupload":
            paths = [file["path"] for file in json.loads(body)["files"]]
            return {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]}
        if action == "commit":
            lines = [json.loads(line) for line in body.decode().splitlines() if line]
            for line in lines:
                if line["key"] == "file":
                    branches[revision][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.commits.append(next(line["value"] for line in lines if line["key"] == "header"))
            number = f"{len(self.commits):040x}"
            name = "/".join(parts[2:4])
            return {"commitUrl": f"{self.url}/{name}/commit/{number}", "commitOid": number, "success": True}
        return None

    def file(self, path: str) -> tuple[str, bytes | None]:
        """(commit, content) of /user/repo/resolve/revision/path, or (error code, None)."""
        parts = [unquote(part) for part in path.strip("/").split("/")]
        name, revision, inside = "/".join(parts[:2]), parts[3] if len(parts) > 3 else "", "/".join(parts[4:])
        if len(parts) < 5 or parts[2] != "resolve" or name not in self.repositories:
            return "RepoNotFound", None
        if revision not in self.repositories[name]:
            return "RevisionNotFound", None
        files = self.repositories[name][revision]
        if inside not in files:
            return "EntryNotFound", None
        return hashlib.sha1(b"".join(key.encode() + files[key] for key in sorted(files))).hexdigest(), files[inside]


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args) -> None:
            """Quiet."""

        def _begin(self) -> str:
            path = urlsplit(self.path).path
            hub.requests.append((self.command, path, self.headers.get("Authorization")))
            return path

        def _answer(self, code: int, content: bytes, headers: dict[str, str]) -> None:
            self.send_response(code)
            for key, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def do_POST(self) -> None:
            path = self._begin()
            answer = hub.post(path, self.rfile.read(int(self.headers.get("Content-Length") or 0)))
            self._answer(
                404 if answer is None else 200, json.dumps(answer).encode(), {"Content-Type": "application/json"}
            )

        def do_GET(self) -> None:
            commit, content = hub.file(self._begin())
            if content is None:
                self._answer(404, b"", {"X-Error-Code": commit, "X-Error-Message": commit})
            else:
                etag = hashlib.sha1(content).hexdigest()
                self._answer(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": commit})

        do_HEAD = do_GET

    return Handler


@contextmanager
def serve() -> Iterator[Hub]:
    """A hub that answers until the block ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
