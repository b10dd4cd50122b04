"""What is printed, character by character: SPEC's formats applied to values by hand."""

from __future__ import annotations

import csv
import json
import struct
import time
import unicodedata
from functools import cache
from socket import AF_INET, AF_INET6, inet_pton
from typing import TYPE_CHECKING, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcpobs.clock import Clock
from tcpobs.columns import CSV, JSON, TEXT, WIDE, Column, Table
from tcpobs.libbpf import Object
from tcpobs.records import Record, Session, StateChange, decoder
from tcpobs.tools import life, states

from .conftest import object_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

MODES = [TEXT, WIDE, CSV]

NAMES = {
    "states": [
        "SKADDR",
        "C-PID",
        "C-COMM",
        "IP",
        "LADDR",
        "LPORT",
        "RADDR",
        "RPORT",
        "OLDSTATE",
        "NEWSTATE",
        "MS",
    ],
    "life": ["PID", "COMM", "IP", "LADDR", "LPORT", "RADDR", "RPORT", "TX_KB", "RX_KB", "MS"],
}
HEADERS = {
    ("states", TEXT): "%-16s %-5s %-10.10s %s%-15s %-5s %-15s %-5s %-11s -> %-11s %s",
    ("states", WIDE): "%-16s %-5s %-16.16s %-2s %-26s %-5s %-26s %-5s %-11s -> %-11s %s",
    ("states", CSV): "%s,%s,%s,%s,%s,%s,%s,%s,%s,%s,%s",
    ("life", TEXT): "%-5s %-10.10s %s%-15s %-5s %-15s %-5s %5s %5s %s",
    ("life", WIDE): "%-5s %-16.16s %-2s %-26s %-5s %-26s %-5s %6s %6s %s",
    ("life", CSV): "%s,%s,%s,%s,%s,%s,%s,%s,%s,%s",
}
ROWS = {
    ("states", TEXT): "%-16x %-5d %-10.10s %s%-15s %-5d %-15s %-5d %-11s -> %-11s %.3f",
    ("states", WIDE): "%-16x %-5d %-16.16s %-2s %-26s %-5s %-26s %-5d %-11s -> %-11s %.3f",
    ("states", CSV): "%x,%d,%s,%s,%s,%s,%s,%d,%s,%s,%.3f",
    ("life", TEXT): "%-5d %-10.10s %s%-15s %-5d %-15s %-5d %5d %5d %.2f",
    ("life", WIDE): "%-5d %-16.16s %-2s %-26s %-5s %-26s %-5d %6d %6d %.2f",
    ("life", CSV): "%d,%s,%s,%s,%s,%s,%d,%d,%d,%.2f",
}
"""SPEC, sections 1 and 2."""

STATES = [
    "ESTABLISHED",
    "SYN_SENT",
    "SYN_RECV",
    "FIN_WAIT1",
    "FIN_WAIT2",
    "TIME_WAIT",
    "CLOSE",
    "CLOSE_WAIT",
    "LAST_ACK",
    "LISTEN",
    "CLOSING",
    "NEW_SYN_RECV",
]
NUMBERS = {name: number for number, name in enumerate(STATES, 1)}

FAMILIES = {4: AF_INET, 6: AF_INET6}


def packed_endpoints(row: Change | End) -> bytes:
    """struct endpoints of bpf/events.h."""
    return struct.pack(
        "=16s16sHHI",
        inet_pton(FAMILIES[row.ip], row.laddr),
        inet_pton(FAMILIES[row.ip], row.raddr),
        row.lport,
        row.rport,
        FAMILIES[row.ip],
    )


class Change(NamedTuple):
    """A state change, as it is shown."""

    skaddr: int
    pid: int
    comm: str
    ip: int
    laddr: str
    lport: int
    raddr: str
    rport: int
    old: str
    new: str
    ms: float

    def packed(self, time_ns: int) -> bytes:
        """struct state_change of bpf/events.h, its owner not known."""
        return struct.pack(
            "=QQQ40sI16sHH40x",
            self.skaddr,
            time_ns,
            round(self.ms * 1e6),
            packed_endpoints(self),
            self.pid,
            self.comm.encode(),
            *(NUMBERS.get(state) or int(state) for state in (self.old, self.new)),
        )


class End(NamedTuple):
    """A session's end, as it is shown."""

    pid: int
    comm: str
    ip: int
    laddr: str
    lport: int
    raddr: str
    rport: int
    tx_kb: int
    rx_kb: int
    ms: float

    def packed(self, time_ns: int) -> bytes:
        """struct session of bpf/events.h; a byte short of one KiB more than is shown."""
        return struct.pack(
            "=QQQQ40sI16s92x",
            time_ns,
            round(self.ms * 1e6),
            self.tx_kb * 1024 + 1023,
            self.rx_kb * 1024 + 1023,
            packed_endpoints(self),
            self.pid,
            self.comm.encode() if self.pid else b"",
        )


CHANGES = [
    Change(
        0xFFFF888012345678, 181, "curl", 4, "10.0.0.1", 0, "192.168.100.200", 443, "CLOSE", "SYN_SENT", 0.0
    ),
    Change(
        0x1, 4194303, "a-comm-of-15-by", 6, "2001:db8::1", 65535, "fe80::1:2:3:4", 1, "99", "LAST_ACK", 1.234
    ),
    Change(
        0xABC,
        0,
        "swapper/0",
        6,
        "2001:db8:1111:2222:3333:4444:5555:6666",
        80,
        "::",
        0,
        "LISTEN",
        "99",
        86400000.001,
    ),
    *(Change(0x2, 1, "all states", 4, "0.0.0.0", 1, "1.2.3.4", 2, s, s, 12.5) for s in STATES),
]
ENDS = [
    End(181, "curl", 4, "10.0.0.1", 40000, "192.168.100.200", 443, 0, 1, 0.25),
    End(
        4194303, "a-comm-of-15-by", 6, "2001:db8::1", 65535, "fe80::1:2:3:4", 1, 123456789, 99999, 86400000.5
    ),
    End(0, "-", 6, "2001:db8:1111:2222:3333:4444:5555:6666", 80, "::ffff:1.2.3.4", 1, 7, 0, 0.0),
]
SAMPLES: dict[str, Sequence[Change | End]] = {"states": CHANGES, "life": ENDS}
COLUMNS: dict[str, Sequence[Column]] = {"states": states.COLUMNS, "life": life.COLUMNS}
RECORDS: dict[str, type[Record]] = {"states": StateChange, "life": Session}

START_NS = 1_000_000_000
EPOCH_NS = 1_700_000_000_000_000_000  # 2023-11-14 22:13:20 UTC


@pytest.fixture(autouse=True, scope="module")
def _in_india() -> Iterator[None]:
    """Local time that is not UTC."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TZ", "IST-5:30")
        time.tzset()
        yield
    time.tzset()


def clock() -> Clock:
    """A clock to which START_NS is EPOCH_NS."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "time_ns", lambda: EPOCH_NS)
        patch.setattr(time, "monotonic_ns", lambda: START_NS)
        return Clock()


@cache
def decode(tool: str) -> Callable[[bytes], Iterator[Record]]:
    """Decodes the tool's records, by the layout in its object."""
    with Object.of_file(str(object_file(tool)), tool) as object:
        return decoder(RECORDS[tool], object.btf, header=0)[1]


def table(tool: str, mode: str, local: bool = False, since_first: bool = False) -> Table:
    decode(tool)  # fits the record class
    return Table([*clock().columns(local, since_first), *COLUMNS[tool]], mode, RECORDS[tool])


def samples(tool: str) -> list[Record]:
    """SAMPLES, half a second apart."""
    packed = (sample.packed(START_NS + n * 500_000_000) for n, sample in enumerate(SAMPLES[tool]))
    return list(decode(tool)(b"".join(packed)))


def shown(tool: str, mode: str, values: Sequence[object]) -> tuple[object, ...]:
    """The values with an empty IP where the mode has no such column, for its `%s` is there all the same."""
    ip = NAMES[tool].index("IP")
    return (*values[:ip], "" if mode == TEXT else values[ip], *values[ip + 1 :])


@pytest.mark.parametrize("since_first", [False, True])
@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tool", ["states", "life"])
def test_text_is_as_specified(tool: str, mode: str, local: bool, since_first: bool) -> None:
    end = "," if mode == CSV else " "
    time_format = ("%s" if mode == CSV else "%-8s") + end if local else ""
    seconds_header = ("%s" if mode == CSV else "%-9s") + end if since_first else ""
    seconds_format = ("%.6f" if mode == CSV else "%-9.6f") + end if since_first else ""

    printed = table(tool, mode, local, since_first)
    rows = printed.rows(samples(tool))

    names = ["TIME"] * local + ["TIME(s)"] * since_first
    header_format = time_format + seconds_header + HEADERS[tool, mode]
    assert printed.header() == header_format % (*names, *shown(tool, mode, NAMES[tool])) + "\n"
    expected = []
    for number, sample in enumerate(SAMPLES[tool]):
        times = [f"03:43:{20 + number // 2}"] * local + [number / 2] * since_first
        row_format = time_format + seconds_format + ROWS[tool, mode]
        expected.append(row_format % (*times, *shown(tool, mode, sample)) + "\n")
    assert rows.splitlines(keepends=True) == expected


@pytest.mark.parametrize("tool", ["states", "life"])
def test_json_has_every_value(tool: str) -> None:
    printed = table(tool, JSON)
    assert printed.header() == ""
    lines = printed.rows(samples(tool)).splitlines()
    assert len(lines) == len(SAMPLES[tool])
    for number, (line, sample) in enumerate(zip(lines, SAMPLES[tool])):
        values = {name.lower().replace("-", "_"): value for name, value in zip(NAMES[tool], sample)}
        if isinstance(sample, Change):
            values["skaddr"] = f"{sample.skaddr:x}"
        else:
            values["tx_bytes"], values["rx_bytes"] = sample.tx_kb * 1024 + 1023, sample.rx_kb * 1024 + 1023
        values["span_ns"] = round(sample.ms * 1e6)
        values["ktime_ns"] = START_NS + number * 500_000_000
        values["time"] = f"2023-11-14T22:13:{20 + number // 2}.{number % 2 * 500000:06}Z"
        assert json.loads(line) == values


@pytest.mark.parametrize("tool", ["states", "life"])
def test_json_has_the_times_asked_for(tool: str) -> None:
    lines = table(tool, JSON, local=True, since_first=True).rows(samples(tool)).splitlines()
    times = [(row["time_local"], row["time_s"]) for row in map(json.loads, lines)]
    assert times == [(f"03:43:{20 + number // 2}", number / 2) for number in range(len(times))]


def with_comm(tool: str, comm: bytes) -> list[Record]:
    """One record, whose 16 bytes of comm are these."""
    marker = b"comm-comm-comm!!"
    packed = SAMPLES[tool][0]._replace(comm=marker.decode()).packed(START_NS)
    return list(decode(tool)(packed.replace(marker, comm.ljust(16, b"\0"))))


COMMS = {
    b"nginx: worker": "nginx: worker",
    b'a "b", c': 'a "b", c',
    b",": ",",
    b'"': '"',
    b"%s{}%d\\": "%s{}%d\\",
    "größe".encode(): "größe",
    b"new\nline\r": "new\\nline\\r",
    b"\x1b[31mred\x7f": "\\x1b[31mred\\x7f",
    "\u2028\u200b\x85".encode(): "\\u2028\\u200b\\x85",
    b"\xff\xfe not UTF-8": "\\xff\\xfe not UTF-8",
    b"cut\0garbage": "cut",
    b"": "",
}


@pytest.mark.parametrize(("comm", "text"), COMMS.items(), ids=repr)
@pytest.mark.parametrize("tool", ["states", "life"])
def test_comm_is_escaped_and_quoted(tool: str, comm: bytes, text: str) -> None:
    [record] = with_comm(tool, comm)
    column = NAMES[tool].index("C-COMM" if tool == "states" else "COMM")
    fields = next(csv.reader([table(tool, CSV).rows([record])], strict=True))
    assert fields[column] == text
    row = json.loads(table(tool, JSON).rows([record]))
    assert row["c_comm" if tool == "states" else "comm"] == text
    assert f" {text[:10]:<10} " in table(tool, TEXT).rows([record])
    assert f" {text[:16]:<16} " in table(tool, WIDE).rows([record])


def test_csv_quotes_only_what_needs_it() -> None:
    assert table("life", CSV).rows(with_comm("life", b"a b")).startswith("181,a b,4,")
    assert table("life", CSV).rows(with_comm("life", b'a,"b"')).startswith('181,"a,""b""",4,')


@given(comm=st.binary(min_size=16, max_size=16))
@pytest.mark.parametrize("tool", ["states", "life"])
def test_no_comm_breaks_a_row(tool: str, comm: bytes) -> None:
    records = with_comm(tool, comm) * 3
    for mode in (*MODES, JSON):
        lines = table(tool, mode).rows(records)
        assert lines.endswith("\n")
        assert len(lines.splitlines()) == 3
        assert not any(unicodedata.category(c).startswith("C") for c in lines.replace("\n", ""))
        assert all(map(str.isprintable, lines.splitlines()))
        if mode == CSV:
            assert [len(row) for row in csv.reader(lines.splitlines(), strict=True)] == [len(NAMES[tool])] * 3
        if mode == JSON:
            for line in lines.splitlines():
                json.loads(line)
