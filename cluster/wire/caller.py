"""Who calls: the tenant and the conversation, as metadata of a call. Both ends have the keys from here."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from cluster.domain.errors import RejectReason, RequestRejected

TENANT_KEY = "x-tenant"  # who is served, for fairness; set by whoever knows its clients
SESSION_KEY = "x-session-id"  # the conversation, for policies that keep one together

CallerMetadata = tuple[tuple[str, str], ...]


def caller_to_metadata(tenant: str = "", session_id: str = "") -> CallerMetadata:
    """No entry for what is "".

    The router checks lengths; RequestRejected INVALID for what would never reach it: gRPC sends printable ASCII only.
    """
    given = tuple((key, value) for key, value in ((TENANT_KEY, tenant), (SESSION_KEY, session_id)) if value)
    for key, value in given:
        if not (value.isascii() and value.isprintable()):
            raise RequestRejected(RejectReason.INVALID, f"{key} must be printable ASCII characters.")
    return given


def caller_from_metadata(metadata: Iterable[tuple[str, Any]] | None) -> tuple[str, str]:
    """The tenant and the conversation that a call's metadata name, "" where they name none."""
    tenant = session_id = ""
    for key, value in metadata or ():
        if key == TENANT_KEY:
            tenant = str(value)
        elif key == SESSION_KEY:
            session_id = str(value)
    return tenant, session_id
