"""Ray Serve's gRPC proxy before one replica that answers the mock's way; run by the python of the peers' environment.

    python serve_front.py PROTOS_FOLDER

PROTOS_FOLDER holds the repository's ``cluster`` package (only ``cluster.v1`` is imported). Prints the proxy's port and
process id as a JSON line, then serves until its standard input ends.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def proxy_pid() -> int:
    """The process whose title is that of Serve's proxy."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            title = (entry / "cmdline").read_bytes()
            ours = MARK in (entry / "environ").read_bytes()
        except OSError:
            continue
        if title.startswith(b"ray::ProxyActor") and ours:
            return int(entry.name)
    raise RuntimeError("Serve has started no proxy")


MARK = f"ROUTER_BENCH_SERVE={os.getpid()}".encode()


def main() -> None:
    os.environ["ROUTER_BENCH_SERVE"] = str(os.getpid())
    os.environ["PYTHONPATH"] = sys.argv[1]
    sys.path.insert(0, sys.argv[1])
    import ray
    from ray import serve
    from ray.serve.config import gRPCOptions

    from cluster.v1 import inference_pb2

    @serve.deployment(max_ongoing_requests=100_000)
    class Mock:
        async def Complete(self, _request: inference_pb2.GenerateRequest) -> inference_pb2.Completion:  # noqa: N802
            usage = inference_pb2.Usage(prompt_tokens=2, generated_tokens=1, seed=1)
            return inference_pb2.Completion(text="x", usage=usage)

        async def Generate(  # noqa: N802
            self, request: inference_pb2.GenerateRequest
        ) -> AsyncIterator[inference_pb2.GenerateResponse]:
            loop = asyncio.get_running_loop()
            pace_ms, delay_ms = (int(word) for word in request.text.split())
            await asyncio.sleep(delay_ms / 1e3)
            for _ in range(request.sampling.max_tokens):
                yield inference_pb2.GenerateResponse(chunk=inference_pb2.Chunk(text="x"))
                if pace_ms:
                    pace_s = pace_ms / 1e3
                    await asyncio.sleep((loop.time() // pace_s + 1) * pace_s - loop.time())
            yield inference_pb2.GenerateResponse(end=inference_pb2.End())

    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
    port = free_port()
    serve.start(
        http_options={"host": "127.0.0.1", "port": free_port()},
        grpc_options=gRPCOptions(
            port=port, grpc_servicer_functions=["cluster.v1.inference_pb2_grpc.add_InferenceServicer_to_server"]
        ),
    )
    serve.run(Mock.bind(), name="mock", route_prefix="/")
    print(json.dumps({"pid": proxy_pid(), "port": port}), flush=True)
    sys.stdin.read()
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
