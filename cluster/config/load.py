"""One configuration from three layers: YAML file < environment < flags, each value with its source.

Environment: ``LLM_CLUSTER_ROUTER__PORT`` sets ``router.port``; ``LLM_CLUSTER_MODELS__0__REPLICAS`` the first model's
replicas; a value that starts with ``[`` or ``{`` is read as YAML. Flags carry dotted paths (``router.port``);
a flag that is None was not given.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from cluster.config.schema import MAPPINGS, ClusterConfig
from cluster.config.yaml_lines import Located, read_yaml
from cluster.domain.errors import ConfigError

ENV_PREFIX = "LLM_CLUSTER_"
# Variables of the same prefix that steer the set-up scripts, or mark the processes of a node or a replica.
NOT_SETTINGS = {
    "LLM_CLUSTER_NODE_DIR",
    "LLM_CLUSTER_PIP_ARGS",
    "LLM_CLUSTER_PYTHON",
    "LLM_CLUSTER_RANK",
    "LLM_CLUSTER_RUN",
}
_FLAG = "flag"

_Path = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LoadedConfig:
    """The configuration, and for every value that was set its source; a path that is absent has its default."""

    config: ClusterConfig
    sources: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class _Layer:
    """Leaves by path. A path in ``lists`` was given whole: it replaces what lower layers said below it."""

    leaves: dict[_Path, Located] = field(default_factory=dict)
    lists: set[_Path] = field(default_factory=set)


def load_config(file: Path | None, env: Mapping[str, str], flags: Mapping[str, object]) -> LoadedConfig:
    """The merged, checked configuration; ConfigError names path and source of the first thing that is wrong."""
    merged = _Layer()
    for layer in (_file_layer(file), _environment_layer(env), _flag_layer(flags)):
        _lay_over(merged, layer)
    for path, leaf in merged.leaves.items():
        _check_known(path, leaf.source)
    try:
        config = ClusterConfig.model_validate(_nest(merged))
    except ValidationError as error:
        raise ConfigError(_first_sentence(error, merged)) from error
    return LoadedConfig(config, {dotted(path): leaf.source for path, leaf in merged.leaves.items()})


def dotted(path: tuple[str | int, ...]) -> str:
    return ".".join(str(part) for part in path)


def _file_layer(file: Path | None) -> _Layer:
    layer = _Layer()
    if file is not None:
        for name, value in read_yaml(file).items():
            _collect(layer, (name,), value)
    return layer


def _environment_layer(env: Mapping[str, str]) -> _Layer:
    layer = _Layer()
    for name in sorted(env):
        if not name.startswith(ENV_PREFIX) or name in NOT_SETTINGS:
            continue
        source = f"environment variable {name}"
        path = tuple(name.removeprefix(ENV_PREFIX).lower().split("__"))
        _collect(layer, path, _located(_environment_value(env[name], source), source))
    return layer


def _environment_value(text: str, source: str) -> object:
    if not text.lstrip().startswith(("[", "{")):
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"The {source} holds no valid YAML: {text!r}.") from error


def _flag_layer(flags: Mapping[str, object]) -> _Layer:
    layer = _Layer()
    for name, value in flags.items():
        if value is not None:
            _collect(layer, tuple(name.split(".")), _located(value, _FLAG))
    return layer


def _located(value: object, source: str) -> Located:
    """``value`` from one place: everything inside it has the same source."""
    if isinstance(value, Mapping):
        return Located({str(key): _located(item, source) for key, item in value.items()}, source)
    if isinstance(value, list | tuple):
        return Located([_located(item, source) for item in value], source)
    return Located(value, source)


def _collect(layer: _Layer, path: _Path, located: Located) -> None:
    """Takes ``located`` apart into leaves. Sections and lists of sections are taken apart, other lists are values."""
    value = located.value
    if _schema_at(path) is None:
        _check_known(path, located.source)  # even where it holds nothing
    if isinstance(value, dict) and path[-1] in MAPPINGS and _schema_at(path) == "value":
        layer.leaves[path] = Located(_plain(located), located.source)
    elif isinstance(value, dict) and (value or _schema_at(path) != "value"):
        for name, item in value.items():
            _collect(layer, (*path, name), item)
    elif isinstance(value, list) and (not value or any(isinstance(item.value, dict) for item in value)):
        layer.lists.add(path)
        if not value:
            layer.leaves[path] = Located((), located.source)
        for index, item in enumerate(value):
            _collect(layer, (*path, str(index)), item)
            if item.value == {}:
                layer.leaves[*path, str(index)] = item  # for the check that it has what it needs
    elif value is not None or not _holds_sections(path):  # `router:` with nothing under it says nothing
        layer.leaves[path] = Located(_plain(located), located.source)


def _holds_sections(path: _Path) -> bool:
    return isinstance(_schema_at(path), type) or isinstance(_schema_at((*path, "0")), type)


def _plain(located: Located) -> object:
    if isinstance(located.value, dict):
        return {key: _plain(item) for key, item in located.value.items()}
    return [_plain(item) for item in located.value] if isinstance(located.value, list) else located.value


def _lay_over(merged: _Layer, upper: _Layer) -> None:
    for replaced in upper.lists:
        for path in [path for path in merged.leaves if path[: len(replaced)] == replaced]:
            del merged.leaves[path]
    merged.lists.update(upper.lists)
    for path, leaf in upper.leaves.items():
        for depth in range(1, len(path)):
            merged.leaves.pop(path[:depth], None)
        merged.leaves[path] = leaf


def _nest(layer: _Layer) -> dict[str, Any]:
    root: dict[str, Any] = {}
    for path, leaf in layer.leaves.items():
        section = root
        for part in path[:-1]:
            section = section.setdefault(part, {})
        section[path[-1]] = leaf.value
    if isinstance(models := root.get("models"), dict):
        root["models"] = _as_list(models, layer)
    return root


def _as_list(models: dict[str, Any], layer: _Layer) -> list[Any]:
    for number, index in enumerate(sorted(models, key=int)):
        if int(index) != number:
            source = next(leaf.source for path, leaf in layer.leaves.items() if path[:2] == ("models", index))
            raise ConfigError(f"models.{index} ({source}) leaves a gap: there is no models.{number}; count from 0.")
    return [models[index] for index in sorted(models, key=int)]


def _schema_at(path: _Path) -> type[BaseModel] | str | None:
    """The section at ``path``; "value" for a setting; None for what is not known."""
    at: Any = ClusterConfig
    for part in path:
        if get_origin(at) is tuple and issubclass(get_args(at)[0], BaseModel):
            at = get_args(at)[0] if part.isdecimal() else None
        elif isinstance(at, type) and issubclass(at, BaseModel):
            found = at.model_fields.get(part)
            at = found.annotation if found else None
        else:
            return None
        if at is None:
            return None
    return at if isinstance(at, type) and issubclass(at, BaseModel) else "value"


def _check_known(path: _Path, source: str) -> None:
    kind = _schema_at(path)
    if kind == "value":
        return
    if kind is not None:
        raise ConfigError(f"{dotted(path)} ({source}) is a section; write its settings below it, one by one.")
    position = next((part for part in path if part.isdecimal()), "0")
    known = [name.replace("*", position) for name in _settings(ClusterConfig, ())]
    near = difflib.get_close_matches(dotted(path), known, n=1, cutoff=0.0)[0]
    raise ConfigError(f"{dotted(path)} ({source}) is no setting; the nearest one is {near}.")


def _settings(section: type[BaseModel], prefix: _Path) -> Iterator[str]:
    """Every setting's dotted path; ``*`` stands for a position in a list."""
    for name, info in section.model_fields.items():
        kind: Any = info.annotation
        if get_origin(kind) is tuple and issubclass(get_args(kind)[0], BaseModel):
            yield dotted((*prefix, name))
            yield from _settings(get_args(kind)[0], (*prefix, name, "*"))
        elif isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _settings(kind, (*prefix, name))
        else:
            yield dotted((*prefix, name))


def _first_sentence(error: ValidationError, layer: _Layer) -> str:
    first = error.errors()[0]
    path = tuple(str(part) for part in first["loc"])
    known, source = _nearest_source(path, layer)
    reason = first["msg"].removeprefix("Value error, ").rstrip(".")
    reason = reason[:1].lower() + reason[1:]
    if first["type"] == "missing":
        return f"{dotted(path)} is missing ({source}); add it."
    shown = f" = {first['input']!r}" if known and isinstance(first["input"], str | int | float | bool) else ""
    return f"{dotted(known or path) or 'models'}{shown} ({source}): {reason}."


def _nearest_source(path: _Path, layer: _Layer) -> tuple[_Path | None, str]:
    """The leaf that ``path`` (pydantic's, which may go deeper than ours) is about, and a source near it."""
    for depth in range(len(path), 0, -1):
        if path[:depth] in layer.leaves:
            return path[:depth], layer.leaves[path[:depth]].source
    for depth in range(len(path), -1, -1):
        for leaf_path, leaf in layer.leaves.items():
            if leaf_path[:depth] == path[:depth]:
                return None, leaf.source
    return None, "nowhere set"
