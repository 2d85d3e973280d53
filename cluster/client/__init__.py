"""A small typed client of cluster.v1.Inference: synchronous and asynchronous, resuming across routers.

>>> from cluster.client import Chunk, Client
>>> with Client("127.0.0.1:50051") as client:
...     for event in client.generate("Return the", max_tokens=20):
...         if isinstance(event, Chunk):  # the last event is a Completion: the whole of it
...             print(event.text, end="")
"""

from __future__ import annotations

from cluster.client.async_client import AsyncClient
from cluster.client.events import Chunk, Completion, Usage
from cluster.client.sync_client import Client

__all__ = ["AsyncClient", "Chunk", "Client", "Completion", "Usage"]
