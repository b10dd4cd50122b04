"""Measures tcpobs beside Debian's libbpf-tools, under the same load, and BCC, into bench/results.md.

Five runs of each tool in turns, so that noise hits all alike. Missing a figure is a result, not an error;
a tool that fails is one.
"""

from __future__ import annotations

import csv
import datetime
import os
import platform
import pty
import re
import select
import shutil
import subprocess
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from holding import open_sockets

import argdist
import owners
import tcpobs
from measuring import (
    BUILD,
    CONNECTIONS,
    HERE,
    TCPOBS,
    compiled,
    fd_infos,
    finish,
    megabytes,
    program_name,
    progress,
    said,
    spread,
    tracefs,
    wait_until,
)
from tcpobs.libbpf import RunStatistics, library
from vm import kernels, matrix

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

RUNS = 5
STARTS = 20
SOCKETS = 100_000


@dataclass
class Run:
    """What one run of a tool under the load came to."""

    rows: int  # of the load's connections
    lost: int  # as the tool says
    missed: int  # recursion_misses
    kernel: float  # ns of all its programs for each change
    cpu: float  # µs of user and system time for each row, from start to end
    resident: float  # MB, at the end of the load
    peak: float  # MB


@dataclass
class Tool:
    """A tool, its runs, and its times (ms) from start to the header."""

    name: str
    command: Sequence[str]
    columns: tuple[int, int]  # of the two ports, counted from the row's end: names of commands have blanks
    runs: list[Run] = field(default_factory=list)
    starts: list[float] = field(default_factory=list)


@dataclass
class Pair:
    """A tool of ours, its peer if there is one, and how many rows the load makes."""

    ours: Tool
    peer: Tool | None
    expected: int
    unit: str


def pairs() -> list[Pair]:
    """What is compared."""
    states = Tool("tcpobs states", [str(TCPOBS), "states"], (-6, -4))
    life = Tool("tcpobs life", [str(TCPOBS), "life"], (-6, -4))
    return [
        Pair(states, peer("tcpstates", (-7, -5)), 10 * CONNECTIONS + 2, "event"),
        Pair(life, peer("tcplife", (-6, -4)), 2 * CONNECTIONS, "session"),
    ]


def peer(name: str, columns: tuple[int, int]) -> Tool | None:
    """The tool of libbpf-tools, if it is installed."""
    found = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")
    return Tool(name, [found], columns) if found else None


# ---- running


def is_ready(process: subprocess.Popen[bytes], name: str, log: Path) -> bool:
    """Whether its program is attached and it waits for the buffer. Raises RuntimeError if it has ended."""
    if process.poll() is not None:
        raise RuntimeError(f"{name} did not start: {log.read_text().strip()}")
    infos = fd_infos(process.pid)
    return all(any(key in info for info in infos) for key in ("link_type", "tfd"))


def under_load(tool: Tool, csv: bool) -> Run:
    """Runs the tool, with the load, writing to a file."""
    out, log = BUILD / "rows", BUILD / "log"
    command = [*tool.command, "-s"] if csv else tool.command
    with open(out, "wb") as stdout, open(log, "wb") as stderr:
        process = subprocess.Popen(command, stdout=stdout, stderr=stderr)
    try:
        wait_until(lambda: is_ready(process, tool.name, log), f"{tool.name} to start")
        subprocess.run([BUILD / "connections", str(CONNECTIONS)], check=True)
        settle(out)
        programs = {i["prog_id"]: i for i in fd_infos(process.pid) if "run_cnt" in i}.values()
        changes = changes_seen(programs)
        status = Path(f"/proc/{process.pid}/status").read_text()
        cpu = finish(process, tool.name, log)
    finally:
        if process.returncode is None:
            process.kill()
            process.wait()
    rows = count(out, tool.columns)
    said = log.read_text()
    if said and "lost" not in said:
        raise RuntimeError(f"{tool.name} said: {said.strip()}")
    # tcpobs tells all that was lost so far, by cause; its peers what was lost since the last time.
    _, _, so_far = said.rpartition("lost so far: ")
    told = re.findall(r"(\d+): ", so_far) if so_far != said else re.findall(r"lost (\d+)", said)
    total = Counter[str]()
    for program in programs:
        total.update({key: int(program[key]) for key in ("run_time_ns", "recursion_misses")})
    return Run(
        rows,
        sum(map(int, told)),
        total["recursion_misses"],
        total["run_time_ns"] / changes,
        cpu * 1e6 / rows,
        megabytes(status, "VmRSS"),
        megabytes(status, "VmHWM"),
    )


def changes_seen(programs: Collection[dict[str, str]]) -> int:
    """How many changes they saw: the runs of a tool's first program for them.

    Ours has another behind it, and one for accept, whose time counts too.
    """
    accepts = [p for p in programs if program_name(int(p["prog_id"])).startswith("accept_")]
    return max(int(program["run_cnt"]) for program in programs if program not in accepts)


def settle(path: Path) -> None:
    """Waits until the file has not grown for half a second, at most five."""
    size, since, end = -1, 0.0, time.monotonic() + 5
    while (now := time.monotonic()) < end and (size != path.stat().st_size or now - since < 0.5):
        if size != (size := path.stat().st_size):
            since = now
        time.sleep(0.02)


def count(path: Path, columns: tuple[int, int]) -> int:
    """The rows of the load's connections: those with the port that most rows have."""
    ports = Counter[str]()
    with open(path, errors="replace") as file:
        next(file)
        for line in file:
            row = line.replace(",", " ").split()
            ports.update({row[column] for column in columns})
    return ports.most_common(1)[0][1]


def start_up(tool: Tool) -> float:
    """Milliseconds from before the fork to the header, read from a terminal."""
    log = BUILD / "log"
    ours, theirs = pty.openpty()
    start = time.perf_counter()
    with open(log, "wb") as stderr:
        process = subprocess.Popen(tool.command, stdout=theirs, stderr=stderr)
    os.close(theirs)
    try:
        read = b""
        while b"\n" not in read:
            if not select.select([ours], [], [], 10.0)[0]:
                raise TimeoutError(f"no header from {tool.name} in 10 s")
            read += os.read(ours, 4096)
        passed = time.perf_counter() - start
        if b"LPORT" not in read:
            raise RuntimeError(f"no header from {tool.name}: {read!r}")
        finish(process, tool.name, log)
    finally:
        os.close(ours)
        if process.returncode is None:
            process.kill()
            process.wait()
    return passed * 1e3


# ---- life --summary


@dataclass
class Busy:
    """What one run of `life -s` or `life --summary -s` cost, with the load or, as long, without."""

    whole: float  # ms of CPU, start-up and all
    tracing: float  # ms of CPU since it traces, with its end
    sessions: int  # of the load's connections
    lost: bool


def busy(flags: Sequence[str], load: bool) -> Busy:
    """Runs `tcpobs life`, writing to a file."""
    out, log = BUILD / "rows", BUILD / "log"
    with open(out, "wb") as stdout, open(log, "wb") as stderr:
        process = subprocess.Popen([str(TCPOBS), "life", "-s", *flags], stdout=stdout, stderr=stderr)
    try:
        wait_until(lambda: is_ready(process, "tcpobs life", log), "tcpobs life to start")
        time.sleep(0.1)
        # Its CPU clock, as clock_getcpuclockid(3) makes it.
        traces = time.clock_gettime(~process.pid << 3 | 2)
        if load:
            subprocess.run([BUILD / "connections", str(CONNECTIONS)], check=True)
        else:
            time.sleep(1.0)
        settle(out)
        cpu = finish(process, "tcpobs life", log)
    finally:
        if process.returncode is None:
            process.kill()
            process.wait()
    with open(out, newline="") as file:
        rows = list(csv.DictReader(file))
    ports = Counter[str]()
    for row in rows:
        if "--summary" in flags:
            ports[row["PORT"]] += int(row["SESSIONS"])
        else:
            ports.update((row["LPORT"], row["RPORT"]))
    sessions = max(ports.values(), default=0)  # the load's port is the one that most have
    return Busy(cpu * 1e3, (cpu - traces) * 1e3, sessions, log.stat().st_size > 0)


def summary_lines() -> list[list[str]]:
    """The lines on `life --summary` beside the list of the same sessions."""
    kinds = [(flags, load) for load in (True, False) for flags in ((), ("--summary",))]
    runs: dict[tuple[tuple[str, ...], bool], list[Busy]] = {kind: [] for kind in kinds}
    for number in range(RUNS):
        for kind in kinds:
            progress(f"run {number + 1} of {RUNS}: tcpobs life {' '.join(kind[0])}")
            runs[kind].append(busy(*kind))
    listing, ours, idle_listing, idle = (runs[kind] for kind in kinds)
    whole = sum(run.sessions == 2 * CONNECTIONS and not run.lost for run in ours)

    def caused(loaded: Sequence[Busy], unloaded: Sequence[Busy]) -> list[float]:
        none = median(run.tracing for run in unloaded)
        return [run.tracing - none for run in loaded]

    by_load, by_listing = caused(ours, idle), caused(listing, idle_listing)
    ratio = median(by_load) / median(by_listing)
    ratio_whole = median(run.whole for run in ours) / median(run.whole for run in listing)
    return [
        [
            "tcpobs life --summary: sessions in groups",
            f"{spread([run.sessions for run in ours])}; all in {whole} of {RUNS} runs",
            f"listed: {spread([run.sessions for run in listing])}",
            f"{2 * CONNECTIONS:,}, nothing lost, {RUNS} of {RUNS}",
            said(whole == RUNS),
        ],
        [
            "tcpobs life --summary: CPU that the load causes (without what a run without load takes)",
            f"{spread(by_load, 1)} ms, {ratio:.2f} times",
            f"listed: {spread(by_listing, 1)} ms",
            "at most 0.1 times",
            said(ratio <= 0.1),
        ],
        [
            "tcpobs life --summary: CPU of the whole process, start-up included",
            f"{spread([run.whole for run in ours])} ms, {ratio_whole:.2f} times",
            f"listed: {spread([run.whole for run in listing])} ms",
            "",
            "",
        ],
    ]


# ---- the report


def compared(
    what: str, tool: Tool, other: Tool | None, figure: str, unit: str, times: float, digits: int = 0
) -> list[str]:
    """A line of the table on a figure of the runs that may be so many times the peer's."""
    ours = [getattr(run, figure) for run in tool.runs]
    theirs = [getattr(run, figure) for run in other.runs] if other else []
    ratio = median(ours) / median(theirs) if theirs else None
    return [
        what,
        f"{spread(ours, digits)} {unit}" + (f", {ratio:.2f} times" if ratio else ""),
        f"{spread(theirs, digits)} {unit}" if theirs else "not installed",
        f"at most {times} times",
        said(None if ratio is None else ratio <= times),
    ]


def seen(tool: Tool) -> str:
    """How much of the load it saw, and what it lost."""
    text = spread([run.rows for run in tool.runs])
    for figure, name in (("lost", "told as lost"), ("missed", "missed by the kernel")):
        values = [getattr(run, figure) for run in tool.runs]
        text += f", {name} {spread(values)}" if any(values) else ""
    return text


def lines_of(pair: Pair) -> list[list[str]]:
    """The lines of the table on one tool."""
    ours, other, unit = pair.ours, pair.peer, pair.unit
    whole = sum(run.rows == pair.expected and not run.lost and not run.missed for run in ours.runs)
    start, resident = median(ours.starts), [run.resident for run in ours.runs]
    peaks = [run.peak for run in ours.runs]
    times = start / median(other.starts) if other else None
    return [
        [
            f"{ours.name}: {unit}s seen",
            f"{seen(ours)}; all in {whole} of {RUNS} runs",
            seen(other) if other else "not installed",
            f"{pair.expected:,}, nothing lost, {RUNS} of {RUNS}",
            said(whole == RUNS),
        ],
        compared(f"{ours.name}: kernel time a change", ours, other, "kernel", "ns", 0.5),
        compared(f"{ours.name}: CPU, start to end, per {unit}", ours, other, "cpu", "µs", 1.0, 2),
        [
            f"{ours.name}: start to header",
            f"{spread(ours.starts)} ms" + (f", {times:.2f} times" if times else ""),
            f"{spread(other.starts)} ms" if other else "not installed",
            "at most 3 times, under 150 ms",
            said(start < 150 and (times is None or times <= 3)),
        ],
        [
            f"{ours.name}: resident at the load's end, peak",
            f"{spread(resident, 1)}, {spread(peaks, 1)} MB",
            ", ".join(spread([getattr(run, of) for run in other.runs], 1) for of in ("resident", "peak"))
            + " MB"
            if other
            else "not installed",
            "at most 32 MB",
            said(max(median(resident), median(peaks)) <= 32),
        ],
    ]


def snapshot_line() -> list[str]:
    """The line on the start with many sockets open, with and without a look at who holds them."""
    with open_sockets(SOCKETS):
        tools = [Tool("life", [str(TCPOBS), "life", *flags], (-6, -4)) for flags in ((), ("--existing",))]
        for _ in range(RUNS):
            for tool in tools:
                tool.starts.append(start_up(tool))
    plain, existing = (tool.starts for tool in tools)
    return [
        f"tcpobs life --existing: start to header with {SOCKETS:,} open sockets",
        f"{spread(existing)} ms, {spread(plain)} ms without --existing",
        "",
        "1,000 ms more at most",
        said(median(existing) - median(plain) <= 1000),
    ]


def system_call_ns(accept: str) -> float:
    """What a system call takes while `life` sees accepts this way."""
    log = BUILD / "log"
    with open(log, "wb") as stderr:
        process = subprocess.Popen(
            [TCPOBS, "life", "--accept", accept], stdout=subprocess.DEVNULL, stderr=stderr
        )
    try:
        wait_until(lambda: is_ready(process, "life", log), "life to start")
        calls = subprocess.run([BUILD / "syscalls", "2000000"], check=True, stdout=subprocess.PIPE)
        finish(process, "life", log)
    finally:
        if process.returncode is None:
            process.kill()
            process.wait()
    return float(calls.stdout)


def system_call_line() -> list[str]:
    """The line on what accept by system calls adds to each of them."""
    times: dict[str, list[float]] = {"syscall": [], "none": []}
    for _ in range(RUNS):
        for accept, measured in times.items():
            measured.append(system_call_ns(accept))
    text = f"{spread(times['syscall'])} ns, {spread(times['none'])} ns without"
    return ["life, accept by system calls: each of these takes", text, "", "", ""]


def wheel_line() -> list[str]:
    """The line on the wheel's size."""
    wheels = HERE.parent.glob(f"dist/tcpobs-{tcpobs.__version__}-*manylinux*_{platform.machine()}.whl")
    sizes = [wheel.stat().st_size / 1e3 for wheel in wheels]
    size = max(sizes, default=None)
    return [
        "wheel",
        f"{size:,.0f} KB" if size else "not built",
        "",
        "at most 500 KB",
        said(None if size is None else size <= 500),
    ]


def beside_bcc() -> str:
    """What BCC's tools and ours cost in the VM where their rows are compared, as a table."""
    [line] = [line for line in kernels.lines() if "bcc" in line.tests]
    outcome = matrix.beside_bcc(line)
    if not outcome.good:
        raise RuntimeError(f"tests/bcc failed on {line.name}: {outcome.error}")
    rows = [["what", "tcpobs", "BCC", "reach", "reached"], ["---"] * 5]
    header, resident = ("header_seconds", "start to header"), ("resident_mb", "resident then, peak")
    armed = "output_seconds", "start to armed"
    for tool, peer, figures in (
        ("states", "tcpstates", ((*header, "s", 20), (*resident, "MB", 5))),
        ("life", "tcplife", ((*header, "s", 20), (*resident, "MB", 5))),
        ("argdist_cold", "argdist", ((*armed, "s", 5), (*resident, "MB", 5))),
        ("argdist_cached", "argdist", ((*armed, "s", 5), (*resident, "MB", 5))),
    ):
        for figure, text, unit, times in figures:
            ours = float(outcome.properties[f"tcpobs_{tool}_{figure}"])
            theirs = float(outcome.properties[f"bcc_{peer}_{figure}"])
            rows.append(
                [
                    f"tcpobs {tool.replace('_', ', ')}: {text}",
                    f"{ours} {unit}, 1/{theirs / ours:.0f}",
                    f"{theirs} {unit}",
                    f"at most 1/{times}",
                    said(ours * times <= theirs),
                ]
            )
    table = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    return f"""
## Beside BCC

In the VM with Linux {outcome.release} and one emulated CPU where `tests/bcc` compares their rows. BCC's
tcpstates and tcplife start there once, together, and compile their programs; ours start one by one, three
times, after that. The argdists start with the same questions about a function of the kernel and one of libc,
ours with an empty cache and then from it; armed is a second, their interval, before their first output.

{table}"""


def intro(compared: Sequence[Pair], stolen: float) -> str:
    """When, where and with what it was measured."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    libbpf = ".".join(map(str, library().version))
    missing = [name for name, pair in zip(("tcpstates", "tcplife"), compared) if not pair.peer]
    command = ["dpkg-query", "-W", "-f", "${Version}", "libbpf-tools"]
    package = "not installed"
    if shutil.which("dpkg-query"):
        package = subprocess.run(command, capture_output=True, text=True).stdout or package
    return f"""\
# tcpobs beside libbpf-tools

Made by `make bench`, {datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d %H:%M} UTC.
Linux {platform.release()} on {os.cpu_count()} cores of {cpu[1] if cpu else platform.machine()};
Python {platform.python_version()}, tcpobs {tcpobs.__version__} with libbpf {libbpf};
libbpf-tools {package}{f", without {' and '.join(missing)}" if missing else ""}.

The load: {CONNECTIONS:,} connections over loopback as fast as one core makes them (bench/connections.c).
Each tool ran {RUNS} times, in turns, writing to a file, tcpobs with `-s`; and {STARTS} times up to its
header, on a terminal. Figures are medians, with the least and the most. CPU is user and system time of
the whole process, start-up included, over the rows it wrote. Meanwhile the machine's CPUs were {stolen:.0%}
of the time taken away by its hypervisor.

"""


def cpu_times() -> list[int]:
    """The machine's, by kind, as /proc/stat has them."""
    with open("/proc/stat") as file:
        return list(map(int, file.readline().split()[1:9]))


def main() -> None:
    """Measures everything and writes the report."""
    for name in ("connections", "syscalls"):
        compiled(name)
    before = cpu_times()
    all_pairs = pairs()
    tools = [tool for pair in all_pairs for tool in (pair.ours, pair.peer) if tool]
    with tracefs():
        beside_bpftrace = argdist.section()
        beside_tcplife = owners.section()
        for number in range(STARTS):
            for tool in tools:
                progress(f"start {number + 1} of {STARTS}: {tool.name}")
                tool.starts.append(start_up(tool))
        with RunStatistics():
            for number in range(RUNS):
                for tool in tools:
                    progress(f"run {number + 1} of {RUNS}: {tool.name}")
                    tool.runs.append(under_load(tool, csv=tool in [pair.ours for pair in all_pairs]))
    progress("")
    passed = [now - then for now, then in zip(cpu_times(), before)]
    lines = [["what", "tcpobs", "libbpf-tools", "reach", "reached"], ["---"] * 5]
    lines += [line for pair in all_pairs for line in lines_of(pair)]
    lines.append(snapshot_line())
    lines.append(system_call_line())
    lines += summary_lines()
    lines.append(wheel_line())
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    table += beside_tcplife + beside_bpftrace + beside_bcc()
    print(table, end="")
    (HERE / "results.md").write_text(intro(all_pairs, passed[7] / sum(passed)) + table)
    readme = HERE.parent / "README.md"
    readme.write_text(owners.refreshed(readme.read_text(), beside_tcplife))


if __name__ == "__main__":
    main()
