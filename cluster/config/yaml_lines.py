"""YAML that remembers where it was written: every value with its file and line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cluster.domain.errors import ConfigError

MAX_FILE_BYTES = 1 << 20
MAX_DEPTH = 8  # sections nest three deep; an anchor that contains itself nests for ever


@dataclass(frozen=True, slots=True)
class Located:
    """A value and its source. ``value`` is a scalar, a dict of str to Located, or a list of Located."""

    value: Any
    source: str


def read_yaml(file: Path) -> dict[str, Located]:
    """The mapping in ``file``; ConfigError when it cannot be read, is no YAML, or repeats a key."""
    try:
        if file.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(f"{file} is larger than 1 MiB: it is no configuration of ours.")
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"There is no file {file}; give --config the path of a YAML file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read: {error}.") from error
    loader = yaml.SafeLoader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return {}
        value = _located(loader, root, file, 0).value
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{file}{line} is no valid YAML: {error.problem}.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} is no valid YAML: {error}.") from error
    finally:
        loader.dispose()
    if not isinstance(value, dict):
        raise ConfigError(f"{file} holds no settings; write lines such as 'cluster_name: my-cluster'.")
    return value


def _located(loader: yaml.SafeLoader, node: yaml.Node, file: Path, depth: int) -> Located:
    source = f"{file}:{node.start_mark.line + 1}"
    if depth > MAX_DEPTH:
        raise ConfigError(f"{source} nests deeper than {MAX_DEPTH} levels; no setting lies so deep.")
    if isinstance(node, yaml.MappingNode):
        return Located(_mapping(loader, node, file, depth), source)
    if isinstance(node, yaml.SequenceNode):
        return Located([_located(loader, item, file, depth + 1) for item in node.value], source)
    return Located(loader.construct_object(node), source)


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode, file: Path, depth: int) -> dict[str, Located]:
    written = [key.value for key, _ in node.value]
    twice = next((key for key, _ in node.value if written.count(key.value) > 1), None)
    if twice is not None:
        raise ConfigError(f"{file}:{twice.start_mark.line + 1} sets {twice.value!r} twice; keep one of them.")
    loader.flatten_mapping(node)
    return {str(key.value): _located(loader, item, file, depth + 1) for key, item in node.value}
