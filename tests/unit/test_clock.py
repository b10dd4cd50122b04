"""The kernel's time as people read it."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcpobs.clock import UTC, Clock

if TYPE_CHECKING:
    from collections.abc import Iterator

SECOND = 1_000_000_000
BOOT_NS = 1_700_000_000 * SECOND  # 2023-11-14 22:13:20 UTC


def set_clocks(patch: pytest.MonkeyPatch, boot_ns: int) -> None:
    """The system's clocks, where the kernel's time 0 is `boot_ns` after the epoch."""
    patch.setattr(time, "time_ns", lambda: boot_ns + 77 * SECOND)
    patch.setattr(time, "monotonic_ns", lambda: 77 * SECOND)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A clock to which the kernel's time 0 is BOOT_NS."""
    set_clocks(monkeypatch, BOOT_NS)
    return Clock()


@pytest.fixture
def _new_york(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Local time that is not UTC."""
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "EST5")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.usefixtures("_new_york")
@pytest.mark.parametrize(
    ("time_ns", "local"),
    [(0, "17:13:20"), (SECOND - 1, "17:13:20"), (SECOND, "17:13:21"), (7 * 3600 * SECOND, "00:13:20")],
)
def test_local_time(time_ns: int, local: str, clock: Clock) -> None:
    assert clock.local(time_ns) == local
    assert clock.local(time_ns + 60 * SECOND) != local
    assert clock.local(time_ns) == local


def utc(clock: Clock, time_ns: int) -> str:
    """One time, as JSON has it."""
    seconds, us = clock.utc([time_ns])
    text: str = json.loads(UTC % (*seconds, *us))
    return text


def test_utc_keeps_microseconds(clock: Clock) -> None:
    assert utc(clock, 0) == "2023-11-14T22:13:20.000000Z"
    assert utc(clock, SECOND + 1_999) == "2023-11-14T22:13:21.000001Z"
    assert clock.realtime_us(1_999) == 1_700_000_000_000_001


def test_seconds_count_from_the_first_event(clock: Clock) -> None:
    assert [clock.since_first(5 * SECOND + ns) for ns in (0, 1_000, SECOND)] == [0.0, 1e-6, 1.0]


@given(first=st.integers(0, 1 << 62), later=st.integers(0, 1 << 40))
def test_seconds_are_exact_to_the_microsecond(first: int, later: int) -> None:
    clock = Clock()
    assert clock.since_first(first) == 0
    assert round(clock.since_first(first + later) * 1e6) == pytest.approx(later / 1000, abs=0.51)


def test_adjust_follows_the_system_clock(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    set_clocks(monkeypatch, BOOT_NS + 3 * SECOND)
    assert utc(clock, 0) == "2023-11-14T22:13:20.000000Z"
    clock.adjust()
    assert utc(clock, 0) == "2023-11-14T22:13:23.000000Z"


@pytest.mark.parametrize(
    ("local", "since_first", "names"),
    [
        (False, False, ["time", "ktime_ns"]),
        (True, False, ["time_local", "time", "ktime_ns"]),
        (False, True, ["time_s", "time", "ktime_ns"]),
        (True, True, ["time_local", "time_s", "time", "ktime_ns"]),
    ],
)
def test_columns(local: bool, since_first: bool, names: list[str], clock: Clock) -> None:
    assert [column.name for column in clock.columns(local, since_first)] == names
