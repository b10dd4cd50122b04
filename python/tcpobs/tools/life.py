"""tcpobs life: every TCP session that ends: its owner, bytes each way, and how long it lasted."""

from __future__ import annotations

import os
import sys

from tcpobs import filters
from tcpobs.columns import Column
from tcpobs.events import Events
from tcpobs.records import Session
from tcpobs.tools import listing

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable

    from typing_extensions import Unpack

    from tcpobs.events import Options
    from tcpobs.filters import Network

EXAMPLES = """\
examples:
  tcpobs life                 every session, when it ends
  tcpobs life -w              wide enough for IPv6 addresses
  tcpobs life -D 443          only those to remote port 443
  tcpobs life -p 181          only those of process 181
  tcpobs life -T --csv > sessions.csv

PID and COMM are the process that connected or closed, the latest of them; 0 and - when none was seen to
act on the socket. TX_KB and RX_KB are what the peer acknowledged and what came in. MS counts from the end
of the handshake to the session's end; sessions older than tcpobs are not shown."""

COLUMNS = (
    Column("PID", "owner.pid", "%-5d"),
    Column("COMM", "owner.comm", "%-10.10s", "%-16.16s", free=True),
    Column("IP", "endpoints.ip", None, "%-2s"),
    Column("LADDR", "endpoints.laddr", "%-15s", "%-26s"),
    Column("LPORT", "endpoints.lport", "%-5d"),
    Column("RADDR", "endpoints.raddr", "%-15s", "%-26s"),
    Column("RPORT", "endpoints.rport", "%-5d"),
    Column("TX_KB", "tx_bytes", "%5d", "%6d", "%d", convert=lambda size: size >> 10),
    Column("RX_KB", "rx_bytes", "%5d", "%6d", "%d", convert=lambda size: size >> 10),
    Column("MS", "span_ns", "%.2f", csv="%.2f", convert=lambda ns: ns // 1000 / 1000),
    Column("SPAN_NS", "span_ns", None, csv=None),
    Column("TX_BYTES", "tx_bytes", None, csv=None),
    Column("RX_BYTES", "rx_bytes", None, csv=None),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its flags."""
    parser.epilog = EXAMPLES
    listing.add_arguments(parser)
    parser.add_argument("-p", "--pid", type=_pid, metavar="PID", help="only this process")


def _pid(text: str) -> int:
    import argparse

    pid = listing.whole_number(text, 1, (1 << 22) - 1)
    if pid is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a PID")
    return pid


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    if arguments.ebpf:
        listing.print_source("life")
        return
    if arguments.pid and not os.path.exists(f"/proc/{arguments.pid}"):
        print(f"tcpobs life: there is no process {arguments.pid} now; going on", file=sys.stderr)
    listing.run(
        arguments,
        COLUMNS,
        Session,
        lambda: sessions(pid=arguments.pid, **listing.filters(arguments), **listing.options(arguments)),
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

    With `existing` also those that are older than the trace; with `still_open` those that are open at its end, and
    with `every` those that are open after each so many seconds. The filters are those of filters.constants,
    `options` those of Events. Raises TcpobsError.

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
