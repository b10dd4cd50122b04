"""The wheels in dist/, and a Debian 11 (bullseye) root to install one in."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).resolve().parents[2]
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")


class Wheel(NamedTuple):
    """A built wheel: `platform` is manylinux or musllinux."""

    path: Path
    platform: str
    machine: str

    def names(self) -> list[str]:
        """The files in it."""
        with ZipFile(self.path) as archive:
            return archive.namelist()

    def read(self, name: str) -> bytes:
        """A file's content; `*.dist-info/` stands for the one such folder."""
        with ZipFile(self.path) as archive:
            if name.startswith("*.dist-info/"):
                name = self.path.name.split("-py3-")[0] + name[1:]
            return archive.read(name)


@pytest.fixture(scope="session")
def checkout() -> Path:
    """The checkout's folder."""
    return ROOT


@pytest.fixture(scope="session")
def wheels(checkout: Path) -> dict[tuple[str, str], Wheel]:
    """The wheels in dist/, by platform and machine."""
    found: dict[tuple[str, str], Wheel] = {}
    paths = sorted((checkout / "dist").glob("*.whl"))
    for path in paths:
        tag = path.stem.rpartition("-")[2]
        match = re.match(r"(manylinux|musllinux)_\d+_\d+_(x86_64|aarch64)", tag)
        assert match, f"{path.name} is no wheel of ours"
        platform, machine = match.groups()
        found[platform, machine] = Wheel(path, platform, machine)
    assert len(found) == len(paths), f"more than one wheel of a kind in dist/, run `make wheel`: {paths}"
    return found


@pytest.fixture(scope="session")
def bullseye_root(checkout: Path, pytestconfig: pytest.Config) -> Path:
    """A minimal bullseye (Python 3.9, glibc 2.31), made once and kept in build/. To be left as it is."""
    root = checkout / "build/roots/bullseye"
    if root.exists():
        return root
    assert os.geteuid() == 0, "debootstrap and chroot need root"
    reporter = pytestconfig.pluginmanager.get_plugin("terminalreporter")
    if reporter:
        reporter.write_line(f"\nmaking {root.relative_to(checkout)} with debootstrap, which takes a minute")
    root.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="bullseye-", dir=root.parent) as temporary:
        unfinished = Path(temporary) / "root"
        _debootstrap(unfinished, _output([checkout / "packaging/mirror"]).strip())
        for cache in ("var/cache/apt", "var/lib/apt/lists"):
            shutil.rmtree(unfinished / cache)
        unfinished.rename(root)
    return root


def _debootstrap(root: Path, mirror: str) -> None:
    # In a mount namespace of its own: what it mounts goes away even when it fails.
    command = ["unshare", "--mount", "--propagation", "private", "debootstrap", f"--keyring={KEYRING}"]
    options = ["--variant=minbase", "--include=python3,python3-venv"]
    _output([*command, *options, "bullseye", root, mirror])


def _output(command: list[str | Path]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout
