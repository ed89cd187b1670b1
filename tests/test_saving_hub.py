"""The card of a memory, the hub, and the code in docs/saving.md."""

import json
import re

import huggingface_hub.constants
import pytest
import torch
import transformers
from hub import serve
from huggingface_hub import EvalResult, ModelCard
from memory_files import (
    FILES,
    of_two_families,  # noqa: F401 (a fixture)
    unchanged,
)
from packaging.version import Version
from tiny import (
    base_model,
    memory_model,
    one_thread,  # noqa: F401 (a fixture)
    random_ids,
)

from gru_memory import AutoModelWithGRUMemory, GPT2WithGRUMemory, add_memory
from gru_memory.evaluation import RecallConfig, RecallResult
from gru_memory.evaluation.report import write_report
from gru_memory.evaluation.scoring import Rate


def recall_report(path, command="gru-memory eval recall --suite"):
    """What `gru-memory eval recall` writes, with figures made up."""
    rows = [
        RecallResult(
            config=RecallConfig(facts=facts),
            memory=Rate.of([True] * hits + [False] * (40 - hits)),
            floor=Rate.of([False] * 40),
            full_history=None,
            old_value=None,
            state_bytes=1234,
            history_tokens=None,
            kv_bytes=None,
            dropped_turns=0,
            seconds={},
            replies=[],
        )
        for facts, hits in ((3, 25), (6, 10))
    ]
    write_report(path, command, 1, rows)
    return path


# The card


def test_the_card_says_what_the_hub_asks_for(family, tmp_path):
    model = memory_model(family)
    model.config._name_or_path = "ann/base"
    model.save_memory(tmp_path, card={"license": "mit", "language": "en", "tags": ["memory", "boats"]})
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.library_name, card.data.base_model, card.data.license) == ("gru-memory", "ann/base", "mit")
    assert card.data.tags == ["gru-memory", "memory", "recurrent", "boats"]
    assert (card.data.language, card.data.pipeline_tag, card.data.eval_results) == ("en", "text-generation", None)
    assert f"| parameters | {model.num_memory_parameters():,} |" in card.text
    assert 'from_pretrained("ann/base"' in card.text.replace("'", '"')
    assert "## Recall" not in card.text
    model.save_memory(tmp_path)
    assert ModelCard.load(tmp_path / "README.md").data.license is None  # not ours to grant


def test_the_figures_of_a_recall_run_are_on_the_card(tmp_path):
    model = memory_model()
    report = recall_report(tmp_path / "recall.json", "gru-memory eval recall --memory=/srv/ann/mine --out /srv/results")
    for recall in (report, str(report), json.loads(report.read_text())):
        model.save_memory(tmp_path / "memory", recall=recall)
        card = ModelCard.load(tmp_path / "memory" / "README.md")
        assert [result.metric_value for result in card.data.eval_results] == [0.625, 0.25]
        assert [result.dataset_config for result in card.data.eval_results] == [
            "3 facts, 12 turns between, unseen values",
            "6 facts, 12 turns between, unseen values",
        ]
        assert card.data.model_name == "Memory for a gpt2 model"
        row = "| 3 facts, 12 turns between, unseen values | 62% (47-76), 25 of 40 | 0% (0-9), 0 of 40 |"
        assert row in card.text
        assert "every turn in its context" not in card.text  # it was not asked
        assert "`gru-memory eval recall --memory=mine --out results`" in card.text
        assert "srv" not in card.text
        assert "1,234 bytes" in card.text


def test_results_and_tags_of_your_own_are_on_the_card(tmp_path):
    mine = EvalResult("text-generation", "mine", "Mine", "accuracy", 0.5)
    model, report = memory_model(), recall_report(tmp_path / "recall.json")
    for recall, values in ((None, [0.5]), (report, [0.5, 0.625, 0.25])):
        model.save_memory(
            tmp_path, recall=recall, card={"model_name": "Boats", "eval_results": [mine], "tags": "boats"}
        )
        card = ModelCard.load(tmp_path / "README.md")
        assert [result.metric_value for result in card.data.eval_results] == values
        assert card.data.model_name == "Boats" and "# Boats" in card.text
        assert card.data.tags == ["gru-memory", "memory", "recurrent", "boats"]
    model.save_memory(tmp_path, card={"eval_results": None, "tags": None})
    with pytest.raises(ValueError, match="give a dict of fields"):
        model.save_memory(tmp_path, card="mit")


@pytest.mark.parametrize(
    "content",
    (
        None,
        "{",
        "[]",
        '{"results": []}',
        '{"results": [{"label": "books", "loss": 3.1}]}',
        '{"results": [{"label": "3 facts", "memory": null, "floor": null, "full_history": null, "state_bytes": 1}]}',
    ),
)
def test_what_is_no_recall_run_is_refused_and_nothing_written(content, tmp_path):
    report = tmp_path / "report.json"
    if content is not None:
        report.write_text(content)
    with pytest.raises(ValueError, match=r"not what `gru-memory eval recall` writes"):
        memory_model().save_memory(tmp_path / "memory", recall=report)
    assert not (tmp_path / "memory").exists()


def test_a_readme_of_somebody_else_stays(tmp_path):
    model = memory_model()
    (tmp_path / "README.md").write_text("# My notes\n")
    model.save_memory(tmp_path)
    assert (tmp_path / "README.md").read_text() == "# My notes\n"
    (tmp_path / "README.md").unlink()
    model.save_memory(tmp_path)
    model.save_memory(tmp_path, card={"license": "mit"})
    assert ModelCard.load(tmp_path / "README.md").data.license == "mit"


# The hub


@pytest.fixture(scope="module")
def server():
    """One for all tests: transformers keeps the address that it first saw."""
    with serve() as server:
        yield server


@pytest.fixture
def hub(server, monkeypatch, tmp_path):
    server.clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(
        "transformers.utils.hub._hf_api", None, raising=False
    )  # made with the address of whoever asked first
    return server


def asked(hub, of):
    """(path, token) of the files asked for in a repository."""
    return {(path, token) for _, path, token in hub.requests if path.startswith(f"/{of}/resolve/")}


def test_a_memory_goes_to_the_hub_and_comes_back(family, hub, tmp_path):
    model = memory_model(family)
    report = recall_report(tmp_path / "recall.json")
    url = model.push_memory_to_hub(
        "ann/boats", recall=report, card={"license": "mit"}, private=True, token="hf_ann", commit_message="Boats"
    )
    assert url.startswith(f"{hub.url}/ann/boats/commit/")
    assert (hub.private["ann/boats"], hub.commits[0]["summary"]) == (True, "Boats")
    files = hub.repositories["ann/boats"]["main"]
    assert set(files) == FILES
    card = ModelCard(files["README.md"].decode())
    assert (card.data.license, len(card.data.eval_results)) == ("mit", 2)
    assert "memory='ann/boats'" in card.text
    assert {token for _, path, token in hub.requests if "ann/boats" in path} == {"Bearer hf_ann"}

    hub.requests.clear()
    other = add_memory(base_model(family)).double()
    other.load_memory("ann/boats", token="hf_bob", cache_dir=tmp_path / "cache")
    assert torch.equal(other(random_ids()).logits, model(random_ids()).logits)
    assert asked(hub, "ann/boats") == {
        (f"/ann/boats/resolve/main/{name}", "Bearer hf_bob")
        for name in ("memory_config.json", "memory_model.safetensors")
    }
    assert (tmp_path / "cache" / "models--ann--boats").is_dir()
    hub.repositories.clear()  # what is in the cache needs no hub
    other.load_memory("ann/boats", cache_dir=tmp_path / "cache", local_files_only=True)


def test_branches_and_subfolders_of_the_hub(hub):
    first, second = memory_model("llama"), memory_model("llama", decay=0.5)
    first.push_memory_to_hub("ann/boats", subfolder="en")
    second.push_memory_to_hub("ann/boats", subfolder="en", revision="v2")
    assert set(hub.repositories["ann/boats"]["main"]) == {f"en/{name}" for name in FILES}
    for revision, arguments in (("main", "subfolder='en'"), ("v2", "revision='v2', subfolder='en'")):
        card = hub.repositories["ann/boats"][revision]["en/README.md"].decode()
        assert f"model.load_memory('ann/boats', {arguments})" in card and "from_pretrained(" not in card
    model = add_memory(base_model("llama")).double()
    model.load_memory("ann/boats", subfolder="en")
    assert model.memory_fingerprint() == first.memory_fingerprint()
    model.load_memory("ann/boats", subfolder="en", revision="v2")
    assert model.memory_fingerprint() == second.memory_fingerprint()


def test_a_card_on_the_hub_that_somebody_else_wrote_stays(hub):
    model = memory_model()
    model.push_memory_to_hub("ann/boats")
    model.push_memory_to_hub("ann/boats", card={"license": "mit"})
    files = hub.repositories["ann/boats"]["main"]
    assert "license: mit" in files["README.md"].decode()
    files["README.md"] = b"# My own words"
    model.push_memory_to_hub("ann/boats")
    assert files["README.md"] == b"# My own words"
    assert set(files) == FILES


def test_what_the_hub_does_not_have(hub, tmp_path):
    model = memory_model()
    model.push_memory_to_hub("ann/boats")
    hub.repositories["ann/boats"]["empty"] = {}
    for source, options, error, message in (
        ("ann/cars", {}, OSError, "no folder 'ann/cars' here.*RepositoryNotFoundError.*token"),
        ("ann/boats", {"revision": "v9"}, OSError, "ann/boats at v9.*RevisionNotFoundError"),
        ("ann/boats", {"revision": "empty"}, ValueError, "memory_config.json is missing"),
        ("ann/boats", {"subfolder": "fr"}, ValueError, "ann/boats/fr holds no memory"),
        ("nowhere", {}, ValueError, "nowhere holds no memory"),
        ("./ann/boats", {}, ValueError, "holds no memory"),
    ):
        with unchanged(model), pytest.raises(error, match=f"(?s){message}"):
            model.load_memory(source, **options)


def test_without_the_hub_a_name_is_refused_with_reasons(tmp_path):
    model = memory_model()
    with unchanged(model), pytest.raises(OSError, match="no folder 'ann/boats' here.*cannot be reached"):
        model.load_memory("ann/boats", cache_dir=tmp_path)


def test_a_folder_comes_before_a_repository_of_the_same_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = memory_model(decay=0.5)
    model.save_memory("ann/boats")
    other = memory_model()
    other.load_memory("ann/boats")
    assert other.memory_fingerprint() == model.memory_fingerprint()


def test_a_push_that_is_refused_here_sends_nothing(hub, tmp_path):
    with pytest.raises(ValueError, match="recall"):
        memory_model().push_memory_to_hub("ann/boats", recall=tmp_path / "nothing.json")
    with pytest.raises(ValueError, match="no memory is called 'fr'"):
        memory_model().push_memory_to_hub("ann/boats", "fr")
    assert not hub.repositories


def test_a_base_model_and_a_memory_by_their_names_on_the_hub(family, hub, tmp_path):
    base_model(family).double().push_to_hub("ann/base", revision="main")
    model = memory_model(family)
    model.push_memory_to_hub("ann/boats")
    branches = hub.repositories["ann/base"]
    branches["v1"], branches["main"] = branches["main"], {}
    settings = {"revision": "v1", "token": "hf_ann", "cache_dir": tmp_path / "cache", "dtype": torch.float64}
    classes = [AutoModelWithGRUMemory, *([GPT2WithGRUMemory] if family == "gpt2" else [])]
    for cls in classes:
        hub.requests.clear()
        loaded = cls.from_pretrained_with_memory("ann/base", memory="ann/boats", **settings)
        assert torch.equal(loaded(random_ids()).logits, model(random_ids()).logits)
        assert {token for _, token in asked(hub, "ann/boats")} == {"Bearer hf_ann"}
        assert {name.split(".")[0] for name, p in loaded.named_parameters() if p.requires_grad} == {"gru_memory"}
    assert type(loaded) is type(model)
    loaded.push_memory_to_hub("ann/again")
    assert ModelCard(hub.repositories["ann/again"]["main"]["README.md"].decode()).data.base_model == "ann/base"


def test_a_whole_model_on_the_hub_is_found_by_revision_and_token(family, hub, tmp_path):
    model = memory_model(family)
    model.push_to_hub("ann/whole")
    branches = hub.repositories["ann/whole"]
    branches["v1"], branches["main"] = branches["main"], {}
    hub.requests.clear()
    settings = {"revision": "v1", "token": "hf_ann", "cache_dir": tmp_path / "cache"}
    loaded = AutoModelWithGRUMemory.from_pretrained("ann/whole", dtype=torch.float64, **settings)
    assert torch.equal(loaded(random_ids()).logits, model(random_ids()).logits)
    found = asked(hub, "ann/whole")
    assert ("/ann/whole/resolve/v1/config.json", "Bearer hf_ann") in found
    if Version(transformers.__version__) >= Version("5.23"):  # 5.17 itself asks for some of them without
        assert {token for _, token in found} == {"Bearer hf_ann"}
        assert {path.split("/")[4] for path, _ in found} == {"v1"}


# The document


def test_the_code_in_the_document_runs(family, hub, repository, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    base_model(family).save_pretrained("base")
    recall_report(tmp_path / "results" / "recall.json")
    text = (repository / "docs" / "saving.md").read_text(encoding="utf-8")
    pieces = re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    assert len(pieces) == text.count("```") // 2 == 4
    names = {}
    for piece in pieces:
        exec(compile(piece, "docs/saving.md", "exec"), names)
    assert "['default', 'fr'] default" in capsys.readouterr().out
    assert hub.private == {"ann/boats": True}
    assert len(ModelCard.load("boats/README.md").data.eval_results) == 2
    assert {path.name for path in (tmp_path / "boats-fr").iterdir()} == FILES
    assert list(names["model"].memories) == ["default"]
