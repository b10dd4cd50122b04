"""Debian packages of other releases and architectures, without touching the system's apt.

Each suite and architecture has an apt configuration and state of its own below build/vm/apt. The mirror is
the one that the machine's apt uses; Debian's signatures are checked by apt, and every package file against
the signed index each time it is used.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
from collections.abc import Iterable, Sequence
from functools import cmp_to_key
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "vm"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"

Package = dict[str, str]
"""A package's fields, as the index has them."""


class PackageError(Exception):
    """A suite or a package that is not to be had."""


class Suite:
    """The packages of one suite for one architecture."""

    def __init__(self, name: str, architecture: str) -> None:
        """Fetches the index. Raises PackageError when the suite is gone or its signature is wrong."""
        self.name, self.architecture = name, architecture
        folder = BUILD / "apt" / f"{name}-{architecture}"
        for state in ("lists/partial", "cache/archives/partial"):
            (folder / state).mkdir(parents=True, exist_ok=True)
        (folder / "status").touch()
        archive = ["security"] if name.endswith("-security") else []
        mirror = _output([str(ROOT / "packaging/mirror"), *archive])
        (folder / "sources").write_text(
            f"deb [arch={architecture} signed-by={KEYRING}] {mirror.strip()} {name} main\n"
        )
        (folder / "conf").write_text(
            f'Dir::State "{folder}";\nDir::State::status "{folder}/status";\nDir::Cache "{folder}/cache";\n'
            f'Dir::Etc::sourcelist "{folder}/sources";\nDir::Etc::sourceparts "-";\n'
            f'APT::Architecture "{architecture}";\nAPT::Architectures {{ "{architecture}"; }};\n'
            'APT::Sandbox::User "root";\nAPT::Update::Error-Mode "any";\n'
        )
        self._environment = {**os.environ, "APT_CONFIG": str(folder / "conf"), "LC_ALL": "C"}
        self._run("apt-get", "-qq", "update")
        stanzas = self._run("apt-cache", "dumpavail").split("\n\n")
        fields = (dict(re.findall(r"^([\w-]+): (.*)$", stanza, re.MULTILINE)) for stanza in stanzas)
        self._packages = [package for package in fields if package]

    def __str__(self) -> str:
        return f"{self.name} ({self.architecture})"

    def _run(self, *command: str, folder: Path | None = None) -> str:
        return _output(command, self._environment, folder, f"{self}: ")

    def find(self, pattern: str) -> list[Package]:
        """The packages whose whole name matches, oldest version first."""
        found = [package for package in self._packages if re.fullmatch(pattern, package["Package"])]
        return sorted(found, key=cmp_to_key(_compare_versions))

    def newest(self, pattern: str) -> Package:
        """The newest of them. Raises PackageError when there is none."""
        found = self.find(pattern)
        if not found:
            raise PackageError(f"{self} has no package {pattern}")
        return found[-1]

    def fetch(self, package: Package) -> Path:
        """The package's file: the one fetched before if it is what the index says, else a new one."""
        folder = BUILD / "packages" / package["SHA256"]
        path = folder / os.path.basename(package["Filename"])
        if not (path.exists() and _sha256(path) == package["SHA256"]):
            folder.mkdir(parents=True, exist_ok=True)
            for old in folder.iterdir():
                old.unlink()
            self._run(
                "apt-get", "-qq", "download", f"{package['Package']}={package['Version']}", folder=folder
            )
            (fetched,) = folder.iterdir()
            fetched.rename(path)  # apt writes a colon in a version as %3a
            if _sha256(path) != package["SHA256"]:
                raise PackageError(f"{self}: {path.name} is not what the index says")
        return path

    def unpack(self, packages: Iterable[Package], folder: Path) -> None:
        """Unpacks the packages over each other into a folder; nothing of theirs is run."""
        folder.mkdir(parents=True, exist_ok=True)
        for package in packages:
            _output(["dpkg-deb", "-x", str(self.fetch(package)), str(folder)])


def _compare_versions(one: Package, other: Package) -> int:
    """As dpkg does: negative when `one` is older."""
    for operator, result in (("lt", -1), ("gt", 1)):
        command = ["dpkg", "--compare-versions", one["Version"], operator, other["Version"]]
        if subprocess.run(command).returncode == 0:
            return result
    return 0


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _output(
    command: Sequence[str],
    environment: dict[str, str] | None = None,
    folder: Path | None = None,
    about: str = "",
) -> str:
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise PackageError(f"{about}{' '.join(command[:3])}: {last[0]}")
    return done.stdout
