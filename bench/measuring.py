"""What all measurements need: running commands, looking into them, and writing figures."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from tcpobs.libbpf import library
from tcpobs.libbpf.program import ProgramInfo

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

HERE = Path(__file__).parent
BUILD = HERE.parent / "build" / "bench"
TCPOBS = Path("build/installed/bin/tcpobs").resolve()  # the wheel, as users have it

# ---- running


def wait_until(condition: Callable[[], object], what: str, seconds: float = 10.0) -> None:
    """Returns when `condition` holds. Raises TimeoutError."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {seconds:.0f} s for {what}")
        time.sleep(0.005)


def finish(process: subprocess.Popen[bytes], name: str, log: Path) -> float:
    """Stops the tool as Ctrl-C would; returns its CPU seconds. Raises RuntimeError if it failed."""
    process.send_signal(signal.SIGINT)
    ended: list[tuple[int, float]] = []

    def has_ended() -> bool:
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            ended.append((status, usage.ru_utime + usage.ru_stime))
        return bool(pid)

    wait_until(has_ended, f"{name} to end")
    [(status, cpu)] = ended
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{name} ended with {process.returncode}: {log.read_text().strip()}")
    return cpu


def fd_infos(pid: int) -> list[dict[str, str]]:
    """/proc/PID/fdinfo of all its file descriptors."""
    infos = []
    for path in Path(f"/proc/{pid}/fdinfo").iterdir():
        try:
            lines = path.read_text().splitlines()
        except FileNotFoundError:  # closed meanwhile
            continue
        infos.append({name: value.strip() for name, _, value in (line.partition(":") for line in lines)})
    return infos


def program_name(number: int) -> str:
    """The name of a BPF program, cut to 15 bytes, by its id."""
    fd = library().bpf_prog_get_fd_by_id(number)
    info = ProgramInfo()
    size = ctypes.c_uint32(ctypes.sizeof(info))
    try:
        library().bpf_obj_get_info_by_fd(fd, ctypes.byref(info), ctypes.byref(size))
    finally:
        os.close(fd)
    return bytes(info.name).decode()


@contextmanager
def tracefs() -> Iterator[None]:
    """The peers' tracepoints need it: mounted meanwhile, if nobody has."""
    place = "/sys/kernel/tracing"
    mounted = Path(place, "events").exists()
    if not mounted:
        subprocess.run(["mount", "-t", "tracefs", "tracefs", place], check=True)
    yield
    if not mounted:
        subprocess.run(["umount", place], check=True)


# ---- the load

CONNECTIONS, ROUNDS = 20_000, 6
"""Of one load; and how many loads, one after another, are a sustained one."""


def compiled(name: str) -> Path:
    """A program of this folder, compiled."""
    BUILD.mkdir(parents=True, exist_ok=True)
    program = BUILD / name
    subprocess.run(["gcc", "-O2", "-Wall", "-Wextra", "-o", program, HERE / f"{name}.c"], check=True)
    return program


def sustained_load() -> None:
    """Makes ROUNDS times CONNECTIONS connections, one after another. First have `connections` compiled."""
    for _ in range(ROUNDS):
        subprocess.run([BUILD / "connections", str(CONNECTIONS)], check=True)


# ---- figures


def megabytes(status: str, name: str) -> float:
    """A figure of /proc/PID/status."""
    found = re.search(rf"{name}:\s+(\d+) kB", status)
    assert found
    return int(found[1]) * 1024 / 1e6


def spread(values: Sequence[float], digits: int = 0) -> str:
    """The median, and from what to what."""
    middle, low, high = (f"{value:,.{digits}f}" for value in (median(values), min(values), max(values)))
    return middle if low == high else f"{middle} ({low}-{high})"


def said(reached: bool | None) -> str:
    """For the last column."""
    return "not measured" if reached is None else "yes" if reached else "**no**"


def progress(text: str) -> None:
    """Shows what is being done, on a terminal."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
