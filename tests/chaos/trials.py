"""Every trial, with its sizes."""

from __future__ import annotations

from . import fuzz, isolation, kill, load, outages, soak, states, tenants
from .result import Trial

TRIALS = {
    "kill": Trial(
        "kill -9 at random moments while 20 conversations are written: every acknowledged turn is there, "
        "no session is unreadable",
        kill.run,
        full={"kills": 100},
        short={"kills": 2, "conversations": 6, "replayed": 1},
    ),
    "isolation": Trial(
        "1,000 conversations, 16 at a time, each told its own fact, then asked: no answer or slot from another one",
        isolation.run,
        full={"conversations": 1000},
        short={"conversations": 32},
    ),
    "facts": Trial(
        "the same with SmolLM2: nobody is answered with a name that another conversation was told",
        isolation.facts,
        full={"conversations": 1000},
        short={"conversations": 4, "at_once": 4},
    ),
    "disk": Trial(
        "the disk fills up under a server that writes 8 conversations: clear errors, nothing lost, recovers by itself",
        outages.disk,
        full={"times": 20},
        short={"times": 1},
    ),
    "lock": Trial(
        "another writer locks the SQLite file for longer than the server waits: clear errors, nothing lost, recovers "
        "by itself",
        outages.locked,
        full={"times": 5},
        short={"times": 1, "wait_seconds": 0.5},
    ),
    "postgres": Trial(
        "PostgreSQL is restarted under a server, every other time as if it had crashed, and servers are killed: clear "
        "errors, nothing lost, recovers by itself",
        outages.postgres,
        full={"times": 20, "kills": 20, "turns_a_kill": 30},
        short={"times": 2, "kills": 1, "turns_a_kill": 5, "down_seconds": 0.0},
    ),
    "states": Trial(
        "1,000 corrupted or truncated states and as many session files, and foreign, NaN and oversized ones: refused, one "
        "line why, the process lives",
        states.run,
        full={"mutations": 1000},
        short={"mutations": 1000},
    ),
    "fuzz": Trial(
        "schemathesis on the OpenAPI schema; hypothesis on paths, headers, ids (`../`, NUL, 10 MB), bodies, JSON bombs and "
        "files: no 5xx, nothing of another key, no path touched",
        fuzz.run,
        full={"examples": 1000, "schemathesis_examples": 100},
        short={"examples": 20, "schemathesis_examples": 1},
    ),
    "tenants": Trial(
        "a wrong key, another tenant's session, a replayed response id: 401 or 404, nothing revealed by text or by time",
        tenants.run,
        full={"pairs": 4000},
        short={"pairs": 60},
    ),
    "load": Trial(
        "p50 and p99 of the time to the first token, and tokens/s, at 1, 8 and 32 chats, against the same model in "
        "`transformers serve`, without memory: no slower at 1, faster at 32",
        load.run,
        full={},
        short={"chats": (1, 2), "new_tokens": 2, "rounds": 1},
    ),
    "soak": Trial(
        "one hour at full load: flat memory, no growth in latency",
        soak.run,
        full={"minutes": 60},
        short={"minutes": 0.2, "growth_mb": 40.0, "turns_slower": 5.0, "cpu_more": 3.0},
    ),
}
