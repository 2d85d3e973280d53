"""The tenant and the conversation on their way from a client to a router."""

import pytest

from cluster.domain.errors import RejectReason, RequestRejected
from cluster.wire.caller import SESSION_KEY, TENANT_KEY, caller_from_metadata, caller_to_metadata


@pytest.mark.parametrize("caller", [("", ""), ("acme", ""), ("", "talk 7"), ("acme", "talk 7")])
def test_what_a_client_names_is_what_a_router_reads(caller: tuple[str, str]) -> None:
    assert caller_from_metadata((("user-agent", "x"), *caller_to_metadata(*caller))) == caller


def test_the_keys_are_those_of_the_documents() -> None:
    assert caller_to_metadata("a", "b") == (("x-tenant", "a"), ("x-session-id", "b"))
    assert caller_to_metadata() == ()
    assert caller_from_metadata(None) == ("", "")


@pytest.mark.parametrize("bad", ["é", "a\nb", "a\x7f", "\0"])
def test_what_grpc_would_not_send_is_told_by_name(bad: str) -> None:
    for key, caller in ((TENANT_KEY, (bad, "")), (SESSION_KEY, ("", bad))):
        with pytest.raises(RequestRejected, match=f"^{key} must be printable ASCII") as caught:
            caller_to_metadata(*caller)
        assert caught.value.reject_reason is RejectReason.INVALID
