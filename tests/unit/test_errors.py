"""What a user gets to read when the host says no: one line, with the remedy."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tcpobs import host, privileges
from tcpobs.errors import HostError, TcpobsError
from tcpobs.host import Way
from tcpobs.libbpf import LibbpfError

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

TP_BTF = Way("tp_btf", "sk_storage", "ringbuf", "none")
TRACEPOINT = Way("tracepoint", "hash", "ringbuf", "none")
KPROBE = Way("kprobe", "hash", "ringbuf", "none")

BTF = "/sys/kernel/btf/vmlinux"
TRACEFS = "/sys/kernel/tracing/events"
KPROBES = "/sys/bus/event_source/devices/kprobe"
USUAL = frozenset({BTF, TRACEFS, KPROBES})

ROOT = (1 << 41) - 1
NOBODY = 0
BPF_AND_PERFMON = 1 << 39 | 1 << 38
BPF_ALONE = 1 << 39
SYS_ADMIN = 1 << 21


def remedy(
    patch: pytest.MonkeyPatch,
    ways: Collection[Way],
    number: int = errno.EINVAL,
    log: str = "",
    capabilities: int = ROOT,
    lockdown: str = "[none] integrity confidentiality",
    exist: Collection[str] = USUAL,
) -> str:
    """What is said when every way fails with this error on such a host."""
    files = {host.LOCKDOWN: lockdown, host.PARANOID: "2", "/proc/self/mounts": ""}
    patch.setattr(host, "read", lambda path: files[path])
    patch.setattr(privileges, "effective", lambda: capabilities)
    patch.setattr(privileges, "in_user_namespace", lambda: False)
    patch.setattr(os.path, "exists", lambda path: path in exist)
    text = str(host.refusal([(way, LibbpfError("bpf_object__load", number, log)) for way in ways]))
    assert "\n" not in text
    return text


ROOT_NEEDED = "tracing needs root, or the capabilities CAP_BPF and CAP_PERFMON: try it with sudo"


@pytest.mark.parametrize("number", [errno.EPERM, errno.EACCES])
@pytest.mark.parametrize("capabilities", [NOBODY, BPF_ALONE])
def test_not_privileged(number: int, capabilities: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert remedy(monkeypatch, host.WAYS, number, capabilities=capabilities, exist=()) == ROOT_NEEDED


@pytest.mark.parametrize("capabilities", [ROOT, SYS_ADMIN, BPF_AND_PERFMON])
def test_refused_though_privileged(capabilities: int, monkeypatch: pytest.MonkeyPatch) -> None:
    text = remedy(monkeypatch, [TP_BTF], errno.EPERM, capabilities=capabilities)
    assert text.startswith("the kernel did not take the program (tp_btf, sk_storage, ringbuf): ")
    assert "Operation not permitted" in text


def test_lockdown(monkeypatch: pytest.MonkeyPatch) -> None:
    lockdown = "none integrity [confidentiality]"
    text = remedy(monkeypatch, host.WAYS, errno.EPERM, lockdown=lockdown)
    assert "locked down (confidentiality)" in text
    assert "boot with lockdown=integrity or none" in text


def test_lockdown_of_integrity_does_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    text = remedy(monkeypatch, host.WAYS, errno.EPERM, lockdown="none [integrity] confidentiality")
    assert "locked down" not in text


def test_no_kernel_btf(monkeypatch: pytest.MonkeyPatch) -> None:
    text = remedy(monkeypatch, host.WAYS, errno.ESRCH, log="kernel BTF is missing", exist=USUAL - {BTF})
    assert "/sys/kernel/btf/vmlinux is missing" in text
    assert "CONFIG_DEBUG_INFO_BTF" in text


def test_tracefs_not_mounted(monkeypatch: pytest.MonkeyPatch) -> None:
    text = remedy(monkeypatch, [TRACEPOINT], errno.ENOENT, exist=USUAL - {TRACEFS})
    assert text == "tracefs is not mounted: mount -t tracefs tracefs /sys/kernel/tracing"


@pytest.mark.parametrize("place", [TRACEFS, "/sys/kernel/debug/tracing/events"])
def test_tracefs_mounted_in_either_place(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = remedy(monkeypatch, [TRACEPOINT], errno.ENOENT, exist={BTF, place})
    assert "tracefs" not in text


def test_no_kprobes(monkeypatch: pytest.MonkeyPatch) -> None:
    text = remedy(monkeypatch, [KPROBE], errno.ENOENT, exist=USUAL - {KPROBES})
    assert text == "this kernel has no kprobes (CONFIG_KPROBES): use another hook"


VERIFIER = """\
libbpf: prog 'x': BPF program load failed: Invalid argument
-- BEGIN PROG LOAD LOG --
0: (79) r6 = *(u64 *)(r1 +0)
  unknown func bpf_sk_storage_get#107
processed 10 insns (limit 1000000)
-- END PROG LOAD LOG --
libbpf: failed to load object 'life'
"""


@pytest.mark.parametrize(
    ("log", "said"),
    [
        ("  the reason\nfollows\n", "; the reason"),
        (VERIFIER, "; unknown func bpf_sk_storage_get#107"),
        ("", ""),
    ],
)
def test_what_the_kernel_said(log: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = remedy(monkeypatch, [TP_BTF], errno.EINVAL, log=log)
    assert text == (
        "the kernel did not take the program (tp_btf, sk_storage, ringbuf): bpf_object__load:"
        f" Invalid argument{said}: -v shows all that was said"
    )


def test_a_user_namespace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(privileges, "in_user_namespace", lambda: True)
    error = LibbpfError("bpf_object__load", errno.EPERM, "")
    assert "user namespace" in host.refusal([(TP_BTF, error)]).cause


def test_the_way_whose_failure_is_understood_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the types from a file, tp_btf is out of the question; tracefs can be mounted."""
    monkeypatch.setattr(os.path, "exists", lambda _: False)
    monkeypatch.setattr(host, "read", lambda _: "")
    error = LibbpfError("bpf_object__load", errno.ESRCH, "kernel BTF is missing")
    failures = [
        (TP_BTF, error),
        (TRACEPOINT, LibbpfError("bpf_program__attach", errno.ENOENT, "")),
        (KPROBE, error),
    ]
    assert host.refusal(failures, "types.btf").cause == "tracefs is not mounted"


def test_maps_are_charged_as_locked_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (65536, 65536))
    text = remedy(monkeypatch, [TP_BTF], errno.EPERM, log="map 'ring_buffer': failed to create")
    assert "RLIMIT_MEMLOCK" in text
    assert "CAP_SYS_RESOURCE" in text


@pytest.mark.parametrize(
    ("hook", "storage", "found"),
    [
        (None, None, list(host.WAYS)),
        ("tp_btf", None, [way for way in host.WAYS if way.hook == "tp_btf"]),
        (None, "hash", [way for way in host.WAYS if way.storage == "hash"]),
        ("tracepoint", "hash", [way for way in host.WAYS if way.hook == "tracepoint"]),
    ],
)
def test_ways(
    hook: str | None, storage: str | None, found: list[Way], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os.path, "exists", lambda _: True)
    monkeypatch.setattr(host, "takes_fexit", lambda: True)
    assert host.ways(hook, storage) == found


def test_what_a_kernel_lacks_is_tried_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "exists", lambda path: path != host.KPROBES)
    monkeypatch.setattr(host, "takes_fexit", lambda: False)
    found = host.ways()
    assert sorted(found) == sorted(host.WAYS)
    assert found[0] == Way("tp_btf", "hash", "ringbuf", "syscall")
    missing = [way.accept in ("fexit", "kretprobe") for way in found]
    assert missing == sorted(missing)


def test_no_way() -> None:
    with pytest.raises(TcpobsError, match=r"^--hook kprobe does not go with --storage sk_storage$"):
        host.ways("kprobe", "sk_storage")


def test_no_object_for_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_OBJECTS", str(tmp_path))
    with pytest.raises(HostError, match=r"life\.bpf\.o is missing: install the tcpobs wheel for ") as raised:
        host.open_object("life", TP_BTF)
    assert "\n" not in str(raised.value)


def test_damaged_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / os.uname().machine
    folder.mkdir()
    (folder / "life.bpf.o").write_bytes(b"damaged")
    monkeypatch.setattr(host, "_OBJECTS", str(tmp_path))
    with pytest.raises(HostError, match=r"life\.bpf\.o is damaged .*: install tcpobs again$") as raised:
        host.open_object("life", TP_BTF)
    assert "\n" not in str(raised.value)


REINSTALL = "; install tcpobs again, or point TCPOBS_LIBBPF to another one\n"


def refusal(libbpf: str, *arguments: str) -> str:
    """The line that tcpobs ends with, given this libbpf."""
    ran = subprocess.run(
        [sys.executable, "-m", "tcpobs", *arguments],
        env={**os.environ, "TCPOBS_LIBBPF": libbpf},
        capture_output=True,
        text=True,
        timeout=60,  # were it to trace after all
    )
    assert (ran.returncode, ran.stdout, ran.stderr.count("\n")) == (1, "", 1)
    return ran.stderr


@pytest.mark.parametrize("arguments", [["--version"], ["states"], ["life"], ["states", "-v"]], ids=" ".join)
def test_libbpf_missing(arguments: list[str]) -> None:
    line = refusal("/nonexistent", *arguments)
    assert line.startswith("tcpobs: libbpf cannot be loaded: /nonexistent: ")
    assert line.endswith(REINSTALL)


def test_not_a_library(tmp_path: Path) -> None:
    (tmp_path / "libbpf.so.1").write_text("no ELF")
    assert refusal(f"{tmp_path}/libbpf.so.1", "--version").startswith("tcpobs: libbpf cannot be loaded: ")


def library_of(folder: Path, source: str) -> str:
    """A shared library made from C."""
    (folder / "libbpf.c").write_text(source)
    path = f"{folder}/libbpf.so"
    compiler = [sys.executable, "-m", "ziglang", "cc", "-shared", "-nostdlib"]
    subprocess.run([*compiler, "-o", path, f"{folder}/libbpf.c"], check=True)
    return path


def test_another_library(tmp_path: Path) -> None:
    path = library_of(tmp_path, "int something_else(void) { return 0; }")
    assert refusal(path, "--version") == f"tcpobs: {path} is not libbpf 1.0 or later{REINSTALL}"


def test_libbpf_too_old(tmp_path: Path) -> None:
    path = library_of(
        tmp_path, "int libbpf_major_version(void) { return 0; } int libbpf_minor_version(void) { return 8; }"
    )
    assert refusal(path, "--version") == f"tcpobs: {path} is libbpf 0.8, and 1.0 is needed{REINSTALL}"
