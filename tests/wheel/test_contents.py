"""What is in the wheels, and what is not."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from email.parser import BytesParser
from io import BytesIO
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from elftools.elf.dynamic import DynamicSection, DynamicTag
from elftools.elf.elffile import ELFFile
from elftools.elf.gnuversions import GNUVerNeedSection
from elftools.elf.sections import SymbolTableSection

if TYPE_CHECKING:
    from collections.abc import Mapping
    from email.message import Message

    from wheel.conftest import Wheel

MOST_BYTES = 500 * 1024
NEWEST_GLIBC = (2, 17)

PLATFORMS = {
    "manylinux": ["manylinux_2_17_{}", "manylinux2014_{}"],
    "musllinux": ["musllinux_1_2_{}"],
}
MACHINES = {"x86_64": "EM_X86_64", "aarch64": "EM_AARCH64"}

LOADERS = {"x86_64": "ld-linux-x86-64.so.2", "aarch64": "ld-linux-aarch64.so.1"}
"""glibc's loaders: part of the C library, so a library may need its machine's."""

LICENCES = {
    "tcpobs/_lib/licenses/libbpf/LICENSE.BSD-2-Clause": b"Redistribution and use in source and binary forms",
    "tcpobs/_lib/licenses/libbpf/LICENSE.LGPL-2.1": b"GNU LESSER GENERAL PUBLIC LICENSE",
    "tcpobs/_lib/licenses/elfutils/COPYING": b"GNU GENERAL PUBLIC LICENSE",
    "tcpobs/_lib/licenses/elfutils/COPYING-GPLV2": b"GNU GENERAL PUBLIC LICENSE",
    "tcpobs/_lib/licenses/elfutils/COPYING-LGPLV3": b"GNU LESSER GENERAL PUBLIC LICENSE",
    "tcpobs/_lib/licenses/zlib/LICENSE": b"Jean-loup Gailly and Mark Adler",
    "*.dist-info/licenses/LICENSE": b"Apache License",
    "*.dist-info/licenses/bpf/LICENSE": b"Redistribution and use in source and binary forms",
    "tcpobs/_objects/source/LICENSE": b"Redistribution and use in source and binary forms",
    "tcpobs/_objects/include/bpf/LICENSE": b"LGPL-2.1 OR BSD-2-Clause",
    "tcpobs/_objects/include/bpf/LICENSE.BSD-2-Clause": b"Redistribution and use in source and binary forms",
}


HERE = ("manylinux", os.uname().machine)
"""What `make test` builds; the others are there for `make test-all`."""


@pytest.fixture(
    params=[
        pytest.param(which, id="-".join(which), marks=[pytest.mark.release] * (which != HERE))
        for which in product(PLATFORMS, MACHINES)
    ]
)
def wheel(request: pytest.FixtureRequest, wheels: Mapping[tuple[str, str], Wheel]) -> Wheel:
    """Each of the four."""
    platform, machine = request.param
    return wheels[platform, machine]


@pytest.fixture
def libbpf(wheel: Wheel) -> ELFFile:
    """Its libbpf.so.1."""
    return ELFFile(BytesIO(wheel.read("tcpobs/_lib/libbpf.so.1")))


def _platforms(wheel: Wheel) -> list[str]:
    return [platform.format(wheel.machine) for platform in PLATFORMS[wheel.platform]]


def _text(tag: DynamicTag, attribute: str) -> object:
    # Set by pyelftools on those tags that have a text; its types do not say so.
    return vars(tag)[attribute]


def _message(wheel: Wheel, name: str) -> Message:
    return BytesParser().parsebytes(wheel.read(f"*.dist-info/{name}"))


def test_size(wheel: Wheel) -> None:
    assert wheel.path.stat().st_size <= MOST_BYTES


def test_tags(wheel: Wheel) -> None:
    assert wheel.path.name.endswith(f"-py3-none-{'.'.join(_platforms(wheel))}.whl")
    message = _message(wheel, "WHEEL")
    assert sorted(message.get_all("Tag", [])) == sorted(f"py3-none-{tag}" for tag in _platforms(wheel))
    assert message["Root-Is-Purelib"] == "false"


def test_auditwheel_agrees_with_the_tag(wheel: Wheel) -> None:
    command = [sys.executable, "-m", "auditwheel", "show", str(wheel.path)]
    said = " ".join(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    assert f'following platform tag: "{_platforms(wheel)[0]}".' in said


@pytest.mark.parametrize("python", ["3.9", "3.14"])
def test_pip_takes_it(wheel: Wheel, python: str, checkout: Path, tmp_path: Path) -> None:
    """Pip finds the tags fit for each of the platforms, and the RECORD true."""
    for platform in _platforms(wheel):
        target = tmp_path / platform
        for_them = [f"--platform={platform}", f"--python-version={python}", "--only-binary=:all:"]
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--isolated", "--no-index", "--no-compile"]
        where = [f"--find-links={checkout}/build/dependencies", f"--target={target}"]
        subprocess.run([*pip, *for_them, *where, wheel.path], check=True)
        assert (target / "tcpobs/_lib/libbpf.so.1").is_file()


def test_no_paths_of_the_host(wheel: Wheel, checkout: Path) -> None:
    paths = {str(checkout), f"{Path.home()}/", sys.prefix, "/home/", "/root/", "site-packages", "/ziglang"}
    pattern = re.compile(b"|".join(re.escape(path.encode()) for path in sorted(paths)))
    found = {
        name: pattern.findall(wheel.read(name).replace(b"/proc/PID/root/", b"")) for name in wheel.names()
    }
    assert {name: paths for name, paths in found.items() if paths} == {}


def test_no_more_files_than_meant(wheel: Wheel) -> None:
    stem = wheel.path.name.split("-py3-")[0]
    places = (
        r"tcpobs/(libbpf/|tools/(argdist/)?)?\w+\.py",
        r"tcpobs/py\.typed",
        r"tcpobs/_lib/(libbpf\.so\.1|NOTICE|licenses/\w+/[\w.-]+)",
        r"tcpobs/_objects/source/(LICENSE|\w+\.bpf\.[ch]|events\.h)",
        r"tcpobs/_objects/include/bpf/([\w.]+\.h|LICENSE(\.BSD-2-Clause)?)",
        r"tcpobs/_objects/include/linux/errno\.h",
        rf"tcpobs/_objects/{wheel.machine}/\w+\.bpf\.o",
        rf"{re.escape(stem)}\.dist-info/(METADATA|WHEEL|RECORD|entry_points\.txt|licenses/(bpf/)?LICENSE)",
    )
    assert [name for name in wheel.names() if not re.fullmatch("|".join(places), name)] == []


def test_the_library_is_for_the_machine(wheel: Wheel, libbpf: ELFFile) -> None:
    assert libbpf["e_machine"] == MACHINES[wheel.machine]
    assert libbpf["e_type"] == "ET_DYN"


def test_the_library_needs_libc_only(wheel: Wheel, libbpf: ELFFile) -> None:
    section = libbpf.get_section_by_name(".dynamic")
    assert isinstance(section, DynamicSection)
    tags = list(section.iter_tags())
    needed = {_text(tag, "needed") for tag in tags if tag.entry.d_tag == "DT_NEEDED"}
    if wheel.platform == "manylinux":
        assert needed - {LOADERS[wheel.machine]} == {"libc.so.6"}
    else:
        assert needed == {f"libc.musl-{wheel.machine}.so.1"}
    assert [_text(tag, "soname") for tag in tags if tag.entry.d_tag == "DT_SONAME"] == ["libbpf.so.1"]
    assert not [tag for tag in tags if tag.entry.d_tag in ("DT_RPATH", "DT_RUNPATH")]


def test_the_library_runs_with_glibc_of_2012(wheel: Wheel, libbpf: ELFFile) -> None:
    section = libbpf.get_section_by_name(".gnu.version_r")
    if wheel.platform == "musllinux":
        assert section is None
        return
    assert isinstance(section, GNUVerNeedSection)
    versions = [needed.name for _, of_library in section.iter_versions() for needed in of_library]
    assert versions
    for version in versions:
        match = re.fullmatch(r"GLIBC_(\d+)\.(\d+)(\.\d+)?", version)
        assert match, version
        assert (int(match[1]), int(match[2])) <= NEWEST_GLIBC, version


def test_the_library_shows_only_what_libbpf_does(libbpf: ELFFile) -> None:
    """Neither libelf's nor zlib's names get in the way of others in the process."""
    section = libbpf.get_section_by_name(".dynsym")
    assert isinstance(section, SymbolTableSection)
    shown = {symbol.name for symbol in section.iter_symbols() if symbol["st_shndx"] != "SHN_UNDEF"}
    assert {"bpf_object__open_mem", "btf__free", "ring_buffer__new", "libbpf_major_version"} <= shown
    ours = re.compile(
        r"(bpf|btf|libbpf|ring_buffer|user_ring_buffer|perf_buffer|user_ring|ring)_\w+|LIBBPF_[\d.]+"
    )
    assert [name for name in shown if not ours.fullmatch(name)] == []


def test_objects_are_for_the_machine_alone(wheel: Wheel, checkout: Path) -> None:
    objects = [name for name in wheel.names() if name.endswith(".o")]
    programs = [path.name.replace(".c", ".o") for path in (checkout / "bpf").glob("*.bpf.c")]
    assert sorted(objects) == sorted(f"tcpobs/_objects/{wheel.machine}/{program}" for program in programs)
    assert len(objects) >= 2
    for name in objects:
        elf = ELFFile(BytesIO(wheel.read(name)))
        assert elf["e_machine"] == "EM_BPF"
        sections = [section.name for section in elf.iter_sections()]
        assert {".BTF", ".BTF.ext"} <= set(sections), name
        assert [section for section in sections if ".debug" in section] == [], name


def test_headers_for_generated_programs(wheel: Wheel) -> None:
    """All that argdist's programs include, and what those include in turn: the host has none."""
    shipped = {name for name in wheel.names() if name.endswith(".h")}
    headers = ["bpf_core_read.h", "bpf_endian.h", "bpf_helpers.h", "bpf_tracing.h", "usdt.bpf.h"]
    for header in [*headers, "bpf_helper_defs.h"]:
        text = wheel.read(f"tcpobs/_objects/include/bpf/{header}").decode()
        if header != "bpf_helper_defs.h":  # it has none
            assert "SPDX-License-Identifier: (LGPL-2.1 OR BSD-2-Clause)" in text, header
        for quoted in re.findall(r'^#include "(.*)"', text, re.M):
            assert f"tcpobs/_objects/include/bpf/{quoted}" in shipped
        for system in re.findall(r"^#include <(.*)>", text, re.M):
            assert f"tcpobs/_objects/include/{system}" in shipped
    assert len(re.findall(r"\(\* const bpf_", text)) > 200


def test_licences(wheel: Wheel) -> None:
    for name, text in LICENCES.items():
        assert text in wheel.read(name), name


def test_notice_names_the_versions(wheel: Wheel, checkout: Path) -> None:
    """The notice beside the library is of the sources that were fetched."""
    sources = (checkout / "packaging/libbpf/sources").read_text()
    notice = wheel.read("tcpobs/_lib/NOTICE").decode()
    versions = re.findall(r"\b(libbpf|elfutils|zlib) (\d+(?:\.\d+)+)", notice)
    assert {package for package, _ in versions} == {"libbpf", "elfutils", "zlib"}
    for package, version in versions:
        assert re.search(rf"/{package}_(?:\S+\+really)?{re.escape(version)}\.orig\b", sources), (
            package,
            version,
        )


def test_metadata(wheel: Wheel) -> None:
    message = _message(wheel, "METADATA")
    requires = [requirement.replace('"', "'") for requirement in message.get_all("Requires-Dist", [])]
    assert sorted(requires) == [
        "pycparser>=2.21",
        "pyelftools>=0.31",
        "systemd-python>=234; extra == 'journal'",
        "ziglang>=0.13; extra == 'compiler'",
    ]
    assert message["Requires-Python"] == ">=3.9"
    assert wheel.path.name.startswith(f"{message['Name']}-{message['Version']}-")


def test_entry_point(wheel: Wheel) -> None:
    lines = wheel.read("*.dist-info/entry_points.txt").decode().split("\n")
    assert [line for line in lines if line] == ["[console_scripts]", "tcpobs = tcpobs.cli:main"]
