from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from cluster.domain import errors
from cluster.domain.errors import AbortReason, ClusterError, RejectReason
from cluster.domain.request import Outcome
from cluster.wire.status import ERROR_DOMAIN, from_rpc_error, to_rpc_status, wire_status

Code = grpc.StatusCode
DETAILS = "grpc-status-details-bin"

# What a client sees for every error that can cross the border: the table of docs and API, said once more.
EXPECTED = {
    ("ConfigError", ""): (Code.INVALID_ARGUMENT, 400, Outcome.REJECTED_INVALID),
    ("CheckpointError", ""): (Code.INVALID_ARGUMENT, 400, Outcome.REJECTED_INVALID),
    ("UnsupportedModelError", ""): (Code.INVALID_ARGUMENT, 400, Outcome.REJECTED_INVALID),
    ("PortTakenError", ""): (Code.INVALID_ARGUMENT, 400, Outcome.REJECTED_INVALID),
    ("NoFeasiblePlan", ""): (Code.FAILED_PRECONDITION, 409, Outcome.REJECTED_INVALID),
    ("RequestRejected", "INVALID"): (Code.INVALID_ARGUMENT, 400, Outcome.REJECTED_INVALID),
    ("RequestRejected", "QUEUE_FULL"): (Code.RESOURCE_EXHAUSTED, 429, Outcome.REJECTED_CAPACITY),
    ("RequestRejected", "NO_ENDPOINT"): (Code.UNAVAILABLE, 503, Outcome.REJECTED_UNAVAILABLE),
    ("RequestRejected", "DRAINING"): (Code.UNAVAILABLE, 503, Outcome.REJECTED_UNAVAILABLE),
    ("RequestEvicted", ""): (Code.DEADLINE_EXCEEDED, 504, Outcome.EVICTED_DEADLINE),
    ("RequestAborted", "CLIENT"): (Code.CANCELLED, 499, Outcome.ABORTED_CLIENT),
    ("RequestAborted", "DEADLINE"): (Code.DEADLINE_EXCEEDED, 504, Outcome.ABORTED_DEADLINE),
    ("ModelNotFound", ""): (Code.NOT_FOUND, 404, Outcome.REJECTED_INVALID),
    ("EngineFailed", ""): (Code.UNAVAILABLE, 503, Outcome.FAILED_REPLICA),
    ("ReplicaError", ""): (Code.UNAVAILABLE, 503, Outcome.FAILED_REPLICA),
}


def subclasses(root: type[ClusterError]) -> Iterator[type[ClusterError]]:
    for child in root.__subclasses__():
        if child.__module__ == errors.__name__:
            yield child
            yield from subclasses(child)


def instances(cls: type[ClusterError]) -> Iterator[tuple[str, ClusterError]]:
    if cls is errors.RequestRejected:
        yield from ((reason.value, cls(reason, "sorry")) for reason in RejectReason)
    elif cls is errors.RequestAborted:
        yield from ((reason.value, cls(reason, "sorry")) for reason in AbortReason)
    elif cls is errors.EngineFailed:
        yield "", cls("sorry", retryable=True)
    else:
        yield "", cls("sorry")


CASES = [(cls.__name__, key, error) for cls in subclasses(ClusterError) for key, error in instances(cls)]


class Call(grpc.RpcError, grpc.Call):
    """A failed call as a client sees it."""

    def __init__(self, status: grpc.Status) -> None:
        self._status = status

    def code(self) -> grpc.StatusCode:
        return self._status.code

    def details(self) -> str:
        return self._status.details

    def trailing_metadata(self):
        return self._status.trailing_metadata

    def initial_metadata(self):
        return ()

    def is_active(self) -> bool:
        return False

    def time_remaining(self) -> None:
        return None

    def cancel(self) -> bool:
        return False

    def add_callback(self, callback) -> bool:
        return False


def details_of(status: grpc.Status) -> status_pb2.Status:
    return status_pb2.Status.FromString(dict(status.trailing_metadata)[DETAILS])


def test_the_table_names_every_class_and_reason() -> None:
    assert {(name, key) for name, key, _ in CASES} == set(EXPECTED)


@pytest.mark.parametrize(("name", "key", "error"), CASES, ids=[f"{name}-{key}" for name, key, _ in CASES])
class TestEveryError:
    def test_stands_in_the_table(self, name: str, key: str, error: ClusterError) -> None:
        status = wire_status(error)
        assert (status.code, status.http, status.outcome) == EXPECTED[name, key]

    def test_carries_its_reason_and_our_domain(self, name: str, key: str, error: ClusterError) -> None:
        first, *_ = details_of(to_rpc_status(error)).details
        found = error_details_pb2.ErrorInfo()
        assert first.Unpack(found)
        assert (found.reason, found.domain) == (error.reason, ERROR_DOMAIN)

    def test_reads_back_on_the_other_end(self, name: str, key: str, error: ClusterError) -> None:
        code, reason, message, retry_after_s = from_rpc_error(Call(to_rpc_status(error)))
        assert (code, reason, message) == (wire_status(error).code, error.reason, "sorry")
        assert (retry_after_s is not None) == (code in {Code.RESOURCE_EXHAUSTED, Code.UNAVAILABLE})


def test_a_reason_is_a_closed_word() -> None:
    assert len({error.reason for _, _, error in CASES}) >= len({name for name, _, _ in CASES}) - 1
    assert all(error.reason.replace("_", "").isalnum() for _, _, error in CASES)


def test_the_time_to_wait_is_the_one_that_was_said() -> None:
    error = errors.RequestRejected(RejectReason.QUEUE_FULL, "full", retry_after_s=2.5)
    assert from_rpc_error(Call(to_rpc_status(error)))[3] == 2.5


def test_a_status_that_gRPC_overtook_is_not_read() -> None:
    """The client's own deadline ends a call while the server's status, which is in the trailers already, comes."""
    call = Call(to_rpc_status(errors.RequestAborted(AbortReason.DEADLINE, "The deadline came.")))
    call.details = lambda: "Stream removed (Deadline Exceeded)"
    assert from_rpc_error(call) == (Code.DEADLINE_EXCEEDED, "", "Stream removed (Deadline Exceeded)", None)


def test_what_is_not_ours_is_a_bug() -> None:
    status = wire_status(ZeroDivisionError("x"))
    assert (status.code, status.outcome) == (Code.INTERNAL, Outcome.FAILED_INTERNAL)
    assert from_rpc_error(Call(to_rpc_status(ZeroDivisionError("x"))))[1] == "INTERNAL"


def test_every_outcome_but_success_has_an_error() -> None:
    said = {expected[2] for expected in EXPECTED.values()} | {wire_status(ValueError()).outcome}
    assert said == set(Outcome) - {Outcome.COMPLETED}
