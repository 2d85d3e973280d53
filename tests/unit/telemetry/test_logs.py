from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from cluster.telemetry.logs import configure_logs, get_logger


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    yield
    structlog.contextvars.clear_contextvars()
    structlog.reset_defaults()


def lines(file: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_one_json_line_for_each_event_with_its_ids(tmp_path: Path) -> None:
    file = tmp_path / "router.log"
    with configure_logs("router", file):
        logger = get_logger(replica="demo/0", generation=3)
        logger.info("replica_ready", caused_by="warm_up")
        logger.warning("replica_failed", rank=1)
    ready, failed = lines(file)
    assert ready["event"] == "replica_ready"
    assert (ready["process"], ready["replica"], ready["generation"]) == ("router", "demo/0", 3)
    assert (ready["level"], failed["level"]) == ("info", "warning")
    assert str(ready["timestamp"]).endswith("Z")


def test_the_file_is_appended_to(tmp_path: Path) -> None:
    file = tmp_path / "a.log"
    for number in range(2):
        with configure_logs("controller", file):
            get_logger().info("started", number=number)
    assert [line["number"] for line in lines(file)] == [0, 1]


def test_below_the_level_nothing_is_written(tmp_path: Path) -> None:
    file = tmp_path / "a.log"
    with configure_logs("controller", file, level=logging.WARNING):
        get_logger().info("started")
    assert lines(file) == []


def test_an_exception_comes_with_its_story(tmp_path: Path) -> None:
    file = tmp_path / "a.log"
    with configure_logs("rank", file):
        try:
            raise ValueError("no such block")
        except ValueError:
            get_logger().exception("step_failed")
    (line,) = lines(file)
    assert "no such block" in str(line["exception"])
