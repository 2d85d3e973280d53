"""Adapter: follows the controller's endpoint tables, and remembers the last one on disk."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable
from pathlib import Path

import grpc
import grpc.aio
from google.protobuf import json_format

from cluster.domain.endpoint import EndpointTable
from cluster.router.cancellation import being_cancelled
from cluster.telemetry.logs import Logger
from cluster.v1 import control_pb2, control_pb2_grpc
from cluster.wire import channel, convert

BACKOFF_FIRST_S = 0.1
BACKOFF_MAX_S = 1.0


def load_table(state_file: Path) -> EndpointTable | None:
    """The table that ``save_table`` wrote last; None when there is none that can be read."""
    try:
        content = json.loads(state_file.read_text("utf-8"))
        if not isinstance(content, dict):
            return None
        message = json_format.ParseDict(content, control_pb2.EndpointTable())
        return convert.endpoint_table_from_message(message)
    except (OSError, ValueError, json_format.ParseError):
        return None


def save_table(state_file: Path, table: EndpointTable) -> None:
    """Replaces the file as a whole, so that a reader never sees half a table."""
    message = convert.endpoint_table_to_message(table)
    temporary = state_file.with_name(f"{state_file.name}.{os.getpid()}")
    temporary.write_text(json_format.MessageToJson(message), "utf-8")
    temporary.replace(state_file)


class EndpointWatch:
    """Hands every table of the controller to ``apply``, which says whether it took it.

    While the controller is away, or says what cannot be used, the last table stays in force; it is asked again for
    ever, after 0.1 to 1 s.
    """

    def __init__(
        self,
        controller_address: str,
        request: control_pb2.WatchEndpointsRequest,
        apply: Callable[[EndpointTable], bool],
        state_file: Path | None,
        log: Logger,
    ) -> None:
        self._address = controller_address
        self._request = request
        self._apply = apply
        self._state_file = state_file
        self._log = log
        self._saved: EndpointTable | None = None
        if state_file is not None and (remembered := load_table(state_file)) is not None:
            self._saved = remembered
            apply(remembered)
            log.info("endpoint_table_remembered", epoch=remembered.epoch, endpoints=len(remembered.endpoints))
        self._task = asyncio.get_running_loop().create_task(self._follow_forever(), name="endpoint watch")

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _follow_forever(self) -> None:
        backoff_s, reported = BACKOFF_FIRST_S, False
        while not being_cancelled():
            try:
                async with channel.open_channel(self._address) as opened:
                    async for message in control_pb2_grpc.ControlStub(opened).WatchEndpoints(self._request):
                        await self._take(convert.endpoint_table_from_message(message))
                        backoff_s, reported = BACKOFF_FIRST_S, False
            except grpc.RpcError as error:
                if not reported:
                    self._log.warning("controller_away", address=self._address, error=str(error.code()))
                    reported = True
            except Exception:  # boundary: whatever a controller says, the next table must be heard
                if not reported:
                    self._log.exception("endpoint_table_refused", address=self._address)
                    reported = True
            if not being_cancelled():
                await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, BACKOFF_MAX_S)

    async def _take(self, table: EndpointTable) -> None:
        if not self._apply(table):
            self._log.warning("stale_endpoint_table", epoch=table.epoch)
            return
        if self._state_file is None or table == self._saved:
            return
        try:
            await asyncio.to_thread(save_table, self._state_file, table)
            self._saved = table
        except OSError as error:
            self._log.warning("endpoint_table_not_saved", file=str(self._state_file), error=str(error))
