"""``values.yaml``, ``values.schema.json`` and the table of every value, from ``values_model``."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from typing import Any, NamedTuple, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ops.generators.values_model import Section, Values, WorkerGroup

CHART = "helm/llm-cluster"
WIDTH = 118
_HEADER = """\
The values of the chart llm-cluster. Written by ops/generate; edit ops/generators/values_model.py.
What is a setting of the product has the same name as in the configuration file (snake_case).
An unknown key is an error. A list replaces the list below as a whole."""


class ValueRow(NamedTuple):
    """One value: its dotted path (``workers[].name`` inside a list), its type, its default and its meaning."""

    path: str
    type: str
    default: str
    description: str


def files() -> dict[str, str]:
    return {
        f"{CHART}/values.yaml": values_yaml(),
        f"{CHART}/values.schema.json": json.dumps(values_schema(), indent=2) + "\n",
        f"{CHART}/files/worker-group.json": json.dumps(_group_defaults(), indent=2) + "\n",
        f"{CHART}/files/needed.json": json.dumps(list(needed_paths(Values(), "")), indent=2) + "\n",
    }


# ---- the schema ----


def values_schema() -> dict[str, Any]:
    """JSON schema of the values, draft 7, without references: there a reference would hide its description."""
    schema = Values.model_json_schema(by_alias=True)
    definitions = schema.pop("$defs")
    properties = _plain(schema, definitions)
    # Helm hands every chart the values of its parents.
    properties["properties"]["global"] = {"type": "object", "description": "Values of parent charts; not used."}
    return {"$schema": "http://json-schema.org/draft-07/schema#", **properties}


def _plain(node: Any, definitions: dict[str, Any]) -> Any:
    if isinstance(node, list):
        return [_plain(item, definitions) for item in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        node = {**definitions[node["$ref"].rpartition("/")[2]], **{k: v for k, v in node.items() if k != "$ref"}}
    plain = {key: _plain(value, definitions) for key, value in node.items() if key not in {"title", "properties"}}
    if isinstance(node.get("title"), dict):  # a value that is called title
        plain["title"] = _plain(node["title"], definitions)
    if "properties" in node:
        plain["properties"] = {key: _plain(value, definitions) for key, value in node["properties"].items()}
    if "prefixItems" in plain:
        plain["items"] = plain.pop("prefixItems")
        plain["additionalItems"] = False
    if "properties" in plain or "properties" in plain.get("items", ()):
        plain.pop("default", None)  # the parts have their own
    return plain


def _group_defaults() -> dict[str, Any]:
    """Of a worker group: Helm does not merge the items of a list, so the templates do."""
    return WorkerGroup(name="defaults").model_dump(mode="json", by_alias=True, exclude={"name"})


def needed_paths(section: Section, prefix: str) -> Iterator[str]:
    """What must not be null: sections, and values whose default says something. A null elsewhere means empty."""
    for name, info in _fields(type(section)):
        value, path = getattr(section, name), f"{prefix}{info.alias or name}"
        if isinstance(value, BaseModel):
            yield path
            if isinstance(value, Section):
                yield from needed_paths(value, f"{path}.")
        elif value:
            yield path


# ---- the table ----


def value_rows() -> list[ValueRow]:
    """Every value that can be set, in the order of ``values.yaml``."""
    return list(_rows(Values, Values(), values_schema(), ""))


def _rows(section: type[BaseModel], value: BaseModel | None, schema: dict[str, Any], prefix: str) -> Iterator[ValueRow]:
    for name, info in _fields(section):
        key = info.alias or name
        found = schema["properties"][key]
        kind, inner = _section_of(info), info.default if value is None else getattr(value, name)
        if kind is not None and not _is_list(info):
            yield from _rows(kind, inner, found, f"{prefix}{key}.")
            continue
        default = "needed" if info.is_required() else json.dumps(_dumped(inner))
        yield ValueRow(f"{prefix}{key}", _type(found), default, found["description"])
        if kind is not None:
            yield from _rows(kind, None, found["items"], f"{prefix}{key}[].")


def _type(schema: dict[str, Any]) -> str:
    if "anyOf" in schema:
        kinds = [_type(option) for option in schema["anyOf"] if option.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    if "enum" in schema:
        return " or ".join(json.dumps(value) for value in schema["enum"])
    if schema["type"] == "array":
        items = schema["items"]
        return f"list of {_type(items)}s" if isinstance(items, dict) else f"{len(items)} {_type(items[0])}s"
    return str(schema["type"])


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "needed"
    whole = info.default.model_dump(by_alias=True) if isinstance(info.default, BaseModel) else info.default
    return json.dumps(whole)


# ---- values.yaml ----


def values_yaml() -> str:
    lines = [f"# {line}" for line in _HEADER.splitlines()]
    for name, info in _fields(Values):
        lines += ["", *_entry(name, info, info.default, 0)]
    return "\n".join(lines) + "\n"


def _entry(name: str, info: FieldInfo, value: Any, depth: int) -> list[str]:
    indent, key = "  " * depth, info.alias or name
    lines = _comment(_meaning(info), indent)
    kind = _section_of(info)
    if kind is not None and _is_list(info):
        return [*lines, *_item_settings(kind, indent), *_block(key, [_dumped(item) for item in value], indent)]
    if isinstance(value, Section):
        lines.append(f"{indent}{key}:")
        for inner, inner_info in _fields(type(value)):
            lines += _entry(inner, inner_info, getattr(value, inner), depth + 1)
        return lines
    if isinstance(value, BaseModel):
        lines.append(f"{indent}{key}: {{}}")
        return lines + [
            line
            for inner, inner_info in _fields(type(value))
            for line in _comment(f"{inner}: {_default(inner_info)}  # {_meaning(inner_info)}", f"{indent}  ")
        ]
    return [*lines, *_block(key, _dumped(value), indent)]


def _item_settings(kind: type[BaseModel], indent: str) -> list[str]:
    """The settings of a list's items, as comments: what an item does not say has its default."""
    lines = [f"{indent}# Settings of an item, with their defaults:"]
    for name, info in _fields(kind):
        lines += _comment(f"{info.alias or name}: {_default(info)}  # {_meaning(info)}", indent, "  ")
    return lines


def _block(key: str, value: Any, indent: str) -> list[str]:
    if isinstance(value, dict | list) and value:
        text = yaml.safe_dump({key: value}, sort_keys=False, default_flow_style=False, width=WIDTH)
        return textwrap.indent(text, indent).splitlines()
    return [f"{indent}{key}: {json.dumps(value)}"]


def _comment(text: str, indent: str, inside: str = "") -> list[str]:
    start = f"{indent}# {inside}"
    return textwrap.wrap(text, WIDTH, initial_indent=start, subsequent_indent=f"{start}  " if inside else start)


# ---- what a field says ----


def _fields(section: type[BaseModel]) -> list[tuple[str, FieldInfo]]:
    """A section's own fields, then those that it shares with others."""
    own = section.__annotations__
    return sorted(section.model_fields.items(), key=lambda field: field[0] not in own)


def _meaning(info: FieldInfo) -> str:
    assert info.description, info
    return info.description


def _is_list(info: FieldInfo) -> bool:
    return get_origin(info.annotation) is tuple


def _section_of(info: FieldInfo) -> type[BaseModel] | None:
    """The section that a field holds, itself or as the items of a list."""
    kind: Any = get_args(info.annotation)[0] if _is_list(info) else info.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _dumped(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", by_alias=True, exclude_unset=True)
    return [_dumped(item) for item in value] if isinstance(value, tuple) else value
