"""Adapter: pods of one namespace through the official client. It lists once, then watches."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import kubernetes.client
import kubernetes.config
import kubernetes.watch
import urllib3.exceptions

from cluster.kube.pod_watch import PodEvent, PodList, PodsUnavailable, VersionGone
from cluster.kube.pods import pod_state

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
CONNECT_DEADLINE_S = 5.0
LIST_DEADLINE_S = 30.0
# The server ends a watch after this; going on costs one request. A silent network is noticed a little later.
WATCH_S = 240
WATCH_MARGIN_S = 20.0
_GONE = 410


class KubePods:
    """Implements ``PodSource``: the pods with ``selector``'s labels in ``namespace``."""

    def __init__(self, api: Any, namespace: str, selector: str, watch_s: int = WATCH_S) -> None:
        self._api, self._namespace, self._selector, self._watch_s = api, namespace, selector, watch_s
        self._watch: Any = None

    def list_pods(self) -> PodList:
        with _translated("listed"):
            response = self._ask(_request_timeout=(CONNECT_DEADLINE_S, LIST_DEADLINE_S), _preload_content=False)
            if not 200 <= response.status <= 299:  # only the client's older versions say so themselves
                raise kubernetes.client.exceptions.ApiException(http_resp=response)
            found = json.loads(response.data)
        return PodList(tuple(pod_state(pod) for pod in found.get("items") or ()), found["metadata"]["resourceVersion"])

    def watch_pods(self, version: str) -> Iterator[PodEvent]:
        self._watch = watch = kubernetes.watch.Watch()
        # Without a return type to look up, the watch leaves objects as they came.
        with _translated("watched"):
            for event in watch.stream(
                lambda **options: self._ask(**options),
                resource_version=version,
                allow_watch_bookmarks=True,
                timeout_seconds=self._watch_s,
                _request_timeout=(CONNECT_DEADLINE_S, self._watch_s + WATCH_MARGIN_S),
            ):
                if event is not None:  # a line that is no JSON
                    yield _event(event["type"], event["raw_object"])

    def close(self) -> None:
        if self._watch is not None:
            self._watch.stop()

    def _ask(self, **options: Any) -> Any:
        return self._api.list_namespaced_pod(self._namespace, label_selector=self._selector, **options)


def _event(kind: str, pod: Mapping[str, Any]) -> PodEvent:
    version = str(pod["metadata"]["resourceVersion"])
    if kind == "BOOKMARK":
        return PodEvent(version)
    if kind == "DELETED":
        return PodEvent(version, gone=str(pod["metadata"]["name"]))
    return PodEvent(version, pod=pod_state(pod))


@contextmanager
def _translated(done: str) -> Iterator[None]:
    try:
        yield
    except kubernetes.client.exceptions.ApiException as error:
        if error.status == _GONE:
            raise VersionGone("the version to watch from is gone") from error
        raise PodsUnavailable(f"worker pods cannot be {done}: {_said(error)}") from error
    except (urllib3.exceptions.HTTPError, OSError) as error:
        raise PodsUnavailable(f"worker pods cannot be {done}: {_broken(error)}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PodsUnavailable(f"worker pods cannot be {done}: the answer is no list of pods ({error!r})") from error


def _broken(error: Exception) -> str:
    """What kind of failure; urllib3 wraps it once more when it does not try again."""
    return type(getattr(error, "reason", None) or error).__name__


def _said(error: Any) -> str:
    """The API's own sentence; it names who may not do what."""
    try:
        return str(json.loads(error.body)["message"])
    except (TypeError, ValueError, KeyError):
        return f"{error.status} {error.reason}"


def connect(selector: str, environment: Mapping[str, str] = os.environ, account: Path = SERVICE_ACCOUNT) -> KubePods:
    """Pods of the namespace that this process runs in, by its ServiceAccount; else by ``KUBECONFIG``.

    PodsUnavailable when neither is there, or it cannot be read.
    """
    inside = bool(environment.get("KUBERNETES_SERVICE_HOST")) and (account / "token").is_file()
    if not inside and not environment.get("KUBECONFIG"):
        raise PodsUnavailable("this process runs outside Kubernetes, or its pod has no token of a ServiceAccount")
    found = kubernetes.client.Configuration()
    try:
        namespace = _configure(found, environment, account) if inside else _read_file(found, environment["KUBECONFIG"])
    except Exception as error:  # boundary: on a strange file the library's reader breaks in many ways
        raise PodsUnavailable(f"the Kubernetes API cannot be reached from here: {error}") from error
    found.retries = urllib3.Retry(0)  # our own loop waits and tries again
    return KubePods(kubernetes.client.CoreV1Api(kubernetes.client.ApiClient(found)), namespace, selector)


def _configure(found: Any, environment: Mapping[str, str], account: Path) -> str:
    """From the mounted ServiceAccount, whose token is read again when it is rotated; returns the namespace."""
    loader = kubernetes.config.incluster_config.InClusterConfigLoader(
        token_filename=str(account / "token"), cert_filename=str(account / "ca.crt"), environ=dict(environment)
    )
    loader.load_and_set(found)
    return (account / "namespace").read_text(encoding="utf-8").strip()


def _read_file(found: Any, path: str) -> str:
    kubernetes.config.load_kube_config(path, client_configuration=found)
    _, active = kubernetes.config.list_kube_config_contexts(path)
    return str(active["context"].get("namespace", "default"))
