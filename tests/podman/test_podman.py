"""A real container, podman's, and what its cgroup tells of it.

podman takes a directory for a container's root, so there is no image, and nothing to fetch: the directory
has one static program, a TCP server.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import pytest

import tcpobs
from live.tcp import DEADLINE, gather, wait
from tcpobs.cgroups import Cgroup, Cgroups, Container, container

POD = "0b8c6a54-2f5d-4f0e-9a37-6d1c5c1be1a9"
PARENTS = {"/libpod_parent": None, f"/kubepods/burstable/pod{POD}": POD}
"""--cgroup-parent, first podman's own for this driver; the pod that it is."""

# runc and podman want cgroup2 at /sys/fs/cgroup: there it is mounted for them alone.
UNSHARED = ["unshare", "--mount", "sh", "-c", 'mount -t cgroup2 none /sys/fs/cgroup && exec "$@"', "sh"]


class Server(NamedTuple):
    """The container's id, its process on the host, and the port that this listens on, at 127.0.0.1."""

    id: str
    pid: int
    port: int


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A container's root."""
    root = tmp_path_factory.mktemp("root")
    source = Path(__file__).with_name("server.c")
    subprocess.run(["gcc", "-O2", "-static", "-o", root / "server", source], check=True)
    return root


@pytest.fixture
def folder() -> Iterator[Path]:
    """What podman keeps. Its --runroot may have 50 characters: pytest's tmp_path is longer."""
    with TemporaryDirectory(prefix="podman-") as folder:
        yield Path(folder)


@contextmanager
def running(root: Path, folder: Path, parent: str) -> Iterator[Server]:
    """Runs the server in a container, which is removed when it ends."""
    command = ["podman", f"--root={folder}/storage", f"--runroot={folder}/run", f"--tmpdir={folder}/tmp"]
    # no systemd, no journal, no overlay
    command += ["--cgroup-manager=cgroupfs", "--events-backend=none", "--storage-driver=vfs"]
    command += ["--runtime=runc", "run", "--rm", "--interactive", "--network=host"]
    command += [f"--cgroup-parent={parent}", f"--cidfile={folder}/id", f"--pidfile={folder}/pid"]
    # to limit takes a controller, and to raise a limit takes CAP_SYS_RESOURCE
    command += ["--pids-limit=-1", "--ulimit=nofile=1024:1024", "--ulimit=nproc=1024:1024"]
    command += ["--rootfs", str(root), "/server"]
    pipe = subprocess.PIPE
    with subprocess.Popen([*UNSHARED, *command], stdin=pipe, stdout=pipe, stderr=pipe, text=True) as podman:
        assert podman.stdin
        assert podman.stdout
        assert podman.stderr
        port = podman.stdout.readline()
        if not port:
            pytest.fail(f"podman: {podman.stderr.read()}")
        pid = int((folder / "pid").read_text())
        try:
            yield Server((folder / "id").read_text(), pid, int(port))
            podman.stdin.close()
            assert podman.wait(DEADLINE) == 0, podman.stderr.read()
        finally:
            if podman.poll() is None:
                os.kill(pid, signal.SIGKILL)


@contextmanager
def removed(mount: str, parent: str) -> Iterator[None]:
    """Removes the cgroups that podman leaves: the parents that were not there, and conmon's."""
    *parents, last = [mount + parent[:end] for end, c in enumerate(f"{parent}/") if c == "/" and end]
    missing = [path for path in (*parents, last, f"{last}/conmon") if not os.path.exists(path)]
    try:
        yield
    finally:
        for path in reversed(missing):
            wait(partial(_remove, path))


def _remove(path: str) -> bool:
    """Removes a cgroup, if there is one; False while conmon is still in it."""
    with suppress(FileNotFoundError):
        try:
            os.rmdir(path)
        except OSError as error:
            if error.errno == errno.EBUSY:
                return False
            raise
    return True


def cgroup_of(pid: int) -> str:
    """A process's cgroup (cgroups(7))."""
    lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    return next(line[len("0::") :] for line in lines if line.startswith("0::"))


def talk(port: int) -> int:
    """A session with the server; the client's port."""
    with socket.create_connection(("127.0.0.1", port), DEADLINE) as client:
        client.sendall(b"hello")
        assert client.recv(5) == b"hello"
        own_port: int = client.getsockname()[1]
        return own_port


@pytest.mark.parametrize("parent", PARENTS)
def test_podman(parent: str, root: Path, folder: Path) -> None:
    known = Cgroups()
    assert known.mount, "cgroup2 is not mounted"
    with removed(known.mount, parent):
        with running(root, folder, parent) as server:
            path = cgroup_of(server.pid)
            id = os.stat(known.mount + path).st_ino
            wait(lambda: known.path(id) == path)  # it was made after the start
            assert container(path) == Container("podman", server.id, PARENTS[parent])
            for prefix in (server.id, server.id[:12]):
                assert known.find_container(prefix) == Cgroup(path, id, path.count("/"))
            assert known.find(path).id == id

            with tcpobs.sessions(local_ports=[server.port]) as events:
                rport = talk(server.port)
                seen = gather(events, lambda seen: any(session.rport == rport for session in seen))
            (session,) = (session for session in seen if session.rport == rport)
            assert (session.owner.pid, session.cgroup) == (server.pid, id)
        assert known.path(id) == path
        assert not os.path.exists(known.mount + path)
