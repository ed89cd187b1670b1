"""Runs scripts, each in a process of its own that has imported torch, transformers and the library already: forked from this one.

A line of JSON on standard input asks for a script: its path, arguments, folder to be in, and files for what it says. The
answer is a line with its exit status.
"""

import json
import os
import runpy
import sys
import traceback
import warnings

import accelerate  # noqa: F401
import peft  # noqa: F401
from transformers import Trainer  # noqa: F401

import gru_memory.embedded
import gru_memory.shipped
import gru_memory.training.collator  # noqa: F401


def run(script: str, arguments: list[str], folder: str, out: str, err: str) -> None:
    """Become the script; never returns."""
    os.chdir(folder)
    for path, descriptor in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    sys.argv = [script, *arguments]
    sys.path[0] = os.path.dirname(script)
    warnings.filterwarnings("error", category=DeprecationWarning, module="__main__")
    code = 1
    try:
        runpy.run_path(script, run_name="__main__")
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    for line in sys.stdin:
        if (child := os.fork()) == 0:
            run(**json.loads(line))
        sys.stdout.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")
        sys.stdout.flush()
