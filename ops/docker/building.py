"""Carries out a recipe's steps on root filesystems, as a container engine would, and remembers what each took."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pathspec

from ops.docker.instructions import DockerfileError, Image, Recipe, Stage, Step, argument, expand
from ops.docker.roots import (
    ROOT,
    Mounts,
    ProofError,
    as_user,
    bootstrap,
    clone,
    copy_tree,
    enter,
    remove_points,
    run_logged,
    size_bytes,
)

SUITES = {"12": "bookworm", "13": "trixie"}
# Arguments that every build has without saying ARG.
_PROXIES = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
_CERTIFICATES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")


@dataclass(frozen=True)
class Machine:
    """How this machine reaches packages: variables for RUN steps, and what has to be seen in the root for them.

    Given to a step while it runs; nothing of it stays in a root.
    """

    env: Mapping[str, str]
    mounts: Mounts


@dataclass
class Built:
    """A stage that was carried out. ``seconds``: without those of the stages that it is built from."""

    stage: Stage
    root: Path
    image: Image
    steps: int = 0
    seconds: float = 0.0
    arguments: dict[str, str] = field(default_factory=dict)

    @property
    def size_bytes(self) -> int:
        return size_bytes(self.root)


def this_machine() -> Machine:
    """Pip's settings (files and environment), proxies, certificates and name servers of this machine."""
    answer = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    settings = [line.partition("=")[::2] for line in answer.stdout.splitlines() if "=" in line]
    env = {f"PIP_{_last(key)}": value for key, quoted in settings for value in shlex.split(quoted)[:1]}
    env |= {name: os.environ[name] for name in (*_PROXIES, *_CERTIFICATES) if name in os.environ}
    shown: dict[Path, str] = {Path("/etc/resolv.conf"): "/etc/resolv.conf"}
    for name, value in env.items():
        for path in _local_paths(value):
            if path.is_file():  # certificates: a package of the image may write a file of that name
                shown[path] = f"/run/host/{path.name}"
                env[name] = env[name].replace(str(path), shown[path])
            else:
                shown[path] = str(path)
    return Machine(env, Mounts(read_only=shown))


def _last(key: str) -> str:
    return key.rpartition(".")[2].replace("-", "_").upper()


def _local_paths(value: str) -> Iterator[Path]:
    """Files and folders of this machine that a setting names; an index's files may lie beside it."""
    for url, name in re.findall(r"(file://|(?<![\w/:.]))(/[\w./+-]+)", value):
        path = Path(name)
        if path.exists():
            yield path.parent if url and len(path.parts) > 3 else path


class Builder:
    """Builds stages below ``folder``; each stage and each base at most once."""

    def __init__(self, recipe: Recipe, folder: Path, given: Mapping[str, str]) -> None:
        self.recipe, self.folder, self.given = recipe, folder, given
        self.machine = this_machine()
        self.built: dict[str, Built] = {}
        self.release = ""  # of the archive that the base was made from
        # The same patterns as git's, but that Docker's begin at the context's root.
        lines = (ROOT / ".dockerignore").read_text().splitlines()
        patterns = [re.sub(r"^(!?)(?=[^/#!*]|\*(?!\*))", r"\1/", line) for line in lines]
        self._ignored = pathspec.GitIgnoreSpec.from_lines(patterns)

    def build(self, target: str) -> Built:
        for stage in self.recipe.chain(target):
            if stage.name not in self.built:
                self.built[stage.name] = self._stage(stage)
        return self.built[target]

    def _stage(self, stage: Stage) -> Built:
        root = self.folder / stage.name
        if stage.base in self.built:
            base = self.built[stage.base]
            clone(base.root, root)
            built = Built(stage, root, base.image.copy())
        else:
            clone(self._base(stage.base), root)
            built = Built(stage, root, Image())
        started = time.monotonic()
        for step in stage.steps:
            self._step(built, step)
            built.steps += 1
        built.seconds = time.monotonic() - started
        return built

    def _base(self, image: str) -> Path:
        """The root that stands in for a registry's image: the same release, from Debian's archive."""
        match = re.fullmatch(r"debian:(\d+)(?:\.\d+)?-slim(?:@.*)?", image)
        if match is None or match[1] not in SUITES:
            raise DockerfileError(f"Only debian:12.x-slim and 13.x-slim can be made here, not {image}.")
        root = self.folder / f"base-{match[1]}"
        if not root.exists():
            say(f"{image}: made from Debian's archive ({SUITES[match[1]]})")
            started = time.monotonic()
            self.release = bootstrap(root, SUITES[match[1]], self.folder / "base.log")
            self.built[image] = Built(Stage(image, "", ()), root, Image(), seconds=time.monotonic() - started)
        return root

    def _step(self, built: Built, step: Step) -> None:
        values = {**built.arguments, **built.image.env}
        if step.name == "ARG":
            inherited = {word: self.recipe.arguments[word] for word in step.words if word in self.recipe.arguments}
            built.arguments |= {**inherited, **argument(step.words, self.given)}
        elif step.name == "RUN":
            self._run(built, step, values)
        else:
            # An exec form is JSON, in which nothing is replaced.
            words = step.words if step.exec_form else tuple(expand(word, values) for word in step.words)
            built.image.apply(step, words)
            if step.name == "COPY":
                self._copy(built, step, words)
            elif step.name == "WORKDIR":
                (built.root / built.image.workdir.lstrip("/")).mkdir(parents=True, exist_ok=True)

    def _run(self, built: Built, step: Step, values: Mapping[str, str]) -> None:
        say(f"{built.stage.name}: line {step.line}: RUN {step.words[0][:70].strip()} ...")
        words = list(step.words) if step.exec_form else ["/bin/sh", "-c", step.words[0]]
        command = ["sh", "-c", f'cd {shlex.quote(built.image.workdir)} && exec "$@"', "run", *words]
        if built.image.user not in {"0:0", "0", "root"}:
            command = as_user(built.image.user, command)
        env = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"}
        env |= {**self.machine.env, **values}
        points = self.machine.mounts.place(built.root)
        log = self.folder / f"{built.stage.name}.log"
        try:
            entered = enter(built.root, command, self.machine.mounts)
            run_logged(["nice", "-n", "5", *entered], log, f"{built.stage.name}, line {step.line}, failed", env)
        finally:
            remove_points(points)

    def _copy(self, built: Built, step: Step, words: tuple[str, ...]) -> None:
        *sources, target = words
        place = built.root / (Path(built.image.workdir) / target).as_posix().lstrip("/")
        source_stage = step.flags.get("from")
        for source in sources:
            if source_stage:
                found = self.built[source_stage].root / source.lstrip("/")
                into = place / found.name if found.is_file() and target.endswith("/") else place
                copy_tree(found, into)
            else:
                self._copy_from_context(Path(source), place, into_folder=target.endswith("/"))
        if "chown" in step.flags:
            subprocess.run(["chown", "-R", step.flags["chown"], str(place)], check=True)

    def _copy_from_context(self, source: Path, place: Path, *, into_folder: bool) -> None:
        files = list(self.context_files(source))
        if not files:
            raise ProofError(f"COPY {source}: nothing of that name is in the build context.")
        for path in files:
            inside = path.relative_to(source)
            target = place / inside if inside.parts else (place / source.name if into_folder else place)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / path, target)
            os.chown(target, 0, 0)
            target.chmod(0o755 if os.access(ROOT / path, os.X_OK) else 0o644)

    def context_files(self, source: Path) -> Iterator[Path]:
        """The files at or below ``source`` that .dockerignore lets through, relative to the repository."""
        whole = ROOT / source
        candidates = sorted(path for path in whole.rglob("*") if path.is_file()) if whole.is_dir() else [whole]
        for path in candidates:
            inside = path.relative_to(ROOT)
            if path.is_file() and not self._ignored.match_file(inside.as_posix()):
                yield inside


def say(line: str) -> None:
    print(f"prove: {line}", file=sys.stderr, flush=True)
