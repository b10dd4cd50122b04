"""Real cgroups, named as container runtimes name them, with a process in each."""

from __future__ import annotations

import errno
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory

import pytest

from live.tcp import wait
from tcpobs import cgroups
from tcpobs.cgroups import Cgroup, Cgroups, Container, container
from tcpobs.errors import HostError, TcpobsError, UsageError

pytestmark = pytest.mark.subject("cgroups and containers")

POD = "0b8c6a54-2f5d-4f0e-9a37-6d1c5c1be1a9"
SLICED = POD.replace("-", "_")
BURSTABLE = f"kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{SLICED}.slice"

LAYOUTS = {
    "docker/{id}": ("docker", None),
    "system.slice/docker-{id}.scope": ("docker", None),
    "default/{id}": (None, None),
    "system.slice/nerdctl-{id}.scope": ("containerd", None),
    "crio/crio-{id}": ("cri-o", None),
    "libpod_parent/libpod-{id}": ("podman", None),
    "machine.slice/libpod-{id}.scope": ("podman", None),
    "user.slice/user-1000.slice/user@1000.service/user.slice/libpod-{id}.scope": ("podman", None),
    "system.slice/web.service/libpod-payload-{id}": ("podman", None),
    f"kubepods/burstable/pod{POD}/{{id}}": (None, POD),
    f"kubepods/burstable/pod{POD}/crio-{{id}}": ("cri-o", POD),
    f"{BURSTABLE}/cri-containerd-{{id}}.scope": ("containerd", POD),
    f"{BURSTABLE}/docker-{{id}}.scope": ("docker", POD),
    f"{BURSTABLE}/crio-{{id}}.scope": ("cri-o", POD),
    f"system.slice/containerd.service/kubepods-pod{SLICED}.slice:cri-containerd:{{id}}": ("containerd", POD),
}
"""Where a container's cgroup is; its runtime and its pod."""


class Tree:
    """A cgroup of the test's own, and those below it; all are removed at the end."""

    def __init__(self, mount: str) -> None:
        self.mount = mount
        self.root = f"/tcpobs-test-{secrets.token_hex(4)}"
        self._made: list[str] = []
        self.make("")

    def make(self, *names: str) -> str:
        """Makes a cgroup, and gives its path from the mount."""
        path = "/".join((self.root, *names)).rstrip("/")
        missing = []
        while not os.path.exists(self.mount + path):
            missing.append(path)
            path = path.rpartition("/")[0]
        for path in reversed(missing):
            os.mkdir(self.mount + path)
            self._made.append(path)
        return path

    def id(self, path: str) -> int:
        """A cgroup's id."""
        return os.stat(self.mount + path).st_ino

    def remove(self, path: str) -> None:
        """Removes a cgroup, as soon as the last process is out of it."""
        wait(lambda: self._removed(path))
        self._made.remove(path)

    def _removed(self, path: str) -> bool:
        try:
            os.rmdir(self.mount + path)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            return False
        return True

    def close(self) -> None:
        """Removes what is left."""
        for path in reversed(self._made[:]):
            self.remove(path)

    @contextmanager
    def process(self, path: str) -> Iterator[int]:
        """Runs a process in a cgroup; gives its PID."""
        with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as cat:
            with open(f"{self.mount}{path}/cgroup.procs", "w") as procs:
                procs.write(str(cat.pid))
            yield cat.pid
            assert cat.stdin
            cat.stdin.close()


class Time:
    """The clock that the once-a-second limit goes by."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def mount() -> Iterator[str]:
    """Where cgroup2 is mounted: for the tests if nobody has."""
    found = Cgroups().mount
    if found:
        yield found
        return
    with TemporaryDirectory() as place:
        subprocess.run(["mount", "-t", "cgroup2", "none", place], check=True)
        yield place
        subprocess.run(["umount", place], check=True)


@pytest.fixture
def tree(mount: str) -> Iterator[Tree]:
    """A place for cgroups."""
    tree = Tree(mount)
    yield tree
    tree.close()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Time:
    """A clock that stands."""
    clock = Time()
    monkeypatch.setattr(cgroups, "time", clock)
    return clock


def new_id() -> str:
    """A container's id."""
    return secrets.token_hex(32)


def path_of(pid: int) -> str:
    """A process's cgroup, as the kernel says it (cgroups(7))."""
    with open(f"/proc/{pid}/cgroup") as file:
        return next(line.rstrip("\n")[len("0::") :] for line in file if line.startswith("0::"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_container(layout: str, tree: Tree) -> None:
    id = new_id()
    path = tree.make(layout.format(id=id))
    cgroup = Cgroup(path, tree.id(path), path.count("/"))
    known = Cgroups(tree.mount)
    with tree.process(path) as pid:
        assert known.path(cgroup.id) == path == path_of(pid)
    runtime, pod = LAYOUTS[layout]
    assert container(path) == Container(runtime, id, pod)
    for given in (path, path[1:], f"{path}/", tree.mount + path):
        assert known.find(given) == cgroup
    for prefix in (id, id[:12], id[:6]):
        assert known.find_container(prefix) == cgroup


def test_a_process_may_be_below(tree: Tree) -> None:
    id, other = new_id(), new_id()
    path = tree.make(f"machine.slice/libpod-{id}.scope")
    below = tree.make(f"machine.slice/libpod-{id}.scope/container")
    inside = tree.make(f"machine.slice/libpod-{id}.scope/container/system.slice/nginx.service")
    nested = tree.make(f"machine.slice/libpod-{id}.scope/container/docker/{other}")
    known = Cgroups(tree.mount)
    with tree.process(below) as pid:
        assert known.path(tree.id(below)) == below == path_of(pid)
    assert known.find_container(id).path == path
    assert known.find_container(other).path == nested
    assert container(inside) == Container("podman", id, None)
    with pytest.raises(TcpobsError, match=r"there is no container or unit nginx\.service"):
        known.find_container("nginx.service")


def test_units(tree: Tree) -> None:
    unit = f"web-{secrets.token_hex(4)}.service"
    path = tree.make("system.slice", unit)
    tree.make("system.slice", unit, "worker")
    known = Cgroups(tree.mount)
    assert known.find_container(unit) == known.find(path)
    for part in (unit[:12], unit.replace(".service", "")):
        with pytest.raises(TcpobsError, match=rf"no container or unit {part};"):
            known.find_container(part)
    again = tree.make("user.slice/user-1000.slice/user@1000.service/app.slice", unit)
    with pytest.raises(TcpobsError) as raised:
        known.find_container(unit)
    assert {path, again} == set(str(raised.value).split(": ")[1].split(", "))


def test_several_containers(tree: Tree) -> None:
    prefix = secrets.token_hex(4)
    ids = [f"{prefix}{secrets.token_hex(28)}" for _ in range(7)]
    for id in ids:
        tree.make("docker", id)
    known = Cgroups(tree.mount)
    with pytest.raises(TcpobsError, match=f"several containers' ids begin with {prefix}, ") as raised:
        known.find_container(prefix)
    *named, more = str(raised.value).split(": ")[1].split(", ")
    assert len(named) == cgroups.NAMED
    assert set(named) < set(ids)
    assert more == "…"
    for id in ids:
        assert known.find_container(id).path == f"{tree.root}/docker/{id}"


def test_no_container(tree: Tree) -> None:
    id, unit = new_id(), f"{secrets.token_hex(4)}.service"
    tree.make("docker", id)
    tree.make("system.slice", unit)
    known = Cgroups(tree.mount)
    nothing = "there is no container or unit "
    with pytest.raises(TcpobsError, match=rf"{nothing}none; these run here: [0-9a-f]{{12}}"):
        known.find_container("none")
    with pytest.raises(TcpobsError, match=rf"{nothing}none\.service; .*: [^ ]+\.(service|scope)"):
        known.find_container("none.service")
    for short in ("", id[:3]):
        with pytest.raises(UsageError, match="too short"):
            known.find_container(short)


def test_no_cgroup(tree: Tree) -> None:
    unit = f"nginx-{secrets.token_hex(4)}.service"
    path = tree.make("system.slice", unit)
    known = Cgroups(tree.mount)
    for given in (unit, f"/sytem.slice/{unit}", f"{path[:-1]}s"):
        with pytest.raises(TcpobsError, match="there is no cgroup /") as raised:
            known.find(given)
        assert path in str(raised.value).split("; nearest: ")[1].split(", ")
    for given in ("/\0", "/" + "?" * 300, f"{path}/cgroup.procs"):
        with pytest.raises(TcpobsError, match=r"^there is no cgroup .*see below /"):
            known.find(given)
    with pytest.raises(UsageError):
        known.find("")


def test_the_root(mount: str) -> None:
    known = Cgroups(mount)
    for given in ("/", mount, f"{mount}/", "/../.."):
        assert known.find(given) == Cgroup("/", os.stat(mount).st_ino, 0)
    assert known.path(os.stat(mount).st_ino) == "/"
    assert known.path(0) is None


def test_names_that_are_hard(tree: Tree) -> None:
    known = Cgroups(tree.mount)
    for name in ("two words", "\x1b[2J", "caf\udce9", "'\"\\", "x" * 255, ": ; nearest", "..."):
        path = tree.make(name)
        assert known.find(path) == Cgroup(path, tree.id(path), 2)
        assert Cgroups(tree.mount).path(tree.id(path)) == path


def test_made_after_the_start(tree: Tree, clock: Time) -> None:
    known = Cgroups(tree.mount)
    path = tree.make("docker", new_id())
    assert known.path(tree.id(path)) is None
    clock.now += 0.9
    assert known.path(tree.id(path)) is None
    clock.now += 0.2
    assert known.path(tree.id(path)) == path
    later = tree.make("docker", new_id())
    assert known.path(tree.id(later)) is None
    clock.now += 1.1
    assert known.path(tree.id(later)) == later


def test_removed(tree: Tree, clock: Time) -> None:
    known = Cgroups(tree.mount)
    path = tree.make("docker", new_id())
    id = tree.id(path)
    clock.now += 1
    assert known.path(id) == path
    tree.remove(path)
    clock.now += 1
    assert known.path(id + 1_000_000) is None
    assert known.path(id) == path
    with pytest.raises(TcpobsError, match="there is no cgroup"):
        known.find(path)
    with pytest.raises(TcpobsError, match="there is no container"):
        known.find_container(path.rpartition("/")[2])


def test_an_id_is_looked_for_once(tree: Tree, clock: Time, monkeypatch: pytest.MonkeyPatch) -> None:
    known = Cgroups(tree.mount)
    looked: list[str] = []
    scandir = os.scandir

    def noted(path: str) -> object:
        looked.append(path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", noted)
    nobodys = (1 << 40) + 1
    assert known.path(nobodys) is None
    assert not looked
    clock.now += 1
    assert known.path(nobodys) is None
    assert tree.mount + tree.root in looked
    looked.clear()
    clock.now += 1
    assert known.path(nobodys) is None
    assert not looked
    assert known.path(nobodys + 1) is None
    assert looked


def test_memory_is_bounded(tree: Tree, clock: Time, monkeypatch: pytest.MonkeyPatch) -> None:
    known = Cgroups(tree.mount)
    here = len(known._paths)
    monkeypatch.setattr(cgroups, "REMEMBERED", here + 20)
    ids = []
    for _ in range(40):
        path = tree.make(new_id())
        ids.append(tree.id(path))
        clock.now += 1
        assert known.path(ids[-1]) == path
        tree.remove(path)
        assert len(known._paths) <= here + 21
    assert known.path(ids[-1]) is not None
    assert known.path(ids[0]) is None


def test_gone_while_walking(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    gone, stays = tree.make("gone"), tree.make("stays")
    scandir = os.scandir

    def too_late(path: str) -> object:
        if path == tree.mount + gone:
            tree.remove(gone)
        return scandir(path)

    id = tree.id(gone)
    monkeypatch.setattr(os, "scandir", too_late)
    known = Cgroups(tree.mount)
    assert known.path(tree.id(stays)) == stays
    assert known.path(id) == gone


def test_without_capabilities(tree: Tree) -> None:
    path = tree.make("docker", new_id())
    tree.make("docker", "closed")
    os.chmod(f"{tree.mount}{tree.root}/docker/closed", 0)
    script = (
        "import sys\n"
        "from tcpobs import cgroups, privileges\n"
        "known = cgroups.Cgroups(sys.argv[1])\n"
        "privileges.give_up()\n"
        "known._paths.clear()\n"
        "known._walk()\n"
        "print(known.path(int(sys.argv[2])), known.find(sys.argv[3]).id)\n"
    )
    id = str(tree.id(path))
    done = subprocess.run(
        [sys.executable, "-c", script, tree.mount, id, path], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [path, id]


@contextmanager
def mounted(*arguments: str) -> Iterator[str]:
    """A directory with something mounted on it."""
    with TemporaryDirectory() as place:
        subprocess.run(["mount", *arguments, place], check=True)
        try:
            yield place
        finally:
            subprocess.run(["umount", place], check=True)


def test_a_part_of_the_hierarchy(tree: Tree) -> None:
    path = tree.make("docker", new_id())
    with mounted("--bind", tree.mount + tree.root) as place:
        part = Cgroups(place)
        assert part.path(tree.id(path)) == path[len(tree.root) :]
        assert part.path(1) is None
        for find in (part.find, part.find_container):
            with pytest.raises(HostError, match="a part of the cgroup2 hierarchy"):
                find(path)
        assert Cgroups().mount != place


def test_where_it_is_mounted(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tree.make("docker", new_id())
    with TemporaryDirectory() as outer:
        place = f"{outer}/a place"
        os.mkdir(place)
        subprocess.run(["mount", "-t", "cgroup2", "none", place], check=True)
        try:
            with open("/proc/self/mounts") as file:
                ours = [line for line in file if f"{outer}/a\\040place" in line]
            part = f"none {tree.mount}{tree.root} cgroup2 rw 0 0\n"
            hidden = "none /nowhere cgroup2 rw 0 0\nnone /tmp cgroup2 rw 0 0\n"
            monkeypatch.setattr(cgroups, "read", lambda _: hidden + part + "".join(ours))
            known = Cgroups()
            assert known.mount == place
            assert known.find(f"{place}{path}").path == path
        finally:
            subprocess.run(["umount", place], check=True)


def test_not_mounted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroups, "read", lambda _: "proc /proc proc rw 0 0\n")
    known = Cgroups()
    assert known.mount is None
    assert known.path(1) is None
    for find in (known.find, known.find_container):
        with pytest.raises(HostError, match="not mounted"):
            find("/system.slice")


def test_the_real_clock(tree: Tree) -> None:
    known = Cgroups(tree.mount)
    path = tree.make("late")
    wait(lambda: known.path(tree.id(path)) == path)
