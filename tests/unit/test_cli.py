"""The command line: what it takes, what it refuses, and how it ends."""

from __future__ import annotations

import argparse
import errno
import gc
import os
import signal
from typing import TYPE_CHECKING

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tcpobs.cli import main
from tcpobs.errors import TcpobsError
from tcpobs.events import Events, Losses
from tcpobs.libbpf import LibbpfError, Object
from tcpobs.records import Session, decoder
from tcpobs.tools import life, listing, states

from .conftest import object_file

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

Captured = pytest.CaptureFixture[str]

TOOLS: dict[str, ModuleType] = {"states": states, "life": life}


def parsed(patch: pytest.MonkeyPatch, tool: str, *arguments: str) -> argparse.Namespace:
    """What the tool's run() is called with."""
    calls: list[argparse.Namespace] = []
    patch.setattr(TOOLS[tool], "run", calls.append)
    assert main([tool, *arguments]) == 0
    [call] = calls
    return call


def refused(arguments: list[str], captured: Captured) -> str:
    """The line that a wrong call gets."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    out, err = captured.readouterr()
    assert out == ""
    assert err.endswith("\n")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ([], "TOOL"),
        (["nothing"], "nothing"),
        (["--nothing"], "TOOL"),
        (["states", "life"], "life"),
        (["states", "--nothing"], "--nothing"),
        (["life", "--nothing"], "--nothing"),
        (["states", "--existing"], "--existing"),
        (["life", "--every", "0"], "'0' is not a number of seconds above 0"),
        (["life", "-Y"], "-Y"),
    ],
    ids=repr,
)
def test_wrong_call(arguments: list[str], names: str, capsys: Captured) -> None:
    assert names in refused(arguments, capsys)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["-L", "70000"], "-L/--localport: '70000' is not a port"),
        (["-L", "65536"], "'65536' is not a port"),
        (["-L", ""], "'' is not a port"),
        (["-L", "80,"], "'' is not a port"),
        (["-D", "x"], "-D/--remoteport: 'x' is not a port"),
        (["-D", "80,-1"], "'-1' is not a port"),
        (["-D", "٨"], "is not a port"),
        (["-4", "-6"], "not allowed with"),
        (["-d", "0"], "'0' is not a number of seconds above 0"),
        (["-d", "nan"], "'nan' is not a number of seconds"),
        (["-d", "inf"], "'inf' is not a number of seconds"),
        (["-d", "soon"], "'soon' is not a number of seconds"),
        (["--duration=-1"], "'-1' is not a number of seconds"),
        (["--buffer-size", "1"], "'1' is not a size from 64K to 1024M"),
        (["--buffer-size", "65535"], "'65535' is not a size"),
        (["--buffer-size", "1025M"], "'1025M' is not a size"),
        (["--buffer-size", "1KK"], "'1KK' is not a size"),
        (["--buffer-size", "M"], "'M' is not a size"),
        (["--max-sockets", "0"], "'0' is not a whole number from 1 to 4294967295"),
        (["--max-sockets", "4294967296"], "'4294967296' is not a whole number"),
        (["-p", "abc"], "'abc' is not a PID"),
        (["-p", "0"], "'0' is not a PID"),
        (["-p", "4194304"], "'4194304' is not a PID"),
        (["-p", ""], "'' is not a PID"),
        (["--uid", "no-such-user"], "there is no user 'no-such-user': give a name or a number"),
        (["--uid", "a\0b"], "there is no user"),
        (["--uid", "4294967295"], "there is no user"),
        (["--net", "10.0.0.0/33"], "give an address or a network"),
        (["--net", "localhost"], "give an address or a network"),
        (["--net", ""], "give an address or a network"),
        (["--netns", "no-such-namespace"], "'/run/netns/no-such-namespace': No such file or directory; give"),
        (["--netns", "0"], "/run/netns/0"),
        (["--netns", "a\0b"], "give a name of `ip netns`"),
        (["--accept", "nothing"], "nothing"),
        (["--hook", "nothing"], "nothing"),
        (["--storage", "nothing"], "nothing"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("tool", TOOLS)
def test_wrong_call_of_a_tool(tool: str, arguments: list[str], names: str, capsys: Captured) -> None:
    line = refused([tool, *arguments], capsys)
    assert line.startswith(f"tcpobs {tool}: ")
    assert line.endswith(f" (see tcpobs {tool} --help)\n")
    assert names in line


@pytest.mark.parametrize("tool", TOOLS)
def test_nothing_asked_for(tool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = parsed(monkeypatch, tool)
    assert set(listing.filters(arguments).values()) == {None}
    assert listing.options(arguments) == {
        "duration": None,
        "buffer_size": 8 << 20,
        "max_sockets": 1 << 18,
        "btf": None,
        "hook": None,
        "storage": None,
        "transport": None,
        "accept": None,
    }
    flags = ("time", "timestamp", "wide", "csv", "json", "extended", "verbose", "ebpf")
    assert not any(getattr(arguments, flag) for flag in flags)


@pytest.mark.parametrize("tool", TOOLS)
def test_all_asked_for(tool: str, monkeypatch: pytest.MonkeyPatch) -> None:
    filters = (
        "-L 80,443 -D 0,65535 -6 --net 10.0.0.0/8,::1 --netns /proc/self/ns/net -p 181 --uid root --comm nc"
    )
    options = (
        "-d 2.5 --buffer-size 64k --max-sockets 5 --btf F --hook tp_btf --storage hash --transport perfbuf"
        " --accept syscall"
    )
    arguments = parsed(monkeypatch, tool, "-Ttwv", *filters.split(), *options.split(), "--cgroup", "/a b")
    assert listing.filters(arguments) == {
        "local_ports": [80, 443],
        "remote_ports": [0, 65535],
        "ip": 6,
        "networks": ["10.0.0.0/8", "::1"],
        "netns": os.stat("/proc/self/ns/net").st_ino,
        "pid": 181,
        "uid": 0,
        "comm": "nc",
        "cgroup": "/a b",
        "container": None,
    }
    assert listing.options(arguments) == {
        "duration": 2.5,
        "buffer_size": 65536,
        "max_sockets": 5,
        "btf": "F",
        "hook": "tp_btf",
        "storage": "hash",
        "transport": "perfbuf",
        "accept": "syscall",
    }
    assert all(getattr(arguments, flag) for flag in ("time", "timestamp", "wide", "verbose"))


@pytest.mark.parametrize(
    ("flag", "name"),
    [
        ("--time", "time"),
        ("--timestamp", "timestamp"),
        ("--wide", "wide"),
        ("--csv", "csv"),
        ("-s", "csv"),
        ("--json", "json"),
        ("--ipv4", "ipv4"),
        ("-4", "ipv4"),
        ("--ipv6", "ipv6"),
    ],
)
@pytest.mark.parametrize("tool", TOOLS)
def test_flag(tool: str, flag: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert getattr(parsed(monkeypatch, tool, flag), name) is True


@pytest.mark.parametrize("flag", ["-p", "--pid"])
@pytest.mark.parametrize("tool", TOOLS)
def test_pid(tool: str, flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert parsed(monkeypatch, tool, flag, "181").pid == 181


@pytest.mark.parametrize("flag", ["-Y", "--journal"])
def test_journal(flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert parsed(monkeypatch, "states", flag).journal is True


@given(ports=st.lists(st.integers(0, 65535), min_size=1))
def test_a_list_of_ports_is_read(ports: list[int]) -> None:
    assert listing._ports(",".join(map(str, ports))) == ports


@given(text=st.text() | st.text("0123456789,+-_ "))
@example("9" * 5000)
def test_any_text_is_ports_or_refused(text: str) -> None:
    try:
        ports = listing._ports(text)
    except argparse.ArgumentTypeError:
        return
    assert ports == [int(port) for port in text.split(",")]
    assert all(0 <= port <= 65535 for port in ports)


@pytest.mark.parametrize("tool", TOOLS)
def test_help_has_examples_and_hides_what_is_for_us(tool: str, capsys: Captured) -> None:
    with pytest.raises(SystemExit) as ended:
        main([tool, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert f"examples:\n  tcpobs {tool} " in text
    for flag in ("--time", "--localport", "--duration", "--buffer-size"):
        assert flag in text
    for flag in ("--ebpf", "--hook", "--storage"):
        assert flag not in text


def test_help_names_the_tools(capsys: Captured) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(f"    {tool} " in text for tool in TOOLS)
    assert "examples:" in text


def test_version_says_what_runs(capsys: Captured) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    words = capsys.readouterr().out.split()
    assert [words[0], words[2], words[4]] == ["tcpobs", "libbpf", "Linux"]


@pytest.mark.parametrize("tool", TOOLS)
def test_ebpf_prints_the_whole_source(tool: str, capfd: Captured) -> None:
    assert main([tool, "--ebpf"]) == 0
    source = capfd.readouterr().out
    assert 'SEC("tp_btf/inet_sock_set_state")' in source
    included = [line for line in source.splitlines() if line.startswith('#include "')]
    assert included == ['#include "vmlinux.h"']
    for defined in ("struct endpoints {", "wanted(", "read_endpoints(", "emit("):
        assert defined in source


@pytest.mark.parametrize(
    ("raised", "status", "says"),
    [
        (TcpobsError("the remedy"), 1, "tcpobs: the remedy\n"),
        (
            LibbpfError("bpf_object__load", errno.EPERM),
            1,
            "tcpobs: bpf_object__load: Operation not permitted\n",
        ),
        (BrokenPipeError(), 0, ""),
        (KeyboardInterrupt(), 0, ""),
    ],
    ids=repr,
)
def test_exit_status(
    raised: BaseException, status: int, says: str, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    def fail(_: argparse.Namespace) -> None:
        raise raised

    monkeypatch.setattr(states, "run", fail)
    assert main(["states"]) == status
    assert capsys.readouterr() == ("", says)


class NoEvents(Events[Session]):
    """Events of a trace in which nothing happens, except that some are lost."""

    def __init__(self) -> None:
        """Traces nothing."""

    losses = Losses(buffer_full=3, recursion_misses=1)

    def batches(self) -> Iterator[list[Session]]:
        return iter([[]])

    def stop_when_broken(self, fd: int) -> None:
        """Nothing is watched."""

    def close(self) -> None:
        """Nothing was opened."""


def ran(patch: pytest.MonkeyPatch, captured: Captured, *flags: str) -> tuple[str, str]:
    """What `tcpobs life` with these flags prints about NoEvents."""
    patch.setattr(signal, "signal", lambda *_: None)
    patch.setattr(gc, "disable", lambda: None)
    patch.setattr(life, "sessions", lambda **_: NoEvents())
    with Object.of_file(str(object_file("life")), "life") as object:
        decoder(Session, object.btf)
    assert main(["life", *flags]) == 0
    return captured.readouterr()


@pytest.mark.parametrize(
    ("flags", "header"),
    [
        ((), "PID   COMM       LADDR           LPORT "),
        (("-w",), "PID   COMM             IP LADDR                      LPORT "),
        (("-s",), "PID,COMM,IP,LADDR,"),
        (("-w", "-s"), "PID,COMM,IP,LADDR,"),
        (("-T",), "TIME     PID   COMM "),
        (("-t",), "TIME(s)   PID   COMM "),
        (("-tTs",), "TIME,TIME(s),PID,"),
        (("--json",), ""),
    ],
    ids=" ".join,
)
def test_mode(flags: tuple[str, ...], header: str, monkeypatch: pytest.MonkeyPatch, capfd: Captured) -> None:
    out, _ = ran(monkeypatch, capfd, *flags)
    assert out.startswith(header)
    assert out.count("\n") == bool(header)


def test_losses_are_told(monkeypatch: pytest.MonkeyPatch, capfd: Captured) -> None:
    _, err = ran(monkeypatch, capfd)
    causes = "3: the buffer was full (raise --buffer-size), 1: the kernel skipped the program"
    assert err == f"tcpobs: lost so far: {causes}\n"
