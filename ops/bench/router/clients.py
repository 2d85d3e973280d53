"""Ways to ask a contender for tokens: gRPC and HTTP."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any, Protocol

import grpc
import grpc.aio

from cluster.v1 import inference_pb2
from cluster.wire import channel
from ops.bench.router.mock_replica import MODEL, prompt_text

CONNECTIONS = 8  # of a gRPC client: idle streams in their thousands share them


class LoadError(Exception):
    """The run says nothing about the contender."""


class Client(Protocol):
    """One way to ask for tokens."""

    async def whole(self, how: tuple[int, int]) -> None: ...

    def stream(self, how: tuple[int, int], tokens: int) -> AsyncIterator[int]:
        """The number of tokens of each message as it comes."""
        ...

    async def close(self) -> None: ...


class GrpcClient:
    """cluster.v1.Inference; prompts and answers as text, or as token ids."""

    def __init__(self, address: str, *, ids: bool, application: str = "", connections: int = CONNECTIONS) -> None:
        options = (("grpc.use_local_subchannel_pool", 1), *channel.CHANNEL_OPTIONS)
        self._channels = [grpc.aio.insecure_channel(address, options=options) for _ in range(connections)]
        encode = inference_pb2.GenerateRequest.SerializeToString
        name = "/cluster.v1.Inference/"
        self._whole = [
            c.unary_unary(name + "Complete", encode, inference_pb2.Completion.FromString) for c in self._channels
        ]
        self._stream = [
            c.unary_stream(name + "Generate", encode, inference_pb2.GenerateResponse.FromString) for c in self._channels
        ]
        self._ids, self._turn, self._asked = ids, 0, 0
        self._metadata = (("application", application),) if application else None

    def _request(self, how: tuple[int, int], tokens: int) -> inference_pb2.GenerateRequest:
        self._asked += 1
        name = f"{self._asked:032x}"  # as long as those of cluster.client, which names its requests, too
        request = inference_pb2.GenerateRequest(model=MODEL, request_id=name, return_token_ids=self._ids)
        request.sampling.max_tokens = tokens
        request.sampling.seed = 1
        if self._ids:
            request.token_ids.ids.extend(how)
        else:
            request.text = prompt_text(*how)
        self._turn = (self._turn + 1) % len(self._channels)
        return request

    async def whole(self, how: tuple[int, int]) -> None:
        request = self._request(how, 1)
        answer = await self._whole[self._turn](request, metadata=self._metadata)
        if answer.usage.generated_tokens != 1:
            raise LoadError(f"not one token: {answer}")

    async def stream(self, how: tuple[int, int], tokens: int) -> AsyncIterator[int]:
        request = self._request(how, tokens)
        async for event in self._stream[self._turn](request, metadata=self._metadata):
            if event.HasField("chunk"):
                yield len(event.chunk.token_ids) if self._ids else len(event.chunk.text)

    async def close(self) -> None:
        for opened in self._channels:
            await opened.close(0)


class HttpClient:
    """POST /v1/completions over kept connections; only as much HTTP as the mocks and routers speak."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._host, self._port = host, int(port)
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self._streaming: set[asyncio.StreamWriter] = set()

    async def _send(self, how: tuple[int, int], tokens: int, *, stream: bool) -> Any:
        body = json.dumps(
            {"model": MODEL, "prompt": prompt_text(*how), "max_tokens": tokens, "stream": stream}
        ).encode()
        connection = self._idle.pop() if self._idle else await asyncio.open_connection(self._host, self._port)
        connection[1].write(
            b"POST /v1/completions HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        head = await connection[0].readuntil(b"\r\n\r\n")
        if b" 200 " not in head.split(b"\r\n", 1)[0]:
            raise LoadError(head.decode())
        return connection, head.lower()

    async def whole(self, how: tuple[int, int]) -> None:
        connection, head = await self._send(how, 1, stream=False)
        if b"content-length:" in head:
            await connection[0].readexactly(int(head.split(b"content-length:")[1].split(b"\r\n")[0]))
        else:
            await connection[0].readuntil(b"0\r\n\r\n")
        self._idle.append(connection)

    async def stream(self, how: tuple[int, int], tokens: int) -> AsyncIterator[int]:
        connection, _ = await self._send(how, tokens, stream=True)
        reader, writer = connection
        self._streaming.add(writer)
        ended = False
        try:
            kept = b""
            while not ended:
                data = await reader.read(65536)
                if not data:
                    raise LoadError("the connection ended within a stream")
                seen = kept + data
                ended = b"0\r\n\r\n" in seen[-7:]
                found = seen.count(b'"text":"x"')
                cut = seen.rfind(b'"text":"x"')
                kept = (seen[cut + 10 :] if cut >= 0 else seen)[-256:]
                if found:
                    yield found
        finally:
            self._streaming.discard(writer)
            if ended:
                self._idle.append(connection)
            else:
                writer.close()

    async def close(self) -> None:
        for _, writer in self._idle:
            writer.close()
        for writer in self._streaming:
            writer.close()
