"""What the release's service accounts may do, by asking the server and by doing it: nearly nothing.

Every cluster lets every account ask who it is and what the API looks like, so each account is compared with one that
nobody gave anything: what it can do beyond that is what the chart gave it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.kube.chart_values import EVERYTHING_OFF, EVERYTHING_ON, Values
from tests.kube.kube_api import Json, KubeApi, Resource
from tests.kube.releases import Site, by_kind, component_of

pytestmark = pytest.mark.timeout(600, func_only=True)
NOBODY = "nobody"
ABSENT = "does-not-exist"
# A verb as API discovery names it -> how it is called. Whoever may not do it is refused before the object is looked for.
CALLS: dict[str, tuple[str, str, dict[str, object]]] = {
    "get": ("GET", ABSENT, {}),
    "list": ("GET", "", {"limit": 1}),
    "watch": ("GET", "", {"watch": 1, "timeoutSeconds": 1, "limit": 1}),
    "create": ("POST", "", {"dryRun": "All"}),
    "update": ("PUT", ABSENT, {"dryRun": "All"}),
    "patch": ("PATCH", ABSENT, {"dryRun": "All"}),
    "delete": ("DELETE", ABSENT, {"dryRun": "All"}),
    "deletecollection": ("DELETE", "", {"dryRun": "All", "labelSelector": f"{ABSENT}=yes"}),
}
Attempt = tuple[str, str, str]  # verb, resource in its group and version, where


def attempts(resources: list[Resource], namespaces: tuple[str, ...]) -> Iterator[tuple[Attempt, Resource, str | None]]:
    for resource in resources:
        # All namespaces at once is a right of its own.
        places = (*namespaces, None) if resource.namespaced else (None,)
        for place in places:
            for verb in sorted(resource.verbs & CALLS.keys()):
                collective = verb in {"list", "watch"}
                if place or collective or not resource.namespaced:
                    yield (verb, f"{resource.group_version}/{resource.name}", place or "everywhere"), resource, place


def allowed(api: KubeApi, resources: list[Resource], namespaces: tuple[str, ...]) -> set[Attempt]:
    """By real calls. 403 is a no; every other answer (not found, no such field, done) is a yes."""
    return {
        attempt
        for attempt, resource, place in attempts(resources, namespaces)
        if not refused(api, attempt[0], resource, place)
    }


def refused(api: KubeApi, verb: str, resource: Resource, place: str | None) -> bool:
    method, name, query = CALLS[verb]
    if "/" in resource.name:
        name = ABSENT
    content = "application/merge-patch+json" if method == "PATCH" else "application/json"
    body = {} if method in {"POST", "PUT", "PATCH"} else None
    answer = api.call(method, resource.path(place, name), body, content, **query)
    assert answer.status != 401, "the token was not accepted, so nothing would be proven"
    return answer.status == 403


def rules(api: KubeApi, namespace: str) -> list[Json]:
    """What the server says that this identity may do in a namespace."""
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectRulesReview",
        "spec": {"namespace": namespace},
    }
    status = api.ok("POST", "/apis/authorization.k8s.io/v1/selfsubjectrulesreviews", review)["status"]
    assert not status["incomplete"]
    return sorted([*status["resourceRules"], *status["nonResourceRules"]], key=str)


class Accounts:
    """The release's accounts by component, and one with no rights of its own, all with real tokens."""

    def __init__(self, site: Site, values: Values) -> None:
        rendered = site.install(values)
        self.site = site
        account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": NOBODY}}
        site.api.ok("POST", f"/api/v1/namespaces/{site.namespace}/serviceaccounts", account)
        self.nobody = self.as_account(NOBODY)
        self.of_release = {
            component_of(one): self.as_account(one["metadata"]["name"]) for one in by_kind(rendered, "ServiceAccount")
        }
        self.resources = site.api.resources()
        self.namespaces = (site.namespace, "kube-system")

    def as_account(self, name: str) -> KubeApi:
        return self.site.api.as_token(self.site.api.token_of(self.site.namespace, name))

    def beyond_nobody(self, component: str) -> set[Attempt]:
        arguments = self.resources, self.namespaces
        return allowed(self.of_release[component], *arguments) - allowed(self.nobody, *arguments)

    def rules_beyond_nobody(self, component: str) -> list[Any]:
        granted = rules(self.nobody, self.site.namespace)
        return [rule for rule in rules(self.of_release[component], self.site.namespace) if rule not in granted]


@pytest.fixture
def accounts(site: Site) -> Accounts:
    return Accounts(site, EVERYTHING_ON)


def test_the_controller_may_read_the_pods_of_its_namespace_and_nothing_else(accounts: Accounts) -> None:
    here = accounts.site.namespace
    assert accounts.beyond_nobody("controller") == {(verb, "v1/pods", here) for verb in ("get", "list", "watch")}
    (rule,) = accounts.rules_beyond_nobody("controller")
    assert set(rule["verbs"]) == {"get", "list", "watch"}
    assert (rule["apiGroups"], rule["resources"], rule.get("resourceNames", [])) == ([""], ["pods"], [])


def test_no_other_account_of_the_release_may_do_anything(accounts: Accounts) -> None:
    others = sorted(accounts.of_release.keys() - {"controller"})
    assert {"router", "worker"} <= set(others)
    assert {component: accounts.beyond_nobody(component) for component in others} == {c: set() for c in others}
    assert {component: accounts.rules_beyond_nobody(component) for component in others} == {c: [] for c in others}


def test_every_pod_runs_as_an_account_that_was_judged(accounts: Accounts) -> None:
    site = accounts.site
    names = {one["metadata"]["name"] for one in site.objects().values() if one["kind"] == "ServiceAccount"}
    site.until_pods(controller=1)
    used = {pod["spec"]["serviceAccountName"] for pod in site.api.pods(site.namespace)}
    assert used <= names - {"default", NOBODY}


def test_without_rbac_the_controller_may_do_nothing_either(site: Site) -> None:
    accounts = Accounts(site, EVERYTHING_OFF)
    assert accounts.beyond_nobody("controller") == set()


def test_the_probe_sees_a_right_that_was_given(accounts: Accounts) -> None:
    """Otherwise the tests above could not fail."""
    site = accounts.site
    path = f"/apis/rbac.authorization.k8s.io/v1/namespaces/{site.namespace}"
    rule = {"apiGroups": [""], "resources": ["pods/exec", "secrets"], "verbs": ["create", "delete"]}
    site.api.ok("POST", f"{path}/roles", {"metadata": {"name": "too-much"}, "rules": [rule]})
    binding = {
        "metadata": {"name": "too-much"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "too-much"},
        "subjects": [{"kind": "ServiceAccount", "name": NOBODY, "namespace": site.namespace}],
    }
    before = allowed(accounts.nobody, accounts.resources, accounts.namespaces)
    site.api.ok("POST", f"{path}/rolebindings", binding)
    gained = allowed(accounts.nobody, accounts.resources, accounts.namespaces) - before
    here = site.namespace
    assert gained == {
        ("create", "v1/pods/exec", here), ("create", "v1/secrets", here), ("delete", "v1/secrets", here),
    }  # fmt: skip
