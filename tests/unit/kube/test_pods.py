from __future__ import annotations

from typing import Any

import pytest

from cluster.kube.pods import MAX_MESSAGE, PodState, pod_state, why_pods_wait

GPU = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."


def pod(phase: str, *containers: dict[str, Any], meta: dict[str, Any] | None = None, **status: Any) -> dict[str, Any]:
    statuses = {"containerStatuses": list(containers)} if containers else {}
    return {"metadata": {"name": "x-worker-0"} | (meta or {}), "status": {"phase": phase} | statuses | status}


def unscheduled(message: str, reason: str = "Unschedulable") -> list[dict[str, Any]]:
    return [{"type": "PodScheduled", "status": "False", "reason": reason, "message": message}]


def waiting(reason: str, message: str | None = None, last: dict[str, Any] | None = None, restarts: int = 0) -> Any:
    state = {"waiting": {"reason": reason} | ({"message": message} if message else {})}
    return {"state": state, "lastState": {"terminated": last} if last else {}, "restartCount": restarts}


RUNNING = {"state": {"running": {"startedAt": "2026-01-01T00:00:00Z"}}, "ready": True, "restartCount": 0}

CASES: list[tuple[dict[str, Any], str]] = [
    (pod("Running", RUNNING), ""),
    (pod("Running", RUNNING | {"ready": False}), ""),
    (
        pod("Pending", conditions=unscheduled(GPU + " preemption: 0/3 nodes are available: 3 No preemption victims.")),
        "is not scheduled (0/3 nodes are available: 3 Insufficient nvidia.com/gpu)",
    ),
    (
        pod("Pending", conditions=unscheduled("0/1 nodes are available: pod has unbound immediate PersistentVolumeClaims.")),
        "is not scheduled (0/1 nodes are available: pod has unbound immediate PersistentVolumeClaims)",
    ),
    (pod("Pending", conditions=unscheduled("", "SchedulingGated")), "is not scheduled (SchedulingGated)"),
    (pod("Pending"), "is scheduled and not started yet"),
    (
        pod("Pending", waiting("ImagePullBackOff", 'Back-off pulling image "a/b:1"')),
        'cannot pull its image (ImagePullBackOff: Back-off pulling image "a/b:1")',
    ),
    (pod("Pending", waiting("ErrImagePull")), "cannot pull its image (ErrImagePull)"),
    (pod("Pending", waiting("ContainerCreating")), "waits for its volumes and its image"),
    (
        pod("Pending", waiting("CreateContainerConfigError", 'secret "ray-token" not found')),
        'waits (CreateContainerConfigError: secret "ray-token" not found)',
    ),
    (
        pod("Running", waiting("CrashLoopBackOff", "back-off 5m0s", {"exitCode": 137, "reason": "OOMKilled"}, 4)),
        "ends again and again with exit code 137 (OOMKilled: it took more memory than its limit), 4 restarts so far",
    ),
    (
        pod("Running", waiting("CrashLoopBackOff", last={
            "exitCode": 1, "reason": "Error", "message": "starting\nllm-cluster: The head refuses the token.\n"}, restarts=1)),
        "ends again and again with exit code 1 (llm-cluster: The head refuses the token), 1 restart so far",
    ),
    (pod("Running", waiting("CrashLoopBackOff")), "waits (CrashLoopBackOff)"),
    (
        pod("Running", {"state": {"terminated": {"exitCode": 2, "reason": "Error"}}}),
        "ended with exit code 2",
    ),
    (
        pod("Running", RUNNING | {"ready": False, "lastState": {"terminated": {"exitCode": 0, "signal": 9}}}),
        "was started again after signal 9",
    ),
    (pod("Running", RUNNING | {"lastState": {"terminated": {"exitCode": 1}}}), ""),
    (pod("Pending", initContainerStatuses=[waiting("ErrImagePull")]), "cannot pull its image (ErrImagePull)"),
    (pod("Running", RUNNING, initContainerStatuses=[{"state": {"terminated": {"exitCode": 0}}}]), ""),
    (pod("Running", RUNNING, meta={"deletionTimestamp": "2026-01-01T00:00:00Z"}), "is being deleted"),
    (
        pod("Failed", reason="Evicted", message="The node was low on resource: ephemeral-storage."),
        "has failed (Evicted: The node was low on resource: ephemeral-storage)",
    ),
    (pod("Failed", {"state": {"terminated": {"exitCode": 3, "reason": "Error"}}}), "ended with exit code 3"),
    (pod("Succeeded"), "has ended by itself"),
    (pod("Unknown", reason="NodeLost"), "has failed (NodeLost)"),
    ({"metadata": {"name": "x-worker-0"}, "status": {"phase": "Pending", "conditions": None}}, "is scheduled and not started yet"),
]  # fmt: skip


@pytest.mark.parametrize(("found", "trouble"), CASES, ids=[trouble or "runs" for _, trouble in CASES])
def test_what_keeps_a_pod_from_running(found: dict[str, Any], trouble: str) -> None:
    assert pod_state(found) == PodState("x-worker-0", trouble)


def test_a_long_message_is_cut_to_one_line() -> None:
    state = pod_state(pod("Pending", conditions=unscheduled("all\nof\n" + "it " * 500)))
    assert "\n" not in state.trouble
    assert len(state.trouble) < MAX_MESSAGE + 40
    assert state.trouble.endswith("...)")


def test_an_object_without_anything_is_still_a_pod() -> None:
    assert pod_state({}).trouble.startswith("has failed")


NO_GPU = "is not scheduled (3 Insufficient nvidia.com/gpu)"


@pytest.mark.parametrize(
    ("troubles", "sentence"),
    [
        (("", ""), ""),
        (("", NO_GPU), f"1 of 2 worker pods wait: w-1 {NO_GPU}"),
        ((NO_GPU,), f"1 of 1 worker pod waits: w-0 {NO_GPU}"),
        (
            (NO_GPU, "", NO_GPU, "is being deleted"),
            "3 of 4 worker pods wait: w-0, w-2 are not scheduled (3 Insufficient nvidia.com/gpu); w-3 is being deleted",
        ),
        (
            ("has failed",) * 4,
            "4 of 4 worker pods wait: w-0, w-1 and 2 more have failed",
        ),
        (
            ("a", "b", "c", "d", "e", "e"),
            "6 of 6 worker pods wait: w-4, w-5 e; w-0 a; w-1 b; 2 more for other reasons",
        ),
    ],
)
def test_pods_are_told_together(troubles: tuple[str, ...], sentence: str) -> None:
    assert why_pods_wait((PodState(f"w-{i}", text) for i, text in enumerate(troubles)), "app=x") == sentence


def test_no_pod_at_all_is_said_too() -> None:
    assert "there is no worker pod (app=x)" in why_pods_wait((), "app=x")


def test_however_many_pods_the_sentence_stays_short() -> None:
    states = [PodState(f"pod-{i:04}", f"waits ({'y' * 200}{i})") for i in range(2000)]
    assert len(why_pods_wait(states, "app=x")) < 1500
