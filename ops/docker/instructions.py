"""A Dockerfile as data: its stages and their steps, read by the parser that Docker itself uses. Pure.

Known are the instructions that ours uses; another one is an error, never skipped.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import dockerfile

# ${NAME}, ${NAME:-default} or $NAME.
_VARIABLE = re.compile(r"\$(?:\{(\w+)(?::-([^}]*))?\}|(\w+))")
KNOWN = ("ARG", "ENV", "WORKDIR", "COPY", "RUN", "USER", "LABEL", "EXPOSE", "STOPSIGNAL", "ENTRYPOINT", "CMD")


class DockerfileError(Exception):
    """The Dockerfile says something that is not known here, or contradicts itself."""


@dataclass(frozen=True)
class Step:
    """One instruction. ``words``: its arguments, variables not yet replaced; ``flags``: name -> value."""

    name: str
    words: tuple[str, ...]
    flags: Mapping[str, str]
    line: int
    exec_form: bool


@dataclass(frozen=True)
class Stage:
    """``base``: another stage's name, or an image's."""

    name: str
    base: str
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Recipe:
    """The whole file. ``arguments``: what stands before the first FROM, with its values."""

    arguments: Mapping[str, str]
    stages: Mapping[str, Stage]

    def chain(self, target: str) -> tuple[Stage, ...]:
        """Every stage that ``target`` needs, each after those that it is built from."""
        found: dict[str, Stage] = {}

        def visit(name: str) -> None:
            if name in found or name not in self.stages:
                return
            stage = self.stages[name]
            visit(stage.base)
            for step in stage.steps:
                if "from" in step.flags:
                    visit(step.flags["from"])
            found[name] = stage

        if target not in self.stages:
            raise DockerfileError(f"There is no stage {target}; there are {', '.join(self.stages)}.")
        visit(target)
        return tuple(found.values())


@dataclass
class Image:
    """What a container of a stage starts with; a stage begins with a copy of its base's."""

    env: dict[str, str] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    user: str = "0:0"
    workdir: str = "/"
    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    stop_signal: str = "SIGTERM"
    ports: tuple[str, ...] = ()

    def copy(self) -> Image:
        return Image(**{**self.__dict__, "env": dict(self.env), "labels": dict(self.labels)})

    def apply(self, step: Step, words: tuple[str, ...]) -> None:
        """What ``step`` changes about the container; COPY and RUN change files only."""
        match step.name:
            case "ENV":
                self.env.update(pairs(words))
            case "LABEL":
                self.labels.update(pairs(words))
            case "USER":
                self.user = words[0]
            case "WORKDIR":
                self.workdir = words[0] if words[0].startswith("/") else f"{self.workdir.rstrip('/')}/{words[0]}"
            case "ENTRYPOINT":
                self.entrypoint, self.command = words, ()
            case "CMD":
                self.command = words
            case "STOPSIGNAL":
                self.stop_signal = words[0]
            case "EXPOSE":
                self.ports += words
            case _:
                pass


def parse(path: Path, given: Mapping[str, str] | None = None) -> Recipe:
    """The recipe in ``path``; ``given``: values of arguments (``--build-arg``) instead of the file's."""
    try:
        commands = dockerfile.parse_file(str(path))
    except (dockerfile.GoParseError, dockerfile.GoIOError) as error:
        raise DockerfileError(f"{path} cannot be read: {error}.") from error
    arguments: dict[str, str] = {}
    stages: dict[str, Stage] = {}
    name, base, steps = "", "", []
    for command in commands:
        upper = command.cmd.upper()
        if upper == "FROM":
            if name:
                stages[name] = Stage(name, base, tuple(steps))
            name, base = _from(command, arguments)
            steps = []
        elif not name and upper == "ARG":
            arguments.update(argument(command.value, given or {}))
        elif upper not in KNOWN or not name:
            raise DockerfileError(f"{path}:{command.start_line}: {upper} is not known here.")
        else:
            steps.append(_step(command, upper))
    stages[name] = Stage(name, base, tuple(steps))
    return Recipe(arguments, stages)


def _from(command: dockerfile.Command, arguments: Mapping[str, str]) -> tuple[str, str]:
    words = [expand(word, arguments) for word in command.value]
    if len(words) != 3 or words[1].upper() != "AS":
        raise DockerfileError(f"Line {command.start_line}: write FROM image AS name.")
    return words[2], words[0]


def _step(command: dockerfile.Command, name: str) -> Step:
    if command.heredocs:
        raise DockerfileError(f"Line {command.start_line}: here-documents are not known here.")
    flags = dict(flag.removeprefix("--").partition("=")[::2] for flag in command.flags)
    if unknown := set(flags) - ({"from", "chown"} if name == "COPY" else set()):
        raise DockerfileError(f"Line {command.start_line}: {name} --{unknown.pop()} is not known here.")
    return Step(name, tuple(command.value), flags, command.start_line, command.json)


def argument(words: tuple[str, ...], given: Mapping[str, str]) -> dict[str, str]:
    """ARG NAME[=default] ...: what is given wins; a name without either has no value."""
    found = {}
    for word in words:
        name, separator, default = word.partition("=")
        if name in given:
            found[name] = given[name]
        elif separator:
            found[name] = expand(default, found)
    return found


def pairs(words: tuple[str, ...]) -> dict[str, str]:
    """name, value, name, value, ... with their quotes taken off."""
    return {unquote(name): unquote(value) for name, value in zip(words[::2], words[1::2], strict=True)}


def unquote(word: str) -> str:
    return word[1:-1] if len(word) > 1 and word[0] == word[-1] and word[0] in "\"'" else word


def expand(word: str, values: Mapping[str, str]) -> str:
    """``word`` with its variables replaced, as Docker does: one that has no value is empty."""
    return _VARIABLE.sub(lambda match: values.get(match[1] or match[3]) or match[2] or "", word)
