"""Every error that crosses a component's border.

::

    ClusterError                     reason: the metric label and the ErrorInfo reason
    |- ConfigError                   the user's input is wrong: fix it and try again
    |  |- CheckpointError            the model's files are missing, damaged or contradict each other
    |  |- UnsupportedModelError      an architecture or layout that is not served (yet)
    |  `- PortTakenError             somebody else listens there
    |- NoFeasiblePlan                nothing fits: every candidate with its reason, and the smallest change
    |- RequestRejected               never entered: invalid, over a limit, no endpoint (reason: RejectReason)
    |- RequestEvicted                left undispatched: it could not start in time
    |- RequestAborted                ended by its client or by its deadline (reason: AbortReason)
    |- ModelNotFound                 no model of that name is served
    |- EngineFailed                  a replica broke under a request (retryable: another may continue)
    `- ReplicaError                  a replica could not be started or kept

The class says what the caller does, ``reason`` is the metric label, the message is for people and
names the fix.
"""

from __future__ import annotations

import enum


class ClusterError(Exception):
    """Root of the tree; ``reason`` comes from a closed set."""

    @property
    def reason(self) -> str:
        return type(self).__name__


class ConfigError(ClusterError):
    """The user's input is wrong; the message says what to write instead."""


class CheckpointError(ConfigError):
    """The model's files are missing, damaged, or contradict each other."""


class UnsupportedModelError(ConfigError):
    """An architecture, or a layout of it, that is not served."""


class PortTakenError(ConfigError):
    """Somebody else listens on a port that was asked for."""


class NoFeasiblePlan(ClusterError):  # noqa: N818 - a verdict, not a fault; the name is public
    """Nothing fits. ``candidates`` holds every (layout, reason) that was considered."""

    def __init__(self, message: str, candidates: tuple[tuple[str, str], ...] = (), smallest_change: str = "") -> None:
        super().__init__(message)
        self.candidates = candidates
        self.smallest_change = smallest_change


class RejectReason(enum.StrEnum):
    """Why a request never entered. The value is the ErrorInfo reason."""

    INVALID = "INVALID"
    QUEUE_FULL = "QUEUE_FULL"
    NO_ENDPOINT = "NO_ENDPOINT"
    DRAINING = "DRAINING"


class AbortReason(enum.StrEnum):
    """Who ended a request that had started."""

    CLIENT = "CLIENT"
    DEADLINE = "DEADLINE"


class RequestRejected(ClusterError):  # noqa: N818
    """The request never entered; nothing was done."""

    def __init__(self, reject_reason: RejectReason, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.reject_reason = reject_reason
        self.retry_after_s = retry_after_s

    @property
    def reason(self) -> str:
        return self.reject_reason.value


class RequestEvicted(ClusterError):  # noqa: N818
    """The request could not start before its deadline."""

    @property
    def reason(self) -> str:
        return "DEADLINE_BEFORE_START"


class RequestAborted(ClusterError):  # noqa: N818
    """The request had started and was ended by its client or its deadline."""

    def __init__(self, abort_reason: AbortReason, message: str) -> None:
        super().__init__(message)
        self.abort_reason = abort_reason

    @property
    def reason(self) -> str:
        return self.abort_reason.value


class ModelNotFound(ClusterError):  # noqa: N818
    """No model of that name is served; the message lists those that are."""

    @property
    def reason(self) -> str:
        return "MODEL_NOT_FOUND"


class EngineFailed(ClusterError):  # noqa: N818
    """A replica broke under a request; ``retryable`` says whether another may continue it, ``retry_after_s`` when."""

    def __init__(self, message: str, *, retryable: bool, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retryable = retryable
        self.retry_after_s = retry_after_s

    @property
    def reason(self) -> str:
        return "REPLICA_FAILED"


class ReplicaError(ClusterError):
    """A replica could not be started or kept."""
