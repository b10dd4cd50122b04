"""Measures whose sessions tcpobs life and libbpf-tools' tcplife say they are: a section of bench/results.md.

Workloads (tests/live/workloads.py) write down the true owner of each end; both tools watch the same sessions.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from socket import AF_INET, AF_INET6
from typing import TYPE_CHECKING

from live.workloads import SESSIONS, WORKLOADS, Score, run, score
from measuring import BUILD, TCPOBS, fd_infos, finish, progress, said, tracefs, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from live.workloads import Ports, Truth

    Pids = Iterator[tuple[Ports, int]]  # that a tool gave to each end


def ours(text: str) -> Pids:
    """What tcpobs wrote with --json."""
    for row in map(json.loads, text.splitlines()):
        yield (row["lport"], row["rport"]), row["pid"]


def theirs(text: str) -> Pids:
    """What tcplife wrote; names may have blanks, so the ports are counted from the row's end."""
    for row in map(str.split, text.splitlines()[1:]):
        yield (int(row[-6]), int(row[-4])), int(row[0])


def of_workloads(pids: Pids, truths: Iterable[Truth]) -> dict[Ports, int]:
    """Those of the workloads' ends. Raises RuntimeError when other sessions had the same ports."""
    ends = {ports for truth in truths for ports in truth}
    found: dict[Ports, int] = {}
    for ports, pid in pids:
        if ports in found:
            raise RuntimeError("other sessions had the same ports: measure again, on a quiet machine")
        if ports in ends:
            found[ports] = pid
    return found


@contextmanager
def watching(name: str, *command: str | Path) -> Iterator[Path]:
    """A tool that is armed, and the file where its rows are when it has ended."""
    out, log = BUILD / f"rows-{name}", BUILD / f"log-{name}"
    with open(out, "wb") as stdout, open(log, "wb") as stderr:
        process = subprocess.Popen(command, stdout=stdout, stderr=stderr)

    def is_ready() -> bool:
        if process.poll() is not None:
            raise RuntimeError(f"{name} did not start: {log.read_text().strip()}")
        infos = fd_infos(process.pid)
        return all(any(key in info for info in infos) for key in ("link_type", "tfd"))

    try:
        wait_until(is_ready, f"{name} to start")
        yield out
        time.sleep(0.5)  # tcplife shows not before its end that it has read all
        finish(process, name, log)
    finally:
        if process.returncode is None:
            process.kill()
            process.wait()


def measure(sessions: int) -> dict[str, tuple[Score, Score]]:
    """How well each did, tcpobs and tcplife, by the workloads' titles. Raises RuntimeError."""
    tcplife = shutil.which("tcplife", path="/usr/sbin:/usr/bin")
    if not tcplife:
        raise RuntimeError("tcplife is not installed (packaging/debian-test.txt has libbpf-tools)")
    truths: list[tuple[str, Truth]] = []
    with watching("tcplife", tcplife) as their_rows, watching("tcpobs", TCPOBS, "life", "--json") as our_rows:
        for workload in WORKLOADS:
            for family in (AF_INET, AF_INET6):
                assert workload.__doc__
                progress(f"owners: {workload.__doc__}")
                truths.append((workload.__doc__, run(workload, family, sessions)))
    progress("")
    of_all = [truth for _, truth in truths]
    us = of_workloads(ours(our_rows.read_text()), of_all)
    them = of_workloads(theirs(their_rows.read_text()), of_all)
    found: dict[str, tuple[Score, Score]] = {}
    for title, truth in truths:
        before = found.get(title, (Score(), Score()))
        found[title] = before[0] + score(truth, us), before[1] + score(truth, them)
    return found


# ---- the report


def line(title: str, us: Score, them: Score) -> list[str]:
    """A line of the table. What is nobody's is right when nobody is named; tcplife's 0 is a swapper."""
    figures = (
        sum(us),
        *(us.right + us.nobody, us.unknown, us.wrong, us.lost),
        *(them.right + them.nobody, them.wrong + them.unknown, them.lost),
    )
    return [title, *(f"{figure:,}" for figure in figures)]


def section(sessions: int = SESSIONS) -> str:
    """Measures everything; the section of the report. tracefs must be there."""
    found = measure(sessions)
    rows = [["workload", "ends", "right", "unknown", "wrong", "lost", "tcplife: right", "wrong", "lost"]]
    rows += [["---", *["---:"] * 8]]
    rows += [line(title, us, them) for title, (us, them) in found.items()]
    us, them = (Score(*map(sum, zip(*scores))) for scores in zip(*found.values()))
    rows.append(line("**sum**", us, them))
    table = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    reached = said(us.right + us.nobody == sum(us))
    return f"""
## Owners: tcpobs life beside tcplife

Processes that write down whose each end is made {sessions} sessions of each kind with IPv4, and as many with
IPv6 (tests/live/workloads.py), while both tools watched. An end is *right* with its owner's PID, or with 0
where no process acted on it; *unknown* with 0 though it has an owner; *wrong* with another PID; *lost*
without a row. tcplife has no unknown: its 0 is the idle task, which it found on the CPU.

{table}
Every end right: {reached}.
"""


def refreshed(readme: str, section: str) -> str:
    """The README, whose table has some of the section's rows, with their figures of now."""
    measured = {row.split(" | ")[0]: row for row in section.splitlines() if _is_row(row)}
    return "".join(
        f"{measured.get(row.split(' | ')[0], row) if _is_row(row) else row}\n" for row in readme.splitlines()
    )


def _is_row(line: str) -> bool:
    return line.startswith("| ") and line.count(" | ") == 8


if __name__ == "__main__":
    # A try: few sessions, and nothing written.
    BUILD.mkdir(parents=True, exist_ok=True)
    with tracefs():
        print(section(int(sys.argv[1]) if sys.argv[1:] else 20))
