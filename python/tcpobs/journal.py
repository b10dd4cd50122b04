"""State changes in the systemd journal (systemd.journal-fields(7))."""

from __future__ import annotations

import os

from tcpobs.errors import HostError, TcpobsError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from tcpobs.clock import Clock
    from tcpobs.records import StateChange

SOCKET = "/run/systemd/journal/socket"


class Journal:
    """The host's journal. Raises HostError when its library or its socket is missing."""

    def __init__(self) -> None:
        try:
            from systemd.journal import sendv
        except ImportError:
            raise HostError(
                "-Y needs the journal library",
                "pip install 'tcpobs[journal]', or your distribution's python3-systemd",
            ) from None
        # The library says nothing when there is no journal: ask first.
        if not os.path.exists(SOCKET):
            raise HostError(f"-Y needs the journal, and {SOCKET} is missing", "start systemd-journald")
        self._send = sendv
        self._root = os.geteuid() == 0

    def log(self, event: StateChange, clock: Clock) -> None:
        """Writes one state change. Raises TcpobsError when journald has gone."""
        fields = [f"{name}={value}" for name, value in self._fields(event, clock).items()]
        try:
            self._send(*fields)
        except OSError as error:
            raise TcpobsError(
                f"cannot write to the journal: {error.strerror}; is journald running?"
            ) from None

    def _fields(self, event: StateChange, clock: Clock) -> dict[str, object]:
        source, target = event.endpoints.laddr, event.endpoints.raddr
        fields: dict[str, object] = {
            "MESSAGE": f"{event.c_comm} {source} {event.lport} → {target} {event.rport}"
            f" {event.oldstate} → {event.newstate}",
            "PRIORITY": 5,
            "SYSLOG_IDENTIFIER": "tcpstates",
            "_SOURCE_REALTIME_TIMESTAMP": clock.realtime_us(event.time_ns),
            "OBJECT_PID": event.c_pid,
            f"OBJECT_IPV{event.ip}_SOURCE_ADDRESS": source,
            f"OBJECT_IPV{event.ip}_DESTINATION_ADDRESS": target,
            "OBJECT_TCP_SOURCE_PORT": event.lport,
            "OBJECT_TCP_DESTINATION_PORT": event.rport,
            "OBJECT_TCP_OLD_STATE": event.oldstate,
            "OBJECT_TCP_NEW_STATE": event.newstate,
            "OBJECT_TCP_SPAN_TIME": event.span_ns // 1000,
        }
        if not self._root:  # journald itself fills it in for a sender that is root
            fields["OBJECT_COMM"] = event.c_comm
        return fields
