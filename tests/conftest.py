"""Options, markers and the few fixtures that every room uses."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from prometheus_client import disable_created_metrics

TESTS = Path(__file__).parent

# A slow, shared machine must not turn a property test red; the seed is hypothesis' own, a failure prints it.
settings.register_profile("cluster", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.load_profile("cluster")

disable_created_metrics()  # as each of our processes does


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run the tests marked long too")
    parser.addoption("--kube", action="store_true", help="run the tests marked kube too: they need an API server")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(TESTS / "integration"):
            item.add_marker(pytest.mark.integration)
        if item.path.is_relative_to(TESTS / "kube"):
            item.add_marker(pytest.mark.kube)
    # Quick answers first: the unit tests run before anything that starts processes.
    items.sort(key=lambda item: any(item.get_closest_marker(name) for name in ("integration", "kube")))
    unwanted = [name for name in ("long", "kube") if not config.getoption(f"--{name}")]
    left_out = [item for item in items if any(item.get_closest_marker(name) for name in unwanted)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture
def short_tmp_path() -> Iterator[Path]:
    """A folder with a short name: unix sockets below it must fit into 107 bytes."""
    path = Path(tempfile.mkdtemp(prefix="lc-", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)
