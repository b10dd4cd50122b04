"""The same sources give the same bytes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from wheel.conftest import Wheel

pytestmark = pytest.mark.release

MACHINE = os.uname().machine
TARGETS = {"manylinux": "{}-linux-gnu.2.17", "musllinux": "{}-linux-musl"}


def _run(command: list[str], checkout: Path, **environment: str) -> None:
    # What an outer make hands down (its flags, its jobs) is not for these.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(command, cwd=checkout, env=inherited | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_libbpf(checkout: Path, tmp_path: Path) -> None:
    """Built anew, elsewhere, with nothing cached."""
    target = TARGETS["manylinux"].format(MACHINE)
    _run(
        [
            "make",
            f"-j{os.cpu_count()}",
            "-f",
            "packaging/libbpf/Makefile",
            f"TARGET={target}",
            f"OUT={tmp_path}",
        ],
        checkout,
        ZIG_GLOBAL_CACHE_DIR=str(tmp_path / "zig-global"),
        ZIG_LOCAL_CACHE_DIR=str(tmp_path / "zig-local"),
    )
    built = checkout / "build/libbpf" / target / "libbpf.so.1"
    assert (tmp_path / "libbpf.so.1").read_bytes() == built.read_bytes()


def test_objects(checkout: Path, tmp_path: Path, wheels: Mapping[tuple[str, str], Wheel]) -> None:
    """Compiled anew, the BPF objects are those in the wheels."""
    names = {
        wheel: [name.removeprefix("tcpobs/_objects/") for name in wheel.names() if name.endswith(".o")]
        for wheel in wheels.values()
    }
    paths = {f"{tmp_path}/{name}" for of_wheel in names.values() for name in of_wheel}
    _run(["make", f"-j{os.cpu_count()}", f"OBJECTS={tmp_path}", *sorted(paths)], checkout)
    for wheel, of_wheel in names.items():
        for name in of_wheel:
            assert (tmp_path / name).read_bytes() == wheel.read(f"tcpobs/_objects/{name}"), name


@pytest.mark.parametrize("platform", TARGETS)
@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_wheel(
    checkout: Path, tmp_path: Path, wheels: Mapping[tuple[str, str], Wheel], platform: str, machine: str
) -> None:
    """Packed anew, another day, for another user's umask."""
    pip = [sys.executable, "-m", "pip", "wheel"]
    before = os.umask(0o077)
    try:
        _run(
            [*pip, "--quiet", "--no-build-isolation", "--no-deps", f"--wheel-dir={tmp_path}", "."],
            checkout,
            TCPOBS_TARGET=TARGETS[platform].format(machine),
        )
    finally:
        os.umask(before)
    (again,) = tmp_path.glob("*.whl")
    wheel = wheels[platform, machine]
    assert again.name == wheel.path.name
    assert again.read_bytes() == wheel.path.read_bytes()
