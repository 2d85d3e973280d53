"""Error class <-> gRPC status: one table, with google.rpc details that programs can read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from cluster.domain.errors import (
    AbortReason,
    ClusterError,
    ConfigError,
    EngineFailed,
    ModelNotFound,
    NoFeasiblePlan,
    RejectReason,
    ReplicaError,
    RequestAborted,
    RequestEvicted,
    RequestRejected,
)
from cluster.domain.request import Outcome

ERROR_DOMAIN = "cluster.v1"
RETRY_AFTER_S = 1.0


@dataclass(frozen=True, slots=True)
class WireStatus:
    """How one error shows on gRPC, on HTTP and in the outcome label."""

    code: grpc.StatusCode
    http: int
    outcome: Outcome


_INVALID = WireStatus(grpc.StatusCode.INVALID_ARGUMENT, 400, Outcome.REJECTED_INVALID)
_UNAVAILABLE = WireStatus(grpc.StatusCode.UNAVAILABLE, 503, Outcome.REJECTED_UNAVAILABLE)
_FAILED = WireStatus(grpc.StatusCode.UNAVAILABLE, 503, Outcome.FAILED_REPLICA)
_INTERNAL = WireStatus(grpc.StatusCode.INTERNAL, 500, Outcome.FAILED_INTERNAL)

_REJECTED = {
    RejectReason.INVALID: _INVALID,
    RejectReason.QUEUE_FULL: WireStatus(grpc.StatusCode.RESOURCE_EXHAUSTED, 429, Outcome.REJECTED_CAPACITY),
    RejectReason.NO_ENDPOINT: _UNAVAILABLE,
    RejectReason.DRAINING: _UNAVAILABLE,
}
_ABORTED = {
    AbortReason.CLIENT: WireStatus(grpc.StatusCode.CANCELLED, 499, Outcome.ABORTED_CLIENT),
    AbortReason.DEADLINE: WireStatus(grpc.StatusCode.DEADLINE_EXCEEDED, 504, Outcome.ABORTED_DEADLINE),
}
_BY_CLASS: dict[type[ClusterError], WireStatus] = {
    ModelNotFound: WireStatus(grpc.StatusCode.NOT_FOUND, 404, Outcome.REJECTED_INVALID),
    ConfigError: _INVALID,
    NoFeasiblePlan: WireStatus(grpc.StatusCode.FAILED_PRECONDITION, 409, Outcome.REJECTED_INVALID),
    RequestEvicted: WireStatus(grpc.StatusCode.DEADLINE_EXCEEDED, 504, Outcome.EVICTED_DEADLINE),
    EngineFailed: _FAILED,
    ReplicaError: _FAILED,
}

Metadata: TypeAlias = "tuple[tuple[str, str], ...]"


def wire_status(error: BaseException) -> WireStatus:
    """Where ``error`` stands in the table of outcomes; INTERNAL for whatever is not ours: that is a bug."""
    if isinstance(error, RequestRejected):
        return _REJECTED[error.reject_reason]
    if isinstance(error, RequestAborted):
        return _ABORTED[error.abort_reason]
    for cls in type(error).__mro__:
        if cls in _BY_CLASS:
            return _BY_CLASS[cls]
    return _INTERNAL


def to_rpc_status(error: BaseException, metadata: Metadata = ()) -> grpc.Status:
    """A status with ErrorInfo, and RetryInfo where another try may succeed; for ``context.abort_with_status``.

    ``metadata`` goes with it: a status leaves none of what ``set_trailing_metadata`` was told.
    """
    status = wire_status(error)
    reason = error.reason if isinstance(error, ClusterError) else "INTERNAL"
    details = [_packed(error_details_pb2.ErrorInfo(reason=reason, domain=ERROR_DOMAIN))]
    retry_after_s = getattr(error, "retry_after_s", None)
    if status.code in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE):
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int((retry_after_s or RETRY_AFTER_S) * 1e9))
        details.append(_packed(error_details_pb2.RetryInfo(retry_delay=delay)))
    message = status_pb2.Status(code=code_pb2.Code.Value(status.code.name), message=str(error), details=details)
    converted: grpc.Status = rpc_status.to_status(message)
    if metadata:
        return _StatusWith(converted.code, converted.details, (*converted.trailing_metadata, *metadata))
    return converted


@dataclass(frozen=True)
class _StatusWith(grpc.Status):
    code: grpc.StatusCode
    details: str
    trailing_metadata: tuple[tuple[str, str | bytes], ...]


# (code, ErrorInfo reason or "", message, seconds to wait before another try or None) of a failed call
CallFailure: TypeAlias = tuple[grpc.StatusCode, str, str, float | None]


def from_rpc_error(error: grpc.RpcError) -> CallFailure:
    code, message = error.code(), error.details() or ""
    reason, retry_after_s = "", None
    try:
        status = rpc_status.from_call(error)
    except ValueError:  # gRPC ended the call by itself while the server's status came: what it says counts
        status = None
    for detail in status.details if status is not None else ():
        info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            reason = info.reason
        elif detail.Unpack(retry):
            retry_after_s = retry.retry_delay.ToNanoseconds() / 1e9
    return code, reason, message, retry_after_s


def _packed(detail: error_details_pb2.ErrorInfo | error_details_pb2.RetryInfo) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(detail)
    return packed
