"""``llm-cluster serve`` as a user starts it; requests go through its router over gRPC, with ``cluster.client``."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from served import REQUEST_DEADLINE_S, Server, send
from wire import Job, Request, Run, drive, versions

READY_DEADLINE_S = 180.0


class Served:
    """The cluster, from its command to its end."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="llm-cluster-bench-"))
        self._server: Server | None = None

    def start(self, config: dict) -> tuple[Run, dict[str, str]]:
        port = config["port"]
        config["spawned_s"] = time.monotonic()
        self._server = Server(
            "llm-cluster serve",
            [
                Path(sys.executable).with_name("llm-cluster"), "serve", config["checkpoint"],
                "--dtype", config["dtype"], "--device", "cpu",
                "--max-model-len", str(config["max_model_len"]), "--max-num-seqs", str(config["max_num_seqs"]),
                "--port", str(port), "--control-port", str(port + 1), "--metrics-port", str(port + 2),
                "--run-dir", self._folder / "run", *config["settings"].get("flags", []),
            ],
            # Threads are the product's own business, as for a user who has set nothing.
            {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "MKL_"))},
        )  # fmt: skip
        address = f"127.0.0.1:{port}"
        asyncio.run(_ready(self._server, address))
        found = versions("llm-cluster", "torch", "transformers", "ray", "deepspeed")
        return lambda job: asyncio.run(run_job(address, job)), found

    def end(self) -> None:
        if self._server is not None:
            self._server.end()
        shutil.rmtree(self._folder, ignore_errors=True)


async def _ready(server: Server, address: str) -> None:
    """As ``wait_ready``, but looking every 50 ms to the end."""
    from cluster.client import AsyncClient
    from cluster.domain.errors import ClusterError

    async with AsyncClient(address) as client:

        async def is_ready() -> bool:
            with contextlib.suppress(ClusterError):
                return any(model.ready_replicas for model in await client.list_models(timeout_s=5))
            return False

        await server.ready(is_ready, READY_DEADLINE_S)


async def run_job(address: str, job: Job) -> list[Request]:
    from cluster.client import AsyncClient, Chunk

    options = {"max_tokens": job.new_tokens, "ignore_eos": True}
    async with AsyncClient(address) as client:

        async def stream(prompt: list[int], request: Request) -> None:
            async for event in client.generate(prompt, timeout_s=REQUEST_DEADLINE_S, **options):
                if isinstance(event, Chunk):
                    request.take(event.token_ids)

        return await send(job, stream)


if __name__ == "__main__":
    served = Served()
    drive(served.start, served.end)
