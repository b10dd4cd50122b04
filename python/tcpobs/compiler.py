"""The C compiler for programs that are made on this host: argdist's."""

from __future__ import annotations

import glob
import os
import re
import shutil
import sys

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

    return [sys.executable, "-m", "ziglang", "clang"] if find_spec("ziglang") else None


def _newest() -> str | None:
    """The clang-N of the highest N."""
    found = [
        path
        for folder in os.get_exec_path()
        for path in glob.glob(f"{glob.escape(folder)}/clang-*")
        if re.search(r"/clang-\d+$", path) and os.access(path, os.X_OK)
    ]
    return max(found, key=lambda path: int(path.rpartition("-")[2]), default=None)
