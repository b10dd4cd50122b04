"""tcpobs life --summary: sessions summed up in the kernel, by what they have in common.

How long sessions took, and their round-trip times, are counted in buckets: eight for each power of two, so
that a percentile, which is the middle of its bucket, is at most 6.25% from the real one.
"""

from __future__ import annotations

import struct
import sys
import time
from bisect import bisect_left
from functools import lru_cache
from itertools import accumulate
from operator import attrgetter

from tcpobs import filters, host, privileges
from tcpobs.columns import Column
from tcpobs.errors import TcpobsError, UsageError
from tcpobs.events import Events
from tcpobs.libbpf.barrier import Barrier
from tcpobs.privileges import Capability
from tcpobs.records import ROLES, Endpoints, Record, Task, Timed, decoder
from tcpobs.tools import listing, owners

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Iterator, Sequence
    from typing import ClassVar

    from typing_extensions import Unpack

    from tcpobs.events import Options
    from tcpobs.filters import Network
    from tcpobs.libbpf.btf import Value
    from tcpobs.records import Address

MAX_GROUPS = 10240
"""Groups that there is room for, unless told otherwise: about 2 KiB each, when it is there."""

UID_UNKNOWN = 0xFFFFFFFF
"""UID_UNKNOWN of bpf/events.h."""

_BUFFER_SIZE = 1 << 16
"""Nothing comes through it."""


class Histogram(Record):
    """How often values came, in µs: the buckets of bpf/groups.bpf.h."""

    __slots__ = ()

    def percentile_ms(self, percent: float) -> float | None:
        """The value that so many percent are not above, in ms; None where there are no values."""
        counts = self[self.fields["counts"]]
        assert isinstance(counts, bytes)
        sums = _sums(counts)
        rank = -(-sums[-1] * percent // 100)
        return middle(bisect_left(sums, max(rank, 1))) / 1000 if sums[-1] else None

    @property
    def p50(self) -> float | None:
        """The median."""
        return self.percentile_ms(50)

    @property
    def p90(self) -> float | None:
        """What nine in ten are not above."""
        return self.percentile_ms(90)

    @property
    def p99(self) -> float | None:
        """What 99 in a hundred are not above."""
        return self.percentile_ms(99)


@lru_cache(8)  # a group's percentiles are asked for one after another
def _sums(counts: bytes) -> list[int]:
    return list(accumulate(struct.unpack(f"={len(counts) // 4}I", counts)))


def middle(bucket: int) -> float:
    """The middle of the values that are in a bucket: below 16, each is in one of its own."""
    shift = max(bucket // 8 - 1, 0)
    return ((bucket - 8 * shift) << shift) + ((1 << shift) - 1) / 2


class Durations(Histogram):
    """Of how long sessions took."""

    __slots__ = ()
    struct_name = "durations"


class RoundTrips(Histogram):
    """Of their smoothed round-trip times."""

    __slots__ = ()
    struct_name = "round_trips"


class GroupKey(Record):
    """What the sessions of a group have in common; 0 what was not asked for."""

    __slots__ = ()
    struct_name = "group_key"
    inner: ClassVar[dict[str, type[Record]]] = {"endpoints": Endpoints, "owner": Task}

    cgroup: int
    endpoints: Endpoints
    owner: Task
    uid: int
    netns: int
    port: int
    role: int

    @property
    def comm(self) -> str:
        """The owner's name; `-` when nobody is known."""
        return self.owner.comm or "-"

    @property
    def role_name(self) -> str:
        """`connect` or `accept`; `-` where the beginning was not seen."""
        return ROLES[self.role]


class GroupSums(Record):
    """What the sessions of a group come to."""

    __slots__ = ()
    struct_name = "group_sums"
    inner: ClassVar[dict[str, type[Record]]] = {"durations": Durations, "rtts": RoundTrips}

    sessions: int
    failed: int
    tx_bytes: int
    rx_bytes: int
    durations: Durations
    rtts: RoundTrips


class Group(Timed):
    """Sessions that have in common what they were grouped by; what they were not grouped by means nothing.

    `time_ns` is when they were read.
    """

    __slots__ = ()
    struct_name = "group"
    inner: ClassVar[dict[str, type[Record]]] = {"key": GroupKey, "sums": GroupSums}

    key: GroupKey
    sums: GroupSums

    @property
    def pid(self) -> int:
        """The owner's PID; 0 when nobody is known."""
        return self.key.owner.pid

    @property
    def comm(self) -> str:
        """The owner's name; `-` when nobody is known."""
        return self.key.comm

    @property
    def uid(self) -> int | None:
        """The owner's user; None when nobody is known."""
        return None if self.key.uid == UID_UNKNOWN else self.key.uid

    @property
    def role(self) -> str:
        """`connect` or `accept`; `-` where the beginning was not seen."""
        return self.key.role_name

    @property
    def laddr(self) -> Address:
        """The local address."""
        from ipaddress import ip_address

        return ip_address(self.key.endpoints.laddr)

    @property
    def raddr(self) -> Address:
        """The remote address."""
        from ipaddress import ip_address

        return ip_address(self.key.endpoints.raddr)

    @property
    def port(self) -> int:
        """The port that was connected to; where the beginning was not seen, the lower one."""
        return self.key.port

    @property
    def netns(self) -> int:
        """The network namespace's inode number."""
        return self.key.netns

    @property
    def cgroup(self) -> int:
        """The id of the owner's cgroup; 0 when nobody is known."""
        return self.key.cgroup

    @property
    def sessions(self) -> int:
        """How many there are."""
        return self.sums.sessions

    @property
    def failed(self) -> int:
        """How many of them ended by an error, or were never established: see Ending.failed."""
        return self.sums.failed

    @property
    def tx_bytes(self) -> int:
        """Sent, and acknowledged by the peers."""
        return self.sums.tx_bytes

    @property
    def rx_bytes(self) -> int:
        """Received."""
        return self.sums.rx_bytes

    def ms(self, percent: float) -> float | None:
        """How long, in ms, so many percent took at most: of those that are not older than the trace.

        At most 6.25% off; more than 76 hours count as 76 hours. None where there are none.
        """
        return self.sums.durations.percentile_ms(percent)

    def rtt_ms(self, percent: float) -> float | None:
        """What, in ms, so many percent of the smoothed round-trip times are not above.

        Of those sessions that have one: a refused one has none. At most 6.25% off; more than 17 seconds count
        as 17 seconds. None where there are none.
        """
        return self.sums.rtts.percentile_ms(percent)


# ---- columns


def _percentiles(name: str, histogram: str, text: str, json: str) -> list[Column]:
    return [
        Column(
            f"{name}_P{percent}",
            f"sums.{histogram}.p{percent}",
            text,
            csv="%.3f",
            convert=lambda ms: ms or 0.0,
            json=lambda ms: ms,
            name=f"{json}_p{percent}",
        )
        for percent in (50, 90, 99)
    ]


_PID = Column("PID", "key.owner.pid", "%-7d")
_COMM = Column("COMM", "key.comm", "%-10.10s", "%-16.16s", free=True)

BY: dict[str, list[Column]] = {
    "owner": [_PID, _COMM],
    "pid": [_PID],
    "comm": [_COMM],
    "uid": [
        Column(
            "UID",
            "key.uid",
            "%-5s",
            convert=lambda uid: "-" if uid == UID_UNKNOWN else uid,
            json=lambda uid: None if uid == UID_UNKNOWN else uid,
        )
    ],
    "role": [Column("ROLE", "key.role_name", "%-7s", json=owners.known)],
    "raddr": [Column("RADDR", "key.endpoints.raddr", "%-15s", "%-26s")],
    "laddr": [Column("LADDR", "key.endpoints.laddr", "%-15s", "%-26s")],
    "port": [Column("PORT", "key.port", "%-5d")],
    "netns": [Column("NETNS", "key.netns", "%-10d")],
    "cgroup": [Column("CGROUP_ID", "key.cgroup", "%-9d")],
}
"""What sessions can be grouped by, and the columns of each."""

DEFAULT_BY = ("owner", "raddr", "port")

SUMS = (
    Column("SESSIONS", "sums.sessions", "%8d", csv="%d"),
    Column("FAILED", "sums.failed", "%7d", csv="%d"),
    Column("TX_KB", "sums.tx_bytes", "%9d", csv="%d", convert=lambda size: size >> 10),
    Column("RX_KB", "sums.rx_bytes", "%9d", csv="%d", convert=lambda size: size >> 10),
    *_percentiles("MS", "durations", "%10.3f", "ms"),
    *_percentiles("RTT", "rtts", "%8.3f", "rtt_ms"),
    Column("TX_BYTES", "sums.tx_bytes", None, csv=None),
    Column("RX_BYTES", "sums.rx_bytes", None, csv=None),
)


def checked(by: str | Iterable[str]) -> list[str]:
    """What to group by, each but once; a text has it between commas. Raises TcpobsError."""
    names = list(dict.fromkeys(by.split(",") if isinstance(by, str) else by))
    for name in names:
        if name not in BY:
            raise TcpobsError(f"sessions cannot be grouped by {name!r}: choose from {', '.join(BY)}")
    return [name for name in names if name not in ("pid", "comm") or "owner" not in names]


def columns(by: Sequence[str]) -> list[Column]:
    """Those of groups by these."""
    found: list[Column] = []
    for name in by:
        found += BY[name]
        found += [_path()] if name == "cgroup" else []
    return [*found, *SUMS]


def _path() -> Column:
    """The path of the cgroup; the hierarchy is walked now, and when a new one comes."""
    from tcpobs.cgroups import Cgroups

    path = Cgroups().path
    return Column(
        "CGROUP", "key.cgroup", "%-40s", convert=lambda cgroup: path(cgroup) or "-", json=path, free=True
    )


# ---- the trace


class Summary(Events[Group]):
    """Groups of the sessions that end from the moment this is made until it is closed.

    Iterate over it for the groups of each interval, or of all the time; or ask for them by `groups` and
    `take`. The most sessions come first. A context manager; leaving it detaches everything.

    The programs add to one of two maps. To take what is there they are sent to the other, and those that are
    running are waited for: so a session is in one output, and in one only.
    """

    def __init__(
        self,
        by: Sequence[str],
        constants: dict[str, Value],
        *,
        max_groups: int,
        every: float | None,
        existing: bool,
        **options: Unpack[Options],
    ) -> None:
        """As Events, which see; `by` is what `checked` gives."""
        if every is not None and not every > 0:
            raise TcpobsError(f"every is more than 0 seconds, not {every}")
        self._interval = every or float("inf")
        self._half = 0
        told = [column.field + "." + column.attribute for name in by for column in BY[name]]
        self._name = attrgetter("key", *told)
        parts = [part for name in by for part in (("pid", "comm") if name == "owner" else (name,))]
        constants = {**constants, "summarize": True, "by": dict.fromkeys(parts, True)}
        options["buffer_size"] = _BUFFER_SIZE
        super().__init__("life", Group, constants, existing=existing, max_groups=max_groups, **options)
        try:
            self._barrier = Barrier()
        except BaseException:
            super().close()
            raise

    def batches(self) -> Iterator[list[Group]]:
        """The groups of each interval when it is over, and of the last at the end; between, empty lists.

        An empty list comes at least every POLL_SECONDS. At the end everything is detached.
        """
        due = time.monotonic() + self._interval
        for nothing in super().batches():
            yield nothing
            if time.monotonic() >= due:
                due += self._interval
                yield self.take()
        yield self.take()

    def groups(self) -> list[Group]:
        """The groups so far: since the start, or since they were taken last.

        A session that is just being added may be there in part.
        """
        return self._read(self._object.maps[host.GROUP_MAPS[self._half]].items())

    def take(self) -> list[Group]:
        """The groups so far; those of the next time are made anew."""
        before = self._half
        self._half = 1 - before
        self._object.variables["half"] = self._half
        self._barrier.wait()
        return self._read(self._object.maps[host.GROUP_MAPS[before]].take())

    def _read(self, entries: Iterable[tuple[bytes, bytes]]) -> list[Group]:
        _, decode = decoder(Group, self._object.btf)
        now = time.monotonic_ns().to_bytes(8, sys.byteorder)
        found = [group for key, value in entries for group in decode(now + key + value)]
        return sorted(found, key=lambda group: (-group.sums.sessions, self._name(group)[1:]))

    def close(self) -> None:
        """Detaches and frees everything."""
        super().close()
        self._barrier.close()


def summary(
    *,
    by: str | Iterable[str] = DEFAULT_BY,
    max_groups: int = MAX_GROUPS,
    local_ports: Iterable[int] | None = None,
    remote_ports: Iterable[int] | None = None,
    ip: int | None = None,
    networks: Iterable[Network] | None = None,
    netns: int | None = None,
    pid: int | None = None,
    uid: int | None = None,
    comm: str | None = None,
    cgroup: str | None = None,
    container: str | None = None,
    existing: bool = False,
    every: float | None = None,
    **options: Unpack[Options],
) -> Summary:
    """Sums up TCP sessions that end from now on, until closed, by what they have in common.

    That is any of BY: owner (which is pid and comm), pid, comm, uid, role, raddr, laddr, port, netns, cgroup.
    `max_groups` is what there is room for; sessions of further groups are lost, which `losses` tells.
    `every` is in seconds, and for iterating. The rest is as in `sessions`; `buffer_size` means nothing here.

    with tcpobs.summary(by=["comm", "port"], every=10) as summary:
        for group in summary:
            print(group.comm, group.port, group.sessions, group.failed, group.ms(99))
    """
    constants = filters.constants(
        local_ports=local_ports,
        remote_ports=remote_ports,
        ip=ip,
        networks=networks,
        netns=netns,
        pid=pid,
        uid=uid,
        comm=comm,
        cgroup=cgroup,
        container=container,
    )
    return Summary(checked(by), constants, max_groups=max_groups, every=every, existing=existing, **options)


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    for flag in ("open", "extended"):
        if getattr(arguments, flag):
            raise UsageError(f"--{flag} is about single sessions: it does not go with --summary")
    by = checked(arguments.by or DEFAULT_BY)
    if arguments.every:
        arguments.time = True  # it tells one interval's groups from the next one's
    listing.run(
        arguments,
        columns(by),
        Group,
        lambda: summary(
            by=by,
            max_groups=arguments.max_groups or MAX_GROUPS,
            existing=arguments.existing,
            every=arguments.every,
            **listing.filters(arguments),
            **listing.options(arguments),
        ),
        # To read the maps; before Linux 5.8 there was but the other.
        keep=[Capability.CAP_BPF if privileges.has(Capability.CAP_BPF) else Capability.CAP_SYS_ADMIN],
    )
