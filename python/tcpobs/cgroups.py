"""Whose a cgroup is: from its id to its path, and from the path to the container or unit.

Names are all there is to go by: no runtime is asked. Whoever may make a cgroup chooses its name, so that a
user to whom systemd delegates a subtree can make one that looks like a container's. What a `Container` says
is safe to print; a path may hold any character but a newline.
"""

from __future__ import annotations

import os
import re
import stat
import time
from collections import namedtuple
from functools import lru_cache
from itertools import islice

from tcpobs.errors import HostError, TcpobsError, UsageError
from tcpobs.host import read

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import NamedTuple

    class Container(NamedTuple):
        """What a cgroup belongs to.

        `runtime` is docker, containerd, cri-o, podman, or systemd for a unit; None for a container whose
        path does not tell. `id` is the container's id, 64 hex digits, or the unit's name (nginx.service).
        `pod` is the UID of the Kubernetes pod, with dashes as the API writes it; a static pod's is the 32
        hex digits of its configuration's hash. None outside a pod.
        """

        runtime: str | None
        id: str
        pod: str | None

    class Cgroup(NamedTuple):
        """A cgroup: its path from the hierarchy's root, its id, and how deep it is; the root's level is 0."""

        path: str
        id: int
        level: int

else:
    Container = namedtuple("Container", "runtime id pod")
    Cgroup = namedtuple("Cgroup", "path id level")

RUNTIMES = {
    "docker": "docker",
    "cri-containerd": "containerd",  # containerd's plugin for Kubernetes
    "nerdctl": "containerd",
    "crio": "cri-o",
    "libpod": "podman",
    "libpod-payload": "podman",  # --cgroups=split, as Quadlet's services are
}
"""What runtimes write before a container's id."""

LEAST_PREFIX = 4
"""Characters of a container's id that have to be given: an empty variable in a script finds none."""

INTERVAL = 1.0
"""Seconds from one walk to the next."""

REMEMBERED = 100_000
"""How many cgroups are known before those that are gone are forgotten."""

NAMED = 5
"""How many an error names."""

_ID = "[0-9a-f]{64}"
_UID = "[0-9a-f]{8}(?:[-_][0-9a-f]{4}){3}[-_][0-9a-f]{12}|[0-9a-f]{32}"
# systemd's driver: PREFIX-ID.scope; cgroupfs: PREFIX-ID; runc's cgroupfs, given what is for systemd's:
# SLICE:PREFIX:ID.
_CONTAINER = re.compile(rf"(?:.*\.slice:)?({'|'.join(RUNTIMES)})[-:]({_ID})(?:\.scope)?")
_BARE = re.compile(_ID)
# The kubelet's cgroups are below --cgroup-root, whose name systemd wants before theirs.
_POD_SLICE = re.compile(rf"(?:.*-)?kubepods(?:-burstable|-besteffort)?-pod({_UID})\.slice(?::.*)?")
_POD = re.compile(rf"pod({_UID})")
_POD_PARENTS = ("kubepods", "burstable", "besteffort")
# The characters of a unit's name (systemd.unit(5)), and the _ before one that a file of the kernel's could
# have (systemd's cg_escape()).
_UNIT = re.compile(r"_?([A-Za-z0-9:_.\\@-]+\.(?:service|scope))")


@lru_cache(2048)
def container(path: str) -> Container | None:
    """The container that a cgroup belongs to, else the systemd unit; None where its path names neither.

    Of containers inside containers it is the innermost, and so it is of units. A unit inside a container is
    the container's. conmon, which podman and CRI-O start beside a container, is not in it.

    Layouts: Docker's (dockerd's --exec-opt native.cgroupdriver and --cgroup-parent), containerd's CRI plugin,
    nerdctl's, CRI-O's (cgroup_manager in crio.conf(5)), podman's (--cgroup-manager of podman(1), --cgroups of
    podman-run(1)) and the kubelet's (--cgroup-driver, --cgroup-root), with either driver. The cgroupfs driver
    of Docker and containerd names the directory after the id alone: below `docker` it is Docker's, and
    elsewhere, in a pod too, the runtime is None. A name that is not 64 hex digits, as ctr(8) takes, is no id.
    """
    names = path.split("/")
    for index in range(len(names) - 1, -1, -1):
        runtime, id = _identity(names[index], names[index - 1] if index else "")
        if id:
            return Container(runtime, id, _pod(names[: index + 1]))
    for index in range(len(names) - 1, -1, -1):
        unit = _UNIT.fullmatch(names[index])
        if unit:
            return Container("systemd", unit[1], _pod(names[:index]))
    return None


def _identity(name: str, parent: str) -> tuple[str | None, str]:
    """A container's runtime and id from its directory's name; no id if it is not a container's."""
    named = _CONTAINER.fullmatch(name)
    if named:
        return RUNTIMES[named[1]], named[2]
    if _BARE.fullmatch(name) and parent != "libpod_parent":  # there it is a podman pod
        return ("docker" if parent == "docker" else None), name
    return None, ""


def _pod(names: list[str]) -> str | None:
    for index in range(len(names) - 1, -1, -1):
        uid = _POD_SLICE.fullmatch(names[index])
        if not uid and index and names[index - 1] in _POD_PARENTS:
            uid = _POD.fullmatch(names[index])
        if uid:
            return uid[1].replace("_", "-")
    return None


class Cgroups:
    """The cgroups of the cgroup2 hierarchy, by id.

    A cgroup's id is what bpf_get_current_cgroup_id() gives (bpf-helpers(7)), and the inode number of its
    directory: cgroup_id() in include/linux/cgroup.h, kernfs_ino() in include/linux/kernfs.h, on 64-bit
    kernels since Linux 5.5. Before, half of it is a generation that no inode number has, and none is found.

    The hierarchy is walked at the start, and again when an unknown id is asked for, at most once a second.
    It takes no privileges where directories are open to all, as the kernel makes them. What was seen once
    stays known when it is removed; but when more than 100,000 are known, those that are gone are forgotten.
    `mount` is where cgroup2 is mounted; if it is not given, /proc/self/mounts tells (proc_pid_mounts(5)).
    Where it is not mounted there are no cgroups.
    """

    def __init__(self, mount: str | None = None) -> None:
        self.mount = mount or _mount()
        self._top = {} if self.mount is None else {os.stat(self.mount).st_ino: "/"}
        self._paths = dict(self._top)
        self._missing = {0}  # what programs give for an unknown one
        self._walk()

    def path(self, id: int) -> str | None:
        """A cgroup's path from the mount, as in /proc/PID/cgroup (cgroups(7)): `/` is the mount itself.

        None if it was made and removed between two walks, if it is outside of what is mounted, or if it is
        new and the last walk not yet a second ago.
        """
        path = self._paths.get(id)
        if path is None and id not in self._missing and time.monotonic() - self._walked >= INTERVAL:
            path = self._walk().get(id)
            if path is None:
                self._missing.add(id)  # ids are not used again: it will not come
        return path

    def find(self, path: str) -> Cgroup:
        """The cgroup at a path: from the hierarchy's root, with or without the first slash, or in the mount.

        Raises TcpobsError if there is none, and HostError where the hierarchy cannot be seen from its root;
        UsageError for an empty path.
        """
        if not path:
            raise UsageError("a cgroup's path is empty: the root's is /")
        mount = self._root()
        name = os.path.normpath(f"/{path.strip('/')}")
        if f"{name}/".startswith(f"{mount}/"):
            name = name[len(mount) :] or "/"
        try:
            status = os.stat(mount + name)
        except (OSError, ValueError):  # ValueError: a zero byte
            status = None
        if status is None or not stat.S_ISDIR(status.st_mode):
            raise TcpobsError(f"there is no cgroup {name}{self._nearest(name)}")
        self._paths[status.st_ino] = name
        return _cgroup(name, status.st_ino)

    def find_container(self, prefix: str) -> Cgroup:
        """The cgroup of the container whose id begins like this, or of the systemd unit with this name.

        It is the outermost that the container has. Raises TcpobsError if there is none, or several, and
        HostError where the hierarchy cannot be seen from its root; UsageError for less than four characters.
        """
        if len(prefix) < LEAST_PREFIX:
            least = f"give {LEAST_PREFIX} characters or more"
            raise UsageError(f"{prefix!r} is too short for a container: {least}")
        self._root()
        here = list(_outermost(self._walk()))
        found = [(cgroup, who) for cgroup, who in here if who.id == prefix]
        if not found:
            found = [
                (cgroup, who)
                for cgroup, who in here
                if who.id.startswith(prefix) and who.runtime != "systemd"  # units are few: names are whole
            ]
        if not found:
            raise TcpobsError(f"there is no container or unit {prefix}{_running(here, prefix)}")
        if len({who for _, who in found}) > 1:
            several = _few(who.id for _, who in found)
            raise TcpobsError(f"several containers' ids begin with {prefix}, give more of it: {several}")
        if len(found) > 1:
            several = _few(cgroup.path for cgroup, _ in found)
            raise TcpobsError(f"several cgroups are {prefix}, give the path of one: {several}")
        return found[0][0]

    def _walk(self) -> dict[int, str]:
        """Learns of the cgroups that are here now, and returns them."""
        here = dict(self._top)
        stack = [""] if here else []
        while stack:
            path = stack.pop()
            try:
                with os.scandir(f"{self.mount}{path}") as entries:
                    for entry in entries:
                        if entry.is_dir(follow_symlinks=False):
                            here[entry.inode()] = below = f"{path}/{entry.name}"
                            stack.append(below)
            except (FileNotFoundError, PermissionError):
                pass  # removed in the meantime; or closed to us
        self._paths.update(here)
        if len(self._paths) + len(self._missing) > REMEMBERED:
            self._paths, self._missing = dict(here), {0}
        self._walked = time.monotonic()
        return here

    def _root(self) -> str:
        """Where the hierarchy's root is mounted; a level counts from there.

        Its id is 1 (cgroup_setup_root() in kernel/cgroup/cgroup.c).
        """
        if self.mount is None:
            cause = "the cgroup2 hierarchy is not mounted"
            raise HostError(cause, "boot with systemd.unified_cgroup_hierarchy=1, or mount -t cgroup2")
        if 1 not in self._top:
            cause = f"{self.mount} is a part of the cgroup2 hierarchy, as in a container"
            raise HostError(cause, "run it on the host, or with the host's /sys/fs/cgroup")
        return self.mount

    def _nearest(self, name: str) -> str:
        from difflib import get_close_matches

        here = {path.rpartition("/")[2]: path for path in self._walk().values()}
        nearest = [here[close] for close in get_close_matches(name.rpartition("/")[2], here)]
        return f"; nearest: {', '.join(nearest)}" if nearest else f": see below {self.mount}"


def _mount() -> str | None:
    """Where cgroup2 is mounted; of several places, one with the hierarchy's root before one with a part."""
    places = {}
    for line in read("/proc/self/mounts").splitlines():
        _, place, type, *_ = line.split()
        place = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), place)
        if type == "cgroup2" and os.path.exists(f"{place}/cgroup.controllers"):  # not below another mount
            places[place] = os.stat(place).st_ino
    return min(places, key=places.__getitem__, default=None)


def _cgroup(path: str, id: int) -> Cgroup:
    return Cgroup(path, id, 0 if path == "/" else path.count("/"))


def _outermost(here: dict[int, str]) -> Iterator[tuple[Cgroup, Container]]:
    """Of each container and unit the cgroup that has all of it."""
    owners = {path: container(path) for path in here.values()}
    for id, path in sorted(here.items()):
        owner = owners[path]
        if owner and owner != owners.get(path.rpartition("/")[0]):
            yield _cgroup(path, id), owner


def _running(here: list[tuple[Cgroup, Container]], wanted: str) -> str:
    """Some of what runs here, for an error: units if it was a unit's name, else containers before them."""
    unit_wanted = _UNIT.fullmatch(wanted) is not None
    owners = sorted((who for _, who in here), key=lambda who: (who.runtime == "systemd") != unit_wanted)
    names = [who.id if who.runtime == "systemd" else who.id[:12] for who in owners]
    return f"; these run here: {_few(dict.fromkeys(names))}" if names else ": none runs here"


def _few(names: Iterable[str]) -> str:
    first = list(islice(names, NAMED + 1))
    return ", ".join([*first[:NAMED], *("…" for _ in first[NAMED:])])
