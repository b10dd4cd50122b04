"""What a row costs in each mode of output, and whether every row is there, under a sustained load.

The load: six times 20,000 connections over loopback, as fast as one core makes them (bench/connections.c).
Each makes 10 state changes and 2 sessions. The output goes to a file.

usage: python bench/rows.py [RUNS]     (as root, with the wheel installed by `make build/installed.stamp`)
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

from measuring import (
    BUILD,
    CONNECTIONS,
    ROUNDS,
    TCPOBS,
    compiled,
    fd_infos,
    finish,
    megabytes,
    sustained_load,
    wait_until,
)

EXPECTED = {"life": 2 * ROUNDS * CONNECTIONS, "states": ROUNDS * (10 * CONNECTIONS + 2)}
MODES: tuple[list[str], ...] = ([], ["-x"], ["-w"], ["-w", "-x"], ["-s"], ["-s", "-x"], ["--json"])


class Run(NamedTuple):
    """What one run came to; `said` is what tcpobs printed on standard error."""

    rows: int
    us_per_row: float
    peak_mb: float
    said: str


def run(tool: str, flags: Sequence[str]) -> Run:
    """Runs the tool under the load."""
    out, log = BUILD / "rows", BUILD / "log"
    with open(out, "wb") as stdout, open(log, "wb") as stderr:
        process = subprocess.Popen([TCPOBS, tool, *flags], stdout=stdout, stderr=stderr)
    try:
        wait_until(lambda: any("link_type" in info for info in fd_infos(process.pid)), f"{tool} to start")
        time.sleep(0.5)
        before = cpu_seconds(process.pid)
        sustained_load()
        time.sleep(1)  # the reader looks twenty times a second
        cpu = cpu_seconds(process.pid) - before
        status = Path(f"/proc/{process.pid}/status").read_text()
        finish(process, tool, log)
    finally:
        if process.returncode is None:
            process.kill()
            process.wait()
    with open(out, "rb") as file:
        rows = sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(1 << 20), b""))
    return Run(rows, cpu * 1e6 / rows, megabytes(status, "VmHWM"), log.read_text().strip())


def cpu_seconds(pid: int) -> float:
    """A process's CPU time so far: its clock, as clock_getcpuclockid(3) makes it."""
    return time.clock_gettime(~pid << 3 | 2)


def main(runs: int) -> int:
    """Prints a line for each mode. Returns 1 when rows were missing."""
    compiled("connections")
    complete = True
    print("| mode | runs with every row | µs of CPU per row (median) | peak memory, MB |")
    print("| --- | ---: | ---: | ---: |")
    for tool, expected in EXPECTED.items():
        for flags in MODES:
            done = [run(tool, flags) for _ in range(runs)]
            seen = sum(each.rows >= expected for each in done)
            complete &= seen == runs
            us, peak = median(each.us_per_row for each in done), max(each.peak_mb for each in done)
            print(f"| `{' '.join([tool, *flags])}` | {seen} of {runs} | {us:.1f} | {peak:.0f} |", flush=True)
            for said in filter(None, (each.said for each in done)):
                print(said.splitlines()[-1], file=sys.stderr)
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 1))
