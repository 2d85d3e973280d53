"""The restricted Pod Security Standard as a table: each rule names what of a pod breaks it.

The rules are those of https://kubernetes.io/docs/concepts/security/pod-security-standards/ (baseline and restricted).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

Pod = dict[str, Any]
VOLUMES = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
}
SYSCTLS = {
    "kernel.shm_rmid_forced",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.tcp_syncookies",
    "net.ipv4.ping_group_range",
    "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
}
SELINUX_TYPES = {"", "container_t", "container_init_t", "container_kvm_t", "container_engine_t"}
PROFILES = {"RuntimeDefault", "Localhost"}
APPARMOR = "container.apparmor.security.beta.kubernetes.io/"


def _containers(pod: Pod) -> list[dict[str, Any]]:
    spec = pod["spec"]
    return [*spec.get("initContainers", []), *spec["containers"], *spec.get("ephemeralContainers", [])]


def _contexts(pod: Pod) -> list[dict[str, Any]]:
    """The pod's security context and that of each container."""
    return [part.get("securityContext", {}) for part in (pod["spec"], *_containers(pod))]


def _effective(pod: Pod, key: str) -> Iterator[Any]:
    """What holds for each container: its own word, else the pod's."""
    ofall = pod["spec"].get("securityContext", {}).get(key)
    for container in _containers(pod):
        yield container.get("securityContext", {}).get(key, ofall)


def _hooks(container: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield from (container.get(name, {}) for name in ("startupProbe", "livenessProbe", "readinessProbe"))
    yield from container.get("lifecycle", {}).values()


def _host_process(pod: Pod) -> bool:
    return any(context.get("windowsOptions", {}).get("hostProcess") for context in _contexts(pod))


def _host_namespaces(pod: Pod) -> bool:
    return any(pod["spec"].get(name) for name in ("hostNetwork", "hostPID", "hostIPC"))


def _privileged(pod: Pod) -> bool:
    return any(context.get("privileged") for context in _contexts(pod))


def _capabilities(pod: Pod) -> bool:
    found = [container.get("securityContext", {}).get("capabilities", {}) for container in _containers(pod)]
    return any("ALL" not in has.get("drop", []) or set(has.get("add", [])) - {"NET_BIND_SERVICE"} for has in found)


def _host_path(pod: Pod) -> bool:
    return any("hostPath" in volume for volume in pod["spec"].get("volumes", []))


def _volume_types(pod: Pod) -> bool:
    kinds = {kind for volume in pod["spec"].get("volumes", []) for kind in volume if kind not in {"name", "hostPath"}}
    return bool(kinds - VOLUMES)


def _host_ports(pod: Pod) -> bool:
    return any(port.get("hostPort") for container in _containers(pod) for port in container.get("ports", []))


def _host_of_probes(pod: Pod) -> bool:
    hooks = [hook for container in _containers(pod) for hook in _hooks(container)]
    return any(hook.get(how, {}).get("host") for hook in hooks for how in ("httpGet", "tcpSocket"))


def _apparmor(pod: Pod) -> bool:
    annotations = pod.get("metadata", {}).get("annotations", {})
    named = [value for key, value in annotations.items() if key.startswith(APPARMOR)]
    profiles = [context["appArmorProfile"]["type"] for context in _contexts(pod) if "appArmorProfile" in context]
    return any(name != "runtime/default" and not name.startswith("localhost/") for name in named) or bool(
        set(profiles) - PROFILES
    )


def _selinux(pod: Pod) -> bool:
    options = [context.get("seLinuxOptions", {}) for context in _contexts(pod)]
    return any(o.get("type", "") not in SELINUX_TYPES or o.get("user") or o.get("role") for o in options)


def _proc_mount(pod: Pod) -> bool:
    return any(context.get("procMount", "Default") != "Default" for context in _contexts(pod))


def _seccomp(pod: Pod) -> bool:
    everywhere = [context["seccompProfile"]["type"] for context in _contexts(pod) if "seccompProfile" in context]
    return bool(set(everywhere) - PROFILES) or any(found is None for found in _effective(pod, "seccompProfile"))


def _sysctls(pod: Pod) -> bool:
    return bool({found["name"] for found in pod["spec"].get("securityContext", {}).get("sysctls", [])} - SYSCTLS)


def _escalation(pod: Pod) -> bool:
    return any(c.get("securityContext", {}).get("allowPrivilegeEscalation") is not False for c in _containers(pod))


def _non_root(pod: Pod) -> bool:
    return any(found is not True for found in _effective(pod, "runAsNonRoot"))


def _user(pod: Pod) -> bool:
    return any(context.get("runAsUser") == 0 for context in _contexts(pod))


RULES: dict[str, Callable[[Pod], bool]] = {
    "host process": _host_process,
    "host namespaces": _host_namespaces,
    "privileged": _privileged,
    "capabilities": _capabilities,
    "host path": _host_path,
    "volume types": _volume_types,
    "host ports": _host_ports,
    "host of probes": _host_of_probes,
    "AppArmor": _apparmor,
    "SELinux": _selinux,
    "proc mount": _proc_mount,
    "seccomp": _seccomp,
    "sysctls": _sysctls,
    "privilege escalation": _escalation,
    "non-root": _non_root,
    "user": _user,
}


def broken_rules(pod: Pod) -> set[str]:
    """The names of the rules that ``pod`` (its metadata and spec) breaks."""
    return {name for name, breaks in RULES.items() if breaks(pod)}
