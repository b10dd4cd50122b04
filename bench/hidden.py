"""Looks for state changes that tcpobs neither shows nor counts as lost, with ftrace beside it.

ftrace hooks the same tracepoint, and no BPF is involved. The changes that only ftrace sees are printed by the
task that was on the CPU: some kernels run no BPF program while a thread of PID 1 is there.

usage: python bench/hidden.py [RUNS]   (as root; each run makes 6 x 20,000 connections, 1.2 million changes)
"""

from __future__ import annotations

import re
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import tcpobs
from measuring import compiled, sustained_load, tracefs

BUFFER_KB = 200_000
"""ftrace's, for each CPU: it holds a whole run."""

_CHANGE = re.compile(
    r"-\d+ +\( *([\d-]+)\) +\[\d+\] .* inet_sock_set_state: family=\w+ protocol=IPPROTO_TCP "
    r"sport=(\d+) dport=(\d+) .* oldstate=TCP_(\w+) newstate=TCP_(\w+)"
)

Change = tuple[int, int, str, str]
"""Local port, remote port, old state, new state."""


@contextmanager
def ftrace() -> Iterator[Path]:
    """An ftrace instance that sees all changes until it is left; its folder."""
    instance = Path(tempfile.mkdtemp(prefix="tcpobs-", dir="/sys/kernel/tracing/instances"))
    try:
        (instance / "buffer_size_kb").write_text(str(BUFFER_KB))
        # The process of each thread is noted then: the thread may have ended when somebody asks.
        (instance / "options/record-tgid").write_text("1")
        (instance / "events/sock/inet_sock_set_state/enable").write_text("1")
        yield instance
    finally:
        instance.rmdir()


def seen_by_ftrace(instance: Path) -> dict[Change, list[int]]:
    """Each change, with the processes that were on the CPU; 0 for an unknown one.

    Raises RuntimeError when ftrace lost some.
    """
    for stats in instance.glob("per_cpu/cpu*/stats"):
        lost = [
            line
            for line in stats.read_text().splitlines()
            if re.match(r"(overrun|dropped events): [1-9]", line)
        ]
        if lost:
            raise RuntimeError(f"ftrace lost events: {stats.parent.name} {', '.join(lost)}")
    found: dict[Change, list[int]] = {}
    with open(instance / "trace", errors="replace") as file:
        for line in file:
            match = _CHANGE.search(line)
            if match:
                pid, lport, rport, oldstate, newstate = match.groups()
                pids = found.setdefault((int(lport), int(rport), oldstate, newstate), [])
                pids.append(int(pid) if pid.isdigit() else 0)
    return found


def run() -> tuple[int, int, Counter[str], tcpobs.Losses]:
    """One run: how many changes ftrace saw; tcpobs showed; tcpobs did not show, by task; and its losses."""
    shown: Counter[Change] = Counter()
    with tcpobs.states(buffer_size=1 << 28) as states, ftrace() as instance:  # ftrace sees no more than we do

        def read() -> None:
            for batch in states.batches():
                shown.update((e.lport, e.rport, e.oldstate, e.newstate) for e in batch)

        reader = threading.Thread(target=read)
        reader.start()
        sustained_load()
        (instance / "tracing_on").write_text("0")
        states.stop()
        reader.join()
        seen = seen_by_ftrace(instance)
    hidden: Counter[str] = Counter()
    for change, pids in seen.items():
        missing = len(pids) - shown[change]
        if missing > 0:
            # Which of several like changes is missing is not known: those of PID 1's threads first.
            by_pid_1 = pids.count(1)
            hidden["a thread of PID 1"] += min(missing, by_pid_1)
            hidden["others"] += max(0, missing - by_pid_1)
    return sum(map(len, seen.values())), sum(shown.values()), +hidden, states.losses


def main(runs: int) -> int:
    """Prints a line for each run. Returns 1 if changes were missing that nothing explains."""
    compiled("connections")
    unexplained = 0
    with tracefs():
        for number in range(runs):
            seen, shown, hidden, losses = run()
            told = losses.recursion_misses + losses.buffer_full
            unexplained += max(0, hidden["others"] - told)
            by = ", ".join(f"{count} on {task}" for task, count in hidden.items()) or "none"
            print(
                f"run {number + 1}: ftrace {seen:,}, tcpobs {shown:,}, not shown: {by}; losses: {losses}",
                flush=True,
            )
    return 1 if unexplained else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 1))
