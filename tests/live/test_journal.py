"""tcpobs states -Y and a real systemd-journald, in a mount namespace of its own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest

from live.ports import new_port
from live.tcp import DEADLINE, LOOPBACK

pytestmark = pytest.mark.subject("the journal")

SCRIPT = """
mount -t tmpfs none /run && mkdir -p /run/systemd/journal
/lib/systemd/systemd-journald & journald=$!
until [ -S /run/systemd/journal/socket ]; do sleep 0.02; done
"$1" states -Y -D "$2" >/run/rows & tcpobs=$!
until [ -s /run/rows ]; do sleep 0.02; done
"$3" -c "$4"
kill -INT $tcpobs; wait $tcpobs; status=$?
journalctl --sync 2>/dev/null
until journalctl --directory=/run/log/journal -t tcpstates -o json | grep -q '"OBJECT_TCP_NEW_STATE":"CLOSE"'
do sleep 0.02; done
journalctl --directory=/run/log/journal -t tcpstates -o json
kill $journald; wait $journald
exit $status
"""
CLIENT = "import socket; socket.socket(socket.{0}).connect_ex(('{1}', {2}))"
TCPOBS = os.path.join(os.path.dirname(sys.executable), "tcpobs")


def private(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a script in a mount namespace of its own."""
    command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE)


def test_each_event_is_logged(family: int) -> None:
    """A refused connection: two entries with all the fields, IPv6 included (BCC's crashes there)."""
    family = socket.AddressFamily(family)
    address = LOOPBACK[family]
    port = str(new_port())
    client = CLIENT.format(family.name, address, port)
    done = private(SCRIPT, TCPOBS, port, sys.executable, client)
    assert done.returncode == 0, done.stderr
    first, second = map(json.loads, done.stdout.splitlines())
    ip = "IPV4" if family == socket.AF_INET else "IPV6"
    assert first["SYSLOG_IDENTIFIER"] == "tcpstates"
    assert first["PRIORITY"] == "5"
    assert int(first["OBJECT_PID"]) > 1
    assert first[f"OBJECT_{ip}_SOURCE_ADDRESS"] == first[f"OBJECT_{ip}_DESTINATION_ADDRESS"] == address
    assert first["OBJECT_TCP_DESTINATION_PORT"] == port
    assert (first["OBJECT_TCP_OLD_STATE"], first["OBJECT_TCP_NEW_STATE"]) == ("CLOSE", "SYN_SENT")
    assert (second["OBJECT_TCP_OLD_STATE"], second["OBJECT_TCP_NEW_STATE"]) == ("SYN_SENT", "CLOSE")
    assert (first["OBJECT_TCP_SPAN_TIME"], int(second["OBJECT_TCP_SPAN_TIME"]) > 0) == ("0", True)
    message = f" {address} {second['OBJECT_TCP_SOURCE_PORT']} → {address} {port} SYN_SENT → CLOSE"
    assert second["MESSAGE"].endswith(message)


def test_without_the_journal() -> None:
    done = private('mount -t tmpfs none /run && exec "$1" states -Y', TCPOBS)
    assert done.returncode == 1
    assert done.stderr == (
        "tcpobs: -Y needs the journal, and /run/systemd/journal/socket is missing: start systemd-journald"
        " (`tcpobs doctor` says more)\n"
    )


def test_without_the_library(tmp_path: os.PathLike[str]) -> None:
    """An empty `systemd` package in front of the real one stands for a host without it."""
    package = os.path.join(tmp_path, "systemd")
    os.mkdir(package)
    with open(os.path.join(package, "__init__.py"), "w"):
        pass
    done = subprocess.run(
        [TCPOBS, "states", "-Y"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert done.returncode == 1
    assert done.stderr == (
        "tcpobs: -Y needs the journal library:"
        " pip install 'tcpobs[journal]', or your distribution's python3-systemd (`tcpobs doctor` says more)\n"
    )
