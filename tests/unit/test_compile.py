"""Generated programs to objects: what compiles, and what the cache may be trusted with."""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from elftools.elf.elffile import ELFFile

from tcpobs import compiler
from tcpobs.errors import HostError, TcpobsError
from tcpobs.libbpf import Object
from tcpobs.tools.argdist import compile
from tcpobs.tools.argdist.compile import CompileError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PROGRAM = """\
#define __VMLINUX_H__
typedef unsigned char __u8;
typedef unsigned short __u16, __be16, __sum16;
typedef unsigned int __u32, __be32, __wsum;
typedef unsigned long long __u64, __be64, u64;
typedef signed char __s8;
typedef short __s16;
typedef int __s32;
typedef long long __s64;
typedef _Bool bool;
enum { false, true };
enum { BPF_MAP_TYPE_HASH = 1, BPF_MAP_TYPE_ARRAY };
enum { BPF_ANY, BPF_NOEXIST };
#ifdef __TARGET_ARCH_x86
struct pt_regs {
	unsigned long r15, r14, r13, r12, bp, bx, r11, r10, r9, r8, ax, cx, dx, si, di, orig_ax;
	unsigned long ip, cs, flags, sp, ss;
};
#else
struct user_pt_regs { __u64 regs[31], sp, pc, pstate; };
struct pt_regs;
#endif
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>
#include <bpf/bpf_core_read.h>
#include <bpf/usdt.bpf.h>

struct { __uint(type, BPF_MAP_TYPE_HASH); __uint(max_entries, 16); __type(key, u64); __type(value, u64); }
counts SEC(".maps");

SEC("uprobe")
int BPF_UPROBE(probe, u64 size)
{
	return bpf_map_update_elem(&counts, &size, &size, BPF_ANY);
}

SEC("usdt")
int BPF_USDT(note, long value)
{
	return value > 0;
}

char LICENSE[] SEC("license") = "GPL";
"""
SHORT = "int zero;\n"


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where the entries are."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/tcpobs/argdist"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], int]:
    """How often the compiler ran so far."""
    found = compiler.find()
    assert found
    script, log = tmp_path / "clang", tmp_path / "log"
    script.write_text(f'#!/bin/sh\necho >>"{log}"\nexec {" ".join(found)} "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("TCPOBS_CLANG", str(script))
    return lambda: log.read_text().count("\n") if log.exists() else 0


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """Makes a shell script the compiler."""

    def make(text: str) -> None:
        (tmp_path / "fake").write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "fake").chmod(0o755)
        monkeypatch.setenv("TCPOBS_CLANG", str(tmp_path / "fake"))

    return make


def _compilers() -> Iterator[str]:
    from importlib.util import find_spec

    package = find_spec("ziglang")
    assert package is not None
    assert package.origin
    yield f"exec {os.path.dirname(package.origin)}/zig clang"
    for folder in os.get_exec_path():
        for path in Path(folder).glob("clang*"):
            if path.name == "clang" or path.name[6:].isdigit():
                yield f"exec {path}"


@pytest.mark.parametrize("command", list(_compilers()), ids=lambda command: command.rpartition("/")[2])
def test_real_compilers(command: str, cache: Path, fake: Callable[[str], None]) -> None:
    fake(f'{command} "$@"')
    object = compile.compile(PROGRAM)
    elf = ELFFile(BytesIO(object))
    assert elf["e_machine"] == "EM_BPF"
    assert {"uprobe", "usdt", ".maps", ".BTF", ".BTF.ext"} <= {
        section.name for section in elf.iter_sections()
    }
    with Object(object, "test") as opened:
        assert set(opened.programs) == {"probe", "note"}
    assert compile.compile(PROGRAM) == object


def test_which_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The chosen one, clang, the newest clang-N, ziglang; nothing that is only called like them."""
    monkeypatch.setenv("PATH", f"{tmp_path}/a:{tmp_path}/none:{tmp_path}/b")
    monkeypatch.delenv("TCPOBS_CLANG", raising=False)
    for name in ("a/clang-9", "a/clang-format-20", "b/clang-18", "b/clang-cpp", "b/clang-19"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch(0o755)
    (tmp_path / "b/clang-19").chmod(0o644)
    assert compiler.find() == [f"{tmp_path}/b/clang-18"]
    (tmp_path / "b/clang").touch(0o755)
    assert compiler.find() == [f"{tmp_path}/b/clang"]
    monkeypatch.setenv("TCPOBS_CLANG", "clang-9")
    assert compiler.find() == ["clang-9"]
    monkeypatch.setenv("TCPOBS_CLANG", "clang-7")
    assert compiler.find() is None
    monkeypatch.delenv("TCPOBS_CLANG")
    monkeypatch.setenv("PATH", str(tmp_path))
    zig, clang = compiler.find() or ("", "")
    assert (Path(zig).name, clang) == ("zig", "clang")


def test_it_writes_nothing_elsewhere(
    cache: Path, calls: Callable[[], int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("TMPDIR", str(home))
    monkeypatch.setenv("ZIG_GLOBAL_CACHE_DIR", str(home))
    monkeypatch.chdir(home)
    compile.compile(PROGRAM)
    assert list(home.iterdir()) == []


def test_a_hit_runs_no_compiler(cache: Path, calls: Callable[[], int]) -> None:
    object = compile.compile(SHORT)
    assert calls() == 1
    assert compile.compile(SHORT) == object
    assert calls() == 1


def test_what_makes_another_entry(cache: Path, calls: Callable[[], int], tmp_path: Path) -> None:
    objects = {
        compile.compile(SHORT),
        compile.compile("int one;\n"),
        compile.compile("int ONE;\n", (), ["ONE=two"]),
    }
    assert len(objects) == calls() == 3
    os.utime(tmp_path / "clang", ns=(1, 1))  # another compiler in its place
    assert compile.compile(SHORT) in objects
    assert calls() == 4


def test_a_header_of_a_header(cache: Path, calls: Callable[[], int], tmp_path: Path) -> None:
    (tmp_path / "a.h").write_text('#include "b.h"\n')
    (tmp_path / "b.h").write_text("#define LENGTH 3\n")
    program = "char text[LENGTH];\n"
    first = compile.compile(program, [str(tmp_path / "a.h")])
    before = calls()
    assert compile.compile(program, [str(tmp_path / "a.h")]) == first
    assert calls() == before + 1, "the preprocessor alone"
    (tmp_path / "b.h").write_text("#define LENGTH 4\n")
    assert compile.compile(program, [str(tmp_path / "a.h")]) != first


def test_header_by_relative_path(
    cache: Path, calls: Callable[[], int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "-a b.h").write_text("#define LENGTH 3\n")
    monkeypatch.chdir(tmp_path)
    compile.compile("char text[LENGTH];\n", ["-a b.h"])


def test_header_on_the_search_path(cache: Path, calls: Callable[[], int]) -> None:
    compile.compile("char text[ENOENT];\n", ["linux/errno.h"])
    with pytest.raises(CompileError, match=r"no/such\.h"):
        compile.compile(SHORT, ["no/such.h"])


def test_headers_of_the_folder_do_not_get_in_the_way(
    cache: Path, calls: Callable[[], int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "bpf").mkdir()
    (tmp_path / "bpf/bpf_endian.h").write_text("#error not this one\n")
    monkeypatch.chdir(tmp_path)
    compile.compile('#include "bpf/bpf_endian.h"\nint zero;\n')


def test_refused(cache: Path, calls: Callable[[], int], capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CompileError, match=r"<stdin>:2:9: error: .*nonsense") as caught:
        compile.compile("int zero;\nint a = nonsense;\nint b = more;\n")
    assert "<stdin>:3:9: error:" in caught.value.diagnostics
    assert "\n" not in str(caught.value)
    assert list(cache.iterdir()) == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("chosen", [None, "/no/such/clang"])
def test_no_compiler(chosen: str | None, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "find", lambda: None)
    monkeypatch.setenv("TCPOBS_CLANG", chosen) if chosen else monkeypatch.delenv(
        "TCPOBS_CLANG", raising=False
    )
    with pytest.raises(HostError) as caught:
        compile.compile(SHORT)
    for name in ("TCPOBS_CLANG", "clang or clang-N", "pip install tcpobs[compiler]", chosen or ""):
        assert name in str(caught.value)


def test_not_a_compiler(cache: Path, fake: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    fake("cat; echo warned >&2")
    with pytest.raises(TcpobsError, match="is it a clang"):
        compile.compile(SHORT)
    fake("exit 3")
    with pytest.raises(CompileError, match="does not say why"):
        compile.compile(SHORT)
    fake("exec sleep 60")
    monkeypatch.setattr(compile, "SECONDS", 0.2)
    with pytest.raises(TcpobsError, match="took more than"):
        compile.compile(SHORT)
    fake("")
    Path(os.environ["TCPOBS_CLANG"]).write_bytes(b"\x7fELF, not quite")
    with pytest.raises(TcpobsError, match="cannot be run"):
        compile.compile(SHORT)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o277])
def test_modes(umask: int, cache: Path, calls: Callable[[], int]) -> None:
    cache.parent.parent.mkdir()
    before = os.umask(umask)
    try:
        compile.compile(SHORT)
    finally:
        os.umask(before)
    if umask != 0o277 or os.geteuid() == 0:
        [entry] = cache.iterdir()
        assert stat.S_IMODE(entry.stat().st_mode) == 0o600
    assert {stat.S_IMODE(folder.stat().st_mode) & 0o077 for folder in (cache, cache.parent)} == {0}


def test_without_xdg(
    cache: Path, calls: Callable[[], int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It is the home of the user that this is, not of the one whose $HOME it is."""
    import pwd

    entry = list(pwd.getpwuid(os.geteuid()))
    entry[5] = str(tmp_path / "home")
    (tmp_path / "home").mkdir()
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: pwd.struct_passwd(entry))
    monkeypatch.setenv("HOME", str(tmp_path / "another"))
    for relative in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", relative)
        compile.compile(SHORT)
    assert calls() == 1
    assert len(list((tmp_path / "home/.cache/tcpobs/argdist").iterdir())) == 1
    assert not (tmp_path / "another").exists()
    assert not cache.exists()
    assert stat.S_IMODE((tmp_path / "home/.cache").stat().st_mode) == 0o700


def _folder_link(cache: Path, target: Path) -> None:
    cache.rename(target)
    cache.symlink_to(target)


def _parent_link(cache: Path, target: Path) -> None:
    cache.parent.rename(target)
    cache.parent.symlink_to(target)


def _group_writes(cache: Path, target: Path) -> None:
    cache.chmod(0o770)


def _all_write_above(cache: Path, target: Path) -> None:
    cache.parent.chmod(0o707)


def _a_file(cache: Path, target: Path) -> None:
    cache.rename(target)
    cache.touch()


UNSAFE = [_folder_link, _parent_link, _group_writes, _all_write_above, _a_file]
if os.geteuid() == 0:

    def _of_another(cache: Path, target: Path) -> None:
        os.chown(cache, 65534, 65534)

    def _above_of_another(cache: Path, target: Path) -> None:
        os.chown(cache.parent, 65534, 65534)

    def _base_of_another(cache: Path, target: Path) -> None:
        os.chown(cache.parent.parent, 65534, 65534)

    UNSAFE += [_of_another, _above_of_another, _base_of_another]


@pytest.mark.parametrize("spoil", UNSAFE)
def test_unsafe_folders_are_not_used(
    spoil: Callable[[Path, Path], None], cache: Path, calls: Callable[[], int], tmp_path: Path
) -> None:
    object = compile.compile(SHORT)
    spoil(cache, tmp_path / "target")
    assert compile.compile(SHORT) == object
    assert compile.compile("int one;\n") != object
    assert calls() == 3
    assert len(list(tmp_path.rglob("?" * 64))) == 1, "nothing was added"


def test_a_folder_that_cannot_be_made(
    cache: Path, calls: Callable[[], int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    for base in (tmp_path / "file", Path("/proc/self/nothing")):
        with monkeypatch.context() as patch:
            patch.setattr(os, "environ", {**os.environ, "XDG_CACHE_HOME": str(base)})
            assert compile.compile(SHORT).startswith(b"\x7fELF")
    assert calls() == 2


def _bit(entry: Path) -> None:
    data = bytearray(entry.read_bytes())
    data[100] ^= 1
    entry.write_bytes(data)


def _cut(entry: Path) -> None:
    os.truncate(entry, entry.stat().st_size - 1)


def _empty(entry: Path) -> None:
    os.truncate(entry, 0)


def _open_to_all(entry: Path) -> None:
    entry.chmod(0o644)


def _link(entry: Path) -> None:
    entry.rename(entry.parent.parent / "moved")
    entry.symlink_to("../moved")


def _fifo(entry: Path) -> None:
    entry.unlink()
    os.mkfifo(entry, 0o600)


SPOILT = [_bit, _cut, _empty, _open_to_all, _link, _fifo]
if os.geteuid() == 0:

    def _chown(entry: Path) -> None:
        os.chown(entry, 65534, 65534)

    SPOILT.append(_chown)


@pytest.mark.parametrize("spoil", SPOILT)
def test_spoilt_entries_are_made_again(
    spoil: Callable[[Path], None], cache: Path, calls: Callable[[], int]
) -> None:
    object = compile.compile(SHORT)
    [entry] = cache.iterdir()
    spoil(entry)
    assert compile.compile(SHORT) == object
    assert calls() == 2
    assert compile.compile(SHORT) == object
    assert calls() == 2
    assert list(cache.iterdir()) == [entry]
    assert stat.S_ISREG(entry.lstat().st_mode)
    data = entry.read_bytes()
    assert data[32:] == object
    assert data[:32] == hashlib.sha256(object).digest()


def test_a_folder_for_an_entry(cache: Path, calls: Callable[[], int]) -> None:
    compile.compile(SHORT)
    [entry] = cache.iterdir()
    entry.unlink()
    entry.mkdir()
    assert compile.compile(SHORT).startswith(b"\x7fELF")
    assert list(cache.iterdir()) == [entry]


def test_a_full_disk(cache: Path, calls: Callable[[], int], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", full)
    assert compile.compile(SHORT).startswith(b"\x7fELF")
    assert list(cache.iterdir()) == []


def test_the_oldest_go(cache: Path, fake: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    fake("printf '\\177ELF'; cat")
    monkeypatch.setattr(compile, "MOST_ENTRIES", 3)
    names: list[str] = []
    for number in range(3):
        compile.compile(f"{number}")
        [new] = {entry.name for entry in cache.iterdir()} - set(names)
        names.append(new)
        os.utime(cache / new, ns=(number, number))
    compile.compile("0")  # used again, so that the second is the oldest
    compile.compile("3")
    left = {entry.name for entry in cache.iterdir()}
    assert len(left) == 3
    assert names[1] not in left
    assert names[0] in left
    monkeypatch.setattr(compile, "MOST_BYTES", 2 * 37)
    compile.compile("4")
    assert len(list(cache.iterdir())) == 2


def test_without_argdist_nothing_is_imported_for_it() -> None:
    """Start-up counts: neither parser, ELF reader nor subprocess before they are needed."""
    import sys

    script = (
        "import sys; from tcpobs.cli import main\n"
        "try: main(['states', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'pycparser', 'elftools', 'subprocess', 'hashlib', 'json', 'typing'}\n"
        "found = [name for name in sys.modules if name.split('.')[0] in heavy or 'argdist' in name]\n"
        "print(found, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"
