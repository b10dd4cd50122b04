"""tcpobs life: every TCP session that ends: its owner, bytes each way, and how long it lasted."""

from __future__ import annotations

import argparse

from tcpobs import filters
from tcpobs.columns import Column
from tcpobs.errors import TcpobsError, UsageError
from tcpobs.events import Events
from tcpobs.privileges import Capability
from tcpobs.records import Session
from tcpobs.tools import listing, owners

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from typing_extensions import Unpack

    from tcpobs.events import Options
    from tcpobs.filters import Network

EXAMPLES = """\
examples:
  tcpobs life                 every session, when it ends
  tcpobs life -w              wide enough for IPv6 addresses
  tcpobs life -D 443          only those to remote port 443
  tcpobs life -p 181          only those of process 181
  tcpobs life -x --net 10.0.0.0/8
                              how those with this network went and ended, and whose they are
  tcpobs life --existing --open --every 60
                              also what was open before, is open each minute, and at the end
  tcpobs life --summary -d 10 how many sessions in 10 s, and how long they took, by owner and service
  tcpobs life --summary --by comm,port --every 60
                              the same each minute, by name and port alone
  tcpobs life -T --csv > sessions.csv

PID and COMM are the process that connected, accepted or closed, the latest of them; 0 and - when none
was seen to act on the socket. TX_KB and RX_KB are what the peer acknowledged and what came in. MS counts
from the end of the handshake to the session's end. Sessions older than tcpobs are shown with --existing:
their MS counts from its start and has a +, as has that of sessions that are open.

-x adds: ROLE; END, REASON and ERROR, how it ended and why (docs/life.md); RTT_US and MINRTT_US; RETRANS,
LOST, SEGS_IN, SEGS_OUT and DELIVERED, in segments; HSHAKE_US, how long the handshake took, and LIFE_US,
from the first SYN that was seen to the end; CC, the congestion control; TID and UID, NETNS, CONTAINER and
CGROUP.

--summary counts SESSIONS, and those that FAILED: an error ended them, or they were never established.
MS and RTT, both in ms, are what 50, 90 and 99 in a hundred are not above. --by takes owner (PID and COMM),
pid, comm, uid, role, raddr, laddr, port (the one that was connected to), netns and cgroup."""

COLUMNS = (
    Column("PID", "owner.pid", "%-5d"),
    Column("COMM", "owner.comm", "%-10.10s", "%-16.16s", free=True),
    Column("IP", "endpoints.ip", None, "%-2s"),
    Column("LADDR", "endpoints.laddr", "%-15s", "%-26s"),
    Column("LPORT", "endpoints.lport", "%-5d"),
    Column("RADDR", "endpoints.raddr", "%-15s", "%-26s"),
    Column("RPORT", "endpoints.rport", "%-5d"),
    Column("TX_KB", "tx_bytes", "%5d", "%6d", "%d", bulk=listing.kib, json_bulk=listing.KIB_JSON),
    Column("RX_KB", "rx_bytes", "%5d", "%6d", "%d", bulk=listing.kib, json_bulk=listing.KIB_JSON),
    Column("MS", "span_ns", "%.2f", csv="%.2f", bulk=listing.milliseconds, json_bulk=listing.MS_JSON),
    Column("SPAN_NS", "span_ns", None, csv=None),
    Column("TX_BYTES", "tx_bytes", None, csv=None),
    Column("RX_BYTES", "rx_bytes", None, csv=None),
)

MS_ALIGNED = Column(
    "MS", "span_ns", "%10.2f", csv="%.2f", bulk=listing.milliseconds, json_bulk=listing.MS_JSON
)

# Behind MS, without a blank; aligned, a place is kept for it.
MARK = Column("", "ending.mark", "%s", joined=True)
MARK_ALIGNED = Column("", "ending.mark", "%-1s", csv="%s", joined=True)

EXTENDED = (
    Column("ROLE", "ending.role_name", "%-7s", json=owners.known),
    Column("END", "ending.name", "%-14s"),
    Column("REASON", "ending.reason", "%-14s", json=owners.known),
    Column("ERROR", "ending.error_name", "%-12s", json=owners.known),
    Column("EXISTING", "ending.existing", None, csv=None, json=bool),
    Column("OPEN", "ending.open", None, csv=None, json=bool),
    Column("RTT_US", "course.srtt_us", "%8d", csv="%d", json_bulk=owners.KNOWN),
    Column("MINRTT_US", "course.min_rtt_us", "%9d", csv="%d", json_bulk=owners.KNOWN),
    Column("RETRANS", "course.retransmits", "%7d", csv="%d"),
    Column("LOST", "course.lost", "%5d", csv="%d"),
    Column("SEGS_IN", "course.segs_in", "%8d", csv="%d"),
    Column("SEGS_OUT", "course.segs_out", "%8d", csv="%d"),
    Column("DELIVERED", "course.delivered", "%9d", csv="%d"),
    Column("HSHAKE_US", "course.handshake_us", "%9d", csv="%d", json_bulk=owners.KNOWN),
    Column("LIFE_US", "course.lifetime_us", "%11d", csv="%d", json_bulk=owners.KNOWN),
    Column("CC", "course.congestion_control", "%-8s", free=True),
)


def columns(arguments: argparse.Namespace) -> Sequence[Column]:
    """Those that these flags mean."""
    marked = arguments.existing or arguments.open or arguments.every
    shown: list[Column] = []
    for column in COLUMNS:
        if column.header != "MS":
            shown.append(column)
        elif arguments.extended:
            shown += [MS_ALIGNED, MARK_ALIGNED]
        else:
            shown += [column, MARK] if marked else [column]
    return [*shown, *EXTENDED, *owners.columns()] if arguments.extended or arguments.json else shown


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its flags."""
    parser.epilog = EXAMPLES
    listing.add_arguments(parser)
    add = parser.add_argument
    add("--existing", action="store_true", help="also sessions that are older than tcpobs")
    add("--open", action="store_true", help="also what is still open, at the end")
    add(
        "--every",
        type=listing.seconds,
        metavar="SECONDS",
        help="also what is open, each so many seconds; a --summary each so many",
    )
    add(
        "--summary",
        action="store_true",
        help="what sessions come to, by what they have in common",
    )
    add("--by", type=_by, metavar="WHAT", help="group by this (default owner,raddr,port)")
    add("--max-groups", type=listing.count, metavar="N", help="room for groups (default 10240)")


def _by(text: str) -> str:
    from tcpobs.tools import summary

    try:
        summary.checked(text)
    except TcpobsError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    if arguments.ebpf:
        listing.print_source("life")
        return
    if arguments.summary:
        from tcpobs.tools import summary

        summary.run(arguments)
        return
    if arguments.by or arguments.max_groups:
        raise UsageError("--by and --max-groups go with --summary")
    listing.run(
        arguments,
        columns(arguments),
        Session,
        lambda: sessions(
            existing=arguments.existing,
            still_open=arguments.open,
            every=arguments.every,
            **listing.filters(arguments),
            **listing.options(arguments),
        ),
        keep=[Capability.CAP_BPF] if arguments.open or arguments.every else [],  # to walk through them
    )


def sessions(
    *,
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
    still_open: bool = False,
    every: float | None = None,
    **options: Unpack[Options],
) -> Events[Session]:
    """Traces TCP sessions that end from now on, until closed.

    With `existing` also those that are older than the trace; with `still_open` those that are open at its
    end, and with `every` those that are open after each so many seconds. The filters are those of
    filters.constants, `options` those of Events. Raises TcpobsError.

    with tcpobs.sessions(remote_ports=[443]) as events:
        for session in events:
            print(session.comm, session.raddr, session.tx_bytes, session.ms)
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
    return Events(
        "life",
        Session,
        constants,
        existing=existing,
        still_open=still_open,
        every=every,
        **options,
    )
