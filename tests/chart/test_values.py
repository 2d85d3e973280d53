"""The values' schema is that of the configuration, keeps every description, and Helm holds users to it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from chart_harness import AUTH, CHART, HelmError, Manifest, config_file, merged, refusal, render
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft7Validator

import cluster
from cluster.config.load import load_config
from cluster.config.schema import ClusterConfig, ControllerConfig, ModelConfig, RouterConfig
from ops.generators.values import value_rows, values_schema
from ops.generators.values_model import SET_BY_THE_CHART, Values

SCHEMA: dict[str, Any] = json.loads((CHART / "values.schema.json").read_text())
Path = tuple[str, ...]


def walk(schema: dict[str, Any], path: Path = ()) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Every part of the schema with its path; ``[]`` is an item of a list."""
    yield path, schema
    for name, part in schema.get("properties", {}).items():
        yield from walk(part, (*path, name))
    if isinstance(schema.get("items"), dict):
        yield from walk(schema["items"], (*path, "[]"))


PARTS = dict(walk(SCHEMA))
SECTIONS = {path: part for path, part in PARTS.items() if "properties" in part}
LEAVES = {
    path: part for path, part in PARTS.items() if path and path[-1] != "[]" and not any(path == p[:-1] for p in PARTS)
}
# What an item of a list needs to be one.
ITEMS = {"models": {"model": "demo"}, "workers": {"name": "workers"}}


def at(path: Path, value: Any) -> dict[str, Any]:
    """Values that hold ``value`` at ``path`` and nothing else that is needed there."""
    if not path:
        assert isinstance(value, dict)
        return value
    first, *rest = path
    if rest[:1] == ["[]"]:
        item = ITEMS.get(first, {})
        return {first: [{**item, **at(tuple(rest[1:]), value)} if rest[1:] else {**item, **value}]}
    return {first: at(tuple(rest), value)} if rest else {first: value}


def test_it_is_a_schema_of_draft_7_without_references():
    Draft7Validator.check_schema(SCHEMA)
    assert "draft-07" in SCHEMA["$schema"]
    assert "$ref" not in json.dumps(SCHEMA)


def test_it_is_written_from_the_model():
    assert values_schema() == SCHEMA


@pytest.mark.parametrize(
    ("path", "section", "ours"),
    [
        (("models", "[]"), ModelConfig, frozenset()),
        (("config", "router"), RouterConfig, SET_BY_THE_CHART["router"]),
        (("config", "controller"), ControllerConfig, SET_BY_THE_CHART["controller"]),
    ],
)
def test_settings_have_the_names_and_bounds_of_the_configuration_file(path: Path, section: Any, ours: frozenset[str]):
    found = PARTS[path]["properties"]
    whole = section.model_json_schema()["properties"]
    assert set(found) == set(whole) - ours
    assert ours < set(whole)
    for name, part in found.items():
        if name == "drain_deadline_s":
            continue  # its default is derived
        for key in ("minimum", "maximum", "exclusiveMinimum", "enum", "default", "type", "minLength", "description"):
            assert part.get(key) == whole[name].get(key), (name, key)
        options = [{k: v for k, v in option.items() if k != "title"} for option in whole[name].get("anyOf", [])]
        assert part.get("anyOf", []) == options, name


def test_every_part_of_the_configuration_file_is_somewhere():
    assert set(ClusterConfig.model_fields) - {"run_dir"} == {"cluster_name", "models", "router", "controller"}
    assert {"clusterName", "models", "config"} < set(SCHEMA["properties"])


def test_every_value_is_described_and_has_a_default():
    rows = {row.path: row for row in value_rows()}
    assert len(rows) == len(value_rows())
    leaves = {".".join(path).replace(".[]", "[]") for path in LEAVES} - {"global"}
    assert leaves <= set(rows)
    assert [path for path, row in rows.items() if len(row.description) < 10 or "|" in row.description] == []
    assert {path for path, row in rows.items() if row.default == "needed"} == {"models[].model", "workers[].name"}
    assert all(part.get("description") for path, part in PARTS.items() if path and path[-1] != "[]")


def test_values_yaml_holds_the_defaults_of_the_model():
    written = yaml.safe_load((CHART / "values.yaml").read_text())
    assert Values.model_validate(written) == Values()
    assert set(written) == set(SCHEMA["properties"]) - {"global"}
    assert written["models"] == [{"model": "demo"}]
    defaults = Values().model_dump(mode="json", by_alias=True)
    for name, value in written.items():
        if name not in ("models", "workers", "config"):
            assert value == defaults[name], name


def test_the_chart_has_the_version_of_the_product():
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == chart["version"] == cluster.__version__
    assert chart["kubeVersion"] == ">=1.20.0-0"
    assert chart["apiVersion"] == "v2"


@pytest.mark.parametrize("path", SECTIONS, ids=".".join)
def test_an_unknown_key_is_refused(path: Path):
    said = refusal(merged(AUTH, at(path, {"unheardOf": 1})))
    assert "unheardOf" in said


def wrong(part: dict[str, Any]) -> Any:
    kinds = {part.get("type"), *(option.get("type") for option in part.get("anyOf", []))}
    return next(value for kind, value in (("object", {}), ("array", []), ("boolean", True)) if kind not in kinds)


@pytest.mark.parametrize("path", LEAVES, ids=".".join)
def test_a_value_of_another_type_is_refused(path: Path):
    said = refusal(merged(AUTH, at(path, wrong(LEAVES[path]))))
    assert path[-1] in said
    assert "schema" in said


@pytest.mark.parametrize(
    "values",
    [
        {"models": [{"replicas": 1}]},
        {"workers": [{"replicas": 1}]},
        {"workers": [{"name": "No Name"}]},
        {"workers": [{"name": "a", "memory": "8 GB"}]},
        {"workers": [{"name": "a", "devicesPerPod": 0}]},
        {"models": [{"model": "demo", "device_memory_utilization": 1.5}]},
        {"config": {"router": {"port": 1}}},
        {"config": {"controller": {"host": "0.0.0.0"}}},
        {"config": {"run_dir": "/x"}},
        {"image": {"tag": "latest"}},
        {"auth": {"token": "short"}},
        {"network": {"ephemeralPorts": "1-2"}},
        {"modelVolume": {"type": "nfs"}},
    ],
    ids=str,
)
def test_what_cannot_work_is_refused_by_the_schema(values: dict):
    assert "schema" in refusal(merged(AUTH, values))


def test_values_of_a_parent_chart_are_let_through():
    assert render({**AUTH, "global": {"anything": 1}})


def plain(part: dict[str, Any]) -> st.SearchStrategy[Any] | None:
    """Values that the schema allows, for the simple types."""
    if "enum" in part:
        return st.sampled_from(part["enum"])
    low = part.get("minimum", part.get("exclusiveMinimum", 0) + 1)
    match part.get("type"):
        case "boolean":
            return st.booleans()
        case "integer":
            return st.integers(low, min(part.get("maximum", 50_000), 50_000))
        case "number":
            return st.integers(int(low), int(part.get("maximum", 50_000)))
    return None


SIMPLE = {
    path: strategy
    for path, part in LEAVES.items()
    if "[]" not in path
    and path[0] not in ("auth", "modelVolume", "serviceAccount")
    and (strategy := plain(part)) is not None
}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.dictionaries(st.sampled_from(sorted(SIMPLE)), st.none(), min_size=1, max_size=6).flatmap(
        lambda chosen: st.fixed_dictionaries({path: SIMPLE[path] for path in chosen})
    )
)
def test_whatever_the_schema_allows_renders_or_is_refused_in_a_sentence(
    tmp_path_factory: pytest.TempPathFactory, chosen: dict[Path, Any]
):
    values = merged(AUTH, *(at(path, value) for path, value in chosen.items()))
    if objects := rendered_or_nothing(values):
        assert {"StatefulSet", "Deployment", "ConfigMap"} <= {found["kind"] for found in objects}
        file = tmp_path_factory.getbasetemp() / "whatever.yaml"
        file.write_text(config_file(objects))
        assert load_config(file, {}, {}).config.cluster_name == "demo-llm-cluster"
    else:
        said = refusal(values)
        assert "execution error at" in said
        assert "; " in said


def rendered_or_nothing(values: dict[str, Any]) -> list[Manifest]:
    try:
        return render(values)
    except HelmError:
        return []
