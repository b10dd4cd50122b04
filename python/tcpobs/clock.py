"""The kernel's time as people read it: wall-clock time, and seconds since the first event."""

from __future__ import annotations

import time
from itertools import repeat
from operator import add, floordiv, mod

from tcpobs.columns import Column, Remembered

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from tcpobs.columns import Values

UTC = '"%s.%06dZ"'
"""ISO 8601 to the microsecond: 2026-11-21T09:30:00.123456Z."""


class Clock:
    """Turns CLOCK_MONOTONIC nanoseconds, the time of events, into wall-clock time.

    `adjust` follows what has been done to the system's clock (NTP, an administrator) in between.
    """

    def __init__(self) -> None:
        self._first: int | None = None
        self._second = -1
        self._local = ""
        self._utc_second = Remembered(lambda s: time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(s)))
        self.adjust()

    def adjust(self) -> None:
        """Measures anew how far the two clocks are apart."""
        self._offset = time.time_ns() - time.monotonic_ns()

    def realtime_us(self, time_ns: int) -> int:
        """Microseconds since the epoch."""
        return (time_ns + self._offset) // 1000

    def local(self, time_ns: int) -> str:
        """HH:MM:SS in the local time zone."""
        second = (time_ns + self._offset) // 1_000_000_000
        if second != self._second:
            self._second = second
            self._local = time.strftime("%H:%M:%S", time.localtime(second))
        return self._local

    def utc(self, times: Values) -> Sequence[Iterable[object]]:
        """What UTC takes of many times: each one's second as text, and its microseconds."""
        us = list(map(floordiv, map(add, times, repeat(self._offset)), repeat(1000)))
        seconds = map(self._utc_second.__getitem__, map(floordiv, us, repeat(1_000_000)))
        return [seconds, map(mod, us, repeat(1_000_000))]

    def since_first(self, time_ns: int) -> float:
        """Seconds since the first event that was asked about."""
        if self._first is None:
            self._first = time_ns
        return (time_ns - self._first) / 1e9

    def columns(self, local: bool, since_first: bool) -> list[Column]:
        """The columns before the others: TIME and TIME(s) where wanted, and those that JSON has."""
        columns = []
        if local:
            columns.append(Column("TIME", "time_ns", "%-8s", convert=self.local, name="time_local"))
        if since_first:
            seconds = Column(
                "TIME(s)", "time_ns", "%-9.6f", csv="%.6f", convert=self.since_first, name="time_s"
            )
            columns.append(seconds)
        return [
            *columns,
            Column("TIME", "time_ns", None, csv=None, json_bulk=(UTC, self.utc)),
            Column("KTIME_NS", "time_ns", None, csv=None),
        ]
