"""The wheel on Debian 11: Python 3.9 and nothing to build with; the kernel is this host's."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from wheel.conftest import Wheel

pytestmark = pytest.mark.release

MACHINE = os.uname().machine
SECONDS = 30.0
"""The longest wait for anything."""

ENTER = """
set -e
root=$1 folder=$2
shift 2
mount --rbind /dev "$root/dev"
mount --rbind /sys "$root/sys"
mount -t proc proc "$root/proc"
mount --bind "$folder" "$root/mnt"
exec chroot "$root" "$@"
"""

HEADER = "PID,COMM,IP,LADDR,LPORT,RADDR,RPORT,TX_KB,RX_KB,MS"
SENT = 300 * 1024 + 512
ANSWERED = 40 * 1024 + 512

CLIENT = """
import socket, sys
address, port, to_send, to_receive = sys.argv[1], *map(int, sys.argv[2:])
with socket.create_connection((address, port), 30) as connection:
    connection.sendall(bytes(to_send))
    while to_receive:
        to_receive -= len(connection.recv(to_receive))
"""


class Root(NamedTuple):
    """A root with tcpobs installed in /mnt/venv, which is `folder` outside."""

    path: Path
    folder: Path

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        """Starts a command in the root. Its mounts are its own, and go with it."""
        unshare = ["unshare", "--mount", "--propagation", "private", "sh", "-c", ENTER, "sh"]
        return subprocess.Popen(
            [*unshare, self.path, self.folder, *command],
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def run(self, *command: str) -> str:
        """Runs a command in the root to its good end; returns what it printed."""
        process = self.start(*command)
        try:
            out, err = process.communicate(timeout=SECONDS * 4)
        finally:
            process.kill()
        assert process.returncode == 0, (command, out, err)
        assert err == b"", command
        return out.decode()

    @contextmanager
    def tcpobs(self, *arguments: str) -> Iterator[Lines]:
        """Runs tcpobs; yields its output, and asks it to end at the end."""
        process = self.start("/mnt/venv/bin/tcpobs", *arguments)
        try:
            yield Lines(process)
            process.send_signal(signal.SIGTERM)
            _, err = process.communicate(timeout=SECONDS)
            assert process.returncode == 0, err
        finally:
            process.kill()
            process.wait()


class Lines:
    """The lines a process prints, each waited for."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout
        self._process = process
        self._fd = process.stdout.fileno()
        self._read = b""

    def next(self, seconds: float = SECONDS) -> str | None:
        """The next line, or None when none comes in that time."""
        end = time.monotonic() + seconds
        while b"\n" not in self._read:
            if not select.select([self._fd], [], [], max(0, end - time.monotonic()))[0]:
                return None
            data = os.read(self._fd, 1 << 16)
            assert data, ("it ended", self._process.communicate(timeout=SECONDS))
            self._read += data
        line, _, self._read = self._read.partition(b"\n")
        return line.decode()


class Ends(NamedTuple):
    """A session that was: both ends' PID, name and port."""

    client: tuple[int, str, int]
    server: tuple[int, str, int]


def _comm(pid: int) -> str:
    with open(f"/proc/{pid}/comm") as file:
        return file.read().strip()


def _converse(family: socket.AddressFamily, address: str) -> Ends:
    """A session from another process to this one; the client closes it first."""
    with socket.socket(family) as listener:
        listener.settimeout(SECONDS)
        listener.bind((address, 0))
        listener.listen()
        port = listener.getsockname()[1]
        command = [sys.executable, "-c", CLIENT, address, str(port), str(SENT), str(ANSWERED)]
        with subprocess.Popen(command) as client:
            connection, peer = listener.accept()
            with connection:
                connection.settimeout(SECONDS)
                left = SENT
                while left:
                    left -= len(connection.recv(left))
                name = _comm(client.pid)
                connection.sendall(bytes(ANSWERED))
                assert connection.recv(1) == b""
        assert client.returncode == 0
    return Ends((client.pid, name, peer[1]), (os.getpid(), _comm(os.getpid()), port))


@pytest.fixture(scope="module")
def root(
    bullseye_root: Path,
    checkout: Path,
    wheels: Mapping[tuple[str, str], Wheel],
    tmp_path_factory: pytest.TempPathFactory,
) -> Root:
    """The root, with the wheel and what it depends on installed by its own pip and no index."""
    root = Root(bullseye_root, tmp_path_factory.mktemp("bullseye"))
    wheel = wheels["manylinux", MACHINE].path
    for path in (wheel, *(checkout / "build/dependencies").glob("*.whl")):
        (root.folder / path.name).write_bytes(path.read_bytes())
    root.run("python3", "-m", "venv", "/mnt/venv")
    root.run(
        "/mnt/venv/bin/pip", "--quiet", "install", "--no-index", "--find-links=/mnt", f"/mnt/{wheel.name}"
    )
    return root


def test_nothing_to_build_with(root: Root) -> None:
    """Neither compiler nor headers nor libbpf are there but for the wheel's."""
    assert root.run("python3", "-c", "import sys; print(*sys.version_info[:2])") == "3 9\n"
    found = [
        os.path.join(folder, name)
        for top in ("usr", "opt", "var/lib/dpkg/info")
        for folder, folders, files in os.walk(root.path / top)
        for name in folders + files
        if name.startswith(
            ("clang", "llvm", "bpftool", "libbpf", "libelf", "linux-headers", "linux-libc-dev")
        )
        or name in ("gcc.list", "vmlinux.h")
        or (folder.endswith("bin") and name in ("gcc", "cc", "tcc"))
    ]
    assert found == []
    assert not (root.path / "usr/include/linux").exists()
    assert not (root.path / "lib/modules").exists()
    assert list((root.path / "usr/src").iterdir()) == []


def test_nothing_stays_mounted(root: Root) -> None:
    root.run("true")
    with open("/proc/self/mounts") as mounts:
        assert [line for line in mounts if str(root.path) in line] == []
    assert list((root.path / "mnt").iterdir()) == []
    assert list((root.path / "proc").iterdir()) == []


def test_version(root: Root) -> None:
    kernel = os.uname()
    version = root.run("/mnt/venv/bin/python", "-c", "import tcpobs; print(tcpobs.__version__)").strip()
    said = f"tcpobs {version}, libbpf 1.5, {kernel.sysname} {kernel.release} {kernel.machine}\n"
    assert root.run("/mnt/venv/bin/tcpobs", "--version") == said


@pytest.mark.parametrize(
    ("family", "address", "ip"),
    [(socket.AF_INET, "127.0.0.1", "4"), (socket.AF_INET6, "::1", "6")],
    ids=["IPv4", "IPv6"],
)
def test_life(root: Root, family: socket.AddressFamily, address: str, ip: str) -> None:
    """Both ends of a session on the host: owners, ports and bytes."""
    with root.tcpobs("life", "--csv") as lines:
        assert lines.next() == HEADER
        began = time.monotonic()
        ends = _converse(family, address)
        rows: dict[str, list[str]] = {}
        ports = {str(ends.client[2]), str(ends.server[2])}
        while len(rows) < 2:
            line = lines.next()
            assert line, f"the rows of {ends} are missing: {rows}"
            row = line.split(",")
            if {row[4], row[6]} == ports:
                assert row[4] not in rows, (rows, row)
                rows[row[4]] = row
        most_ms = (time.monotonic() - began) * 1000

    for (pid, name, port), (_, _, peer), sent, received in (
        (ends.client, ends.server, SENT, ANSWERED),
        (ends.server, ends.client, ANSWERED, SENT),
    ):
        *fields, ms = rows[str(port)]
        kilobytes = [str(sent // 1024), str(received // 1024)]
        assert fields == [str(pid), name, ip, address, str(port), address, str(peer), *kilobytes]
        assert 0 < float(ms) < most_ms


def test_states_json(root: Root) -> None:
    """The client's way through the states; sessions are made until it is seen to run."""
    with root.tcpobs("states", "--json") as lines:
        end = time.monotonic() + SECONDS
        while (line := lines.next(0.2)) is None:
            assert time.monotonic() < end, "it prints nothing"
            _converse(socket.AF_INET, "127.0.0.1")
        ends = _converse(socket.AF_INET, "127.0.0.1")
        pid, name, port = ends.client
        seen: list[dict[str, Any]] = []
        while not seen or seen[-1]["newstate"] != "CLOSE":
            change = json.loads(line)
            if change["lport"] == port and change["rport"] == ends.server[2]:
                seen.append(change)
            following = lines.next()
            assert following, seen
            line = following

    assert [(change["oldstate"], change["newstate"]) for change in seen[:2]] == [
        ("SYN_SENT", "ESTABLISHED"),
        ("ESTABLISHED", "FIN_WAIT1"),
    ]
    assert {(change["ip"], change["laddr"], change["raddr"]) for change in seen} == {
        (4, "127.0.0.1", "127.0.0.1")
    }
    assert len({change["skaddr"] for change in seen}) == 1
    # The process closes the socket itself, so it is on the CPU then.
    assert (seen[1]["c_pid"], seen[1]["c_comm"]) == (pid, name)
