"""tcpobs states: every TCP state change, with the time spent in the old state."""

from __future__ import annotations

from tcpobs import filters
from tcpobs.columns import Column
from tcpobs.events import Events
from tcpobs.records import StateChange
from tcpobs.tools import listing, owners

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Sequence

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
was not seen before.

-x adds the owner, as it is known then: PID and COMM, who connected, accepted, listened or closed, the
latest of them, or who held the socket when tcpobs began (0 and -: nobody is known); TID and UID, NETNS,
CONTAINER and CGROUP. The filters by owner (-p, --comm, --uid, --cgroup, --container) are by this one."""

COLUMNS = (
    Column("SKADDR", "skaddr", "%-16x", csv="%x", json_bulk=('"%x"', lambda sockets: [sockets])),
    Column("C-PID", "current.pid", "%-5d"),
    Column("C-COMM", "current.comm", "%-10.10s", "%-16.16s", free=True),
    Column("IP", "endpoints.ip", None, "%-2s"),
    Column("LADDR", "endpoints.laddr", "%-15s", "%-26s"),
    Column("LPORT", "endpoints.lport", "%-5d"),
    Column("RADDR", "endpoints.raddr", "%-15s", "%-26s"),
    Column("RPORT", "endpoints.rport", "%-5d"),
    Column("OLDSTATE", "transition.old", "%-11s"),
    Column("NEWSTATE", "transition.new", "%-11s", before=" -> "),
    Column("MS", "span_ns", "%.3f", csv="%.3f", bulk=listing.milliseconds, json_bulk=listing.MS_JSON),
    Column("SPAN_NS", "span_ns", None, csv=None),
)

MS_ALIGNED = Column(
    "MS", "span_ns", "%-10.3f", csv="%.3f", bulk=listing.milliseconds, json_bulk=listing.MS_JSON
)

OWNER = (
    Column("PID", "owner.pid", "%-7d"),
    Column("COMM", "owner.comm", "%-15.15s", free=True),
)


def columns(arguments: argparse.Namespace) -> Sequence[Column]:
    """Those that these flags mean; -x aligns MS, which is the last without it."""
    if not arguments.extended and not arguments.json:
        return COLUMNS
    shown = [MS_ALIGNED if column.header == "MS" else column for column in COLUMNS]
    return [*shown, *OWNER, *owners.columns()]


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
    extended = arguments.extended or arguments.json
    listing.run(
        arguments,
        columns(arguments),
        StateChange,
        lambda: states(owners=extended, **listing.filters(arguments), **listing.options(arguments)),
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
