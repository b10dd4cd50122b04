"""The kernels of the matrix, unpacked and ready to boot."""

from __future__ import annotations

import os
import re
import struct
import subprocess
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

from elftools.elf.elffile import ELFFile

from vm.packages import BUILD, Package, PackageError, Suite

LIST = Path(__file__).parent / "kernels.txt"


class Line(NamedTuple):
    """A line of kernels.txt."""

    name: str
    suite: str
    architecture: str
    version: str
    tests: Sequence[str]


class Kernel(NamedTuple):
    """A kernel that can be booted."""

    name: str
    architecture: str
    package: str
    folder: Path

    @property
    def tree(self) -> Path:
        """Its packages, unpacked."""
        return self.folder / "tree"

    @property
    def release(self) -> str:
        """What `uname -r` says there."""
        (release,) = os.listdir(self.tree / "lib/modules")
        return release

    @property
    def modules(self) -> Path:
        """The folder of its modules."""
        return self.tree / "lib/modules" / self.release

    @property
    def image(self) -> Path:
        """What boots; since 7.x it is beside the modules."""
        path = self.tree / "boot" / f"vmlinuz-{self.release}"
        return path if path.exists() else self.modules / "vmlinuz"

    @property
    def headers(self) -> Path:
        """Its headers, unpacked, once `headers` has fetched them."""
        return self.folder / "headers"

    @property
    def types(self) -> Path:
        """Its BTF, once `types` has taken it out of the image."""
        return self.folder / "btf"


def lines() -> list[Line]:
    """The list, as it is written."""
    with open(LIST) as file:
        fields = [line.split() for line in file if line.split() and not line.startswith("#")]
    return [
        Line(name, suite, architecture, version, tests.split(","))
        for name, suite, architecture, version, tests in fields
    ]


def find(line: Line) -> Kernel | None:
    """Fetches and unpacks the kernel of a line, unless that was done before.

    None for a release candidate when there is none. Raises PackageError, which names what is missing.
    """
    suite = Suite(line.suite, line.architecture)
    image = _image(suite, line)
    if not image:
        return None
    folder = BUILD / "kernels" / f"{line.name}-{image['Version']}"
    packages = [image, *_parts(suite, image)]
    kernel = Kernel(line.name, line.architecture, f"{image['Package']} {image['Version']}", folder)
    for package in packages:
        suite.fetch(package)
    if not folder.exists():
        unfinished = _unfinished(folder)
        suite.unpack(packages, unfinished / "tree")
        _arrange(unfinished / "tree")
        unfinished.rename(folder)
    return kernel


def headers(line: Line, kernel: Kernel) -> None:
    """Fetches and unpacks the headers of a kernel, for tools that compile; unless that was done before.

    Raises PackageError, which names what is missing.
    """
    if kernel.headers.exists():
        return
    suite = Suite(line.suite, line.architecture)
    own = suite.newest(re.escape(f"linux-headers-{kernel.release}"))
    version = kernel.package.split()[1]
    if own["Version"] != version:
        raise PackageError(f"{suite} has the headers of {own['Version']}, not of {version}")
    names = re.findall(r"linux-(?:headers|kbuild)-\d\S*", own["Depends"])
    unfinished = _unfinished(kernel.headers)
    suite.unpack([own, *(suite.newest(re.escape(name)) for name in names)], unfinished)
    unfinished.rename(kernel.headers)


def types(kernel: Kernel) -> None:
    """Takes the BTF out of an x86 kernel's image, unless that was done before."""
    if kernel.types.exists():
        return
    image = kernel.image.read_bytes()
    # Documentation/arch/x86/boot.rst: the sectors of the setup, and where in what follows the kernel is.
    start, length = struct.unpack_from("=II", image, 0x248)
    start += (image[0x1F1] + 1) * 512
    section = ELFFile(BytesIO(_unpacked(image[start : start + length]))).get_section_by_name(".BTF")
    if not section:
        raise PackageError(f"{kernel.image} has no BTF")
    unfinished = kernel.types.with_suffix(".new")
    unfinished.write_bytes(section.data())
    unfinished.rename(kernel.types)


def _unpacked(packed: bytes) -> bytes:
    """What Debian's kernels are packed with; the size is behind it."""
    tool = "lz4" if packed.startswith(b"\x02\x21\x4c\x18") else "zstd"
    return subprocess.run([tool, "-dcq"], input=packed[:-4], capture_output=True, check=True).stdout


def _unfinished(folder: Path) -> Path:
    """Where a folder is filled before it gets its name; without what a run that was ended left there."""
    unfinished = folder.with_name(f"{folder.name}.new")
    subprocess.run(["rm", "-rf", str(unfinished)], check=True)
    return unfinished


def _image(suite: Suite, line: Line) -> Package | None:
    found = suite.find(rf"linux-image-\d\S*-cloud-{line.architecture}")
    candidates = [package for package in found if "~rc" in package["Version"]]
    released = [package for package in found if "~rc" not in package["Version"]]
    if line.version == "candidate":
        return candidates[-1] if candidates else None
    if line.version != "newest":
        released = [package for package in released if package["Version"].startswith(line.version)]
    if not released:
        raise PackageError(f"{suite} has no cloud kernel {line.version}: mend its line in {LIST.name}")
    return released[-1]


def _parts(suite: Suite, image: Package) -> list[Package]:
    """The packages that hold the kernel and its modules, where the image package is empty (since 6.19)."""
    names = re.findall(r"linux-(?:binary|modules)-\d\S*", image.get("Depends", ""))
    return [suite.newest(re.escape(name)) for name in names]


def _arrange(tree: Path) -> None:
    """Makes the tree one that modprobe finds its way in: newer packages have everything below usr/."""
    if not (tree / "lib").exists():
        (tree / "lib").symlink_to("usr/lib")
    (release,) = os.listdir(tree / "lib/modules")
    subprocess.run(["depmod", "-b", str(tree), release], check=True, capture_output=True)
