"""What this kernel lacks. A test with the marker `needs` is left out then, and the report says why."""

from __future__ import annotations

import os
import re
from pathlib import Path

RELEASE = tuple(int(part) for part in re.findall(r"\d+", os.uname().release)[:2])
HAS_KPROBES = os.path.exists("/sys/bus/event_source/devices/kprobe")

_BTFS = Path(__file__).resolve().parents[2] / "build/vm/kernels"
OTHER_TYPES = next(_BTFS.glob("6.12-6*/btf" if RELEASE == (5, 10) else "5.10-*/btf"), None)
"""The types of another kernel than this (tests/vm puts them there)."""


def _missing() -> dict[str, str]:
    found = {}
    if not HAS_KPROBES:
        found["kprobes"] = "CONFIG_KPROBES"
    if RELEASE < (5, 17):  # bpf_get_func_ret
        found["fexit's return value"] = "Linux 5.17"
    if RELEASE < (5, 15):  # bpf_get_func_ip
        found["addresses of returns"] = "Linux 5.15"
    if RELEASE < (5, 17):
        # Then kretprobes are used, which had room for only one call per CPU (max_active, backported to 6.1).
        found["returns of several at once"] = "Linux 6.1"
    several = (6, 14) if os.uname().machine == "aarch64" else (6, 12)
    if several > RELEASE:
        found["kprobe.multi"] = "CONFIG_FPROBE"  # in Debian's kernels
    if not OTHER_TYPES or os.uname().machine != "x86_64":
        found["another kernel's types"] = "no other kernel's types"
    if os.uname().machine != "x86_64":
        found["x86_64"] = os.uname().machine
    if HAS_KPROBES:
        found["no kprobes"] = "it has kprobes"
    return found


MISSING = _missing()
"""By feature, why it is not here."""
