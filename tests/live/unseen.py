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
from collections.abc import Container, Iterator
from contextlib import contextmanager

from live.workloads import Ports

TRACING = "/sys/kernel/tracing"

ATTEMPTS = 3
"""How often a test is made at most, when each time the kernel kept something from BPF."""

_CHANGE = re.compile(r"-\d+ +\( *(\d+)\) +\[\d+\] .* inet_sock_set_state: .* sport=(\d+) dport=(\d+) ")
"""The process (record-tgid), and the ports."""
_HERE = "tcpobs: from here on"


class Changes:
    """What ftrace sees, in an instance of its own."""

    def __init__(self, instance: str) -> None:
        self._instance = instance

    def forget(self) -> None:
        """Leaves out, from now on, what it has seen so far."""
        with open(f"{self._instance}/trace_marker", "w") as file:
            file.write(_HERE)

    def by_pid_1(self, ports: Container[int]) -> set[Ports]:
        """The sockets with one of these ports that a thread of PID 1 changed since then.

        Of the last few thousand changes on each CPU.
        """
        with open(f"{self._instance}/trace", errors="replace") as file:  # the tasks may have any name
            _, _, recent = file.read().rpartition(_HERE)
        found = (map(int, match) for match in _CHANGE.findall(recent))
        return {
            (lport, rport) for pid, lport, rport in found if pid == 1 and (lport in ports or rport in ports)
        }


@contextmanager
def changes() -> Iterator[Changes]:
    """Sees all changes until it is left."""
    instance = tempfile.mkdtemp(prefix="tcpobs-", dir=f"{TRACING}/instances")
    try:
        # The process of each thread is noted then: the thread may have ended when somebody asks.
        for name in ("options/record-tgid", "events/sock/inet_sock_set_state/enable"):
            with open(f"{instance}/{name}", "w") as file:
                file.write("1")
        yield Changes(instance)
    finally:
        os.rmdir(instance)
