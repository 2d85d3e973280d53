"""Replicas of bounded capacity without a model, and their controller: what stands behind the router under overload.

    python -m ops.bench.overload.replicas --replicas 2 --slots 8 --step-ms 25

One process, one loopback port for each service. Every replica speaks the real Engine session: a step each STEP_MS while
it has work, in which each of its first SLOTS sequences (by priority, then arrival) gets a token, one StepUpdate for all
of them, with a true load. So the capacity is known: replicas x slots tokens in each step, whatever the requests are.
The controller's port comes as a JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
from typing import Any

import grpc
import grpc.aio
import uvloop

from cluster.domain.endpoint import Endpoint, EndpointTable
from cluster.domain.ids import Incarnation, ReplicaId
from cluster.v1 import control_pb2_grpc, engine_pb2, engine_pb2_grpc
from cluster.wire import channel, convert
from cluster.wire.http2.server import Http2Server

MODEL, BLOCK_SIZE, DIGEST, VOCAB_SIZE, MAX_MODEL_LEN = "bounded", 16, "sha256:bounded", 300, 100_000
BEAT_S = 0.5
LIVE_END = engine_pb2.SEQUENCE_END_UNSPECIFIED


class Sequence:
    """One of a session; ``left`` tokens are to come, the next one at ``position`` of the answer."""

    __slots__ = ("attempt", "left", "position", "priority", "prompt_tokens", "sequence_id", "started")

    def __init__(self, submit: engine_pb2.Submit) -> None:
        self.sequence_id, self.attempt, self.priority = submit.sequence_id, submit.attempt, submit.priority
        self.prompt_tokens = len(submit.prompt_token_ids)
        self.position = len(submit.generated_token_ids)
        self.left = submit.sampling.max_tokens - self.position
        self.started = False


def token_at(position: int) -> int:
    """What every replica "generates" there: so a gap or a duplicate shows, whoever went on."""
    return position % 100 + 10


class Replica(engine_pb2_grpc.EngineServicer):
    """One Engine service for one router. ``step_s`` may change; ``breaks``: its session ends with every step."""

    def __init__(self, slot: int, slots: int, step_s: float, generation: int = 1) -> None:
        self._slots, self.step_s, self.breaks = slots, step_s, False
        self._incarnation = Incarnation(ReplicaId(MODEL, slot), generation)
        self._identity = engine_pb2.ReplicaIdentity(
            model=MODEL, slot=slot, generation=generation, checkpoint_digest=DIGEST, block_size=BLOCK_SIZE
        )
        self._card = engine_pb2.ModelCard(
            name=MODEL, max_model_len=MAX_MODEL_LEN, vocab_size=VOCAB_SIZE, checkpoint_digest=DIGEST, max_num_seqs=slots
        )
        self._sequences: dict[int, Sequence] = {}
        self._work = asyncio.Event()
        self._step = 0

    async def start(self) -> Endpoint:
        self._server = Http2Server()
        engine_pb2_grpc.add_EngineServicer_to_server(self, self._server)
        port = channel.bind(self._server, "127.0.0.1", 0)
        await self._server.start()
        return Endpoint(self._incarnation, f"127.0.0.1:{port}", DIGEST, BLOCK_SIZE)

    async def Describe(self, _request: engine_pb2.DescribeRequest, _context: Any) -> engine_pb2.DescribeResponse:  # noqa: N802
        return engine_pb2.DescribeResponse(identity=self._identity, card=self._card)

    async def Session(self, _requests: Any, context: Any) -> None:  # noqa: N802
        hello = (await context.read()).hello
        if hello.expected != self._identity:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"this is {self._identity}")
        await context.write(engine_pb2.SessionResponse(welcome=engine_pb2.Welcome(identity=self._identity)))
        reader = asyncio.create_task(self._read(context))
        try:
            await self._run(context)
        finally:
            reader.cancel()
            self._sequences.clear()

    async def _read(self, context: Any) -> None:
        while (message := await context.read()) is not grpc.aio.EOF:
            for cancel in message.commands.cancels:
                self._sequences.pop(cancel.sequence_id, None)
            for submit in message.commands.submits:
                self._sequences[submit.sequence_id] = Sequence(submit)
            self._work.set()

    async def _run(self, context: Any) -> None:
        """Steps at a fixed pace while there is work, beats otherwise."""
        loop = asyncio.get_running_loop()
        due_s = loop.time()
        while True:
            if not self._sequences:
                self._work.clear()
                try:
                    async with asyncio.timeout(BEAT_S):
                        await self._work.wait()
                except TimeoutError:
                    beat = engine_pb2.Beat(step=self._step, load=self._load([]))
                    await context.write(engine_pb2.SessionResponse(beat=beat))
                    continue
                due_s = loop.time()
            due_s = max(due_s + self.step_s, loop.time())
            await asyncio.sleep(due_s - loop.time())
            await context.write(engine_pb2.SessionResponse(step=self._advance()))
            if self.breaks:
                return

    def _advance(self) -> engine_pb2.StepUpdate:
        self._step += 1
        first = sorted(self._sequences.values(), key=lambda s: (not s.started, -s.priority, s.sequence_id))
        update = engine_pb2.StepUpdate(step=self._step)
        running = first[: self._slots]
        for sequence in running:
            sequence.started = True
            sequence.left -= 1
            end = LIVE_END if sequence.left > 0 else engine_pb2.SEQUENCE_END_LENGTH
            token_ids = [token_at(sequence.position)]
            sequence.position += 1
            update.sequences.add(
                sequence_id=sequence.sequence_id, attempt=sequence.attempt, token_ids=token_ids, end=end
            )
            if end:
                del self._sequences[sequence.sequence_id]
        update.load.CopyFrom(self._load(running))
        return update

    def _load(self, running: list[Sequence]) -> engine_pb2.Load:
        live = [s for s in running if s.left > 0]
        waiting = [s for s in self._sequences.values() if not s.started]
        return engine_pb2.Load(
            running_sequences=len(live),
            waiting_sequences=len(waiting),
            queued_prompt_tokens=sum(s.prompt_tokens for s in waiting),
        )


class Control(control_pb2_grpc.ControlServicer):
    """Pushes one table to whoever watches."""

    def __init__(self, endpoints: list[Endpoint]) -> None:
        self._table = EndpointTable(1, tuple(endpoints), (MODEL,))

    async def WatchEndpoints(self, _request: Any, context: Any) -> None:  # noqa: N802
        await context.write(convert.endpoint_table_to_message(self._table))
        await asyncio.Event().wait()


async def serve(replicas: int, slots: int, step_s: float) -> None:
    running = [Replica(slot, slots, step_s) for slot in range(replicas)]
    control = Control([await replica.start() for replica in running])
    server = channel.new_server()
    control_pb2_grpc.add_ControlServicer_to_server(control, server)
    port = channel.bind(server, "127.0.0.1", 0)
    await server.start()
    print(json.dumps({"pid": os.getpid(), "port": port}), flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--step-ms", type=float, default=25.0)
    arguments = parser.parse_args()
    uvloop.run(serve(arguments.replicas, arguments.slots, arguments.step_ms / 1e3))
