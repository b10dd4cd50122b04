"""Groups of sessions: percentiles from buckets, what is printed of them, and what the command refuses."""

from __future__ import annotations

import csv
import json
import math
import struct
from collections import Counter
from socket import AF_INET, AF_INET6, inet_pton
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcpobs import cgroups
from tcpobs.cli import main
from tcpobs.columns import CSV, JSON, TEXT, WIDE, Table
from tcpobs.errors import TcpobsError
from tcpobs.libbpf import Kind, Object
from tcpobs.records import CLOSING, FIN_WAIT2, LAST_ACK, SYN_RECV, SYN_SENT, Ending, Session, decoder
from tcpobs.tools.summary import BY, DEFAULT_BY, Group, checked, columns, middle

from .conftest import object_file

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

DURATIONS, RTTS = 288, 176
"""Buckets: eight for each power of two up to 2^38 and 2^24 µs."""


@pytest.fixture(scope="module", autouse=True)
def life() -> Iterator[Object]:
    """The object, and the records fitted to it."""
    with Object.of_file(str(object_file("life")), "life") as object:
        decoder(Session, object.btf)
        decoder(Group, object.btf)
        yield object


def bucket(us: int) -> int:
    """bucket_of() of bpf/groups.bpf.h."""
    shift = max(us.bit_length() - 4, 0)
    return 8 * shift + (us >> shift)


def packed(buckets: int, values: Sequence[int]) -> bytes:
    counts = Counter(min(bucket(value), buckets - 1) for value in values)
    return struct.pack(f"={buckets}I", *(counts[i] for i in range(buckets)))


def group(
    btf: Object,
    *,
    pid: int = 0,
    comm: bytes = b"",
    uid: int = 0xFFFFFFFF,
    ip: int = 4,
    raddr: str = "10.0.0.2",
    netns: int = 0,
    port: int = 0,
    role: int = 0,
    cgroup: int = 0,
    sums: tuple[int, int, int, int] = (1, 0, 0, 0),
    us: Sequence[int] = (),
    rtts: Sequence[int] = (),
) -> Group:
    """A group as the programs sum it up: struct group of bpf/events.h."""
    family = AF_INET if ip == 4 else AF_INET6
    data = struct.pack(
        "=QQ16s16sHHII16sIIHH4Q",
        0,
        cgroup,
        bytes(16),
        inet_pton(family, raddr),
        0,
        0,
        family,
        pid,
        comm,
        uid,
        netns,
        port,
        role,
        *sums,
    )
    size, decode = decoder(Group, btf.btf)
    data += packed(DURATIONS, us) + packed(RTTS, rtts)
    assert len(data) == size
    [found] = decode(data)
    return found


# ---- percentiles


def test_buckets_are_as_many_as_in_c(life: Object) -> None:
    for name, buckets, bits in (("durations", DURATIONS, 38), ("round_trips", RTTS, 24)):
        found = life.btf.find(name, Kind.STRUCT)
        assert found
        assert found.size == 4 * buckets
        assert bucket(2**bits - 1) == buckets - 1


@given(st.integers(0, 2**38 - 1))
def test_a_value_is_at_most_a_sixteenth_from_its_bucket(us: int) -> None:
    assert abs(middle(bucket(us)) - us) <= us / 16
    assert bucket(us) <= bucket(us + 1) <= bucket(us) + 1
    assert middle(bucket(us)) < middle(bucket(us) + 1)


@pytest.mark.parametrize("us", range(16))
def test_small_values_are_exact(us: int) -> None:
    assert middle(bucket(us)) == us


@given(
    st.lists(st.integers(0, 2**24 - 1) | st.integers(0, 300), min_size=1),
    st.sampled_from([1, 50, 90, 99, 99.9, 100]) | st.floats(0.1, 100),
)
def test_percentiles_are_those_of_the_sorted_values(values: list[int], percent: float) -> None:
    with Object.of_file(str(object_file("life")), "life") as object:
        found = group(object, us=values, rtts=values)
    rank = math.ceil(len(values) * percent / 100)
    exact = sorted(values)[rank - 1]
    for ms in (found.ms(percent), found.rtt_ms(percent)):
        assert ms is not None
        assert abs(ms * 1000 - exact) <= exact / 16 + 1e-6


def test_there_are_no_percentiles_of_nothing(life: Object) -> None:
    assert (group(life).ms(50), group(life).rtt_ms(99)) == (None, None)


def test_too_large_values_are_in_the_last_bucket(life: Object) -> None:
    found = group(life, us=[2**50], rtts=[2**29])
    assert found.ms(50) == middle(DURATIONS - 1) / 1000 > 0.93 * 2**38 / 1000
    assert found.rtt_ms(50) == middle(RTTS - 1) / 1000 > 0.93 * 2**24 / 1000


# ---- failed


@pytest.mark.parametrize(
    ("error", "oldstate", "open", "name", "failed"),
    [
        (0, FIN_WAIT2, 0, "fin-local", False),
        (0, LAST_ACK, 0, "fin-remote", False),
        (0, CLOSING, 0, "fin-both", False),
        (0, 1, 0, "reset-sent", False),
        (104, 1, 0, "reset-received", True),
        (111, SYN_SENT, 0, "refused", True),
        (110, 1, 0, "timeout", True),
        (113, SYN_SENT, 0, "unreachable", True),
        (103, 1, 0, "aborted", True),
        (71, 1, 0, "unreachable", True),
        (12, 1, 0, "error", True),
        (0, SYN_SENT, 0, "cancelled", True),
        (0, SYN_RECV, 0, "reset-sent", True),
        (0, SYN_SENT, 1, "open", False),
    ],
)
def test_failed(error: int, oldstate: int, open: int, name: str, failed: bool) -> None:
    fields = {"error": error, "oldstate": oldstate, "open": open, "by_process": 1, "sent": 1, "orphaned": 1}
    ending = Ending(fields.get(field, 0) for field in Ending.fields)
    assert (ending.name, ending.failed) == (name, failed)


# ---- what is printed


def shown(groups: Sequence[Group], mode: str, by: Sequence[str]) -> str:
    table = Table(columns(by), mode, Group)
    return table.header() + table.rows(groups)


@pytest.fixture
def web(life: Object) -> Group:
    return group(
        life,
        pid=181,
        comm=b'we,"b',
        uid=33,
        raddr="10.1.2.3",
        port=443,
        role=1,
        sums=(1200, 3, 5 << 20, 2047),
        us=[15, 15, 1000],
        rtts=[120] * 99 + [8000],
    )


def test_text(web: Group, life: Object) -> None:
    unknown = group(life, ip=6, raddr="2001:db8::1", port=22)
    assert shown([web, unknown], TEXT, DEFAULT_BY) == (
        "PID     COMM       RADDR           PORT  SESSIONS  FAILED     TX_KB     RX_KB"
        "     MS_P50     MS_P90     MS_P99  RTT_P50  RTT_P90  RTT_P99\n"
        '181     we,"b      10.1.2.3        443       1200       3      5120         1'
        "      0.015      0.992      0.992    0.123    0.123    0.123\n"
        "0       -          2001:db8::1     22           1       0         0         0"
        "      0.000      0.000      0.000    0.000    0.000    0.000\n"
    )


def test_wide(web: Group) -> None:
    header, row = shown([web], WIDE, ["comm", "raddr"]).splitlines()
    assert header.startswith("COMM             RADDR                      SESSIONS")
    assert row.startswith('we,"b            10.1.2.3                       1200')


def test_csv(web: Group, life: Object) -> None:
    header, *rows = csv.reader(shown([web, group(life)], CSV, ["uid", "role", "owner"]).splitlines())
    sums = ["SESSIONS", "FAILED", "TX_KB", "RX_KB"]
    percentiles = [f"{of}_P{percent}" for of in ("MS", "RTT") for percent in (50, 90, 99)]
    assert header == ["UID", "ROLE", "PID", "COMM", *sums, *percentiles]
    assert rows[0][:8] == ["33", "connect", "181", 'we,"b', "1200", "3", "5120", "1"]
    assert rows[0][8:] == ["0.015", "0.992", "0.992", "0.123", "0.123", "0.123"]
    assert rows[1][:5] == ["-", "-", "0", "-", "1"]


def test_json(web: Group, life: Object) -> None:
    first, second = map(json.loads, shown([web, group(life)], JSON, ["uid", "role", "port"]).splitlines())
    assert first == {
        "uid": 33,
        "role": "connect",
        "port": 443,
        "sessions": 1200,
        "failed": 3,
        "tx_kb": 5120,
        "rx_kb": 1,
        "ms_p50": 0.015,
        "ms_p90": 0.9915,
        "ms_p99": 0.9915,
        "rtt_ms_p50": 0.1235,
        "rtt_ms_p90": 0.1235,
        "rtt_ms_p99": 0.1235,
        "tx_bytes": 5 << 20,
        "rx_bytes": 2047,
    }
    assert (second["uid"], second["role"], second["ms_p50"], second["rtt_ms_p99"]) == (None,) * 4


class OneCgroup(cgroups.Cgroups):
    """A hierarchy with one that is known."""

    def __init__(self) -> None:
        """Walks nowhere."""

    def path(self, id: int) -> str | None:
        return "/web, db" if id == 7 else None


def test_the_cgroup_has_its_path(life: Object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroups, "Cgroups", OneCgroup)
    groups = [group(life, cgroup=7), group(life, cgroup=8)]
    rows = [json.loads(line) for line in shown(groups, JSON, ["cgroup"]).splitlines()]
    assert [(row["cgroup_id"], row["cgroup"]) for row in rows] == [(7, "/web, db"), (8, None)]
    assert shown(groups, CSV, ["cgroup"]).splitlines()[1].startswith('7,"/web, db",1,')
    assert shown(groups, TEXT, ["cgroup"]).splitlines()[2].startswith("8         -     ")


def test_the_api_names_what_the_group_is(web: Group, life: Object) -> None:
    assert (web.pid, web.comm, web.uid, web.role, web.port) == (181, 'we,"b', 33, "connect", 443)
    assert str(web.raddr) == "10.1.2.3"
    assert (web.sessions, web.failed, web.tx_bytes, web.rx_bytes) == (1200, 3, 5 << 20, 2047)
    unknown = group(life)
    assert (unknown.pid, unknown.comm, unknown.uid, unknown.role) == (0, "-", None, "-")


# ---- what to group by


@pytest.mark.parametrize(
    ("by", "names"),
    [
        ("owner,raddr,port", ["owner", "raddr", "port"]),
        (["port", "port", "comm"], ["port", "comm"]),
        ("pid,owner,comm", ["owner"]),
        ((), []),
        (BY, [name for name in BY if name not in ("pid", "comm")]),
    ],
)
def test_checked(by: str | Sequence[str], names: list[str]) -> None:
    assert checked(by) == names


def test_an_unknown_name_is_refused_with_all_that_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(TcpobsError, match="cannot be grouped by 'rport': choose from owner, pid, comm"):
        checked("owner,rport")
    with pytest.raises(SystemExit) as ended:
        main(["life", "--summary", "--by", "owner,rport"])
    assert ended.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "'rport'" in line
    assert all(name in line for name in BY)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--by", "comm"], "--by and --max-groups go with --summary"),
        (["--max-groups", "5"], "--by and --max-groups go with --summary"),
        (["--summary", "--open"], "--open is about single sessions: it does not go with --summary"),
        (["--summary", "-x"], "--extended is about single sessions: it does not go with --summary"),
    ],
)
def test_what_does_not_go_together(flags: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["life", *flags]) == 2
    assert capsys.readouterr() == ("", f"tcpobs: {says}\n")
