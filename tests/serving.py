"""A server on a real socket of the loopback, with a tiny model, and clients for it."""

import contextlib
import socket
import threading
import time

from talking import talking_model, talking_tokenizer

from gru_memory.server import ServerSettings, create_app
from gru_memory.server.stopping import GracefulServer
from gru_memory.store import SessionStore

MODEL = "tiny"
KEYS = ("ada-0123456789abcdef", "bob-0123456789abcdef")


class Running:
    """A server, its store, and how to reach it."""

    def __init__(self, app, store, url, server, thread):
        self.app, self.store, self.url, self.server, self.thread = app, store, url, server, thread
        self.engine = app.state.engine

    def client(self, key=KEYS[0], **settings):
        """OpenAI's own client."""
        import openai

        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60, **settings)


@contextlib.contextmanager
def running(store_url, loaded=None, limits=None, **settings):
    """Serve until the block ends."""
    loaded = loaded or (talking_model("llama"), talking_tokenizer("llama"))
    given = {"model_name": MODEL, "api_keys": KEYS, "default_new_tokens": 8, "grace_seconds": 5.0, **settings}
    configured = ServerSettings(**given) if limits is None else ServerSettings(limits=limits, **given)
    with SessionStore(str(store_url), configured.limits) as store, socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        app = create_app(*loaded, store, configured)
        server = GracefulServer(app, configured.grace_seconds, lifespan="on")
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        try:
            yield Running(app, store, f"http://127.0.0.1:{listening.getsockname()[1]}", server, thread)
        finally:
            server.should_exit = True
            thread.join(timeout=30)
