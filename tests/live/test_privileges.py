"""What privileges the tools need, and that they give them up."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

import tcpobs
from live.tcp import (
    DEADLINE,
    WALK_LIMIT,
    WAYS,
    connect,
    is_loaded,
    is_tracing,
    programs_of,
    server_first,
    wait,
    wait_over,
)
from tcpobs.host import Way

pytestmark = [pytest.mark.essential, pytest.mark.subject("least privilege, and giving it up")]

NOBODY = 65534
PYTHON = "/usr/bin/python3"
"""One that every user can run: the tests' own may be closed to others."""

RELEASE = tuple(map(int, os.uname().release.split("-")[0].split("+")[0].split(".")[:2]))


def needed(way: Way) -> set[str]:
    """The capabilities that a way takes, of setpriv(1)'s names."""
    capabilities = {"bpf", "perfmon"}
    if way.hook == "tracepoint":
        capabilities.add("dac_read_search")  # tracefs, which only root may look into
    if RELEASE < (5, 11):
        capabilities.add("sys_resource")  # maps are charged to RLIMIT_MEMLOCK, which has to be raised
    elif way.transport == "perfbuf":
        capabilities.add("ipc_lock")  # buffers larger than RLIMIT_MEMLOCK and kernel.perf_event_mlock_kb
    return capabilities


REFUSALS = {
    "bpf": "CAP_BPF and CAP_PERFMON",
    "perfmon": "CAP_BPF and CAP_PERFMON",
    "dac_read_search": "CAP_DAC_READ_SEARCH",
    "ipc_lock": "CAP_IPC_LOCK",
    "sys_resource": "CAP_SYS_RESOURCE",
}
"""What a refusal names when a capability is missing."""


@pytest.fixture(scope="module")
def package() -> Iterator[str]:
    """A folder with tcpobs that everybody may read."""
    with TemporaryDirectory(dir="/tmp") as folder:
        os.chmod(folder, 0o755)
        shutil.copytree(Path(tcpobs.__file__).parent, Path(folder) / "tcpobs")
        yield folder


def as_nobody(package: str, capabilities: set[str], *arguments: str) -> list[str]:
    """The command of a user that has these capabilities and nothing else, nor a large RLIMIT_MEMLOCK."""
    given = ",".join(["-all", *(f"+{name}" for name in sorted(capabilities))])
    return [
        *("prlimit", "--memlock=65536:65536", "setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}"),
        *("--clear-groups", f"--inh-caps={given}", f"--ambient-caps={given}", f"--bounding-set={given}"),
        *("env", f"PYTHONPATH={package}", PYTHON, "-m", "tcpobs", *arguments),
    ]


@contextmanager
def running(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """The command, tracing, its header read and its privileges given up."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        if not process.stdout.readline():
            pytest.fail(process.communicate()[1])
        wait(lambda: is_tracing(process.pid))
        yield process
    finally:
        process.kill()
        process.communicate()


def status_of(pid: int) -> dict[str, str]:
    """/proc/PID/status."""
    with open(f"/proc/{pid}/status") as file:
        return {name: value.strip() for name, _, value in (line.partition(":") for line in file)}


def end_and_read(process: subprocess.Popen[str]) -> str:
    """Makes a session, ends the command cleanly; gives its rows with that session's server port."""
    pair = connect(socket.AF_INET6)
    port = pair.ports[1]
    server_first(pair)
    wait_over(port)
    programs = programs_of(process.pid)
    assert programs
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=DEADLINE)
    assert (process.returncode, err) == (0, "")
    wait(lambda: not any(map(is_loaded, programs)))
    return "".join(line for line in out.splitlines(keepends=True) if f",{port}," in line)


@pytest.fixture
def open_perf_events() -> Iterator[None]:
    """kernel.perf_event_paranoid as the kernel's own source has it: Debian sets 3, for CAP_SYS_ADMIN only."""
    path = Path("/proc/sys/kernel/perf_event_paranoid")
    before = path.read_text()
    if int(before) > 2:
        path.write_text("2")
    yield
    if int(before) > 2:
        path.write_text(before)


def test_closed_perf_events(package: str) -> None:
    """Where the sysctl closes them, the hooks that need them say so; tp_btf and the ring buffer need none."""
    if int(Path("/proc/sys/kernel/perf_event_paranoid").read_text()) <= 2:
        return
    for way in WAYS:
        if way.hook == "tp_btf" and way.transport == "ringbuf":
            continue
        refused = subprocess.run(
            as_nobody(package, needed(way), *arguments_of("life", way)),
            capture_output=True,
            text=True,
            timeout=DEADLINE,
        )
        assert (refused.returncode, refused.stdout) == (1, "")
        assert "sysctl kernel.perf_event_paranoid=2" in refused.stderr


def arguments_of(tool: str, way: Way) -> list[str]:
    """The arguments that force a way."""
    return [tool, "-s", *(part for name, choice in way._asdict().items() for part in (f"--{name}", choice))]


@pytest.mark.usefixtures("open_perf_events")
@pytest.mark.parametrize("way", WAYS, ids="-".join)
def test_least_privilege(way: Way, package: str) -> None:
    """A user with just these capabilities gets the rows; without any one of them, its name."""
    with running(as_nobody(package, needed(way), *arguments_of("life", way))) as process:
        assert status_of(process.pid)["Uid"].split() == [str(NOBODY)] * 4
        assert end_and_read(process).count("\n") == 2
    for missing in needed(way):
        refused = subprocess.run(
            as_nobody(package, needed(way) - {missing}, *arguments_of("life", way)),
            capture_output=True,
            text=True,
            timeout=DEADLINE,
        )
        assert (refused.returncode, refused.stdout) == (1, "")
        assert REFUSALS[missing] in refused.stderr


def test_least_privilege_of_states(package: str) -> None:
    """It takes no more than `life`."""
    way = WAYS[0]
    with running(as_nobody(package, needed(way), *arguments_of("states", way))) as process:
        assert end_and_read(process).count("\n") == 12


@pytest.mark.usefixtures("open_perf_events")
def test_least_privilege_of_open_sessions(package: str) -> None:
    """They take no more: CAP_BPF is kept for the walk."""
    way = next(way for way in WAYS if way.storage not in WALK_LIMIT)
    pair = connect(socket.AF_INET6)
    flags = ["--existing", "--open", "--duration", "0.1"]
    command = as_nobody(package, needed(way), *arguments_of("life", way), *flags)
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE)
    assert (done.returncode, done.stderr) == (0, "")
    assert [f",{port}," in done.stdout for port in pair.ports] == [True, True]
    server_first(pair)


@pytest.mark.parametrize("tool", ["states", "life"])
def test_every_capability_is_given_up(tool: str, package: str) -> None:
    """Even root's; and what comes later works where only a privileged user could open a file.

    The package belongs to somebody else and is closed to all others.
    """
    with TemporaryDirectory(dir="/tmp") as folder:
        shutil.copytree(package, folder, dirs_exist_ok=True)
        for path, _, names in os.walk(folder):
            for name in ("", *names):
                os.chown(os.path.join(path, name), NOBODY, NOBODY)
        os.chmod(folder, 0o700)
        command = ["env", f"PYTHONPATH={folder}", PYTHON, "-m", "tcpobs", tool, "-s", "-T"]
        with running(command) as process:
            status = status_of(process.pid)
            for name in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
                assert int(status[name], 16) == 0
            # For good: even what root executes gets none.
            assert status["NoNewPrivs"] == "1"
            assert "::1" in end_and_read(process)
