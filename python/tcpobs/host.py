"""What this host can do. Every choice between mechanisms is made here.

A way is a hook, by which a program sees state changes, and a storage, where it keeps what it knows of a
socket. The first way that the kernel takes is used: it is tried, not guessed from a version.
"""

from __future__ import annotations

import errno
import os
from collections import namedtuple

from tcpobs.errors import TcpobsError
from tcpobs.libbpf.errors import LibbpfError, LibraryMissing
from tcpobs.libbpf.object import Object

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import NamedTuple

    class Way(NamedTuple):
        """One way to see state changes."""

        hook: str
        storage: str

else:
    Way = namedtuple("Way", "hook storage")

WAYS = (
    Way("tp_btf", "sk_storage"),  # Linux 5.11
    Way("tp_btf", "hash"),  # Linux 5.5
    Way("tracepoint", "hash"),  # Linux 4.16
    Way("kprobe", "hash"),
)
"""Best first."""

HOOKS = tuple(dict.fromkeys(way.hook for way in WAYS))
STORAGES = tuple(dict.fromkeys(way.storage for way in WAYS))

_OBJECTS = os.path.join(os.path.dirname(__file__), "_objects")
_CAP_SYS_ADMIN, _CAP_PERFMON, _CAP_BPF = 21, 38, 39  # include/uapi/linux/capability.h


class HostError(TcpobsError):
    """The host does not allow what is needed."""


def ways(hook: str | None = None, storage: str | None = None) -> list[Way]:
    """The ways to try, best first; `hook` and `storage` force one."""
    found = [way for way in WAYS if hook in (None, way.hook) and storage in (None, way.storage)]
    if not found:
        raise TcpobsError(f"--hook {hook} does not go with --storage {storage}")
    return found


def attach(tool: str, candidates: Sequence[Way], set_up: Callable[[Object], None]) -> tuple[Object, str]:
    """Loads a tool's object the first way that works, and attaches its program.

    `set_up` sets what the object's user wants before loading. Returns the object and the program's name.
    Raises HostError with the remedy when no way works.
    """
    failures: list[tuple[Way, LibbpfError]] = []
    data = _object(tool)
    for way in candidates:
        program = f"{tool}_{way.hook}"
        object = _open(tool, data)
        try:
            for name in object.programs:
                object.programs[name].autoload = name == program
            object.variables["use_sk_storage"] = way.storage == "sk_storage"
            unused = "socket_hash" if way.storage == "sk_storage" else "socket_storage"
            object.maps[unused].autocreate = False
            set_up(object)
            object.load()
            object.attach(program)
            return object, program
        except LibbpfError as error:
            object.close()
            failures.append((way, error))
        except BaseException:
            object.close()
            raise
    raise HostError(_remedy(failures))


def _object(tool: str) -> bytes:
    machine = os.uname().machine
    path = os.path.join(_OBJECTS, machine, f"{tool}.bpf.o")
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        raise HostError(
            f"{path} is missing: install the tcpobs wheel for {machine}, or run `make build`"
        ) from None


def _open(tool: str, data: bytes) -> Object:
    try:
        return Object(data, tool)
    except LibraryMissing:
        raise
    except LibbpfError as error:
        raise HostError(f"the object {tool}.bpf.o is damaged ({error}): install tcpobs again") from error


def _remedy(failures: Sequence[tuple[Way, LibbpfError]]) -> str:
    """One line: why nothing worked, and what to do."""
    hooks = {way.hook for way, _ in failures}
    way, error = failures[0]
    denied = any(failure.errno in (errno.EPERM, errno.EACCES) for _, failure in failures)
    if denied and not _may_trace():
        return "tracing needs root, or the capabilities CAP_BPF and CAP_PERFMON: try it with sudo"
    if "[confidentiality]" in _read("/sys/kernel/security/lockdown"):
        return (
            "the kernel is locked down (confidentiality), and BPF may not read its memory:"
            " boot with lockdown=integrity or none"
        )
    if not os.path.exists("/sys/kernel/btf/vmlinux"):
        return (
            "this kernel carries no type information: /sys/kernel/btf/vmlinux is missing;"
            " it takes a kernel built with CONFIG_DEBUG_INFO_BTF"
        )
    if hooks == {"tracepoint"} and not _tracefs():
        return "tracefs is not mounted: mount -t tracefs tracefs /sys/kernel/tracing"
    if hooks == {"kprobe"} and not os.path.exists("/sys/bus/event_source/devices/kprobe"):
        return "this kernel has no kprobes (CONFIG_KPROBES): leave --hook out"
    said = error.log.strip().splitlines()
    detail = f"; the kernel: {said[-1].strip()}" if said else ""
    return f"the kernel did not take the program ({way.hook}, {way.storage}): {error}{detail}; see -v"


def _may_trace() -> bool:
    """Whether this process has the capabilities that tracing needs (capabilities(7))."""
    for line in _read("/proc/self/status").splitlines():
        if line.startswith("CapEff:"):
            have = int(line.split()[1], 16)
            both = 1 << _CAP_BPF | 1 << _CAP_PERFMON
            return bool(have >> _CAP_SYS_ADMIN & 1) or have & both == both
    return False


def _tracefs() -> bool:
    return any(os.path.exists(f"/sys/kernel/{place}/events") for place in ("tracing", "debug/tracing"))


def _read(path: str) -> str:
    try:
        with open(path) as file:
            return file.read()
    except OSError:
        return ""
