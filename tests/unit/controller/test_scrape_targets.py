from __future__ import annotations

import asyncio
import json

from cluster.controller.controller_actor import targets_page
from cluster.controller.scrape_targets import scrape_targets
from cluster.v1 import control_pb2


def process(
    kind: str, node: str, rank: control_pb2.RankStatus | None = None, **ports: int
) -> control_pb2.ProcessStatus:
    return control_pb2.ProcessStatus(kind=kind, node=node, ports=ports, rank=rank)


def status(*processes: control_pb2.ProcessStatus) -> control_pb2.ClusterStatus:
    return control_pb2.ClusterStatus(processes=processes)


def test_every_process_with_a_metrics_port_is_named_with_what_it_is() -> None:
    rank = control_pb2.RankStatus(replica="demo/1", rank=3, generation=7)
    found = scrape_targets(
        status(
            process("router", "10.0.0.1", grpc=50051, metrics=9101),
            process("rank", "10.0.0.2", rank, metrics=9102, engine=50060),
            process("controller", "10.0.0.1", grpc=50052, metrics=9100),
            process("worker", "10.0.0.2", metrics=9100),
        )
    )
    assert found == [
        {"targets": ["10.0.0.1:9100"], "labels": {"kind": "controller", "node": "10.0.0.1"}},
        {
            "targets": ["10.0.0.2:9102"],
            "labels": {"kind": "rank", "node": "10.0.0.2", "model": "demo", "replica": "demo/1", "rank": "3"},
        },
        {"targets": ["10.0.0.1:9101"], "labels": {"kind": "router", "node": "10.0.0.1"}},
        {"targets": ["10.0.0.2:9100"], "labels": {"kind": "worker", "node": "10.0.0.2"}},
    ]


def test_a_process_that_has_not_told_its_port_is_left_out() -> None:
    rank = control_pb2.RankStatus(replica="demo/0")
    assert scrape_targets(status(process("rank", "10.0.0.2", rank), process("router", "::1", metrics=0))) == []


def test_an_address_of_version_6_is_bracketed() -> None:
    assert scrape_targets(status(process("router", "fd00::1", metrics=9101)))[0]["targets"] == ["[fd00::1]:9101"]


async def test_the_page_asks_on_the_loop_that_owns_the_status() -> None:
    owner = asyncio.get_running_loop()

    def ask() -> control_pb2.ClusterStatus:
        assert asyncio.get_running_loop() is owner
        return status(process("router", "10.0.0.1", metrics=9101))

    page = await asyncio.to_thread(targets_page(ask, owner))
    assert (page.status, page.content_type) == (200, "application/json")
    assert json.loads(page.body)[0]["targets"] == ["10.0.0.1:9101"]


def test_a_controller_that_is_busy_says_so(monkeypatch) -> None:
    monkeypatch.setattr("cluster.controller.controller_actor.TARGETS_DEADLINE_S", 0.01)
    loop = asyncio.new_event_loop()  # nobody runs it
    try:
        assert targets_page(lambda: status(), loop)().status == 503
    finally:
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()
