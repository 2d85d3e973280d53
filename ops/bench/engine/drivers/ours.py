"""``llm-cluster serve`` as a user starts it; requests go through its router over gRPC, with ``cluster.client``."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from wire import Job, Request, Run, drive, versions

READY_DEADLINE_S, REQUEST_DEADLINE_S, STOP_DEADLINE_S = 180.0, 300.0, 40.0


class Served:
    """The cluster, from its command to its end."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="llm-cluster-bench-"))
        self._process: subprocess.Popen | None = None

    def start(self, config: dict) -> tuple[Run, dict[str, str]]:
        port = config["port"]
        config["spawned_s"] = time.monotonic()
        self._process = subprocess.Popen(
            [
                Path(sys.executable).with_name("llm-cluster"), "serve", config["checkpoint"],
                "--dtype", config["dtype"], "--device", "cpu",
                "--max-model-len", str(config["max_model_len"]), "--max-num-seqs", str(config["max_num_seqs"]),
                "--port", str(port), "--control-port", str(port + 1), "--metrics-port", str(port + 2),
                "--run-dir", self._folder / "run", *config["settings"].get("flags", []),
            ],
            # Threads are the product's own business, as for a user who has set nothing.
            stdout=sys.stderr, env={k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "MKL_"))},
        )  # fmt: skip
        address = f"127.0.0.1:{port}"
        asyncio.run(self._ready(address))
        found = versions("llm-cluster", "torch", "transformers", "ray", "deepspeed")
        return lambda job: asyncio.run(run_job(address, job)), found

    async def _ready(self, address: str) -> None:
        """As ``wait_ready``, but looking every 50 ms to the end."""
        from cluster.client import AsyncClient
        from cluster.domain.errors import ClusterError

        assert self._process is not None
        until_s = time.monotonic() + READY_DEADLINE_S
        async with AsyncClient(address) as client:
            while True:
                if self._process.poll() is not None or time.monotonic() > until_s:
                    raise RuntimeError("llm-cluster serve does not get ready; what it printed above says why")
                with contextlib.suppress(ClusterError):
                    if any(model.ready_replicas for model in await client.list_models(timeout_s=5)):
                        return
                await asyncio.sleep(0.05)

    def end(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_DEADLINE_S)
        shutil.rmtree(self._folder, ignore_errors=True)


async def run_job(address: str, job: Job) -> list[Request]:
    from cluster.client import AsyncClient, Chunk

    requests: list[Request] = []
    waiting = iter(job.prompts)

    async def client_of(client: AsyncClient) -> None:
        for prompt in waiting:
            request = Request(time.monotonic())
            requests.append(request)
            options = {"max_tokens": job.new_tokens, "ignore_eos": True}
            async for event in client.generate(prompt, timeout_s=REQUEST_DEADLINE_S, **options):
                if isinstance(event, Chunk):
                    request.take(event.token_ids)

    async with AsyncClient(address) as client:
        await asyncio.gather(*(client_of(client) for _ in range(job.concurrency)))
    return requests


if __name__ == "__main__":
    served = Served()
    drive(served.start, served.end)
