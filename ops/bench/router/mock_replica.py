"""A replica without a model, its controller, and a front of its own: what stands behind the routers that speak gRPC.

    python -m ops.bench.router.mock_replica [--tokenizer FOLDER] [--uvloop]

Three services on one loopback port, printed as a JSON line. Control pushes a table with one endpoint, this one. Engine
speaks the real session: one StepUpdate a step for all sequences of the same pace. Inference answers by itself, with no
router between: the backend of a plain gRPC balancer, what latencies are compared with, and, by its own CPU time, what
grpcio's asyncio server costs alone.

The prompt tells how to answer, so that one process serves every scenario: as token ids PACE_MS, DELAY_MS; as text
"PACE_MS DELAY_MS". A new token comes every PACE_MS, with 0 as fast as the other side takes it, the first one after
DELAY_MS. Everything of one pace ticks together, as the sequences of an engine's step do.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from cluster.domain.endpoint import Endpoint, EndpointTable
from cluster.domain.ids import Incarnation, ReplicaId
from cluster.v1 import control_pb2_grpc, engine_pb2, engine_pb2_grpc, inference_pb2
from cluster.wire import channel, convert
from cluster.wire.http2.call import ServerCall
from cluster.wire.http2.server import Http2Server

MODEL, BLOCK_SIZE, DIGEST, VOCAB_SIZE = "mock", 16, "sha256:mock", 300
TOKENS = tuple(range(10, 26))  # what it "generates", in turn
SEQUENCES_MAX = 65536  # so that nothing waits in the router: its cost is looked at, not its queue
BEAT_S = 0.5
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


class Ticker:
    """Ticks every ``pace_ms`` while somebody waits; all who wait for one pace wake together."""

    def __init__(self) -> None:
        self._next: dict[int, asyncio.Future[None]] = {}

    async def tick(self, pace_ms: int) -> None:
        if pace_ms == 0:
            await asyncio.sleep(0)
            return
        loop = asyncio.get_running_loop()
        waiter = self._next.get(pace_ms)
        if waiter is None:
            waiter = self._next[pace_ms] = loop.create_future()
            pace_s = pace_ms / 1e3
            loop.call_at((round(loop.time() / pace_s) + 1) * pace_s, self._ring, pace_ms)  # timers may be early
        await asyncio.shield(waiter)

    def _ring(self, pace_ms: int) -> None:
        self._next.pop(pace_ms).set_result(None)


class Running:
    """One sequence of a session."""

    __slots__ = ("attempt", "delay_ms", "left", "pace_ms", "sent", "sequence_id")

    def __init__(self, submit: engine_pb2.Submit, pace_ms: int, delay_ms: int) -> None:
        self.sequence_id, self.attempt = submit.sequence_id, submit.attempt
        self.left = submit.sampling.max_tokens - len(submit.generated_token_ids)
        self.pace_ms, self.delay_ms, self.sent = pace_ms, delay_ms, 0

    def advance(self, update: engine_pb2.SequenceUpdate) -> bool:
        """Writes the next token into ``update``; False after the last one."""
        update.sequence_id, update.attempt = self.sequence_id, self.attempt
        update.token_ids.append(TOKENS[self.sent % len(TOKENS)])
        self.sent += 1
        self.left -= 1
        if self.left <= 0:
            update.end = engine_pb2.SEQUENCE_END_LENGTH
        return self.left > 0


class Outgoing:
    """The way down of a session: pushed, as a leader does; whoever finds no room waits for it."""

    def __init__(self, call: ServerCall) -> None:
        self._call, self._room = call, asyncio.Event()
        call.on_room = self._room.set

    async def write(self, message: engine_pb2.SessionResponse) -> None:
        while not self._call.writable:
            self._room.clear()
            await self._room.wait()
        self._call.push(message)


class MockEngine(engine_pb2_grpc.EngineServicer):
    """Describe and Session. ``files``: the tokenizer's, by name."""

    def __init__(self, files: dict[str, bytes], ticker: Ticker) -> None:
        self._files, self._ticker = files, ticker
        digest = hashlib.sha256(b"".join(files.values())).hexdigest() if files else ""
        self._text_prompts = _text_prompts(files)
        self._card = engine_pb2.ModelCard(
            name=MODEL,
            max_model_len=1_000_000,
            vocab_size=VOCAB_SIZE,
            checkpoint_digest=DIGEST,
            tokenizer_digest=digest,
            max_num_seqs=SEQUENCES_MAX,
        )
        self._identity = engine_pb2.ReplicaIdentity(
            model=MODEL, slot=0, generation=1, checkpoint_digest=DIGEST, block_size=BLOCK_SIZE
        )

    async def Describe(  # noqa: N802
        self, request: engine_pb2.DescribeRequest, _context: Any
    ) -> engine_pb2.DescribeResponse:
        files = self._files.items() if request.include_tokenizer else ()
        sent = [engine_pb2.TokenizerFile(name=name, content=content) for name, content in files]
        return engine_pb2.DescribeResponse(identity=self._identity, card=self._card, tokenizer_files=sent)

    async def Session(self, _requests: Any, context: Any) -> None:  # noqa: N802
        hello = (await context.read()).hello
        if hello.expected != self._identity:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"this is {self._identity}")
        down = Outgoing(context)
        await down.write(engine_pb2.SessionResponse(welcome=engine_pb2.Welcome(identity=self._identity)))
        running: dict[int, dict[int, Running]] = {}
        steppers: dict[int, asyncio.Task[None]] = {}
        beat = asyncio.create_task(self._beat(down))
        try:
            while (message := await context.read()) is not grpc.aio.EOF:
                for submit in message.commands.submits:
                    pace_ms, delay_ms = self._how(submit)
                    begun = Running(submit, pace_ms, delay_ms)
                    if delay_ms:
                        asyncio.get_running_loop().call_later(
                            delay_ms / 1e3, self._begin, begun, running, steppers, down
                        )
                    else:
                        self._begin(begun, running, steppers, down)
                for cancel in message.commands.cancels:
                    for group in running.values():
                        group.pop(cancel.sequence_id, None)
        finally:
            for task in (beat, *steppers.values()):
                task.cancel()

    def _how(self, submit: engine_pb2.Submit) -> tuple[int, int]:
        known = self._text_prompts.get(tuple(submit.prompt_token_ids))
        return known or (submit.prompt_token_ids[0], submit.prompt_token_ids[1])

    def _begin(
        self, begun: Running, running: dict[int, dict[int, Running]], steppers: dict[int, Any], down: Outgoing
    ) -> None:
        group = running.setdefault(begun.pace_ms, {})
        group[begun.sequence_id] = begun
        if begun.pace_ms not in steppers or steppers[begun.pace_ms].done():
            steppers[begun.pace_ms] = asyncio.create_task(self._step(begun.pace_ms, group, down))

    async def _step(self, pace_ms: int, group: dict[int, Running], down: Outgoing) -> None:
        """One message a step for everything of this pace, until nothing is left."""
        step = 0
        while group:
            step += 1
            message = engine_pb2.SessionResponse()
            update = message.step
            update.step = step
            update.load.running_sequences = len(group)
            for sequence in tuple(group.values()):
                if not sequence.advance(update.sequences.add()):
                    del group[sequence.sequence_id]
            await down.write(message)
            await self._ticker.tick(pace_ms)

    async def _beat(self, down: Outgoing) -> None:
        while True:
            await down.write(engine_pb2.SessionResponse(beat=engine_pb2.Beat(load=engine_pb2.Load())))
            await asyncio.sleep(BEAT_S)


class Front:
    """Inference without a router: the same answers from this process, every message built beforehand."""

    def __init__(self, ticker: Ticker) -> None:
        self._ticker = ticker
        chunks = [inference_pb2.Chunk(text="x", token_ids=[token]) for token in TOKENS]
        self._chunks = [inference_pb2.GenerateResponse(chunk=chunk).SerializeToString() for chunk in chunks]
        usage = inference_pb2.Usage(prompt_tokens=2, generated_tokens=1, seed=1)
        end = inference_pb2.End(finish_reason=inference_pb2.FINISH_REASON_LENGTH, usage=usage)
        self._end = inference_pb2.GenerateResponse(end=end).SerializeToString()
        self._completion = inference_pb2.Completion(
            text="x", token_ids=TOKENS[:1], finish_reason=inference_pb2.FINISH_REASON_LENGTH, usage=usage
        ).SerializeToString()

    async def generate(self, request: inference_pb2.GenerateRequest, _context: Any) -> AsyncIterator[bytes]:
        pace_ms, delay_ms = _asked(request)
        if delay_ms:
            await asyncio.sleep(delay_ms / 1e3)
        for sent in range(request.sampling.max_tokens):
            if sent:
                await self._ticker.tick(pace_ms)
            yield self._chunks[sent % len(self._chunks)]
        yield self._end

    async def complete(self, _request: inference_pb2.GenerateRequest, _context: Any) -> bytes:
        return self._completion

    def methods(self) -> grpc.GenericRpcHandler:
        decode = inference_pb2.GenerateRequest.FromString
        return grpc.method_handlers_generic_handler(
            "cluster.v1.Inference",
            {
                "Generate": grpc.unary_stream_rpc_method_handler(self.generate, decode),
                "Complete": grpc.unary_unary_rpc_method_handler(self.complete, decode),
            },
        )


class OneEndpoint(control_pb2_grpc.ControlServicer):
    """A controller whose table never changes."""

    def __init__(self, port: int) -> None:
        incarnation = Incarnation(ReplicaId(MODEL, 0), 1)
        endpoint = Endpoint(incarnation, f"127.0.0.1:{port}", DIGEST, BLOCK_SIZE)
        self._table = EndpointTable(1, (endpoint,), (MODEL,), "mock")

    async def WatchEndpoints(self, _request: Any, context: Any) -> None:  # noqa: N802
        await context.write(convert.endpoint_table_to_message(self._table))
        await asyncio.Event().wait()


def prompt_text(pace_ms: int, delay_ms: int) -> str:
    return f"{pace_ms} {delay_ms}"


# What the scenarios ask for; a tokenizer is asked once for the ids of each, so that no step has to decode.
ASKED = ((0, 0), (10, 0), (30, 0), (0, 600_000))


def _text_prompts(files: dict[str, bytes]) -> dict[tuple[int, ...], tuple[int, int]]:
    if not files:
        return {}
    from cluster.router.tokenization import Tokenizer

    tokenizer = Tokenizer(files)
    return {tuple(tokenizer.encode(prompt_text(*how), add_special_tokens=True)): how for how in ASKED}


def _asked(request: inference_pb2.GenerateRequest) -> tuple[int, int]:
    pace_ms, delay_ms = request.token_ids.ids[:2] if request.HasField("token_ids") else request.text.split()
    return int(pace_ms), int(delay_ms)


async def serve(folder: Path | None) -> None:
    files = {name: (folder / name).read_bytes() for name in TOKENIZER_FILES} if folder else {}
    engine, server, ticker = Http2Server(), channel.new_server(), Ticker()
    engine_pb2_grpc.add_EngineServicer_to_server(MockEngine(files, ticker), engine)
    endpoint = OneEndpoint(channel.bind(engine, "127.0.0.1", 0))
    await engine.start()
    server.add_generic_rpc_handlers((Front(ticker).methods(),))
    control_pb2_grpc.add_ControlServicer_to_server(endpoint, server)
    port = channel.bind(server, "127.0.0.1", 0)
    await server.start()
    print(json.dumps({"pid": os.getpid(), "port": port}), flush=True)
    await server.wait_for_termination()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, help="folder with tokenizer.json and tokenizer_config.json")
    given = parser.parse_args()
    import uvloop

    uvloop.run(serve(given.tokenizer))


if __name__ == "__main__":
    main()
