"""What the Dockerfile promises, read by the parser that Docker uses; the tests of ops/docker/prove run its steps."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

import cluster
from ops.docker.building import Builder
from ops.docker.instructions import Image, Recipe, Stage, expand, parse

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "ops" / "docker" / "Dockerfile"
TARGETS = ("controller", "worker", "router")


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return parse(DOCKERFILE)


def image_of(recipe: Recipe, target: str) -> Image:
    """The container settings of a target; variables take their defaults."""
    image = Image()
    for stage in based_on(recipe, target):
        values = dict(recipe.arguments)
        for step in stage.steps:
            if step.name == "ARG":
                values |= dict(word.partition("=")[::2] for word in step.words if "=" in word)
            words = step.words if step.exec_form else tuple(expand(word, values) for word in step.words)
            image.apply(step, words)
    return image


def based_on(recipe: Recipe, target: str) -> list[Stage]:
    """The stages that a target is FROM, the first one first."""
    stages = []
    while target in recipe.stages:
        stages.insert(0, recipe.stages[target])
        target = recipe.stages[target].base
    return stages


@pytest.mark.parametrize("target", TARGETS)
class TestEveryTarget:
    def test_runs_as_nobody_in_particular(self, recipe: Recipe, target: str) -> None:
        assert image_of(recipe, target).user == "10001:10001"

    def test_starts_the_program_below_a_process_that_reaps(self, recipe: Recipe, target: str) -> None:
        image = image_of(recipe, target)
        assert image.entrypoint == ("/usr/bin/tini", "--", "llm-cluster")
        assert [
            step.exec_form for stage in recipe.stages.values() for step in stage.steps if step.name == "ENTRYPOINT"
        ] == [True]
        assert image.stop_signal == "SIGTERM"

    def test_says_what_it_is(self, recipe: Recipe, target: str) -> None:
        labels = image_of(recipe, target).labels
        assert labels["org.opencontainers.image.title"] == f"llm-cluster {target}"
        assert labels["org.opencontainers.image.version"] == cluster.__version__
        assert labels["org.opencontainers.image.base.name"].endswith(f"debian:{recipe.arguments['DEBIAN']}")

    def test_caches_in_tmp_and_writes_no_bytecode(self, recipe: Recipe, target: str) -> None:
        env = image_of(recipe, target).env
        assert (env["HOME"], env["PYTHONDONTWRITEBYTECODE"]) == ("/tmp", "1")
        assert not [name for name in env if name.startswith("LLM_CLUSTER_")]

    def test_holds_no_compiler(self, recipe: Recipe, target: str) -> None:
        runs = [step.words[0] for stage in based_on(recipe, target) for step in stage.steps if step.name == "RUN"]
        assert runs
        assert not [run for run in runs if "g++" in run or "pip" in run]


def test_the_base_is_a_point_release(recipe: Recipe) -> None:
    outside = {stage.base for stage in recipe.stages.values()} - set(recipe.stages)
    assert len(outside) == 1
    assert re.fullmatch(r"debian:\d+\.\d+-slim(@sha256:[0-9a-f]{64})?", outside.pop())


def test_every_pip_install_is_held_by_the_constraints(recipe: Recipe) -> None:
    steps = [step for stage in recipe.stages.values() for step in stage.steps if step.name == "RUN"]
    installs = [
        step.words[0] for step in steps if re.search(r"pip\S* .*install", step.words[0].replace("apt-get install", ""))
    ]
    assert len(installs) == 7
    assert [text for text in installs if "constraint constraints.txt" not in text] == []


def test_nothing_is_fetched_by_url(recipe: Recipe) -> None:
    steps = [step for stage in recipe.stages.values() for step in stage.steps]
    assert {step.name for step in steps} >= {"RUN", "COPY"}
    assert not [step for step in steps if step.name == "ADD" or re.search(r"\b(curl|wget|git)\b", " ".join(step.words))]


def test_what_is_copied_is_in_the_build_context(recipe: Recipe, tmp_path: Path) -> None:
    builder = Builder(recipe, tmp_path, {})
    copies = [step for stage in recipe.stages.values() for step in stage.steps if step.name == "COPY"]
    sources = {word for step in copies if "from" not in step.flags for word in step.words[:-1]}
    assert sources == {
        "pyproject.toml",
        "constraints.txt",
        "README.md",
        "LICENSE",
        "cluster",
        "ops/compile-cpu-kernels",
        "ops/compile-shared-memory-op",
    }
    for source in sources:
        assert list(builder.context_files(Path(source))), source
    assert {step.flags["from"] for step in copies if "from" in step.flags} <= set(recipe.stages)


def test_the_build_context_holds_nothing_else(recipe: Recipe, tmp_path: Path) -> None:
    builder = Builder(recipe, tmp_path, {})
    for left_out in ("tests", "docs", ".git", ".venv/bin", "ops/setup", "helm"):
        assert list(builder.context_files(Path(left_out))) == []
    inside = {path.suffix for path in builder.context_files(Path("cluster"))}
    assert ".py" in inside
    assert ".pyc" not in inside


def test_the_linter_finds_nothing() -> None:
    hadolint = shutil.which("hadolint", path=str(ROOT / ".venv" / "bin")) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint has no wheel for this machine; put one on the PATH to have the Dockerfile linted.")
    done = subprocess.run(
        [hadolint, "--failure-threshold", "style", DOCKERFILE], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


class TestPackages:
    def names(self, project: dict, group: str) -> set[str]:
        found: set[str] = set()
        for entry in project["dependency-groups"][group]:
            found |= self.names(project, entry["include-group"]) if isinstance(entry, dict) else {entry}
        return found

    def asked_for(self, project: dict) -> set[str]:
        return {re.match(r"[\w.-]+", text)[0] for text in project["project"]["dependencies"]}

    def normal(self, names: set[str]) -> set[str]:
        return {re.sub(r"[-_.]+", "-", name).lower() for name in names}

    def test_a_worker_has_all_that_the_package_asks_for(self, project: dict) -> None:
        assert self.normal(self.names(project, "worker")) == self.normal(self.asked_for(project))

    def test_only_workers_have_torch(self, project: dict) -> None:
        heavy = {"torch", "deepspeed", "transformers"}
        assert heavy <= self.names(project, "worker")
        assert not heavy & self.names(project, "controller")
        assert not (heavy | {"ray", "kubernetes"}) & self.names(project, "router")

    def test_the_doctor_asks_an_image_for_what_it_has(self, project: dict) -> None:
        from cluster.cli.machine import PACKAGES

        assert {role.value for role in PACKAGES} == set(TARGETS)
        for role, packages in PACKAGES.items():
            assert self.normal(set(packages)) <= self.normal(self.names(project, role.value))
