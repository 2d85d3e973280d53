"""Strict schemas of Kubernetes' own objects (from kubernetes-validate) and of custom resources (from their definitions)."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import yaml
from importlib_resources import files
from jsonschema import Draft202012Validator
from referencing import Registry, Resource

VERSIONS = tuple(f"1.{minor}" for minor in range(29, 38))
CRDS = Path(__file__).parent / "crds"


@functools.cache
def _definitions(version: str) -> Registry:
    text = (_folder(version) / "_definitions.json").read_text()
    return Resource.from_contents(json.loads(text)) @ Registry()


def _folder(version: str) -> Any:
    return files("kubernetes_validate") / "kubernetes-json-schema" / f"v{version}.0-local-strict"


@functools.cache
def _validator(version: str, api_version: str, kind: str) -> Draft202012Validator:
    # rbac.authorization.k8s.io/v1 is filed as rbac-v1
    group = re.sub(r"^([^./]*)(?:\.[^/]*)?/", r"\1-", api_version)
    file = _folder(version) / f"{kind.lower()}-{group}.json"
    assert file.is_file(), f"Kubernetes {version} knows no {kind} of {api_version}"
    schema = json.loads(file.read_text())
    return Draft202012Validator(schema, registry=Resource.from_contents(schema) @ _definitions(version))


@functools.cache
def _custom() -> dict[tuple[str, str], Draft202012Validator]:
    found = {}
    for path in sorted(CRDS.glob("*.yaml")):
        spec = yaml.load(path.read_text(), yaml.CSafeLoader)["spec"]
        for version in spec["versions"]:
            schema = _strict(version["schema"]["openAPIV3Schema"])
            schema["properties"]["metadata"] = {"type": "object"}  # the API server's own business
            found[f"{spec['group']}/{version['name']}", spec["names"]["kind"]] = Draft202012Validator(schema)
    return found


def _strict(schema: Any) -> Any:
    """A definition's structural schema as JSON schema in which an unknown field is an error."""
    if not isinstance(schema, dict):
        return schema
    strict = {key: value for key, value in schema.items() if not key.startswith("x-kubernetes-")}
    if schema.get("x-kubernetes-int-or-string"):
        strict.pop("type", None)
        strict.setdefault("anyOf", [{"type": "integer"}, {"type": "string"}])
    if schema.get("nullable") and "type" in strict:
        strict["type"] = [strict["type"], "null"]
    if "items" in strict:
        strict["items"] = _strict(strict["items"])
    if "properties" in strict:
        strict["properties"] = {key: _strict(value) for key, value in strict["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            strict.setdefault("additionalProperties", False)
    if isinstance(strict.get("additionalProperties"), dict):
        strict["additionalProperties"] = _strict(strict["additionalProperties"])
    return strict


def is_custom(manifest: dict[str, Any]) -> bool:
    return (manifest["apiVersion"], manifest["kind"]) in _custom()


def problems(manifest: dict[str, Any], version: str) -> list[str]:
    """Everything that the API server of ``version`` would refuse; an assertion for a kind that it does not know."""
    key = (manifest["apiVersion"], manifest["kind"])
    validator = _custom().get(key) or _validator(version, *key)
    return [f"{'/'.join(map(str, error.path))}: {error.message}" for error in validator.iter_errors(manifest)]
