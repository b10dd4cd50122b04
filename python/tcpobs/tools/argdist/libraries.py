"""Which file a specifier's library is: as the loader resolves it, or as a process has it."""

from __future__ import annotations

import os
import re
import stat
import struct

from tcpobs.errors import TcpobsError
from tcpobs.tools.argdist.names import nearest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

CACHE = "/etc/ld.so.cache"
"""What ldconfig found; musl has none."""

_FOLDERS = (
    "/lib/{0}-linux-gnu",
    "/usr/lib/{0}-linux-gnu",
    "/lib64",
    "/usr/lib64",
    "/lib",
    "/usr/local/lib",
    "/usr/lib",
)
_CACHE_FLAGS = {"x86_64": 0x303, "aarch64": 0xA03}
"""In the cache: of libc 6, and of this machine."""
PARTS_OF_LIBC = {"pthread", "dl", "rt", "util"}
"""Libraries of their own before glibc 2.34, and empty since; never in musl."""
_MOST_LINKS = 40


def find_binary(name: str, pid: int | None = None) -> str:
    """The path to open for a library's short name (`c` is libc), a program, or a path.

    With `pid` it is that process's: what it has mapped, itself, or what its root folder has; the path then
    goes through /proc/PID. Of several versions the highest counts, and one built for newer processors
    (glibc-hwcaps) only where the process has it mapped. Raises TcpobsError.
    """
    root = "" if pid is None else f"/proc/{pid}/root"
    if "/" in name:
        return _at_path(name, pid)
    for attempt in (name, "c") if name in PARTS_OF_LIBC else (name,):
        path = (_of_process(attempt, pid) if pid is not None else None) or _installed(attempt, root)
        if path:
            return path
    for folder in os.get_exec_path():
        path = inside(root, os.path.join(folder, name))
        if os.path.isfile(path) and os.access(path, os.X_OK):
            return path
    where = "" if pid is None else f" in process {pid} or its root"
    others = {short for short in map(_short_name, _installed_files(root)) if short}
    near = nearest(name, others)
    hint = f" (there is {', '.join(near)})" if near else ""
    raise TcpobsError(f"no library or program {name}{where}: give a path{hint}")


def inside(root: str, path: str) -> str:
    """The path of a file below another root, with its links followed there as a process there would."""
    if not root:
        return path
    links = 0
    done: list[str] = []
    left = path.split("/")[::-1]
    while left:
        part = left.pop()
        if part in ("", "."):
            continue
        if part == "..":
            del done[-1:]
            continue
        try:
            target = os.readlink("/".join((root, *done, part)))
        except OSError:  # no link
            done.append(part)
            continue
        links += 1
        if links > _MOST_LINKS:
            return "/".join((root, *done, part))  # opening it fails as it does there
        if target.startswith("/"):
            done.clear()
        left += target.split("/")[::-1]
    return "/".join((root, *done))


def _at_path(path: str, pid: int | None) -> str:
    if pid is not None:
        try:
            absolute = os.path.join(os.readlink(f"/proc/{pid}/cwd"), path)
        except OSError as error:
            raise _no_process(pid, error) from error
        within = inside(f"/proc/{pid}/root", absolute)
        if os.path.exists(within):
            return within
    # Also with a process: a path that its user sees, and not the process.
    if not os.path.exists(path):
        where = "" if pid is None else f", also for process {pid}"
        raise TcpobsError(f"no file {path}{where}: give the path of a program or library")
    return path


def _of_process(name: str, pid: int) -> str | None:
    """What it has mapped under this name, or itself."""
    root = f"/proc/{pid}/root"
    try:
        program = os.readlink(f"/proc/{pid}/exe")
        with open(f"/proc/{pid}/maps", encoding="utf-8", errors="surrogateescape") as file:
            lines = file.readlines()
    except OSError as error:
        raise _no_process(pid, error) from error
    for line in lines:
        words = line.rstrip("\n").split(None, 5)
        if len(words) < 6 or not words[5].startswith("/"):
            continue
        path = words[5]
        if _is_library(name, os.path.basename(path.partition(" (deleted)")[0])):
            start, end = (int(place, 16) for place in words[0].split("-"))
            return _same_file(root, path, f"/proc/{pid}/map_files/{start:x}-{end:x}")
    if os.path.basename(program.partition(" (deleted)")[0]) == name:
        return _same_file(root, program, f"/proc/{pid}/exe")
    return None


def _same_file(root: str, path: str, link: str) -> str:
    """The path by which to open what the kernel's link leads to: the link itself where the file was deleted.

    A path is relative to our root for a process that has its own by chroot, to its own in a container.
    """
    for candidate in (f"{root}{path}", path):
        try:
            if os.path.samefile(candidate, link):
                return candidate
        except OSError:
            continue
    if os.path.exists(link):
        return link
    if os.path.exists(f"{root}{path}"):  # the links are for root alone
        return f"{root}{path}"
    raise TcpobsError(
        f"{path} cannot be opened: run as root, or start the process again with the file in place"
    )


def _installed(name: str, root: str) -> str | None:
    """The library of the highest version that a program would get."""
    for files in (_cached(root), _in_folders(root)):
        found = [path for path in files if _is_library(name, os.path.basename(path))]
        for path in sorted(found, key=_version, reverse=True):
            within = inside(root, path)
            if _is_elf(within):
                return within
    return None


def _installed_files(root: str) -> Iterator[str]:
    yield from _cached(root)
    yield from _in_folders(root)


def _cached(root: str) -> list[str]:
    """The paths in the loader's cache, for this machine; those for any processor first."""
    try:
        with open(inside(root, CACHE), "rb") as file:
            data = file.read()
    except OSError:
        return []
    # An older format may come first; the places of the strings count from the magic on.
    data = data[max(0, data.find(b"glibc-ld.so.cache1.1")) :]
    flags = _CACHE_FLAGS.get(os.uname().machine)
    found: list[tuple[bool, str]] = []
    try:
        (count,) = struct.unpack_from("<I", data, 20)
        for index in range(count):
            kind, _, place, _, capabilities = struct.unpack_from("<iIIIQ", data, 48 + 24 * index)
            if kind == flags:
                path = data[place : data.index(b"\0", place)]
                found.append((capabilities != 0, os.fsdecode(path)))
    except (struct.error, ValueError):
        return []  # damaged: the folders have them, too
    found.sort(key=lambda entry: entry[0])
    return [path for _, path in found]


def _in_folders(root: str) -> list[str]:
    found = []
    for folder in _FOLDERS:
        folder = folder.format(os.uname().machine)
        try:
            found += [f"{folder}/{name}" for name in os.listdir(inside(root, folder))]
        except OSError:
            continue
    return found


def _is_library(name: str, file: str) -> bool:
    """Whether the file is lib<name>.so, with a version or without; musl's libc is its loader."""
    if name == "c" and re.fullmatch(r"ld-musl-\w+\.so\.1|libc\.musl-\w+\.so\.1", file):
        return True
    return bool(re.fullmatch(rf"lib{re.escape(name)}(-[\d.]+)?\.so(\.[\w.]+)?", file))


def _short_name(path: str) -> str:
    match = re.match(r"lib(.+?)(-[\d.]+)?\.so\b", os.path.basename(path))
    return match.group(1) if match else ""


def _version(path: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", os.path.basename(path).partition(".so")[2])]


def _is_elf(path: str) -> bool:
    """In a developer's folders libc.so is a linker's script."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return False
        with open(path, "rb") as file:
            return file.read(4) == b"\x7fELF"
    except OSError:
        return False


def _no_process(pid: int, error: OSError) -> TcpobsError:
    if isinstance(error, PermissionError):
        return TcpobsError(f"process {pid} cannot be looked into ({error.strerror}): run as root")
    return TcpobsError(f"no process {pid}: it has ended, or lives in another PID namespace")
