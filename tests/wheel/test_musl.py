"""The musl wheel's libbpf.so.1, run by musl.

Debian has no Python linked with musl, nor an Alpine root, so it is a small C program that loads the library:
built by zig for musl, and run by the loader of Debian's package musl.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from elftools.elf.elffile import ELFFile
from elftools.elf.segments import InterpSegment

if TYPE_CHECKING:
    from collections.abc import Mapping

    from wheel.conftest import Wheel

pytestmark = pytest.mark.release

MACHINE = os.uname().machine
LOADER = f"/lib/ld-musl-{MACHINE}.so.1"


def test_library_loads_and_attaches(wheels: Mapping[tuple[str, str], Wheel], tmp_path: Path) -> None:
    wheel = wheels["musllinux", MACHINE]
    library, object, program = tmp_path / "libbpf.so.1", tmp_path / "states.bpf.o", tmp_path / "attach"
    library.write_bytes(wheel.read("tcpobs/_lib/libbpf.so.1"))
    object.write_bytes(wheel.read(f"tcpobs/_objects/{MACHINE}/states.bpf.o"))
    source = Path(__file__).with_name("attach.c")
    flags = ["-target", f"{MACHINE}-linux-musl", "-dynamic", "-O1", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([sys.executable, "-m", "ziglang", "cc", *flags, "-o", program, source], check=True)

    with program.open("rb") as file:
        segments = ELFFile(file).iter_segments()
        loaders = [segment.get_interp_name() for segment in segments if isinstance(segment, InterpSegment)]
    assert loaders == [LOADER]
    done = subprocess.run([program, library, object], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "libbpf 1.5 OK\n"

    # What it needs by the name of libc.musl-ARCH.so.1 is the one C library that runs.
    command = [LOADER, "--list", str(library)]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    assert {line.partition(" => ")[2].partition(" ")[0] for line in listed if "=>" in line} == {LOADER}
