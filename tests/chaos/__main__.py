"""python -m chaos [TRIAL ...] [--short]"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def main() -> int:
    from .trials import TRIALS

    parser = argparse.ArgumentParser(prog="make chaos", description="Try to break the server, within bounds.")
    parser.add_argument(
        "trials", nargs="*", metavar="TRIAL", help=f"of {', '.join(TRIALS)}; all of them if none is given"
    )
    parser.add_argument("--short", action="store_true", help="seconds instead of minutes")
    given = parser.parse_args()
    if unknown := set(given.trials) - set(TRIALS):
        parser.error(f"there is no trial {', '.join(sorted(unknown))}: choose from {', '.join(TRIALS)}")
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # it warns of every request that is no HTTP
    failed = []
    for name in given.trials or TRIALS:
        trial = TRIALS[name]
        print(f"{name}: {trial.says}", flush=True)
        began = time.monotonic()
        result = trial.run(**(trial.short if given.short else trial.full))
        for what, figure in result.figures.items():
            print(f"    {what}: {figure}")
        for broken in result.broken[:20]:
            print(f"    BROKEN: {broken}")
        print(f"    {'held' if not result.broken else 'DID NOT HOLD'} ({time.monotonic() - began:.0f} s)", flush=True)
        if result.broken:
            failed.append(name)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
