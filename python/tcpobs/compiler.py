"""The C compiler for programs that are made on this host: argdist's."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


def find() -> Sequence[str] | None:
    """The beginning of its command line, or None.

    $TCPOBS_CLANG, else clang on PATH, else the newest clang-N there, else the package ziglang (the extra
    tcpobs[compiler]).
    """
    chosen = os.environ.get("TCPOBS_CLANG")
    if chosen:
        return [chosen] if shutil.which(chosen) else None
    on_path = shutil.which("clang") or _newest()
    if on_path:
        return [on_path]
    from importlib.util import find_spec

    # Not `python -m ziglang`: that would take a module of the current folder first.
    package = find_spec("ziglang")
    zig = os.path.join(os.path.dirname(package.origin), "zig") if package and package.origin else ""
    return [zig, "clang"] if os.access(zig, os.X_OK) else None


def _newest() -> str | None:
    """The clang-N of the highest N."""
    found = []
    for folder in os.get_exec_path():
        with suppress(OSError):
            names = [name for name in os.listdir(folder) if name.startswith("clang-")]
            found += [f"{folder}/{name}" for name in names if name[6:].isdecimal()]
    found = [path for path in found if os.access(path, os.X_OK)]
    return max(found, key=lambda path: int(path.rpartition("-")[2]), default=None)
