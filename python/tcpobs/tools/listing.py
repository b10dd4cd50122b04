"""What the tools that list events share: their flags, and printing rows until told to stop."""

from __future__ import annotations

import argparse
import gc
import os
import signal
import sys
import time
from itertools import repeat
from operator import floordiv, mod, rshift

from tcpobs import events, host, privileges
from tcpobs.clock import Clock
from tcpobs.columns import CSV, JSON, TEXT, WIDE, Table
from tcpobs.errors import TcpobsError
from tcpobs.output import Output

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from typing import TypedDict, TypeVar

    from tcpobs.columns import Bulk, Column, Values
    from tcpobs.events import Events, Options
    from tcpobs.privileges import Capability
    from tcpobs.records import Timed

    R = TypeVar("R", bound=Timed)

    class Filters(TypedDict):
        """The filters that all listings have."""

        local_ports: list[int] | None
        remote_ports: list[int] | None
        ip: int | None
        networks: list[str] | None
        netns: int | None
        pid: int | None
        uid: int | None
        comm: str | None
        cgroup: str | None
        container: str | None


LOSSES_SECONDS = 1.0
"""How often losses are looked for while running."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that all listings have."""
    add = parser.add_argument
    add("-T", "--time", action="store_true", help="first column TIME (HH:MM:SS)")
    add("-t", "--timestamp", action="store_true", help="column TIME(s): seconds since the first event")
    add("-w", "--wide", action="store_true", help="wide columns (fit IPv6 addresses)")
    add("-s", "--csv", action="store_true", help="comma separated values")
    add("--json", action="store_true", help="one JSON object a line, with every column")
    add("-L", "--localport", type=_ports, metavar="PORTS", help="only these local ports (80,443)")
    add("-D", "--remoteport", type=_ports, metavar="PORTS", help="only these remote ports")
    family = parser.add_mutually_exclusive_group()
    family.add_argument("-4", "--ipv4", action="store_true", help="only IPv4")
    family.add_argument("-6", "--ipv6", action="store_true", help="only IPv6")
    add("-x", "--extended", action="store_true", help="more columns: see below")
    add("-p", "--pid", type=_pid, metavar="PID", help="only of this process")
    add("--comm", metavar="NAME", help="only of processes with this name")
    add("--uid", type=_uid, metavar="USER", help="only of this user: a name or a number")
    add("--cgroup", metavar="PATH", help="only of this cgroup, and those below it")
    add("--container", metavar="ID", help="only of the container whose id begins so, or of a systemd unit")
    add("--net", type=_networks, metavar="NETS", help="only with either end in one of these (10.0.0.0/8,::1)")
    add("--netns", type=_netns, metavar="NS", help="only of this network namespace: its name, file, or inode")
    add("-d", "--duration", type=seconds, metavar="SECONDS", help="end after this time")
    add(
        "--buffer-size",
        type=_size,
        default=events.BUFFER_SIZE,
        metavar="SIZE",
        help="buffer for events in bytes, K or M (default 8M)",
    )
    add(
        "--max-sockets",
        type=count,
        default=events.MAX_SOCKETS,
        metavar="N",
        help="sockets remembered where the kernel cannot do so itself, before 5.11 (default 262144)",
    )
    add("--btf", metavar="FILE", help="the kernel's types, where it does not carry them itself")
    add("-v", "--verbose", action="store_true", help="show libbpf's messages on standard error")
    add("--ebpf", action="store_true", help=argparse.SUPPRESS)
    add("--hook", choices=host.HOOKS, help=argparse.SUPPRESS)
    add("--storage", choices=host.STORAGES, help=argparse.SUPPRESS)
    add("--transport", choices=host.TRANSPORTS, help=argparse.SUPPRESS)
    add("--accept", choices=host.ACCEPTS, help=argparse.SUPPRESS)


def filters(arguments: argparse.Namespace) -> Filters:
    """The filters of the Python API that these flags mean."""
    return {
        "local_ports": arguments.localport,
        "remote_ports": arguments.remoteport,
        "ip": 4 if arguments.ipv4 else 6 if arguments.ipv6 else None,
        "networks": arguments.net,
        "netns": arguments.netns,
        "pid": arguments.pid,
        "uid": arguments.uid,
        "comm": arguments.comm,
        "cgroup": arguments.cgroup,
        "container": arguments.container,
    }


def options(arguments: argparse.Namespace) -> Options:
    """The options of the Python API that these flags mean."""
    return {
        "duration": arguments.duration,
        "buffer_size": arguments.buffer_size,
        "max_sockets": arguments.max_sockets,
        "btf": arguments.btf,
        "hook": arguments.hook,
        "storage": arguments.storage,
        "transport": arguments.transport,
        "accept": arguments.accept,
    }


def run(
    arguments: argparse.Namespace,
    columns: Sequence[Column],
    record: type[R],
    start: Callable[[], Events[R]],
    also: Callable[[R, Clock], None] | None = None,
    keep: Sequence[Capability] = (),
) -> None:
    """Prints a header, then a row for each event until stopped; tells losses on standard error.

    SIGINT, SIGTERM, the duration's end and a closed pipe end it. `also` is called with each event after
    its row is out. `keep` are the capabilities that `start`'s trace needs while it runs.
    """
    if arguments.pid and not os.path.exists(f"/proc/{arguments.pid}"):
        print(f"tcpobs {arguments.tool}: there is no process {arguments.pid} now; going on", file=sys.stderr)
    if arguments.verbose:
        from tcpobs.libbpf.library import show_messages

        show_messages()
    stopping = Stopping()
    output = Output()
    clock = Clock()
    with start() as trace:
        stopping.when_asked(trace.stop)
        trace.stop_when_broken(output.fd)
        shown = [*clock.columns(arguments.time, arguments.timestamp), *columns]
        table = Table(shown, mode(arguments), record)
        output.write(table.header())
        # Nothing below opens a file, or imports a module, that only a privileged user could read.
        privileges.give_up(*keep)
        told, look = events.Losses(), time.monotonic() + LOSSES_SECONDS
        # Nothing below makes reference cycles; looking for them would double the cost of a batch.
        gc.disable()
        try:
            for batch in trace.batches():
                if batch:
                    output.write(table.rows(batch))
                if also:
                    for event in batch:
                        also(event, clock)
                if time.monotonic() >= look:
                    look = time.monotonic() + LOSSES_SECONDS
                    clock.adjust()
                    told = _tell(trace.losses, told)
        finally:
            _tell(trace.losses, told)


def milliseconds(times: Values) -> Iterable[float]:
    """Nanoseconds in ms, cut to whole microseconds as the originals do it."""
    return [ns // 1000 / 1000 for ns in times]


_FRACTIONS = [repr(us / 1000)[1:] for us in range(1000)]


def _whole_and_fraction(times: Values) -> Sequence[Iterable[object]]:
    us = list(map(floordiv, times, repeat(1000)))
    return map(floordiv, us, repeat(1000)), map(_FRACTIONS.__getitem__, map(mod, us, repeat(1000)))


MS_JSON: Bulk = ("%d%s", _whole_and_fraction)
"""The same in JSON: as repr() writes the number, which is slower."""


def kib(sizes: Values) -> Iterable[int]:
    """Bytes in KiB, cut to a whole number."""
    return map(rshift, sizes, repeat(10))


KIB_JSON: Bulk = ("%d", lambda sizes: [kib(sizes)])


def mode(arguments: argparse.Namespace) -> str:
    """The mode of output that these flags mean."""
    return JSON if arguments.json else CSV if arguments.csv else WIDE if arguments.wide else TEXT


def _tell(losses: events.Losses, told: events.Losses) -> events.Losses:
    if losses != told and sys.stderr:
        print(f"tcpobs: lost so far: {losses}", file=sys.stderr, flush=True)
    return losses


_STOPS = (signal.SIGINT, signal.SIGTERM)


class Stopping:
    """SIGINT and SIGTERM, from the start on: what comes before there is something to stop is kept.

    A second one ends the process at once, should it be stuck in a write that nobody reads.
    """

    def __init__(self) -> None:
        self._asked = False
        self._stop: Callable[[], None] | None = None
        for number in _STOPS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, *_: object) -> None:
        for number in _STOPS:
            signal.signal(number, signal.SIG_DFL)
        self._asked = True
        if self._stop:
            self._stop()

    def when_asked(self, stop: Callable[[], None]) -> None:
        """Calls `stop` when a signal comes, or at once if one has come."""
        self._stop = stop
        if self._asked:
            stop()


def print_source(tool: str) -> None:
    """Prints the BPF source of a tool: its program with the shared headers in their places."""
    Output().write(_with_headers(f"{tool}.bpf.c"))


def _with_headers(name: str) -> str:
    path = os.path.join(os.path.dirname(host.__file__), "_objects", "source", name)
    lines = []
    with open(path) as file:
        for line in file:
            included = line.split('"')[1] if line.startswith('#include "') else "vmlinux.h"
            lines.append(line if included == "vmlinux.h" else _with_headers(included))
    return "".join(lines)


def whole_number(text: str, low: int, high: int) -> int | None:
    """The number that the text is, if it is one from `low` to `high`."""
    if text.isascii() and text.isdigit() and len(text) <= 20 and low <= int(text) <= high:
        return int(text)
    return None


def _ports(text: str) -> list[int]:
    ports = []
    for part in text.split(","):
        port = whole_number(part, 0, 65535)
        if port is None:
            raise argparse.ArgumentTypeError(f"{part!r} is not a port: give 0 to 65535, like 80,443")
        ports.append(port)
    return ports


def _pid(text: str) -> int:
    pid = whole_number(text, 1, (1 << 22) - 1)
    if pid is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a PID")
    return pid


def _uid(text: str) -> int:
    uid = whole_number(text, 0, (1 << 32) - 2)
    if uid is not None:
        return uid
    from pwd import getpwnam

    try:
        return getpwnam(text).pw_uid
    except (KeyError, ValueError):
        raise argparse.ArgumentTypeError(f"there is no user {text!r}: give a name or a number") from None


def _networks(text: str) -> list[str]:
    from tcpobs import filters

    networks = text.split(",")
    try:
        filters.constants(networks=networks)
    except TcpobsError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return networks


def _netns(text: str) -> int:
    inode = whole_number(text, 1, (1 << 32) - 1)
    if inode is not None:
        return inode
    path = text if "/" in text else f"/run/netns/{text}"
    try:
        return os.stat(path).st_ino
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise argparse.ArgumentTypeError(
            f"{path!r}: {why}; give a name of `ip netns`, a file like /proc/PID/ns/net, or its inode number"
        ) from None


def seconds(text: str) -> float:
    """A time in seconds, for argparse."""
    try:
        number = float(text)
    except ValueError:
        number = 0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return number


def _size(text: str) -> int:
    digits = text.rstrip("KMkm")
    unit = {"": 1, "k": 1 << 10, "m": 1 << 20}.get(text[len(digits) :].lower(), 0)
    size = (whole_number(digits, 1, 1 << 30) or 0) * unit
    if not 1 << 16 <= size <= 1 << 30:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size from 64K to 1024M")
    return size


def count(text: str) -> int:
    """A number of something, for argparse."""
    count = whole_number(text, 1, (1 << 32) - 1)
    if count is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to {(1 << 32) - 1}")
    return count
