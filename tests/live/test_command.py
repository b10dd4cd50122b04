"""The installed command on the live kernel: its output, its ends, its bad days."""

from __future__ import annotations

import csv
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from live.ports import new_port
from live.tcp import (
    ALL_WAYS,
    DEADLINE,
    client_first,
    connect,
    is_loaded,
    is_tracing,
    limit,
    programs_of,
    read_rest,
    wait,
    wait_over,
)

pytestmark = pytest.mark.subject("the command: output, ends, errors")

DOCTOR = " (`tcpobs doctor` says more)"
TCPOBS = [os.path.join(os.path.dirname(sys.executable), "tcpobs")]
HEADERS = {
    "states": "SKADDR           C-PID C-COMM     LADDR           LPORT RADDR           RPORT"
    " OLDSTATE    -> NEWSTATE    MS",
    "life": "PID   COMM       LADDR           LPORT RADDR           RPORT TX_KB RX_KB MS",
}


@pytest.fixture(params=["states", "life"])
def tool(request: pytest.FixtureRequest) -> str:
    """Each test that takes it runs with both tools."""
    return str(request.param)


@contextmanager
def running(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """tcpobs with these arguments, tracing, and its header line (JSON has none)."""
    with tracing([*TCPOBS, *arguments]) as (command, header):
        yield command, header


@contextmanager
def tracing(arguments: list[str]) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The same for a whole command."""
    command = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert command.stdout
        wait(lambda: command.poll() is not None or is_tracing(command.pid))
        yield command, "" if "--json" in arguments else command.stdout.readline()
    finally:
        command.kill()
        command.communicate()


def fails(*command: str) -> tuple[int, str]:
    """The exit status and the one line on standard error of a command that cannot run."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE)
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    return done.returncode, line


def end_pair(family: int = socket.AF_INET) -> tuple[int, int]:
    """Makes a session and ends it; gives its ports."""
    pair = connect(family)
    ports = pair.ports
    for end in pair:
        end.close()
    wait_over(ports[1])
    return ports


def finish(command: subprocess.Popen[str], number: int = signal.SIGINT) -> tuple[str, str]:
    """Ends it by a signal; it must do so cleanly."""
    programs = programs_of(command.pid)
    assert programs
    command.send_signal(number)
    out, err = read_rest(command)
    assert command.returncode == 0
    wait(lambda: not any(map(is_loaded, programs)))
    return out, err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_all_rows(tool: str, number: int) -> None:
    with running(tool) as (command, header):
        assert header.rstrip("\n") == HEADERS[tool]
        _, port = end_pair()
        out, err = finish(command, number)
    assert err == ""
    rows = [line for line in out.splitlines() if f" {port} " in line]
    assert len(rows) == (12 if tool == "states" else 2)


def test_rows_come_within_a_moment_into_a_pipe(tool: str) -> None:
    """Without any end: readline() returns while it runs."""
    with running(tool, "-s") as (command, _):
        assert command.stdout
        _, port = end_pair()
        while f",{port}," not in command.stdout.readline():
            pass
        finish(command)


def test_extended_in_each_mode(tool: str) -> None:
    """-x: the same in text, CSV and JSON, but for what JSON has null."""
    with (
        running(tool, "-x") as (in_text, names),
        running(tool, "-x", "-s") as (in_csv, header),
        running(tool, "--json") as (in_json, _),
    ):
        _, port = end_pair()
        texts = [line.replace(" -> ", " ").split() for line in finish(in_text)[0].splitlines()]
        rows = list(csv.DictReader([header, *finish(in_csv)[0].splitlines()]))
        objects = [json.loads(line) for line in finish(in_json)[0].splitlines()]
    columns = names.replace("->", "").split()
    texts = [row for row in texts if str(port) in row]
    rows = [row for row in rows if str(port) in (row["LPORT"], row["RPORT"])]
    objects = [row for row in objects if port in (row["lport"], row["rport"])]
    latest = objects[-1]
    # What two CPUs do at once comes to each command in its own order.
    which = ("SKADDR", "NEWSTATE") if tool == "states" else ("LPORT",)
    texts.sort(key=lambda row: [row[columns.index(name)] for name in which])
    rows.sort(key=lambda row: [row[name] for name in which])
    objects.sort(key=lambda row: [str(row[name.lower()]) for name in which])
    assert len(texts) == len(rows) == len(objects) == (12 if tool == "states" else 2)
    last = {"CGROUP", "NETNS", "UID", "TID"} | ({"PID"} if tool == "states" else {"END", "CC"})
    for text, row, object in zip(texts, rows, objects):
        assert len(text) == len(columns)
        for name in last:
            value = object[name.lower()]
            assert row[name] == ("-" if value is None else str(value))
            assert text[columns.index(name)] == row[name]
    assert {row["netns"] for row in objects} == {os.stat("/proc/self/ns/net").st_ino}
    assert latest["pid"] == latest["tid"] == os.getpid()
    assert latest["uid"] == 0


def test_open_sessions(family: int) -> None:
    """--every while it runs, --open at its end, --existing those from before: each with a `+`."""
    before = connect(family)
    flags = ["-s", "--existing", "--every", "0.1", "--open"]
    with running("life", *flags) as (command, _), before.client, before.server:
        pair = connect(family)
        assert command.stdout
        with pair.client, pair.server:
            rows: list[list[str]] = []
            ports = {str(port) for port in (*pair.ports, *before.ports)}
            while ports - {row[4] for row in rows if row[9].endswith("+")}:
                rows += csv.reader([command.stdout.readline()])
            out, err = finish(command)
    assert err == ""
    at_the_end = [row for row in csv.reader(out.splitlines()) if {row[4], row[6]} <= ports]
    assert {row[4] for row in at_the_end} == ports
    assert all(row[9].endswith("+") for row in at_the_end)
    assert {int(row[0]) for row in at_the_end} == {os.getpid()}


def test_csv_and_json_say_the_same(family: int) -> None:
    with running("life", "-s", "-t") as (in_csv, header), running("life", "--json") as (in_json, _):
        _, port = end_pair(family)
        objects = [json.loads(line) for line in finish(in_json)[0].splitlines()]
        rows = list(csv.DictReader([header, *finish(in_csv)[0].splitlines()]))
    rows = [row for row in rows if str(port) in (row["LPORT"], row["RPORT"])]
    objects = [found for found in objects if port in (found["lport"], found["rport"])]
    assert len(rows) == len(objects) == 2
    rows.sort(key=lambda row: row["LPORT"])
    objects.sort(key=lambda found: str(found["lport"]))
    for row, found in zip(rows, objects):
        for name in ("PID", "COMM", "IP", "LADDR", "LPORT", "RADDR", "RPORT", "TX_KB", "RX_KB"):
            assert row[name] == str(found[name.lower()])
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", found["time"])
        assert found["ktime_ns"] > 0
        assert found["span_ns"] // 1000 / 1000 == found["ms"]


def test_a_name_that_would_break_the_output() -> None:
    """A task may call itself anything (prctl(2)): no terminal, CSV or JSON is broken by it."""
    name = b'\x1b[2J",\xff\n\xc3\xa9'
    program = (
        "import ctypes, socket, sys\n"
        f"ctypes.CDLL(None).prctl(15, {name!r})\n"
        "l = socket.create_server(('127.0.0.1', int(sys.argv[1])))\n"
        "c = socket.create_connection(l.getsockname()); a, _ = l.accept(); c.close(); a.close()"
    )
    rows: dict[str, list[str]] = {}
    for mode in ("-w", "-s", "--json"):
        with running("life", mode) as (command, _):
            port = new_port()
            subprocess.run([sys.executable, "-c", program, str(port)], check=True)
            wait_over(port)
            out, _ = finish(command)
        assert "\x1b" not in out
        assert "\r" not in out
        rows[mode] = [line for line in out.splitlines() if re.search(rf"[ ,]{port}[ ,]", line)]
        assert len(rows[mode]) == 2
    escaped = '\\x1b[2J",\\xff\\né'
    assert all(row[1] == escaped for row in csv.reader(rows["-s"]))
    assert all(json.loads(line)["comm"] == escaped for line in rows["--json"])


def test_a_closed_pipe_ends_it_quietly(tool: str) -> None:
    """`tcpobs states | head -1` on an idle host: it ends although no event comes any more."""
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {TCPOBS[0]} {tool} | head -n 1"],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.rstrip("\n") == HEADERS[tool]


def test_on_a_terminal(tool: str) -> None:
    """Ctrl-C on a real terminal."""
    pid, terminal = pty.fork()
    if not pid:
        os.execv(TCPOBS[0], [TCPOBS[0], tool])
    seen = b""
    while b"\n" not in seen:
        seen += os.read(terminal, 4096)
    os.write(terminal, b"\x03")
    assert os.waitpid(pid, 0)[1] == 0
    os.close(terminal)


def test_the_duration_ends_it(tool: str) -> None:
    done = subprocess.run([*TCPOBS, tool, "-d", "0.2"], capture_output=True, text=True, timeout=DEADLINE)
    assert (done.returncode, done.stderr) == (0, "")


SYSTEM_LIBBPF = f"/usr/lib/{sysconfig.get_config_var('MULTIARCH')}/libbpf.so.1"


@pytest.mark.parametrize(
    ("library", "transport"),
    [("", "ringbuf"), ("", "perfbuf"), (SYSTEM_LIBBPF, "ringbuf")],
    ids=["bundled", "perf-buffers", "distribution"],
)
def test_losses_are_told(library: str, transport: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full buffer: what is seen and what is told as lost add up, with each libbpf."""
    monkeypatch.setenv("TCPOBS_LIBBPF", library)
    with running("states", "-s", "--buffer-size", "64K", "--transport", transport) as (command, _):
        os.kill(command.pid, signal.SIGSTOP)
        pairs = [connect(socket.AF_INET) for _ in range(300)]
        ports = [pair.ports[1] for pair in pairs]
        for pair in pairs:
            client_first(pair)
        wait_over(*ports)
        os.kill(command.pid, signal.SIGCONT)
        out, err = finish(command)
    told = re.findall(r"tcpobs: lost so far: (\d+): the buffer was full \(raise --buffer-size\)", err)
    assert int(told[-1]) + len(out.splitlines()) >= 300 * 12
    assert int(told[-1]) > 0


def test_no_room_for_sockets_is_told() -> None:
    with running("life", "--storage", "hash", "--max-sockets", "1") as (command, _):
        pairs = [connect(socket.AF_INET) for _ in range(100)]
        for pair in pairs:
            for end in pair:
                end.close()
        _, err = finish(command)
    assert "no room to remember a socket (raise --max-sockets)" in err


def test_a_second_signal_ends_a_stuck_write() -> None:
    """Nobody reads the pipe: the first signal waits for the reader, the second does not."""
    with running("states", "-s") as (command, _):
        for _ in range(100):
            end_pair()
        wait(lambda: _waits_for(command.pid, "pipe_write"))
        programs = programs_of(command.pid)
        command.send_signal(signal.SIGTERM)
        wait(lambda: not _handles(command.pid, signal.SIGTERM))
        command.send_signal(signal.SIGTERM)
        assert command.wait(DEADLINE) == -signal.SIGTERM
        wait(lambda: not any(map(is_loaded, programs)))


def _waits_for(pid: int, function: str) -> bool:
    with open(f"/proc/{pid}/stack") as file:
        return function in file.read()


def _handles(pid: int, number: int) -> bool:
    with open(f"/proc/{pid}/status") as file:
        caught = next(line for line in file if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> number - 1 & 1)


def test_a_process_that_is_not_there() -> None:
    done = subprocess.run(
        [*TCPOBS, "life", "-p", "4194303", "-d", "0.1"], capture_output=True, text=True, timeout=DEADLINE
    )
    assert done.returncode == 0
    assert done.stderr == "tcpobs life: there is no process 4194303 now; going on\n"


def test_without_privileges(tool: str) -> None:
    status, line = fails("setpriv", "--bounding-set=-all", "--inh-caps=-all", *TCPOBS, tool)
    assert status == 1
    assert line == (
        f"tcpobs: tracing needs root, or the capabilities CAP_BPF and CAP_PERFMON: try it with sudo{DOCTOR}"
    )


def hidden(paths: str, *command: str) -> list[str]:
    """The command in a mount namespace where empty folders hide these."""
    script = f'for path in {paths}; do mount -t tmpfs none $path || exit; done; exec "$@"'
    return ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh", *command]


def test_a_kernel_without_types(tool: str) -> None:
    status, line = fails(*hidden("/sys/kernel/btf", *TCPOBS, tool))
    assert status == 1
    assert "/sys/kernel/btf/vmlinux is missing" in line


def test_tracefs_is_not_mounted(tool: str) -> None:
    """Nor debugfs, below which it is mounted when somebody looks."""
    command = hidden("/sys/kernel/tracing /sys/kernel/debug", *TCPOBS, tool, "--hook", "tracepoint")
    status, line = fails(*command)
    assert status == 1
    assert line == f"tcpobs: tracefs is not mounted: mount -t tracefs tracefs /sys/kernel/tracing{DOCTOR}"


def test_a_way_that_this_kernel_has_not(tool: str) -> None:
    """A refusal names the cause. (That all others work is what the tests with `way` are for.)"""
    why = {
        "CONFIG_KPROBES": "no kprobes (CONFIG_KPROBES)",
        "no fexit": "takes no fexit programs",
        "Linux 5.11": "unknown func bpf_s",
    }
    for way in ALL_WAYS:
        if limit(way):
            flags = [part for name, choice in way._asdict().items() for part in (f"--{name}", choice)]
            status, line = fails(*TCPOBS, tool, "-x", *flags)
            assert (status, why[limit(way)] in line) == (1, True)


def test_the_distribution_s_libbpf(tool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """TCPOBS_LIBBPF: Debian 12 has libbpf 1.1."""
    monkeypatch.setenv("TCPOBS_LIBBPF", SYSTEM_LIBBPF)
    with running(tool, "-s") as (command, _):
        _, port = end_pair()
        out, err = finish(command)
    assert err == ""
    assert f",{port}," in out


def test_ways_that_do_not_go_together(tool: str) -> None:
    status, line = fails(*TCPOBS, tool, "--hook", "kprobe", "--storage", "sk_storage")
    assert (status, line) == (1, "tcpobs: --hook kprobe does not go with --storage sk_storage")


def test_a_full_disk(tool: str) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*TCPOBS, tool], stdout=full, stderr=subprocess.PIPE, text=True, timeout=DEADLINE
        )
    assert done.returncode == 1
    assert done.stderr == "tcpobs: cannot write the output: No space left on device\n"


def test_a_closed_output(tool: str) -> None:
    status, line = fails("sh", "-c", f"{TCPOBS[0]} {tool} >&-")
    assert (status, line) == (1, "tcpobs: standard output is closed")
