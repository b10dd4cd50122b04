"""tcpobs doctor, and a kernel that does not carry its own types."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from live.tcp import ALL_WAYS, DEADLINE, WALK_LIMIT, WAYS, connect, limit, server_first, wait_over
from live.test_command import TCPOBS, finish, hidden, tracing
from tcpobs import host

pytestmark = pytest.mark.subject("`tcpobs doctor`")


def doctor(*prefix: str, arguments: tuple[str, ...] = ()) -> tuple[int, dict[str, Any]]:
    """Its exit status, and its findings by name."""
    done = run(*prefix, *TCPOBS, "doctor", "--json", *arguments)
    said = json.loads(done.stdout)
    assert done.stderr == ""
    assert said["able"] == (done.returncode == 0)
    return done.returncode, {finding["name"]: finding for finding in said["findings"]}


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE)


def test_text_and_json_say_the_same() -> None:
    status, findings = doctor()
    text = run(*TCPOBS, "doctor")
    assert (text.returncode, text.stderr) == (status, "")
    answers = {True: "yes", False: "no", None: "-"}
    for finding in findings.values():
        line = f"{finding['name']:<22} {answers[finding['works']]:<4} {finding['text']}"
        assert line in text.stdout.splitlines()
        assert (finding["remedy"] or "") in text.stdout


@pytest.mark.essential
def test_what_it_says_of_each_mechanism_is_so() -> None:
    """It agrees with what is known of this kernel, and with what the tools then do."""
    status, findings = doctor()
    assert status == 0
    for part in ("hook", "storage", "transport", "accept"):
        for choice in {getattr(way, part) for way in ALL_WAYS} - {"none"}:
            works = any(getattr(way, part) == choice for way in WAYS)
            assert findings[f"{part} {choice}"]["works"] is works
    for storage in host.STORAGES:
        limits = storage in WALK_LIMIT or all(way.storage != storage for way in WAYS)
        assert findings[f"walk {storage}"]["works"] is not limits
    assert findings["tcpobs life --existing"]["works"]
    assert findings["tcpobs life --open"]["works"]
    best = next(way for way in host.WAYS if not limit(way))
    assert findings["tcpobs life"]["text"] == host.describe(best)
    best = next(way for way in host.WAYS if way.accept == "none" and not limit(way))
    assert findings["tcpobs states"]["text"] == host.describe(best)


def test_without_privileges() -> None:
    """It runs, and says what it could not look at."""
    status, findings = doctor("setpriv", "--bounding-set=-all", "--inh-caps=-all")
    assert status == 1
    assert "CAP_BPF and CAP_PERFMON" in findings["capabilities"]["text"]
    assert findings["tcpobs life"]["remedy"] == "try it with sudo"
    for hook in host.HOOKS:
        assert findings[f"hook {hook}"]["works"] is None
        assert "not looked at" in findings[f"hook {hook}"]["text"]
    assert findings["kernel types (BTF)"]["works"]


def test_in_a_user_namespace() -> None:
    """Root there has every capability, and none that counts."""
    status, findings = doctor("unshare", "--user", "--map-root-user")
    assert (status, findings["capabilities"]["works"]) == (1, False)
    assert "user namespace" in findings["tcpobs life"]["text"]


def test_without_libbpf(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TCPOBS_LIBBPF", "/nonexistent")
    status, findings = doctor()
    assert (status, findings["libbpf"]["works"]) == (1, False)
    assert "install tcpobs again" in findings["libbpf"]["remedy"]


def test_nobody_reads_it() -> None:
    """The status says it, too; and a full disk is told."""
    piped = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {TCPOBS[0]} doctor | true"], capture_output=True, text=True
    )
    assert (piped.returncode, piped.stderr) == (0, "")
    with open("/dev/full", "w") as full:
        done = subprocess.run([*TCPOBS, "doctor"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr == "tcpobs: cannot write the output: No space left on device\n"


@pytest.fixture
def types(tmp_path: Path) -> str:
    """A file with this kernel's types."""
    shutil.copy(host.KERNEL_BTF, tmp_path / "kernel.btf")
    return str(tmp_path / "kernel.btf")


def without_types(*command: str) -> list[str]:
    """The command, where the kernel's types are hidden."""
    return hidden("/sys/kernel/btf", *command)


def test_a_kernel_without_types(types: str) -> None:
    status, findings = doctor(*without_types())
    assert (status, findings["kernel types (BTF)"]["works"]) == (1, False)
    assert "--btf FILE" in findings["kernel types (BTF)"]["remedy"]
    status, findings = doctor(*without_types(), arguments=("--btf", types))
    assert (status, findings["kernel types (BTF)"]["works"]) == (0, True)


WITHOUT_TYPES = [way for way in ALL_WAYS if way.hook != "tp_btf" and not limit(way)]
"""tp_btf is for kernels that carry their types."""


@pytest.mark.essential
@pytest.mark.subject("types from a file (`--btf`)")
@pytest.mark.parametrize(
    ("tool", "way"),
    [("states", None), *(("life", way) for way in WITHOUT_TYPES)],
    ids=["states", *map("-".join, WITHOUT_TYPES)],
)
def test_types_from_a_file(tool: str, way: host.Way | None, types: str) -> None:
    """The rows are right on a kernel that hides its types, given the file."""
    forced = ["--hook", way.hook, "--transport", way.transport] if way else []
    command = without_types(*TCPOBS, tool, "-s", "--btf", types, *forced)
    with tracing(command) as (process, _):
        pair = connect(socket.AF_INET6)
        client_port, port = pair.ports
        server_first(pair)
        wait_over(port)
        out, err = finish(process)
    rows = [line.split(",") for line in out.splitlines() if str(port) in line.split(",")]
    assert err == ""
    assert len(rows) == (12 if tool == "states" else 2)
    ends = {(row[-6], row[-4]) if tool == "life" else (row[5], row[7]) for row in rows}
    assert {(str(client_port), str(port)), (str(port), str(client_port))} <= ends
    assert all("::1" in row for row in rows)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file"),
        (b"", "cannot be read as BTF"),
        (b"damaged" * 100, "cannot be read as BTF"),
        (Path("/bin/true").read_bytes(), "cannot be read as BTF"),
    ],
    ids=["missing", "empty", "damaged", "ELF"],
)
def test_a_file_that_holds_no_types(content: bytes | None, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "no.btf"
    if content is not None:
        path.write_bytes(content)
    done = run(*TCPOBS, "life", "--btf", str(path))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert f"tcpobs: {path}" in done.stderr
    assert reason in done.stderr
