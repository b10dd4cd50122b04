"""Symbols, debug files and USDT probes of real ELF files; damaged ones."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tcpobs.errors import TcpobsError
from tcpobs.tools.argdist import elf as elf_module
from tcpobs.tools.argdist.elf import Elf, UsdtArgument
from tcpobs.tools.argdist.names import nearest

from .built import build, run

PROGRAM = """
#include <stdio.h>
__attribute__((noinline)) int twice(int x) { return x * 2; }
static __attribute__((noinline)) int hidden(int x) { return x * 3 + getchar(); }
int main(int argc, char **argv) { return twice(argc) + hidden(argc); }
"""

LIBRARY = """
int plain(int x) { return x; }
int old_one(int x) { return x + 1; }
int old_two(int x) { return x + 2; }
int new_one(int x) { return x + 3; }
int gone_one(int x) { return x + 4; }
int gone_two(int x) { return x + 5; }
__asm__(".symver old_one, versioned@V1");
__asm__(".symver old_two, versioned@V2");
__asm__(".symver new_one, versioned@@V3");
__asm__(".symver gone_one, gone@V1");
__asm__(".symver gone_two, gone@V2");
"""
VERSIONS = "V1 { global: plain; versioned; gone; local: *; }; V2 { } V1; V3 { } V2;"

PROBES = """
#define NOTE(name, semaphore, arguments) __asm__ volatile ( \\
    "990: nop\\n" \\
    ".pushsection .note.stapsdt,\\"\\",\\"note\\"\\n.balign 4\\n" \\
    ".4byte 992f-991f, 994f-993f, 3\\n" \\
    "991: .asciz \\"stapsdt\\"\\n992: .balign 4\\n" \\
    "993: .8byte 990b, _.stapsdt.base, " semaphore "\\n" \\
    ".asciz \\"shop\\"\\n.asciz \\"" name "\\"\\n" \\
    ".asciz \\"" arguments "\\"\\n994: .balign 4\\n.popsection\\n" \\
    ".ifndef _.stapsdt.base\\n" \\
    ".pushsection .stapsdt.base,\\"aG\\",\\"progbits\\",.stapsdt.base,comdat\\n" \\
    ".weak _.stapsdt.base\\n.hidden _.stapsdt.base\\n_.stapsdt.base: .space 1\\n" \\
    ".size _.stapsdt.base, 1\\n.popsection\\n.endif\\n")
unsigned short sale_semaphore __attribute__((section(".probes")));
__attribute__((noinline)) void sell(void) {
    NOTE("sale", "sale_semaphore", "-4@%%edi 8@-8(%%rbp) -2@$5");
    NOTE("closed", "0", "");
    NOTE("arm", "0", "8@[sp, 16] -4@w0 1@12 1@13 1@14 1@15 1@16 1@17 1@18 4f@x12");
}
int main(void) { sell(); return sale_semaphore; }
""".replace("%%", "%")


def addresses(path: str) -> dict[str, int]:
    """The functions of .symtab, by nm."""
    lines = re.findall(r"^([0-9a-f]+) [tTiW] (\S+)$", run("nm", path), re.MULTILINE)
    return {name: int(address, 16) for address, name in lines}


def code(path: str, offset: int, size: int) -> bytes:
    """Of the file at this place."""
    return Path(path).read_bytes()[offset : offset + size]


def is_function(path: str, name: str) -> None:
    """The symbol is where nm says, and its offset leads to the code that objdump shows there."""
    with Elf(path) as elf:
        (symbol,) = elf.find(name)
        assert elf.functions()[name] == [symbol]
    assert symbol.address == addresses(path)[name]
    assert symbol.size > 0
    assert not symbol.indirect
    listing = run("objdump", "-d", f"--disassemble={name}", path)
    first = re.search(rf"^\s*{symbol.address:x}:\t((?:[0-9a-f]+ )+)", listing, re.MULTILINE)
    assert first
    expected = bytes.fromhex(first.group(1))
    if os.uname().machine == "aarch64":  # shown as one number
        expected = expected[::-1]
    assert code(path, symbol.offset, len(expected)) == expected


@pytest.mark.parametrize("flags", [("-pie", "-fPIE"), ("-no-pie",), ("-static",), ("-static-pie", "-fPIE")])
def test_offsets(tmp_path: Path, flags: tuple[str, ...]) -> None:
    path = build(tmp_path / "program", PROGRAM, *flags)
    is_function(path, "twice")
    is_function(path, "hidden")
    with Elf(path) as elf:
        assert elf.find("nowhere") == []
        assert elf.find("wice") == []
        assert "getchar" not in elf.functions() or "-static" in flags[0]


def test_stripped_library_has_its_dynamic_symbols(tmp_path: Path) -> None:
    path = build(tmp_path / "libplain.so", "int twice(int x) { return 2 * x; }", "-shared", "-fPIC")
    with Elf(path) as elf:
        before = elf.find("twice")
    run("strip", path)
    with Elf(path) as elf:
        assert elf.find("twice") == before
        assert list(elf.functions()) == ["twice"]


def test_versions(tmp_path: Path) -> None:
    (tmp_path / "versions").write_text(VERSIONS)
    flags = ("-shared", "-fPIC", "-Wl,--version-script=versions")
    path = build(tmp_path / "libversions.so", LIBRARY, *flags)
    home = addresses(path)
    for stripped in (False, True):
        if stripped:
            run("strip", path)
        with Elf(path) as elf:
            for names in (elf.functions(), {}):
                found = {
                    name: sorted(symbol.address for symbol in (names.get(name) or elf.find(name)))
                    for name in (
                        "plain",
                        "plain@V1",
                        "versioned",
                        "versioned@V3",
                        "versioned@V2",
                        "gone",
                        "gone@V1",
                    )
                }
                assert found == {
                    "plain": [home["plain"]],
                    "plain@V1": [home["plain"]],
                    "versioned": [home["new_one"]],
                    "versioned@V3": [home["new_one"]],
                    "versioned@V2": [home["old_two"]],
                    "gone": [home["gone_one"], home["gone_two"]],
                    "gone@V1": [home["gone_one"]],
                }
                assert [symbol.name for symbol in elf.find("versioned")] == ["versioned"]
                assert {symbol.name for symbol in elf.find("gone")} == {"gone@V1", "gone@V2"}


def test_same_name_twice(tmp_path: Path) -> None:
    one = (
        "static __attribute__((noinline)) int f(int x) { return x + %d; } int %s(int x) { return f(x) * x; }"
    )
    (tmp_path / "two.c").write_text(one % (2, "g"))
    path = build(tmp_path / "library.so", one % (1, "h"), "-shared", "-fPIC", "two.c")
    with Elf(path) as elf:
        assert len({symbol.offset for symbol in elf.find("f")}) == 2
        assert elf.functions()["f"] == elf.find("f")


def test_indirect_function(tmp_path: Path) -> None:
    source = """
    static int one(int x) { return x + 1; }
    static int (*resolve(void))(int) { return one; }
    int chosen(int) __attribute__((ifunc("resolve")));
    """
    with Elf(build(tmp_path / "library.so", source, "-shared", "-fPIC")) as elf:
        (symbol,) = elf.find("chosen")
        assert symbol.indirect
        assert not elf.find("one")[0].indirect
        assert symbol.address == elf.find("resolve")[0].address


def separated(path: str, debug: Path, link: bool) -> None:
    """Moves the debug information to its own file."""
    debug.parent.mkdir(parents=True, exist_ok=True)
    run("objcopy", "--only-keep-debug", path, str(debug))
    run("strip", path)
    if link:
        run("objcopy", f"--add-gnu-debuglink={debug}", path)


def test_debug_file_by_build_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elf_module, "DEBUG_FOLDER", str(tmp_path / "debug"))
    path = build(tmp_path / "program", PROGRAM, "-g")
    with Elf(path) as elf:
        before = elf.find("hidden")
        build_id = elf.build_id
        assert elf.debug_file() is None, "it has its own"
    notes = re.search(r"Build ID: (\w+)", run("readelf", "-n", path))
    assert notes
    assert build_id == notes.group(1)
    debug = tmp_path / "debug" / ".build-id" / build_id[:2] / f"{build_id[2:]}.debug"
    separated(path, debug, link=False)
    with Elf(path) as elf:
        assert elf.debug_file() == str(debug)
        assert elf.find("hidden") == before, "offsets are those of the program, not of the debug file"
        assert elf.functions()["hidden"] == before
    shutil.copy(build(tmp_path / "other", PROGRAM + "int other;", "-g"), debug)
    with Elf(path) as elf:
        assert elf.debug_file() is None, "that is another build's"
        assert elf.find("hidden") == []
    debug.write_bytes(b"\x7fELF and no more")
    with Elf(path) as elf:
        assert elf.debug_file() is None


@pytest.mark.parametrize("place", ["program.debug", ".debug/program.debug", "elsewhere/{0}/program.debug"])
def test_debug_file_by_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    monkeypatch.setattr(elf_module, "DEBUG_FOLDER", str(tmp_path / "elsewhere"))
    path = build(tmp_path / "program", PROGRAM, "-g", "-Wl,--build-id=none")
    debug = tmp_path / place.format(str(tmp_path)[1:])
    separated(path, debug, link=True)
    way = tmp_path / "folder" / "link"
    way.parent.mkdir()
    way.symlink_to(path)
    for name in (path, str(way)):
        with Elf(name) as elf:
            assert elf.build_id == ""
            assert elf.debug_file() == str(debug)
            assert len(elf.find("hidden")) == 1
    with debug.open("ab") as file:
        file.write(b"changed")
    with Elf(path) as elf:
        assert elf.debug_file() is None


def test_debug_file_through_a_process(tmp_path: Path) -> None:
    path = build(tmp_path / "program", PROGRAM, "-g")
    separated(path, tmp_path / "program.debug", link=True)
    root = f"/proc/{os.getpid()}/root"
    with Elf(f"{root}{path}") as elf:
        assert elf.debug_file() == f"{root}{tmp_path}/program.debug"
    with Elf(f"/proc/{os.getpid()}/exe") as elf:
        assert elf.folder() == f"{root}{os.path.dirname(os.path.realpath(sys.executable))}"


def test_usdt(tmp_path: Path) -> None:
    path = build(tmp_path / "program", PROBES)
    with Elf(path) as elf:
        (sell,) = elf.find("sell")
        sale, closed, arm = elf.usdt()
        assert all(sell.address <= probe.address < sell.address + sell.size for probe in (sale, closed, arm))
        assert code(path, sale.address, 1) == code(path, closed.address, 1)
    assert (sale.provider, sale.name, sale.semaphore) == ("shop", "sale", True)
    assert sale.arguments == (
        UsdtArgument(4, True, "-4@%edi"),
        UsdtArgument(8, False, "8@-8(%rbp)"),
        UsdtArgument(2, True, "-2@$5"),
    )
    assert (closed.provider, closed.name, closed.semaphore, closed.arguments) == ("shop", "closed", False, ())
    assert len(arm.arguments) == 10
    assert arm.arguments[:2] == (UsdtArgument(8, False, "8@[sp, 16]"), UsdtArgument(4, True, "-4@w0"))
    assert arm.arguments[9] == UsdtArgument(4, False, "4f@x12")


@pytest.mark.skipif(not os.path.exists("/usr/bin/python3.11"), reason="it has probes of its own")
def test_usdt_of_python() -> None:
    with Elf("/usr/bin/python3.11") as elf:
        probes = {f"{probe.provider}:{probe.name}": probe for probe in elf.usdt()}
    assert len(probes["python:gc__done"].arguments) == 1
    assert probes["python:gc__done"].semaphore
    assert [argument.size for argument in probes["python:function__entry"].arguments] == [8, 8, 4]


def test_no_file_and_no_elf(tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("#!/bin/sh\n")
    for path, message in (
        (tmp_path / "nothing", "cannot open .*/nothing .No such file.*: give the path"),
        (tmp_path, "cannot open .* .Is a directory.: give"),
        (script, "no program and no library"),
    ):
        with pytest.raises(TcpobsError, match=message):
            Elf(str(path))


def test_another_machine(tmp_path: Path) -> None:
    data = bytearray(Path(build(tmp_path / "program", PROGRAM)).read_bytes())
    for place, value in ((18, 8), (4, 1), (5, 2)):  # MIPS; 32 bits; big-endian
        changed = data.copy()
        changed[place] = value
        (tmp_path / "other").write_bytes(changed)
        with pytest.raises(TcpobsError, match="is for another machine: one for"):
            Elf(str(tmp_path / "other"))


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A library with versions and probes."""
    folder = tmp_path_factory.mktemp("sound")
    (folder / "versions").write_text(VERSIONS)
    flags = ("-shared", "-fPIC", "-Wl,--version-script=versions", "-Wl,-z,noseparate-code")
    return Path(build(folder / "library.so", PROBES + LIBRARY, *flags)).read_bytes()


@settings(max_examples=150)
@given(data=st.data())
def test_damaged(tmp_path_factory: pytest.TempPathFactory, sound: bytes, data: st.DataObject) -> None:
    tables = st.integers(0, 800) | st.integers(len(sound) - 2500, len(sound) - 1)
    changes = data.draw(st.lists(st.tuples(tables, st.binary(min_size=1, max_size=4)), max_size=6))
    changed = bytearray(sound)
    for place, value in changes:
        changed[place : place + len(value)] = value
    length = data.draw(st.just(len(sound)) | st.integers(0, len(sound)))
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(changed[:length])
    try:
        with Elf(str(path)) as elf:
            elf.functions()
            elf.find("versioned")
            elf.usdt()
            elf.debug_file()
    except TcpobsError as error:
        assert "\n" not in str(error)  # noqa: PT017 (there need be none)


def test_nearest() -> None:
    names = {f"function_{number}" for number in range(50_000)} | {"pthread_create", "malloc", "calloc"}
    assert nearest("pthread_creat", names) == ["pthread_create"]
    assert nearest("maloc", names)[0] == "malloc"
    assert nearest("xyz", names) == []
