"""Measures tcpobs argdist beside Debian's bpftrace, natively: a section of bench/results.md.

Kernel functions cannot be probed on the build machine: uprobes and tracepoints stand for all. Both tools are
armed when the kernel has run their program for the first time: a process calls the function and makes the
system call every 100 µs, run statistics are on, and every ms the counters of the tool's programs are read
from /proc/PID/fdinfo. That is the same for both, whatever they open, print or attach before, in any order.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from measuring import BUILD, HERE, TCPOBS, finish, progress, said, spread
from tcpobs import compiler
from tcpobs.libbpf import RunStatistics

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

STARTS = 20
RUNS = 5
HITS = 200_000
MANY, THREADS = 5_000_000, 2
PROGRAM = BUILD / "calls"


@dataclass
class Question:
    """One question, as each tool is asked it: ms from the fork to armed, ns for each run in the kernel."""

    name: str
    ours: tuple[str, str]
    theirs: str
    cold: list[float] = field(default_factory=list)
    cached: list[float] = field(default_factory=list)
    peer: list[float] = field(default_factory=list)
    kernel: list[float] = field(default_factory=list)
    peer_kernel: list[float] = field(default_factory=list)

    @property
    def command(self) -> list[str]:
        """Ours."""
        return [str(TCPOBS), "argdist", "-i", "600", *self.ours]


def questions() -> list[Question]:
    """A count and a histogram of an int, of a function and of a tracepoint."""
    function, event = f"p:{PROGRAM}:called(int value):int:value", "t:syscalls:sys_enter_close():int:args->fd"
    uprobe, tracepoint = f"uprobe:{PROGRAM}:called", "tracepoint:syscalls:sys_enter_close"
    return [
        Question("uprobe, -C", ("-C", function), f"{uprobe} {{ @[arg0] = count(); }}"),
        Question("uprobe, -H", ("-H", function), f"{uprobe} {{ @ = hist(arg0); }}"),
        Question("tracepoint, -C", ("-C", event), f"{tracepoint} {{ @[args->fd] = count(); }}"),
        Question("tracepoint, -H", ("-H", event), f"{tracepoint} {{ @ = hist(args->fd); }}"),
    ]


def bpftrace() -> list[str]:
    """The peer's command. Raises RuntimeError if it is not installed."""
    found = shutil.which("bpftrace")
    if not found:
        raise RuntimeError("bpftrace is not installed (packaging/debian-test.txt has it)")
    return [found, "-e"]


# ---- running


def prepare() -> dict[str, str]:
    """Compiles the program; the environment for ours, with the compiler of tcpobs[compiler]."""
    command = ["gcc", "-O2", "-Wall", "-Wextra", "-pthread", "-o", str(PROGRAM), str(HERE / "calls.c")]
    subprocess.run(command, check=True)
    # It is in the environment that this runs in, not in that of the wheel.
    clang = compiler.find()
    if not clang:
        raise RuntimeError("there is no compiler")
    shim = BUILD / "clang"
    shim.write_text(f'#!/bin/sh\nexec {" ".join(clang)} "$@"\n')
    shim.chmod(0o755)
    return {**os.environ, "TCPOBS_CLANG": str(shim)}


def counters(pid: int) -> Iterator[tuple[int, int]]:
    """How often each of its BPF programs has run, and for how many ns."""
    seen = set()
    try:
        for fd in os.listdir(f"/proc/{pid}/fd"):
            if os.readlink(f"/proc/{pid}/fd/{fd}") == "anon_inode:bpf-prog":
                lines = Path(f"/proc/{pid}/fdinfo/{fd}").read_text().splitlines()
                info = dict(line.split(":", 1) for line in lines)
                if info.get("run_cnt") and info["prog_id"] not in seen:  # none: it was closed between
                    seen.add(info["prog_id"])
                    yield int(info["run_cnt"]), int(info["run_time_ns"])
    except FileNotFoundError:  # closed meanwhile
        return


class Run:
    """A tool that runs, armed."""

    def __init__(self, command: Sequence[str], environment: dict[str, str] | None = None) -> None:
        self._out, self._log = BUILD / "rows", BUILD / "log"
        start = time.perf_counter()
        with open(self._out, "wb") as stdout, open(self._log, "wb") as stderr:
            self.process = subprocess.Popen(command, stdout=stdout, stderr=stderr, env=environment)
        try:
            while not any(runs for runs, _ in counters(self.process.pid)):
                if self.process.poll() is not None or time.perf_counter() - start > 20:
                    log = self._log.read_text().strip()
                    raise RuntimeError(f"{command[0]} did not start: {log}")
                time.sleep(0.001)
        except BaseException:
            self.kill()
            raise
        self.ms = (time.perf_counter() - start) * 1e3

    def kernel_ns(self) -> float:
        """The time of each run of its programs until now."""
        found = list(counters(self.process.pid))
        return sum(ns for _, ns in found) / max(runs for runs, _ in found)

    def finish(self) -> str:
        """Ends it as a user does; its output."""
        finish(self.process, "tcpobs argdist", self._log)
        return self._out.read_text()

    def kill(self) -> None:
        """Ends it at once: bpftrace does not always end at Ctrl-C."""
        self.process.kill()
        self.process.wait()


def starts(asked: Sequence[Question], environment: dict[str, str], number: int = STARTS) -> None:
    """Measures from start to armed, in turns."""
    peer = bpftrace()
    for turn in range(number):
        for question in asked:
            progress(f"argdist, start {turn + 1} of {number}: {question.name}")
            with tempfile.TemporaryDirectory(dir=BUILD) as cache:
                ours = {**environment, "XDG_CACHE_HOME": cache}
                for command, into, in_environment in (
                    (question.command, question.cold, ours),
                    (question.command, question.cached, ours),
                    ([*peer, question.theirs], question.peer, None),
                ):
                    run = Run(command, in_environment)
                    run.kill()
                    into.append(run.ms)


def under_load(asked: Sequence[Question], environment: dict[str, str], number: int = RUNS) -> None:
    """Measures the kernel's time for each hit, in turns."""
    peer = bpftrace()
    for turn in range(number):
        for question in asked:
            progress(f"argdist, run {turn + 1} of {number}: {question.name}")
            for command, into in (
                (question.command, question.kernel),
                ([*peer, question.theirs], question.peer_kernel),
            ):
                run = Run(command, environment)
                subprocess.run([PROGRAM, str(HITS), "1"], check=True)
                into.append(run.kernel_ns())
                run.kill()


def many_hits(question: Question, environment: dict[str, str], hits: int = MANY) -> Counter[int]:
    """How often each value was counted, of so many hits."""
    progress(f"argdist: {hits:,} hits")
    run = Run([*question.command, "--json"], environment)
    subprocess.run([PROGRAM, str(hits // THREADS), str(THREADS), "function"], check=True)
    found: Counter[int] = Counter()
    for line in run.finish().splitlines():
        for row in json.loads(line)["counts"]:
            found[row["values"]["value"]] += row["count"]
    del found[-1]  # those that showed that it was armed
    return found


# ---- the report


def line(
    name: str, ours: list[float], theirs: list[float], times: float, unit: str, most: float = inf
) -> list[str]:
    """A line of the table, on a figure that may be so many times bpftrace's."""
    ratio = median(ours) / median(theirs)
    return [
        name,
        f"{spread(ours)} {unit}, {ratio:.2f} times",
        f"{spread(theirs)} {unit}",
        f"at most {times} times" + (f", under {most:.0f} {unit}" if most < inf else ""),
        said(ratio <= times and median(ours) < most),
    ]


def section(number: int = STARTS, runs: int = RUNS, hits: int = MANY) -> str:
    """Measures everything; the section of the report. tracefs must be there."""
    environment = prepare()
    asked = questions()
    with subprocess.Popen([PROGRAM]) as pace:
        try:
            with RunStatistics(), tempfile.TemporaryDirectory(dir=BUILD) as cache:
                starts(asked, environment, number)
                environment["XDG_CACHE_HOME"] = cache
                under_load(asked, environment, runs)
                counted = many_hits(asked[0], environment, hits)
        finally:
            pace.kill()
    progress("")
    rows = [["what", "tcpobs argdist", "bpftrace", "reach", "reached"], ["---"] * 5]
    for q in asked:
        rows.append(line(f"{q.name}: start to armed, cold", q.cold, q.peer, 1.0, "ms", 400))
        rows.append(line(f"{q.name}: start to armed, from the cache", q.cached, q.peer, 0.5, "ms", 200))
    for q in asked:
        rows.append(line(f"{q.name}: kernel time a hit", q.kernel, q.peer_kernel, 1.0, "ns"))
    exact = counted == dict.fromkeys(range(8), hits // 8)
    what = f"uprobe, -C: {hits:,} hits from {THREADS} threads"
    rows.append([what, f"{counted.total():,} counted", "", "every one counted", said(exact)])
    table = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    version = subprocess.run([*bpftrace()[:1], "--version"], capture_output=True, text=True).stdout.strip()
    return f"""
## tcpobs argdist beside bpftrace

{version}. Each started {number} times with each question, in turns, ours with an empty cache and then from
it; *armed* is when the kernel runs its program for the first time, under calls that come every 100 µs.
Cold, ours compiles with ziglang's clang. Then {runs} runs each under {HITS:,} hits from one thread; kernel
time is the program's own, `run_time_ns` over `run_cnt`.

{table}"""


if __name__ == "__main__":
    # A try: few repetitions, and nothing written.
    few = int(sys.argv[1]) if sys.argv[1:] else 3
    BUILD.mkdir(parents=True, exist_ok=True)
    print(section(few, max(few // 2, 1), 400_000))
