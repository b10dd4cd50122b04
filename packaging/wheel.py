"""Hatch's build hook: puts the built library and objects of one target into a wheel, and names it.

The target is $TCPOBS_TARGET: ARCH-linux-gnu.2.17 or ARCH-linux-musl, as packaging/libbpf builds them.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

TAGS = {"gnu.2.17": "manylinux_2_17_{0}.manylinux2014_{0}", "musl": "musllinux_1_2_{0}"}

LICENCES = {
    "libbpf": ["LICENSE", "LICENSE.BSD-2-Clause", "LICENSE.LGPL-2.1"],
    "elfutils": ["COPYING-GPLV2", "COPYING-LGPLV3", "COPYING"],
    "zlib": ["LICENSE"],
}
"""The licences of what is in libbpf.so.1, by source package."""


class WheelHook(BuildHookInterface[Any]):
    """See the module."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Adds the files to a wheel; an editable install finds them in the source tree."""
        if version == "editable":
            return
        target = os.environ["TCPOBS_TARGET"]
        machine, _, libc = target.split("-")
        root = Path(self.root)
        include: dict[str, str] = {
            f"build/libbpf/{target}/libbpf.so.1": "tcpobs/_lib/libbpf.so.1",
            "packaging/libbpf/NOTICE": "tcpobs/_lib/NOTICE",
        }
        for package, names in LICENCES.items():
            for name in names:
                include[f"build/source/{package}/{name}"] = f"tcpobs/_lib/licenses/{package}/{name}"
        objects = root / "python/tcpobs/_objects"
        patterns = ("source/*", "include/*/*", f"{machine}/*.bpf.o")
        for path in sorted(path for pattern in patterns for path in objects.glob(pattern)):
            include[str(path.relative_to(root))] = f"tcpobs/_objects/{path.relative_to(objects)}"
        build_data["force_include"].update({str(root / path): to for path, to in include.items()})
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{TAGS[libc].format(machine)}"
