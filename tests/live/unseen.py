"""Changes of TCP states that the kernel shows to no BPF program, as ftrace sees them.

The build machine's kernel runs no BPF program while the current task is a thread of PID 1, its control
process: a tp_btf program on softirq_entry counts all softirqs of every other task, and none of these. One
that interrupts such a thread may end many sessions at once, as that of the timer that sends delayed
acknowledgements does.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from live.workloads import Ports

TRACING = "/sys/kernel/tracing"

ATTEMPTS = 3
"""How often a test is made at most, when each time the kernel kept something from BPF."""

_CHANGE = re.compile(r"-(\d+) +\[\d+\] .* inet_sock_set_state: .* sport=(\d+) dport=(\d+) ")


class Changes:
    """What ftrace sees, in an instance of its own."""

    def __init__(self, instance: str) -> None:
        self._trace = f"{instance}/trace"

    def forget(self) -> None:
        """Forgets what it saw so far."""
        open(self._trace, "w").close()

    def by_pid_1(self) -> set[Ports]:
        """The sockets that a thread of PID 1 changed since then, among the last few thousand changes."""
        threads = set(os.listdir("/proc/1/task"))
        with open(self._trace, errors="replace") as file:  # the tasks may have any name
            changes = _CHANGE.findall(file.read())
        return {(int(lport), int(rport)) for tid, lport, rport in changes if tid in threads}


@contextmanager
def changes() -> Iterator[Changes]:
    """Sees all changes until it is left."""
    instance = tempfile.mkdtemp(prefix="tcpobs-", dir=f"{TRACING}/instances")
    try:
        with open(f"{instance}/events/sock/inet_sock_set_state/enable", "w") as file:
            file.write("1")
        yield Changes(instance)
    finally:
        os.rmdir(instance)
