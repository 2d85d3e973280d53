from __future__ import annotations

import asyncio
import os
from types import SimpleNamespace

import grpc
import pytest

from cluster.client.presence import Presence
from cluster.controller.attendance import Attendance
from cluster.controller.cluster_status import ProcessFacts
from cluster.controller.server import ControlService
from cluster.domain.errors import ReplicaError
from cluster.v1 import control_pb2, control_pb2_grpc
from cluster.wire.channel import bind, new_server, open_channel

DEADLINE_S = 10.0


def worker(node: str = "10.0.0.2") -> control_pb2.ProcessStatus:
    return control_pb2.ProcessStatus(kind="worker", pid=os.getpid(), node=node, ports={"metrics": 9100})


def test_present_while_the_block_runs_and_not_more_than_so_many():
    attendance, router = Attendance(most=2), ProcessFacts("router", 1, "h")
    with attendance.present(router), attendance.present(router):
        assert attendance.processes == (router, router)
        with pytest.raises(ReplicaError, match="2 routers and workers"), attendance.present(router):
            pass
    assert attendance.processes == ()


class Controller:
    """The Control service of a controller that has nothing but its attendance."""

    def __init__(self) -> None:
        self.attendance, self.port, self.server = Attendance(), 0, None

    async def start(self) -> None:
        self.server = new_server()
        self.port = bind(self.server, "127.0.0.1", self.port)
        service = ControlService(SimpleNamespace(attendance=self.attendance), lambda: None)
        control_pb2_grpc.add_ControlServicer_to_server(service, self.server)
        await self.server.start()

    async def stop(self) -> None:
        await self.server.stop(grace=0)
        await self.until(0)

    async def until(self, count: int) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while len(self.attendance.processes) != count:
                await asyncio.sleep(0.01)


@pytest.fixture
async def controller():
    made = Controller()
    await made.start()
    yield made
    await made.stop()


async def test_a_worker_is_there_from_its_start_to_its_end_over_restarts_of_the_controller(controller):
    presence = Presence(f"127.0.0.1:{controller.port}", worker(), retry_s=0.05)
    await controller.until(1)
    assert controller.attendance.processes == (ProcessFacts("worker", os.getpid(), "10.0.0.2", {"metrics": 9100}),)
    await controller.stop()
    await controller.start()
    await controller.until(1)
    await asyncio.to_thread(presence.close)
    await controller.until(0)


async def test_without_a_controller_it_tries_again_until_it_is_closed(controller):
    await controller.stop()
    presence = Presence(f"127.0.0.1:{controller.port}", worker(), retry_s=0.01)
    await asyncio.to_thread(presence.close)
    assert not presence._thread.is_alive()
    await controller.start()


async def test_ranks_do_not_attend(controller):
    async with open_channel(f"127.0.0.1:{controller.port}") as channel:
        call = control_pb2_grpc.ControlStub(channel).Attend(control_pb2.ProcessStatus(kind="rank"), timeout=DEADLINE_S)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "only a router or worker attends" in caught.value.details()
    assert controller.attendance.processes == ()
