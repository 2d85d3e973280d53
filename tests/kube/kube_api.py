"""Plain calls to a Kubernetes API server: what was answered, status included, for any kind of object it knows."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from kubernetes import client, config

T = TypeVar("T")
Json = dict[str, Any]
CALL_TIMEOUT_S = 30
# Made by controllers for themselves, not by whoever installed something.
BY_CONTROLLERS = {"events", "leases", "endpoints", "endpointslices", "controllerrevisions"}


@dataclass(frozen=True)
class Resource:
    """One resource that API discovery names; ``pods/exec`` is one of its own."""

    group_version: str
    name: str
    kind: str
    namespaced: bool
    verbs: frozenset[str]

    def path(self, namespace: str | None = None, name: str = "") -> str:
        """Its collection, or one object; of all namespaces when none is given."""
        root = f"/api/{self.group_version}" if self.group_version == "v1" else f"/apis/{self.group_version}"
        within = f"/namespaces/{namespace}" if namespace else ""
        collection, _, subresource = self.name.partition("/")
        return "/".join(part for part in (f"{root}{within}/{collection}", name, subresource) if part)


@dataclass(frozen=True)
class Answer:
    status: int
    body: Json

    @property
    def message(self) -> str:
        return str(self.body.get("message", ""))


class KubeApi:
    """Calls as one identity; `as_token` is the same server as another."""

    def __init__(self, configuration: client.Configuration) -> None:
        self._client = client.ApiClient(configuration)
        self.configuration = configuration
        self._resources: list[Resource] | None = None

    @classmethod
    def from_kubeconfig(cls, path: Path) -> KubeApi:
        configuration = client.Configuration()
        config.load_kube_config(config_file=str(path), client_configuration=configuration)
        configuration.retries = False
        return cls(configuration)

    def as_token(self, token: str) -> KubeApi:
        other = client.Configuration(host=self.configuration.host)
        other.ssl_ca_cert, other.verify_ssl = self.configuration.ssl_ca_cert, self.configuration.verify_ssl
        other.retries, other.api_key = False, {"authorization": f"Bearer {token}"}
        return KubeApi(other)

    def call(
        self, method: str, path: str, body: Any = None, content: str = "application/json", **query: object
    ) -> Answer:
        headers = {"Accept": "application/json", "Content-Type": content}
        bearer = self.configuration.auth_settings().get("BearerToken")
        if bearer:  # else a client certificate says who we are
            headers[bearer["key"]] = bearer["value"]
        fields = "&".join(f"{key}={value}" for key, value in query.items())
        response = self._client.rest_client.pool_manager.request(
            method,
            f"{self.configuration.host}{path}" + (f"?{fields}" if fields else ""),
            headers=headers,
            body=None if body is None else json.dumps(body),
            timeout=CALL_TIMEOUT_S,
            redirect=False,
        )
        text = response.data.decode(errors="replace")
        try:
            parsed = json.loads(text)
        except json.JSONDecodeError:
            parsed = {"message": text}
        return Answer(response.status, parsed if isinstance(parsed, dict) else {"message": text})

    def ok(self, method: str, path: str, body: Any = None, **query: object) -> Json:
        content = "application/merge-patch+json" if method == "PATCH" else "application/json"
        answer = self.call(method, path, body, content, **query)
        assert answer.status < 300, f"{method} {path}: {answer.status} {answer.message}"
        return answer.body

    def get(self, path: str, **query: object) -> Json:
        return self.ok("GET", path, **query)

    def minor_version(self) -> int:
        return int(self.get("/version")["gitVersion"].split(".")[1])

    def resources(self) -> list[Resource]:
        """Everything that API discovery knows, in every served version, as of the first call."""
        if self._resources is None:
            self._resources = self._discover()
        return self._resources

    def _discover(self) -> list[Resource]:
        versions = list(self.get("/api")["versions"])
        for group in self.get("/apis")["groups"]:
            versions += [version["groupVersion"] for version in group["versions"]]
        found = []
        for version in versions:
            root = "/api/" if version == "v1" else "/apis/"
            for entry in self.get(f"{root}{version}")["resources"]:
                verbs = frozenset(entry["verbs"])
                found.append(Resource(version, entry["name"], entry["kind"], entry["namespaced"], verbs))
        return found

    def resource_of(self, rendered: Json) -> Resource:
        """The resource that a manifest is an object of."""
        version, kind = rendered["apiVersion"], rendered["kind"]
        for resource in self.resources():
            if (resource.group_version, resource.kind) == (version, kind) and "/" not in resource.name:
                return resource
        raise AssertionError(f"{version} {kind} is unknown to the server")

    def objects(self, namespace: str, leave_out: Iterable[str] = BY_CONTROLLERS) -> dict[str, Json]:
        """``kind/name`` -> object, for every kind that a namespace can hold."""
        found: dict[str, Json] = {}
        for resource in self.resources():
            listable = resource.namespaced and "list" in resource.verbs and "/" not in resource.name
            if listable and resource.name not in leave_out:
                for item in self.get(resource.path(namespace))["items"]:
                    # Listed once however many versions serve it; the first is the preferred one.
                    found.setdefault(f"{resource.kind}/{item['metadata']['name']}", {"kind": resource.kind, **item})
        return found

    def pods(self, namespace: str, **labels: str) -> list[Json]:
        """Pods that are not on their way out."""
        selector = ",".join(f"{key}={value}" for key, value in labels.items())
        items = self.get(f"/api/v1/namespaces/{namespace}/pods", labelSelector=selector)["items"]
        return [pod for pod in items if "deletionTimestamp" not in pod["metadata"]]

    def token_of(self, namespace: str, account: str) -> str:
        path = f"/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token"
        request = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"expirationSeconds": 600}}
        return str(self.ok("POST", path, request)["status"]["token"])


def until(what: Callable[[], T], deadline_s: float = 60, told: Callable[[], object] = lambda: "") -> T:
    """What ``what`` returns as soon as that is true."""
    end, pause = time.monotonic() + deadline_s, threading.Event()
    while not (result := what()):
        assert time.monotonic() < end, f"not within {deadline_s} s: {told() or what()}"
        pause.wait(0.1)
    return result
