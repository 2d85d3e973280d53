"""Fixtures of the tests that put a router between real sockets."""

from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.contract.fake_engine import FakeEngine
from tests.contract.router_cluster import RouterCluster, StartCluster


@pytest.fixture
async def start() -> AsyncIterator[StartCluster]:
    """Starts a RouterCluster with engines and settings; all of them are closed, and checked, after the test."""
    clusters: list[RouterCluster] = []

    async def start_cluster(*engines: FakeEngine, **config: Any) -> RouterCluster:
        cluster = RouterCluster(**config)
        clusters.append(cluster)
        return await cluster.start(*engines)

    yield start_cluster
    for cluster in reversed(clusters):
        await cluster.close()
