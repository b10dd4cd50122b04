"""Events as Python objects.

A record is a tuple in the order of its C struct, and its class names the fields that mean something to
users. Which field is where is read from the object's BTF and never written here: `decoder` gives a class
its properties. A struct inside a struct stays bytes until somebody asks, for the same few hundred values
come again and again, and are decoded once.
"""

from __future__ import annotations

import errno
import struct
from _socket import inet_ntop  # socket itself takes longer to import than all of this package
from functools import lru_cache, partial
from operator import itemgetter

from tcpobs.libbpf.btf import Kind
from tcpobs.libbpf.errors import LibbpfError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from ipaddress import IPv4Address, IPv6Address
    from typing import ClassVar, TypeVar, Union

    from tcpobs.libbpf.btf import Btf, Type

    Address = Union[IPv4Address, IPv6Address]
    R = TypeVar("R", bound="Record")

AF_INET, AF_INET6 = 2, 10
"""include/linux/socket.h."""

REMEMBERED = 2048
"""How many decoded values of each inner struct, and their texts, are kept for reuse."""

STATES = {
    1: "ESTABLISHED",
    2: "SYN_SENT",
    3: "SYN_RECV",
    4: "FIN_WAIT1",
    5: "FIN_WAIT2",
    6: "TIME_WAIT",
    7: "CLOSE",
    8: "CLOSE_WAIT",
    9: "LAST_ACK",
    10: "LISTEN",
    11: "CLOSING",
    12: "NEW_SYN_RECV",
}
"""include/net/tcp_states.h."""


def state_name(state: int) -> str:
    """The name of a TCP state; a number that is none, as itself."""
    return STATES.get(state, str(state))


class Record(tuple[object, ...]):
    """What one C struct holds."""

    __slots__ = ()

    struct_name: ClassVar[str]
    """The C struct of this record."""
    inner: ClassVar[dict[str, type[Record]]] = {}
    """The records of the structs inside it, by field."""
    fields: ClassVar[dict[str, int]] = {}
    """The C struct's fields, and their places in the tuple."""
    layout: ClassVar[str]
    """The C struct as the struct module writes it, for a struct inside another."""
    decode: ClassVar[Callable[[bytes], Record]]
    """Decodes one, for a struct inside another."""
    spread: ClassVar[bool] = False
    """Whether its members rarely come together again, so that each is formatted by itself."""
    made: ClassVar[dict[str, tuple[Callable[..., object], tuple[str, ...]]]] = {}
    """Of such a record: what is made from members, and from which."""


def _ip(family: int) -> int:
    return 6 if family == AF_INET6 else 4


def _address(family: int, field: bytes) -> str:
    if family != AF_INET6:
        return "{}.{}.{}.{}".format(*field[:4])
    return inet_ntop(AF_INET6, field)


class Endpoints(Record):
    """Both ends of a socket, seen from its own."""

    __slots__ = ()
    struct_name = "endpoints"
    spread = True
    made: ClassVar = {
        "ip": (_ip, ("family",)),
        "laddr": (_address, ("family", "laddr")),
        "raddr": (_address, ("family", "raddr")),
    }

    family: int
    lport: int
    rport: int

    @property
    def ip(self) -> int:
        """4 or 6."""
        return _ip(self.family)

    @property
    def laddr(self) -> str:
        """The local address as text."""
        return _remembered_address(self.family, self[self.fields["laddr"]])

    @property
    def raddr(self) -> str:
        """The remote address as text."""
        return _remembered_address(self.family, self[self.fields["raddr"]])


_remembered_address = lru_cache(REMEMBERED)(_address)


def printable(text: str) -> str:
    r"""A text that somebody else chose, safe to print: what is not printable is escaped, as \xNN."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class Task(Record):
    """A process: the kernel's `struct task` of events.h."""

    __slots__ = ()
    struct_name = "task"

    pid: int

    @property
    def comm(self) -> str:
        r"""The task's name, safe to print: what is not printable, or not UTF-8, is escaped as \xNN."""
        field = self[self.fields["comm"]]
        assert isinstance(field, bytes)
        return printable(field.split(b"\0", 1)[0].decode("utf-8", "backslashreplace"))


class Owner(Task):
    """The process that a session belongs to; PID 0 and `-` when nobody is known."""

    __slots__ = ()

    @property
    def comm(self) -> str:
        """The process's name, safe to print."""
        return super().comm if self.pid else "-"


class Identity(Record):
    """What else is known of an owner; all zero where nobody is known."""

    __slots__ = ()
    struct_name = "identity"

    tid: int
    uid: int

    @property
    def user(self) -> int | str:
        """The UID; `-` where nobody is known, for 0 is root."""
        return self.uid if self.tid else "-"


ROLES = ("-", "connect", "accept")
"""enum role of bpf/events.h."""


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("ascii", "backslashreplace")


class Course(Record):
    """How a session went, as struct tcp_sock counts it; 0 where it is not known."""

    __slots__ = ()
    struct_name = "course"
    spread = True
    made: ClassVar = {"congestion_control": (_text, ("congestion",))}

    lifetime_us: int
    handshake_us: int
    srtt_us: int
    min_rtt_us: int
    retransmits: int
    lost: int
    segs_in: int
    segs_out: int
    delivered: int

    @property
    def congestion_control(self) -> str:
        """The algorithm's name, such as cubic."""
        field = self[self.fields["congestion"]]
        assert isinstance(field, bytes)
        return _text(field)


class Ending(Record):
    """How a session ended, from what the kernel knew at CLOSE (net/ipv4/tcp.c, tcp_input.c, tcp_timer.c)."""

    __slots__ = ()
    struct_name = "ending"

    error: int
    oldstate: int
    role: int
    open: int
    existing: int
    by_process: int
    shut: int
    linger_zero: int
    fin_received: int
    orphaned: int
    late_data: int
    retransmits: int
    probes: int
    sent: int

    @property
    def role_name(self) -> str:
        """`connect` or `accept`; `-` where its beginning was not seen."""
        return ROLES[self.role]

    @property
    def mark(self) -> str:
        """`+` where the duration is the least it can be: not all of the session was, or is, seen."""
        return "+" if self.open or self.existing else ""

    @property
    def error_name(self) -> str:
        """The name of the socket's error, such as ECONNRESET; `-` for none."""
        return _errno_name(self.error) if self.error else "-"

    @property
    def name(self) -> str:
        """How it ended.

        `fin-local`, `fin-remote`: by a FIN, which that side sent first; `fin-both`: their FINs crossed.
        `reset-sent`, `reset-received`. `refused`, `unreachable`, `timeout`: as the error says. `aborted`: by
        somebody else, as with `ss -K`. `cancelled`: closed before it was connected; `failed`: connect() could
        not even send. `error`: another one, see `error_name`; or one that its process had read before that.
        `open`: it has not ended.
        """
        if self.open:
            return "open"
        if self.error:
            return self._by_error()
        return self._by_state()

    def _by_error(self) -> str:
        if self.error in (errno.ECONNRESET, errno.EPIPE):  # EPIPE: the peer had sent its FIN before
            # Data that comes after close() is answered with a reset, and counts as one (tcp_reset).
            return "reset-sent" if self.late_data else "reset-received"
        return _ENDS_BY_ERROR.get(self.error, "error")

    def _by_state(self) -> str:
        if self.oldstate == SYN_SENT and self.by_process:
            return "cancelled" if self.sent else "failed"
        if self.oldstate == FIN_WAIT2:
            # Without the peer's FIN, TIME_WAIT's socket took over; unless data came that nobody could take.
            took_over = self.orphaned and not self.late_data
            return "fin-local" if self.fin_received or took_over else "reset-sent"
        # SYN_SENT: an error can be read, and is 0 then, before CLOSE (tcp_v4_err in net/ipv4/tcp_ipv4.c).
        by_kernel = {SYN_SENT: "error", LAST_ACK: "fin-remote", CLOSING: "fin-both"}
        return by_kernel.get(self.oldstate, "reset-sent")

    @property
    def failed(self) -> bool:
        """Whether it ended by an error, or was never established.

        That is every end but `fin-local`, `fin-remote`, `fin-both` and `reset-sent`, and of the latter those
        after late data, and those before the handshake was over.
        """
        return not self.open and (bool(self.error) or self.oldstate in (SYN_SENT, SYN_RECV))

    @property
    def reason(self) -> str:
        """Why a reset was sent, or what was not answered before the timeout; `-` for other ends.

        Resets: `linger` (SO_LINGER of 0 seconds), `unread-data` (closed with data not read), `late-data`
        (data came after close), `not-accepted` (the listener closed), `disconnect` (connect() to AF_UNSPEC),
        `memory` (too little for sockets that are closed already).
        Timeouts: `handshake`, `retransmission`, `probes` (keepalive, or a window that stayed 0).
        """
        if self.name == "reset-sent":
            if self.late_data:
                return "late-data"
            if self.orphaned:
                return "memory"
            if not self.by_process:
                return "not-accepted"
            if self.shut != SHUT_BOTH:
                return "disconnect"
            return "linger" if self.linger_zero else "unread-data"
        if self.name == "timeout":
            if self.oldstate in (SYN_SENT, SYN_RECV):
                return "handshake"
            return "retransmission" if self.retransmits else "probes"
        return "-"


SYN_SENT, SYN_RECV, FIN_WAIT2, LAST_ACK, CLOSING = 2, 3, 5, 9, 11
"""include/net/tcp_states.h."""

SHUT_BOTH = 3
"""SHUTDOWN_MASK of include/net/sock.h."""

_ENDS_BY_ERROR = {
    errno.ECONNREFUSED: "refused",
    errno.ETIMEDOUT: "timeout",
    errno.ECONNABORTED: "aborted",
    # What ICMP errors become: icmp_err_convert (net/ipv4/icmp.c), icmpv6_err_convert (net/ipv6/icmp.c).
    errno.ENETUNREACH: "unreachable",
    errno.EHOSTUNREACH: "unreachable",
    errno.EHOSTDOWN: "unreachable",
    errno.ENONET: "unreachable",
    errno.ENOPROTOOPT: "unreachable",
    errno.EOPNOTSUPP: "unreachable",
    errno.EACCES: "unreachable",
    errno.EPROTO: "unreachable",
}


def _errno_name(number: int) -> str:
    return errno.errorcode.get(number, str(number))


class Transition(Record):
    """A change from one TCP state to another."""

    __slots__ = ()
    struct_name = "transition"

    oldstate: int
    newstate: int

    @property
    def old(self) -> str:
        """The name of the state before."""
        return state_name(self.oldstate)

    @property
    def new(self) -> str:
        """The name of the state after."""
        return state_name(self.newstate)


class Timed(Record):
    """What all that is listed has: a time."""

    __slots__ = ()

    time_ns: int
    """CLOCK_MONOTONIC, in ns."""


class WithEndpoints(Timed):
    """What all events have: a time, a span, and a socket's two ends."""

    __slots__ = ()

    span_ns: int
    endpoints: Endpoints
    netns: int
    """The network namespace's inode number."""

    @property
    def ms(self) -> float:
        """The span in milliseconds."""
        return self.span_ns / 1e6

    @property
    def ip(self) -> int:
        """4 or 6."""
        return self.endpoints.ip

    @property
    def laddr(self) -> Address:
        """The local address."""
        from ipaddress import ip_address

        return ip_address(self.endpoints.laddr)

    @property
    def raddr(self) -> Address:
        """The remote address."""
        from ipaddress import ip_address

        return ip_address(self.endpoints.raddr)

    @property
    def lport(self) -> int:
        """The local port; 0 while it is not chosen yet."""
        return self.endpoints.lport

    @property
    def rport(self) -> int:
        """The remote port; 0 where there is no peer (yet)."""
        return self.endpoints.rport


class StateChange(WithEndpoints):
    """One change of a TCP socket's state. `span_ns` is the time spent in the old state, 0 if unknown."""

    __slots__ = ()
    struct_name = "state_change"
    inner: ClassVar[dict[str, type[Record]]] = {
        "endpoints": Endpoints,
        "current": Task,
        "transition": Transition,
        "owner": Owner,
        "identity": Identity,
    }

    skaddr: int
    """The socket's address in the kernel."""
    current: Task
    transition: Transition
    owner: Owner
    """Known only where it was asked for."""
    identity: Identity
    cgroup: int

    @property
    def c_pid(self) -> int:
        """The process on the CPU at that moment: not always the socket's owner."""
        return self.current.pid

    @property
    def c_comm(self) -> str:
        """The name of the task on the CPU."""
        return self.current.comm

    @property
    def oldstate(self) -> str:
        """The state before."""
        return self.transition.old

    @property
    def newstate(self) -> str:
        """The state after."""
        return self.transition.new


class Session(WithEndpoints):
    """One TCP session that ended.

    `span_ns` is the time from its last change into a state before FIN_WAIT1 (for a completed handshake:
    ESTABLISHED) to CLOSE; `time_ns` is the time of CLOSE.
    """

    __slots__ = ()
    struct_name = "session"
    inner: ClassVar[dict[str, type[Record]]] = {
        "endpoints": Endpoints,
        "owner": Owner,
        "identity": Identity,
        "course": Course,
        "ending": Ending,
    }

    tx_bytes: int
    """bytes_acked of struct tcp_sock: sent, and acknowledged by the peer."""
    rx_bytes: int
    """bytes_received of struct tcp_sock."""
    owner: Owner
    identity: Identity
    cgroup: int
    """The id of the owner's cgroup (version 2)."""
    course: Course
    ending: Ending

    @property
    def pid(self) -> int:
        """The owner's PID; 0 when no process was seen to act on the socket."""
        return self.owner.pid

    @property
    def comm(self) -> str:
        """The owner's name; `-` when nobody is known."""
        return self.owner.comm

    @property
    def tx_kb(self) -> int:
        """KiB sent, cut to a whole number."""
        return self.tx_bytes // 1024

    @property
    def rx_kb(self) -> int:
        """KiB received, cut to a whole number."""
        return self.rx_bytes // 1024


def decoder(record: type[R], btf: Btf, header: int = 0) -> tuple[int, Callable[[bytes], Iterator[R]]]:
    """Fits a record class to an object's BTF.

    Returns the C struct's size in bytes, and a function that decodes a run of such structs, each led by
    `header` bytes and filled up to a multiple of eight.
    """
    type = btf.find(record.struct_name, Kind.STRUCT)
    if type is None:
        raise LibbpfError(f"the object has no struct {record.struct_name}")
    layout, size = f"={header}x{_fit(record, type)}", type.size
    unpack = struct.Struct(layout + f"{-(header + size) % 8}x").iter_unpack
    make = partial(record.__new__, record)
    return size, lambda data: map(make, unpack(data))


def _fit(record: type[Record], type: Type) -> str:
    """Gives a record class its fields, and returns the struct module's format of the C struct."""
    layout, place = "", 0
    record.fields = {}
    for index, member in enumerate(type.members):
        resolved = member.type.resolve()
        layout += f"{member.offset // 8 - place}x" if member.offset // 8 > place else ""
        place = member.offset // 8 + resolved.size
        record.fields[member.name] = index
        if resolved.kind in (Kind.STRUCT, Kind.ARRAY):
            layout += f"{resolved.size}s"
        else:
            layout += resolved.integer_format()
        if member.name in record.inner:
            _fit_inner(record.inner[member.name], resolved)
            setattr(record, member.name, _inner_property(record.inner[member.name], index))
        elif resolved.kind is not Kind.ARRAY:
            setattr(record, member.name, property(itemgetter(index)))
    return layout + (f"{type.size - place}x" if type.size > place else "")


def _fit_inner(record: type[Record], type: Type) -> None:
    record.layout = "=" + _fit(record, type)
    unpack = struct.Struct(record.layout).unpack
    record.decode = staticmethod(lambda data: record(unpack(data)))


def _inner_property(record: type[Record], index: int) -> property:
    decode = lru_cache(REMEMBERED)(record.decode)
    return property(lambda outer: decode(outer[index]))
