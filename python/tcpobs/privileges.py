"""What this process may do (capabilities(7)), and giving it up."""

from __future__ import annotations

import ctypes
import os
from enum import IntEnum

from tcpobs.errors import TcpobsError


class Capability(IntEnum):
    """Those that tracing has to do with (include/uapi/linux/capability.h)."""

    CAP_DAC_READ_SEARCH = 2
    CAP_IPC_LOCK = 14
    CAP_SYS_ADMIN = 21
    CAP_SYS_RESOURCE = 24
    CAP_PERFMON = 38
    CAP_BPF = 39


def effective() -> int:
    """The capabilities that this process has, as a set of bits; see `in_user_namespace`."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1], 16) for line in file if line.startswith("CapEff:"))


def has(capability: Capability) -> bool:
    """Whether this process has it."""
    return bool(effective() >> capability & 1)


def in_user_namespace() -> bool:
    """Whether this is not the host's own user namespace (user_namespaces(7)): its capabilities count less."""
    with open("/proc/self/uid_map") as file:
        return file.read().split() != ["0", "0", "4294967295"]


def may_trace() -> bool:
    """Whether the kernel lets this process load and attach tracing programs."""
    if in_user_namespace():
        return False
    both = has(Capability.CAP_BPF) and has(Capability.CAP_PERFMON)
    return both or has(Capability.CAP_SYS_ADMIN)  # all there was before Linux 5.8


_PR_SET_NO_NEW_PRIVS = 38
_VERSION_3 = 0x20080522  # _LINUX_CAPABILITY_VERSION_3: two words for each set


def give_up(*but: Capability) -> None:
    """Gives up every capability `but` these, for good: what it executes from now on gets none at all.

    This thread's effective, permitted and inheritable sets are set (capset(2)), and with them the
    ambient one; no_new_privs (prctl(2)) keeps it so. Open files, maps and attached programs stay usable.
    """
    kept = effective() & sum(1 << capability for capability in but)
    low, high = kept & 0xFFFFFFFF, kept >> 32
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(_VERSION_3, 0)
    # struct __user_cap_data_struct, twice: effective, permitted, inheritable
    sets = (ctypes.c_uint32 * 6)(low, low, 0, high, high, 0)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.capset(header, sets):
        raise TcpobsError(f"capabilities cannot be given up: {os.strerror(ctypes.get_errno())}")
