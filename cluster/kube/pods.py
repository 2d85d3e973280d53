"""Why worker pods do not run, in one bounded sentence. Pure: pods come as the API's JSON objects."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

# What one sentence may hold at most: reasons, pods named for each, characters of somebody else's message.
MAX_REASONS = 3
MAX_NAMES = 2
MAX_MESSAGE = 240

Json = Mapping[str, Any]

# A container's waiting reason -> what it means; others are quoted.
_IMAGE_REASONS = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "RegistryUnavailable")
_CREATING = ("ContainerCreating", "PodInitializing")


@dataclass(frozen=True, slots=True)
class PodState:
    """A pod, and what keeps it from running; "" when it runs as far as Kubernetes can tell."""

    name: str
    trouble: str = ""


def pod_state(pod: Json) -> PodState:
    """The state of one object of kind Pod."""
    metadata: Json = pod.get("metadata") or {}
    status: Json = pod.get("status") or {}
    return PodState(str(metadata.get("name", "?")), _trouble(metadata, status))


def _trouble(metadata: Json, status: Json) -> str:
    if metadata.get("deletionTimestamp"):
        return "is being deleted"
    phase = status.get("phase")
    containers: list[Json] = [*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())]
    if phase == "Pending":
        return _not_scheduled(status) or _first_trouble(containers) or "is scheduled and not started yet"
    if phase == "Running":
        return _first_trouble(containers)
    if phase == "Succeeded":
        return "has ended by itself"
    why = _first_trouble(containers) if phase == "Failed" and not status.get("reason") else ""
    return why or "has failed" + _in_brackets(status.get("reason"), status.get("message"))


def _not_scheduled(status: Json) -> str:
    for condition in status.get("conditions") or ():
        if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
            # What the scheduler says of preemption only repeats why no node will do.
            said = str(condition.get("message") or "").partition(" preemption:")[0]
            return "is not scheduled" + _in_brackets(said or condition.get("reason"))
    return ""


def _first_trouble(containers: Iterable[Json]) -> str:
    return next((trouble for trouble in map(_container_trouble, containers) if trouble), "")


def _container_trouble(container: Json) -> str:
    """``container``: one of containerStatuses. One that runs but is not ready is asked how its last life ended."""
    state: Json = container.get("state") or {}
    last = (container.get("lastState") or {}).get("terminated")
    waiting: Json | None = state.get("waiting")
    ended: Json | None = state.get("terminated")
    if waiting is not None:
        return _waiting(waiting, last, int(container.get("restartCount") or 0))
    if ended is not None:
        # An init container that did its work is no trouble.
        return "" if ended.get("exitCode") == 0 else f"ended with {_ending(ended)}"
    if last is not None and not container.get("ready"):
        return f"was started again after {_ending(last)}"
    return ""


def _waiting(waiting: Json, last: Json | None, restarts: int) -> str:
    reason, message = str(waiting.get("reason") or ""), waiting.get("message")
    if reason in _IMAGE_REASONS:
        return "cannot pull its image" + _in_brackets(reason, message)
    if reason == "CrashLoopBackOff" and last is not None:
        times = f"{restarts} restart{'s' if restarts != 1 else ''} so far"
        return f"ends again and again with {_ending(last)}, {times}"
    if reason in _CREATING:
        return "waits for its volumes and its image" + _in_brackets(message)
    return "waits" + _in_brackets(reason, message)


def _ending(ended: Json) -> str:
    code, signal = ended.get("exitCode"), ended.get("signal")
    how = f"exit code {code}" if not signal else f"signal {signal}"
    reason = ended.get("reason")
    if reason == "OOMKilled":
        how += " (OOMKilled: it took more memory than its limit)"
        return how
    # With terminationMessagePolicy FallbackToLogsOnError the message is the log's end: its last line says why.
    lines = str(ended.get("message") or "").strip().splitlines()
    return how + _in_brackets(reason if reason not in ("Error", "Completed") else None, lines[-1] if lines else None)


def _in_brackets(*parts: object) -> str:
    said = ": ".join(_short(str(part)) for part in parts if part)
    return f" ({said})" if said else ""


def _short(text: str) -> str:
    """One line without its full stop, bounded."""
    line = " ".join(text.split()).rstrip(".")
    return line if len(line) <= MAX_MESSAGE else line[: MAX_MESSAGE - 3] + "..."


def why_pods_wait(states: Iterable[PodState], selector: str) -> str:
    """One sentence about the pods that do not run, the commonest reason first; "" when all of them do.

    "2 of 4 worker pods wait: x-1 is not scheduled (0/3 nodes are available: 3 Insufficient nvidia.com/gpu); x-3 ..."
    """
    pods = sorted(states, key=lambda pod: pod.name)
    if not pods:
        return f"there is no worker pod ({selector}); 'kubectl describe statefulset' says what keeps them away"
    by_trouble: dict[str, list[str]] = {}
    for pod in pods:
        if pod.trouble:
            by_trouble.setdefault(pod.trouble, []).append(pod.name)
    if not by_trouble:
        return ""
    count = sum(len(names) for names in by_trouble.values())
    noun = "worker pod waits" if len(pods) == 1 else "worker pods wait"
    groups = sorted(by_trouble.items(), key=lambda item: (-len(item[1]), item[1][0]))
    told = [f"{_names(names)} {_plural(trouble, len(names))}" for trouble, names in groups[:MAX_REASONS]]
    rest = sum(len(names) for _, names in groups[MAX_REASONS:])
    if rest:
        told.append(f"{rest} more for other reasons")
    return f"{count} of {len(pods)} {noun}: {'; '.join(told)}"


def _names(names: list[str]) -> str:
    shown = ", ".join(names[:MAX_NAMES])
    return shown if len(names) <= MAX_NAMES else f"{shown} and {len(names) - MAX_NAMES} more"


_VERBS = {"is": "are", "has": "have", "was": "were", "waits": "wait", "cannot": "cannot", "ends": "end"}


def _plural(trouble: str, count: int) -> str:
    verb, space, rest = trouble.partition(" ")
    return trouble if count == 1 else _VERBS.get(verb, verb) + space + rest
