"""What this host can do. Every choice between mechanisms is made here.

A way is a hook, by which a program sees state changes; a storage, where it keeps what it knows of a
socket; a transport, by which its events come out; and how accept's return is seen. The first way that the
kernel takes is used: it is tried, not guessed from a version.
"""

from __future__ import annotations

import errno
import os
from collections import namedtuple

from tcpobs import privileges
from tcpobs.errors import HostError, TcpobsError
from tcpobs.libbpf.btf import Btf, Kind
from tcpobs.libbpf.errors import LibbpfError, LibraryMissing
from tcpobs.libbpf.object import Object
from tcpobs.libbpf.program import takes_fexit

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NamedTuple

    class Way(NamedTuple):
        """One way to see state changes, and who accepts."""

        hook: str
        storage: str
        transport: str
        accept: str

else:
    Way = namedtuple("Way", "hook storage transport accept")

_HOOKS = (
    ("tp_btf", "sk_storage"),  # Linux 5.11
    ("tp_btf", "hash"),  # Linux 5.5
    ("tracepoint", "hash"),  # Linux 4.16
    ("kprobe", "hash"),
)

WAYS = tuple(
    Way(hook, storage, transport, accept)
    for transport in ("ringbuf", "perfbuf")  # Linux 5.8; any
    for accepts in (("fexit", "kretprobe", "syscall"), ("none",))
    for hook, storage in _HOOKS
    for accept in accepts
    if storage == "hash" or accept in ("fexit", "none")  # the others know a socket by its address only
)
"""Best first."""

HOOKS, STORAGES, TRANSPORTS, ACCEPTS = (tuple(dict.fromkeys(choices)) for choices in zip(*WAYS))

REFUSED = {
    "snapshot": "the iterator iter/task_file, which --existing needs",
    "open_sk_storage": "the iterator iter/bpf_sk_storage_map, which --open and --every need",
    "open_hash": "a raw_tp program, which --open and --every need",
}
"""What a kernel refuses that does not take one of the programs beside those of a way."""

STORAGE_MAPS = {"sk_storage": "socket_storage", "hash": "socket_hash"}
GROUP_MAPS = ("groups_a", "groups_b")
_TRANSPORT_MAPS = {"ringbuf": "ring_buffer", "perfbuf": "perf_buffers"}

KERNEL_BTF = "/sys/kernel/btf/vmlinux"
KPROBES = "/sys/bus/event_source/devices/kprobe"
PARANOID = "/proc/sys/kernel/perf_event_paranoid"
LOCKDOWN = "/sys/kernel/security/lockdown"

NO_TRACEFS = ("tracefs is not mounted", "mount -t tracefs tracefs /sys/kernel/tracing")
"""Cause and remedy."""

_OBJECTS = os.path.join(os.path.dirname(__file__), "_objects")


def describe(way: Way) -> str:
    """A way in words: `tp_btf, sk_storage, ringbuf, accept by fexit`."""
    *parts, accept = way
    return ", ".join([*parts, *([f"accept by {accept}"] if accept != "none" else [])])


def ways(
    hook: str | None = None,
    storage: str | None = None,
    transport: str | None = None,
    accept: str | None = None,
) -> list[Way]:
    """The ways to try, best first; what is given forces that."""
    forced = (hook, storage, transport, accept)
    found = [way for way in WAYS if all(want in (None, part) for want, part in zip(forced, way))]
    if not found:
        given = [(name, choice) for name, choice in zip(Way._fields, forced) if choice not in (None, "none")]
        raise TcpobsError(" does not go with ".join(f"--{name} {choice}" for name, choice in given))
    # What a kernel plainly lacks is tried last: hearing it say so takes time.
    missing = ["kretprobe"] if not os.path.exists(KPROBES) else []
    if len(found) > 1 and found[0].accept == "fexit" and not takes_fexit():
        missing.append("fexit")
    return sorted(found, key=lambda way: way.accept in missing)


def open_object(
    tool: str, way: Way, btf: str | None = None, beside: Sequence[str] = ()
) -> tuple[Object, list[str]]:
    """A tool's object, set up to be loaded this way, and the names of the programs to attach, in their order.

    `btf` is a file with the kernel's types, for a kernel that does not carry them. The programs
    `beside` are loaded, too. Raises HostError when the object is missing or damaged.
    """
    try:
        object = Object(_read_object(tool), tool, btf)
    except LibraryMissing:
        raise
    except LibbpfError as error:
        raise HostError(f"the object {tool}.bpf.o is damaged ({error})", "install tcpobs again") from error
    try:
        name = f"{tool}_{way.hook}"
        # accept first: whoever accepts a session whose birth was seen is to be seen, too
        programs = [f"accept_{way.accept}"] if way.accept != "none" else []
        programs += [program for program in object.programs if f"{program}_".startswith(f"{name}_")]
        if not tracepoints_are_preempted():
            programs = [program for program in programs if not program.endswith("_preempted")]
        for program in object.programs:
            object.programs[program].autoload = program in (*programs, *beside)
        object.variables["use_sk_storage"] = way.storage == "sk_storage"
        object.variables["use_ring_buffer"] = way.transport == "ringbuf"
        for choice, map in (*STORAGE_MAPS.items(), *_TRANSPORT_MAPS.items()):
            object.maps[map].autocreate = choice in way
        for map in object.maps.keys() & set(GROUP_MAPS):
            object.maps[map].autocreate = False
    except BaseException:
        object.close()
        raise
    return object, programs


def tracepoints_are_preempted() -> bool:
    """Whether a program may stand still in a tracepoint while other tasks run: from Linux 7.0 on.

    Nothing else tells it than the release: it is no feature that could be tried.
    """
    return int(os.uname().release.split(".")[0]) >= 7


def _read_object(tool: str) -> bytes:
    machine = os.uname().machine
    path = os.path.join(_OBJECTS, machine, f"{tool}.bpf.o")
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        remedy = f"install the tcpobs wheel for {machine}, or run `make build`"
        raise HostError(f"{path} is missing", remedy) from None
    except OSError as error:
        raise HostError(f"{path} cannot be read ({error.strerror})", "install tcpobs again") from None


def check_btf(path: str) -> None:
    """Raises TcpobsError unless the file holds a kernel's types."""
    try:
        with Btf.of_file(path) as btf:
            known = btf.find("tcp_sock", Kind.STRUCT)
    except LibraryMissing:
        raise
    except LibbpfError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise TcpobsError(f"{path} cannot be read as BTF: {reason}") from None
    if known is None:
        raise TcpobsError(f"{path} knows no struct tcp_sock: it is not a kernel's BTF")


def refusal(failures: Sequence[tuple[Way, LibbpfError]], btf: str | None = None) -> HostError:
    """The error to raise when no way worked, given each one's failure, best way first."""
    if any(is_denied(error) for _, error in failures):
        return HostError(*unprivileged())
    if "[confidentiality]" in read(LOCKDOWN):
        return HostError(
            "the kernel is locked down (confidentiality), and BPF may not read its memory",
            "boot with lockdown=integrity or none",
        )
    if btf and not os.path.exists(KERNEL_BTF):  # tp_btf takes the kernel's own
        failures = [failure for failure in failures if failure[0].hook != "tp_btf"] or failures
    forced = set.intersection(*(set(way) for way, _ in failures))
    for way, error in failures:
        known = _cause(way, error, btf, forced)
        if known:
            return HostError(*known)
    way, error = failures[0]
    lines = error.verdict[-1:] or error.log.strip().splitlines()[:1]  # what says most
    said = "".join(f"; {line.strip()}" for line in lines)
    return HostError(
        f"the kernel did not take the program ({describe(way)}): {error}{said}",
        "-v shows all that was said",
    )


def is_denied(error: LibbpfError) -> bool:
    """Whether the kernel refused because this process may not trace at all."""
    return error.errno in (errno.EPERM, errno.EACCES) and not privileges.may_trace()


def unprivileged() -> tuple[str, str]:
    """Why this process may not trace, and what to do."""
    if privileges.in_user_namespace():
        cause = "in a user namespace, as of a rootless container, capabilities do not count for tracing"
        return cause, "run it as the host's root"
    return "tracing needs root, or the capabilities CAP_BPF and CAP_PERFMON", "try it with sudo"


def _cause(way: Way, error: LibbpfError, btf: str | None, forced: set[str]) -> tuple[str, str] | None:
    """Why one way failed, if that is something known, and what to do; `forced` is what all ways have."""
    for program, what in REFUSED.items():
        if f"prog '{program}'" in error.log and error.errno == errno.EPERM:
            return f"this kernel refuses {what}", "-v shows all that was said"
    if not btf and not os.path.exists(KERNEL_BTF) and "BTF" in error.log:
        return (
            f"this kernel carries no type information, {KERNEL_BTF} is missing",
            "give it with --btf FILE, or take a kernel built with CONFIG_DEBUG_INFO_BTF",
        )
    if way.hook == "tracepoint" and not tracefs():
        return NO_TRACEFS
    if error.errno == errno.EACCES and "perf event ID" in error.log:
        return "tracefs may not be read", "it takes root, or the capability CAP_DAC_READ_SEARCH"
    paranoid = read(PARANOID).strip()
    if error.errno == errno.EACCES and "perf" in error.log and int(paranoid or 0) > 2:
        return (
            f"kernel.perf_event_paranoid of {paranoid} closes perf events, as Debian's kernels do it",
            "sysctl kernel.perf_event_paranoid=2, or give the capability CAP_SYS_ADMIN",
        )
    if forced & {"kprobe", "kretprobe"} and not os.path.exists(KPROBES):
        return "this kernel has no kprobes (CONFIG_KPROBES)", "use another hook"
    if "fexit" in forced and not takes_fexit():
        return "this kernel takes no fexit programs", "do without --accept"
    if error.errno == errno.EPERM and error.what.startswith("perf_buffer"):
        return (
            "perf buffers of this size take the capability CAP_IPC_LOCK, or RLIMIT_MEMLOCK",
            "lower --buffer-size, or raise kernel.perf_event_mlock_kb",
        )
    if error.errno == errno.EPERM and "failed to create" in error.log and _limits_locked_memory():
        return (
            "this kernel, before 5.11, counts BPF maps as locked memory (RLIMIT_MEMLOCK)",
            "raise it (ulimit -l unlimited), or give the capability CAP_SYS_RESOURCE",
        )
    return None


def _limits_locked_memory() -> bool:
    import resource

    return resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] != resource.RLIM_INFINITY


def tracefs() -> str | None:
    """Where tracefs is mounted, be it closed to this user or not."""
    mounts = dict(line.split()[1:3] for line in read("/proc/self/mounts").splitlines())
    for place in ("/sys/kernel/tracing", "/sys/kernel/debug/tracing"):
        # The latter is mounted when somebody looks.
        if os.path.exists(f"{place}/events"):
            return place
        # Closed to this user; or else hidden below another mount.
        closed = os.path.exists(place) or not os.access(os.path.dirname(place), os.X_OK)
        if mounts.get(place) == "tracefs" and closed:
            return place
    return None


def read(path: str) -> str:
    """A file's text; nothing if it is not there, or not for us."""
    try:
        with open(path, errors="replace") as file:
            return file.read()
    except OSError:
        return ""
