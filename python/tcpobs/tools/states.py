"""tcpobs states: every TCP state change, with the time spent in the old state."""

from __future__ import annotations

from tcpobs import filters
from tcpobs.columns import Column
from tcpobs.events import Events
from tcpobs.records import StateChange
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
  tcpobs states               every state change
  tcpobs states -w            wide enough for IPv6 addresses
  tcpobs states -L 80,443     only local ports 80 and 443
  tcpobs states -t -d 10      ten seconds, with the time since the first event
  tcpobs states --json | jq -r 'select(.newstate == "CLOSE").raddr'

C-PID and C-COMM are the task on the CPU at that moment. It need not be the socket's owner: a packet
changes states on whatever task it interrupts. MS is the time spent in OLDSTATE, 0.000 when the socket
was not seen before."""

COLUMNS = (
    Column("SKADDR", "skaddr", "%-16x", csv="%x", json="{:x}".format),
    Column("C-PID", "current.pid", "%-5d"),
    Column("C-COMM", "current.comm", "%-10.10s", "%-16.16s", free=True),
    Column("IP", "endpoints.ip", None, "%-2s"),
    Column("LADDR", "endpoints.laddr", "%-15s", "%-26s"),
    Column("LPORT", "endpoints.lport", "%-5d"),
    Column("RADDR", "endpoints.raddr", "%-15s", "%-26s"),
    Column("RPORT", "endpoints.rport", "%-5d"),
    Column("OLDSTATE", "transition.old", "%-11s"),
    Column("NEWSTATE", "transition.new", "%-11s", before=" -> "),
    Column("MS", "span_ns", "%.3f", csv="%.3f", convert=lambda ns: ns // 1000 / 1000),
    Column("SPAN_NS", "span_ns", None, csv=None),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its flags."""
    parser.epilog = EXAMPLES
    listing.add_arguments(parser)
    parser.add_argument(
        "-Y", "--journal", action="store_true", help="also log each event to the systemd journal"
    )


def run(arguments: argparse.Namespace) -> None:
    """Runs the command."""
    if arguments.ebpf:
        listing.print_source("states")
        return
    log = None
    if arguments.journal:
        from tcpobs.journal import Journal

        log = Journal().log
    listing.run(
        arguments,
        COLUMNS,
        StateChange,
        lambda: states(**listing.filters(arguments), **listing.options(arguments)),
        also=log,
    )


def states(
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
    owners: bool = False,
    **options: Unpack[Options],
) -> Events[StateChange]:
    """Traces TCP state changes from now on, until closed.

    With `owners`, or a filter by owner, each has the owner as it is known then; that costs a little more. The
    filters are those of filters.constants, `options` those of Events. Raises TcpobsError.

    with tcpobs.states(local_ports=[443]) as events:
        for event in events:
            print(event.raddr, event.oldstate, event.newstate)
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
    owners = owners or any(wanted is not None for wanted in (pid, uid, comm, cgroup, container))
    constants["track_owners"] = owners
    return Events("states", StateChange, constants, owners=owners, existing=owners, **options)
