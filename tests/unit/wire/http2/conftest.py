"""Fixtures of the tests that meet the server as clients."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.unit.wire.http2.front_site import Start, starting


@pytest.fixture
async def start() -> AsyncIterator[Start]:
    async with starting() as start:
        yield start
