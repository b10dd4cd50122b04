"""Programs and libraries that the tests compile."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def build(path: Path, source: str, *flags: str, compiler: str = "gcc") -> str:
    """Compiles C; the path of what came out. A file has a build-id, whatever the compiler's habit."""
    language = "c++" if compiler == "g++" else "c"
    command = [
        compiler,
        "-x",
        language,
        "-",
        "-x",
        "none",
        "-O1",
        "-w",
        "-Wl,--build-id",
        *flags,
        "-o",
        str(path),
    ]
    subprocess.run(command, input=source, text=True, check=True, cwd=path.parent)
    return str(path)


def run(*command: str) -> str:
    """A tool's output."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
