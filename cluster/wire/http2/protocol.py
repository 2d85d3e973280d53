"""h2's state of a connection, with the limits of a server whose streams are many and long."""

from __future__ import annotations

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.settings import SettingCodes, Settings

STREAMS_MAX = 65536  # calls of one connection at a time
STREAM_WINDOW = 2**20  # bytes that a client may send on a stream before it hears from us
CONNECTION_WINDOW = 2**22
LOOKS_AT_ONCE = 64  # new streams before the open ones are counted anew


class ServerProtocol(H2Connection):
    """h2 counts the open streams one by one for each new one; here it does so for each twice as many."""

    def __init__(self) -> None:
        # What is sent is ours: spelled right already. What comes is looked at.
        super().__init__(
            H2Configuration(
                client_side=False,
                header_encoding=None,
                normalize_outbound_headers=False,
                validate_outbound_headers=False,
            )
        )
        wanted = {
            SettingCodes.MAX_CONCURRENT_STREAMS: STREAMS_MAX, SettingCodes.INITIAL_WINDOW_SIZE: STREAM_WINDOW,
            SettingCodes.MAX_HEADER_LIST_SIZE: self.DEFAULT_MAX_HEADER_LIST_SIZE,
        }  # fmt: skip
        self.local_settings = Settings(client=False, initial_values=wanted)
        self._counted = self._since = 0

    def initiate_connection(self) -> None:
        super().initiate_connection()
        self.increment_flow_control_window(CONNECTION_WINDOW - self.inbound_flow_control_window)

    @property
    def open_inbound_streams(self) -> int:
        """Never too few; h2 forgets those that have ended when it counts."""
        self._since += 1
        if self._since > self._counted + LOOKS_AT_ONCE:
            self._counted, self._since = super().open_inbound_streams, 0
        return self._counted + self._since
