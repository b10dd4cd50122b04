"""Which file a library's name is, here and in a process."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from tcpobs.errors import TcpobsError
from tcpobs.tools.argdist import libraries
from tcpobs.tools.argdist.elf import Elf
from tcpobs.tools.argdist.libraries import find_binary, inside

from .built import build, run

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

WAITING = (
    '#include <stdio.h>\nint shared(int);\nint main(void) { puts("here"); fflush(stdout); return getchar(); }'
)


@contextmanager
def running(path: str, **options: str) -> Iterator[int]:
    """The PID of the program, past its start."""
    with subprocess.Popen([path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, **options) as process:  # type: ignore[call-overload]
        process.stdout.readline()
        try:
            yield process.pid
        finally:
            process.stdin.close()


def with_library(tmp_path: Path, library: str) -> str:
    """A program that has it mapped."""
    build(tmp_path / library, "int shared(int x) { return x; }", "-shared", "-fPIC", f"-Wl,-soname,{library}")
    flags = ("-Wl,--no-as-needed", str(tmp_path / library), f"-Wl,-rpath,{tmp_path}")
    return build(tmp_path / "waiting", WAITING, *flags)


def loaded(name: str) -> str:
    """The path that this process's loader gives to such a library."""
    for line in run("ldd", "/bin/ls").splitlines():
        match = re.search(rf"(\S*/{name}\S*) \(", line)
        if match:
            return os.path.realpath(match.group(1))
    raise AssertionError(name)


@pytest.mark.parametrize("cache", [True, False])
def test_libc(monkeypatch: pytest.MonkeyPatch, cache: bool) -> None:
    if not cache:
        monkeypatch.setattr(libraries, "CACHE", "/nonexistent")
    path = find_binary("c")
    assert os.path.realpath(path) == loaded("libc")
    with Elf(path) as elf:
        assert elf.find("malloc")


def test_damaged_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries, "CACHE", str(tmp_path / "cache"))
    for data in (b"", b"glibc-ld.so.cache1.1", b"glibc-ld.so.cache1.1" + b"\x03\x03\0\0" * 30):
        (tmp_path / "cache").write_bytes(data)
        assert os.path.realpath(find_binary("c")) == loaded("libc")


def test_part_of_libc_that_is_no_file() -> None:
    assert os.path.basename(find_binary("util")) in ("libutil.so.1", os.path.basename(find_binary("c")))


def test_program_on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = build(tmp_path / "own-program", "int main(void) { return 0; }")
    monkeypatch.setenv("PATH", f"{tmp_path / 'nothing'}:{tmp_path}")
    assert find_binary("own-program") == path


def test_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "library.so").touch()
    assert find_binary(f"{tmp_path}/library.so") == f"{tmp_path}/library.so"
    monkeypatch.chdir(tmp_path)
    assert find_binary("./library.so") == "./library.so"
    with pytest.raises(TcpobsError, match=r"no file \./nothing: give the path"):
        find_binary("./nothing")


def test_unknown_name() -> None:
    with pytest.raises(
        TcpobsError, match=r"^no library or program pthraed: give a path \(there is .*pthread"
    ):
        find_binary("pthraed")
    with pytest.raises(TcpobsError, match=r"^no library or program qqqqqqq: give a path$"):
        find_binary("qqqqqqq")
    with pytest.raises(TcpobsError, match=r"no process 4194305: "):
        find_binary("c", 4194305)
    with pytest.raises(TcpobsError, match=r"no process 4194305: "):
        find_binary("/bin/ls", 4194305)


@pytest.mark.parametrize("library", ["libshared.so", "libshared.so.2", "libshared-2.31.so"])
def test_what_a_process_has_mapped(tmp_path: Path, library: str) -> None:
    with running(with_library(tmp_path, library)) as pid:
        assert find_binary("shared", pid) == f"/proc/{pid}/root{tmp_path}/{library}"
        assert find_binary("waiting", pid) == f"/proc/{pid}/root{tmp_path}/waiting"
        assert os.path.samefile(find_binary("c", pid), loaded("libc"))
        with pytest.raises(TcpobsError, match=f"no library or program share in process {pid} or its root: "):
            find_binary("share", pid)


def test_a_deleted_library(tmp_path: Path) -> None:
    program = with_library(tmp_path, "libshared.so.2")
    with running(program) as pid:
        os.unlink(tmp_path / "libshared.so.2")
        os.unlink(program)
        try:
            path = find_binary("shared", pid)
        except TcpobsError as error:
            assert "run as root" in str(error)  # noqa: PT017 (the links below map_files are for root)
        else:
            with Elf(path) as elf:
                assert elf.find("shared")
        with Elf(find_binary("waiting", pid)) as elf:
            assert elf.find("main")


def test_a_library_that_was_replaced(tmp_path: Path) -> None:
    with running(with_library(tmp_path, "libshared.so.2")) as pid:
        os.unlink(tmp_path / "libshared.so.2")
        build(tmp_path / "libshared.so.2", "int other(int x) { return x; }", "-shared", "-fPIC")
        try:
            path = find_binary("shared", pid)
        except TcpobsError as error:
            assert "run as root" in str(error)  # noqa: PT017
        else:
            with Elf(path) as elf:
                assert elf.find("shared"), "the one that runs"


def test_relative_path_is_the_process_s_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = build(tmp_path / "waiting", WAITING)
    here = tmp_path / "here"
    here.mkdir()
    (here / "mine").touch()
    monkeypatch.chdir(here)
    with running(program, cwd=str(tmp_path)) as pid:
        assert find_binary("./waiting", pid) == f"/proc/{pid}/root{tmp_path}/waiting"
        assert find_binary("./mine", pid) == "./mine"


def test_links_stay_below_a_root(tmp_path: Path) -> None:
    (tmp_path / "usr" / "lib").mkdir(parents=True)
    (tmp_path / "lib").symlink_to("/usr/lib")
    (tmp_path / "usr" / "lib" / "one").symlink_to("../../lib/two")
    (tmp_path / "usr" / "lib" / "two").touch()
    (tmp_path / "loop").symlink_to("loop")
    root = str(tmp_path)
    assert inside(root, "/lib/one") == f"{root}/usr/lib/two"
    assert inside(root, "/../../lib/./two") == f"{root}/usr/lib/two"
    assert inside("", "/lib/one") == "/lib/one"
    assert not os.path.exists(inside(root, "/loop"))


@pytest.mark.skipif(not shutil.which("ldconfig", path="/sbin:/usr/sbin"), reason="glibc's")
def test_cache_as_ldconfig_prints_it() -> None:
    text = run(shutil.which("ldconfig", path="/sbin:/usr/sbin") or "", "-p")
    machine = {"x86_64": "x86-64", "aarch64": "AArch64"}[os.uname().machine]
    listed = re.findall(rf"\(libc6,{machine}[^)]*\) => (\S+)", text)
    assert sorted(libraries._cached("")) == sorted(listed)
