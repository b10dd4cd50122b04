"""What the kernel matrix tests, as a hash: docs/kernels.md carries that of the files that it is about.

usage: python -m vm.tested      fails when docs/kernels.md is about other files than those that are here
"""

from __future__ import annotations

import hashlib
import re
import sys
from pathlib import Path

from vm.packages import ROOT

REPORT = ROOT / "docs" / "kernels.md"

FILES = (
    "Makefile",
    "bpf/*.[ch]",
    "packaging/libbpf/*",
    "pyproject.toml",
    "python/tcpobs/**/*.py",
    "tests/bcc/*.py",
    "tests/live/**/*.[cp]*",
    "tests/vm/*",
    "vmlinux/*/vmlinux.h",
)


def digest() -> str:
    """The SHA-256 of these files and their names."""
    hashed = hashlib.sha256()
    for path in sorted({path for pattern in FILES for path in ROOT.glob(pattern) if _is_source(path)}):
        data = path.read_bytes()
        hashed.update(f"{path.relative_to(ROOT)} {len(data)}\n".encode() + data)
    return hashed.hexdigest()


def _is_source(path: Path) -> bool:
    return path.is_file() and not {"_objects", "_lib", "__pycache__"} & set(path.parts)


def main() -> int:
    """Returns the exit status: 0 when the report is about these files."""
    found = re.search(r"SHA-256 of what was tested: `(\w+)`", REPORT.read_text())
    if found and found[1] == digest():
        return 0
    print(f"{REPORT.name} is about other files: run `make test-vm`, and commit it", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
