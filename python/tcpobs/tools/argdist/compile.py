"""Generated programs to objects: compiled once, and kept in the user's cache folder.

The cache is $XDG_CACHE_HOME/tcpobs/argdist, or ~/.cache/tcpobs/argdist. What is in there runs in the kernel,
so only what this user alone can have written is taken: both folders and each entry are theirs, no links
are followed, and an entry begins with the SHA-256 of the rest. A cache that cannot be had is done without.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
from contextlib import suppress

from tcpobs import __version__, compiler
from tcpobs.errors import HostError, TcpobsError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

MOST_ENTRIES = 256
MOST_BYTES = 64 << 20
"""What the cache holds at most: the entries that were used last."""

SECONDS = 60
"""The longest a compiler may take."""

_OBJECTS = os.path.join(os.path.dirname(os.path.dirname(os.path.dirname(__file__))), "_objects")
_HEADERS = [os.path.join(_OBJECTS, "include"), os.path.join(_OBJECTS, "source")]
_ARCHITECTURES = {"x86_64": "x86", "aarch64": "arm64"}
_DIGEST = 32
"""Bytes of a SHA-256."""


class CompileError(TcpobsError):
    """The compiler refused a program; `diagnostics` is all it said, with `<stdin>:LINE:` for the program."""

    def __init__(self, diagnostics: str) -> None:
        lines = diagnostics.splitlines() or ["it does not say why"]
        first = next((line for line in lines if "error: " in line), lines[-1])
        super().__init__(f"the compiler refuses the generated program: {first}")
        self.diagnostics = diagnostics


def compile(source: str, include: Sequence[str] = (), defines: Sequence[str] = ()) -> bytes:
    """The object of a BPF program in C, for this machine: out of the cache, or compiled.

    `include` names headers that come before the program, each a path or a name on the compiler's search
    path; `defines` are macros, `NAME` or `NAME=VALUE`. Raises HostError when there is no compiler, and
    CompileError when it refuses the program.
    """
    command = _command(include, defines)
    text = source.encode()
    # A user's headers may include others: what counts is what the preprocessor makes of them all.
    key = _key(command, _run([*command, "-E", "-"], text) if include else text)
    object = recall(key)
    if object is None:
        object = _compiled(command, text)
        keep(key, object)
    return object


def key(inputs: Sequence[str], defines: Sequence[str] = ()) -> str:
    """The name in the cache of what is made of these texts. Raises HostError when there is no compiler."""
    return _key(_command((), defines), "\0".join(inputs).encode(errors="surrogateescape"))


def recall(key: str) -> bytes | None:
    """What `keep` wrote under this name, if it can be trusted."""
    folder = _open_cache()
    if folder is None:
        return None
    try:
        return _read(folder, key)
    finally:
        os.close(folder)


def keep(key: str, data: bytes) -> None:
    """Writes an entry of the cache, if there is one."""
    folder = _open_cache()
    if folder is None:
        return
    try:
        with suppress(OSError):
            _write(folder, key, data)
            _drop_oldest(folder)
    finally:
        os.close(folder)


def _command(include: Sequence[str], defines: Sequence[str]) -> list[str]:
    found = compiler.find()
    if not found:
        chosen = os.environ.get("TCPOBS_CLANG")
        raise HostError(
            f"there is no compiler {chosen} (TCPOBS_CLANG)" if chosen else "there is no C compiler for BPF",
            "install clang, so that clang or clang-N is on PATH, or `pip install tcpobs[compiler]`, "
            "or point TCPOBS_CLANG to a clang",
        )
    machine = os.uname().machine
    command = [*found, "-target", "bpf", "-mcpu=v3", "-O2", "-g", "-fdebug-compilation-dir=.", "-x", "c"]
    command += ["-Wall", "-Wno-unused", f"-D__TARGET_ARCH_{_ARCHITECTURES.get(machine, machine)}"]
    command += [f"-I{folder}" for folder in _HEADERS]
    if include:
        # Where a C library has its headers for this machine (Debian's way); clang knows /usr/include itself.
        command += ["-idirafter", f"/usr/include/{machine}-linux-gnu"]
        # ziglang's clang does not look for its own stddef.h by itself.
        command += ["-idirafter", os.path.join(os.path.dirname(found[0]), "lib", "include")]
        command += [f"-D__{machine}__", "-D__LP64__"]  # which their layout depends on
    for name in include:
        command += ["-include", os.path.abspath(name) if os.path.isfile(name) else name]
    return command + [f"-D{define}" for define in defines]


def _compiled(command: Sequence[str], text: bytes) -> bytes:
    object = _run([*command, "-c", "-o", "-", "-"], text)
    if not object.startswith(b"\x7fELF"):
        raise TcpobsError(f"{command[0]} makes no BPF objects: is it a clang?")
    return object


def _run(command: Sequence[str], text: bytes) -> bytes:
    import subprocess

    # Not in the user's folder, for its files would go before our headers.
    try:
        done = subprocess.run(command, input=text, capture_output=True, timeout=SECONDS, cwd=_OBJECTS)
    except OSError as error:
        raise TcpobsError(f"{command[0]} cannot be run: {error.strerror}") from None
    except subprocess.TimeoutExpired:
        raise TcpobsError(f"{command[0]} was stopped: it took more than {SECONDS} seconds") from None
    if done.returncode:
        raise CompileError(done.stderr.decode(errors="backslashreplace"))
    return done.stdout


def _key(command: Sequence[str], content: bytes) -> str:
    """The entry's name: a hash over all that makes the object, compiler and our headers by their dates."""
    path = os.path.realpath(shutil.which(command[0]) or command[0])
    files = [os.stat(path)]
    for folder in _HEADERS:
        for parent, _, names in os.walk(folder):
            files += [os.stat(os.path.join(parent, name)) for name in sorted(names) if name.endswith(".h")]
    parts = [__version__, path, *command, *(f"{file.st_size} {file.st_mtime_ns}" for file in files)]
    hashed = hashlib.sha256("\0".join(parts).encode(errors="surrogateescape"))
    hashed.update(b"\0\0" + content)
    return hashed.hexdigest()


def _open_cache() -> int | None:
    """The cache folder, made where it is missing; None when it cannot be had, or others could write there."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        if not os.path.isabs(base):
            from pwd import getpwuid

            # Not $HOME: under sudo it may be another user's.
            base = os.path.join(getpwuid(os.geteuid()).pw_dir, ".cache")
        os.makedirs(base, 0o700, exist_ok=True)
        folder = os.open(base, os.O_RDONLY | os.O_DIRECTORY)
    except (OSError, KeyError):
        return None
    try:
        usable = os.fstat(folder).st_uid in (0, os.geteuid())
        for name in ("tcpobs", "argdist"):
            if not usable:
                break
            with suppress(FileExistsError):
                os.mkdir(name, 0o700, dir_fd=folder)
            inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
            os.close(folder)
            folder = inner
            status = os.fstat(folder)
            usable = status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    except OSError:
        usable = False
    if usable:
        return folder
    os.close(folder)
    return None


def _read(folder: int, key: str) -> bytes | None:
    """An entry's object, which now counts as used; None when there is none that can be trusted."""
    try:
        # O_NONBLOCK, for it might be a FIFO.
        with open(os.open(key, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder), "rb") as file:
            status = os.fstat(file.fileno())
            ours = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()
            if not ours or stat.S_IMODE(status.st_mode) != 0o600 or status.st_size > MOST_BYTES:
                return None
            entry = file.read()
            if hashlib.sha256(entry[_DIGEST:]).digest() != entry[:_DIGEST]:
                return None
            os.utime(file.fileno())
            return entry[_DIGEST:]
    except OSError:
        return None


def _write(folder: int, key: str, object: bytes) -> None:
    """Adds an entry, whole or not at all."""
    temporary = f"{key}.{os.getpid()}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    with open(os.open(temporary, flags, 0o600, dir_fd=folder), "wb") as file:
        try:
            os.fchmod(file.fileno(), 0o600)  # whatever the umask
            file.write(hashlib.sha256(object).digest() + object)
            file.flush()
            os.rename(temporary, key, src_dir_fd=folder, dst_dir_fd=folder)
        except OSError:
            os.unlink(temporary, dir_fd=folder)
            raise


def _drop_oldest(folder: int) -> None:
    """Keeps the cache in its bounds; what a killed process left there ends this way, too."""
    with os.scandir(folder) as entries:
        dated = [(entry.stat(follow_symlinks=False), entry.name) for entry in entries]
    dated.sort(key=lambda one: one[0].st_mtime_ns, reverse=True)
    size = 0
    for number, (status, name) in enumerate(dated):
        size += status.st_size
        if number >= MOST_ENTRIES or size > MOST_BYTES:
            with suppress(OSError):
                os.unlink(name, dir_fd=folder)
