"""h2's state of a connection, with the limits of a server whose streams are many and long."""

from __future__ import annotations

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import Event
from h2.exceptions import DenialOfServiceError
from h2.settings import ChangedSetting, SettingCodes, Settings
from hyperframe.frame import DataFrame, Frame, GoAwayFrame, HeadersFrame, SettingsFrame

from cluster.wire.http2.headers import METADATA_BYTES_MAX

STREAMS_MAX = 65536  # calls of one connection at a time
STREAM_WINDOW = 2**20  # bytes that a client may send on a stream before it hears from us
CONNECTION_WINDOW = 2**22
HEADER_BYTES_MAX = 2**20  # of a header block that is read at all; a call is refused long before
HEADER_TABLE_BYTES = 4096  # of the headers that we remember having sent
SETTINGS_MAX = 100  # frames of settings between two looks
_FRAME_HEAD_BYTES = 9
_CALLS = (DataFrame, HeadersFrame)  # those that bring calls further
LOOKS_AT_ONCE = 64  # new streams before the open ones are counted anew


class ServerProtocol(H2Connection):
    """h2 counts the open streams one by one for each new one; here it does so for each twice as many."""

    def __init__(self) -> None:
        # What is sent is ours: spelled right already. What comes is looked at where it is read: h2 would end the whole
        # connection, and with it the calls of others, for a blank that one of them has sent.
        super().__init__(
            H2Configuration(
                client_side=False, header_encoding=None, normalize_outbound_headers=False,
                validate_outbound_headers=False, normalize_inbound_headers=False, validate_inbound_headers=False,
            )
        )  # fmt: skip
        self.decoder.max_header_list_size = HEADER_BYTES_MAX
        wanted = {
            SettingCodes.MAX_CONCURRENT_STREAMS: STREAMS_MAX, SettingCodes.INITIAL_WINDOW_SIZE: STREAM_WINDOW,
            SettingCodes.MAX_HEADER_LIST_SIZE: METADATA_BYTES_MAX,
        }  # fmt: skip
        self.local_settings = Settings(client=False, initial_values=wanted)
        self._counted = self._since = 0
        self.noise_bytes = 0  # that came beside what DATA and HEADERS carry; whoever looks sets it back
        self.settings_seen = 0  # frames of them; likewise

    def initiate_connection(self) -> None:
        super().initiate_connection()
        self.increment_flow_control_window(CONNECTION_WINDOW - self.inbound_flow_control_window)

    @property
    def open_inbound_streams(self) -> int:
        """Never too few; h2 forgets those that have ended when it counts."""
        self._since += 1
        if self._since > self._counted + LOOKS_AT_ONCE or self._counted + self._since >= STREAMS_MAX:
            self._counted, self._since = super().open_inbound_streams, 0
        return self._counted + self._since

    def stream_has_room(self, stream_id: int) -> bool:
        """Whether the window of the stream itself is open, whatever the connection's is."""
        stream = self.streams.get(stream_id)
        return stream is None or stream.outbound_flow_control_window > 0

    # h2's own dispatch, with what a server of many callers on one connection needs otherwise.

    def _receive_frame(self, frame: Frame) -> list[Event]:
        self.noise_bytes += _FRAME_HEAD_BYTES if isinstance(frame, _CALLS) else _FRAME_HEAD_BYTES + frame.body_len
        return super()._receive_frame(frame)

    def _receive_settings_frame(self, frame: SettingsFrame) -> tuple[list[Frame], list[Event]]:
        """Each costs as much as there are streams."""
        self.settings_seen += 1
        if self.settings_seen > SETTINGS_MAX:
            raise DenialOfServiceError("too many settings")
        result = super()._receive_settings_frame(frame)
        # A client may grant us any memory for its headers; we need little, and search all of it.
        self.encoder.header_table_size = min(self.encoder.header_table_size, HEADER_TABLE_BYTES)
        return result

    def _local_settings_acked(self) -> dict[SettingCodes | int, ChangedSetting]:
        changed = super()._local_settings_acked()
        self.decoder.max_header_list_size = HEADER_BYTES_MAX
        return changed

    def _receive_goaway_frame(self, frame: GoAwayFrame) -> tuple[list[Frame], list[Event]]:
        """A client that leaves in peace opens no more streams and reads those that it has to their end."""
        if frame.error_code == ErrorCodes.NO_ERROR:
            return [], []
        return super()._receive_goaway_frame(frame)
