"""tcpobs doctor: what this host can do, and what to do about the rest."""

from __future__ import annotations

import os
from collections import namedtuple
from contextlib import suppress
from functools import partial

from tcpobs import __version__, compiler, host, privileges
from tcpobs.errors import HostError, TcpobsError
from tcpobs.journal import Journal
from tcpobs.libbpf.errors import LibraryMissing
from tcpobs.libbpf.library import library
from tcpobs.output import Output
from tcpobs.privileges import Capability
from tcpobs.tools.life import sessions
from tcpobs.tools.states import states

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable
    from typing import Any, NamedTuple

    from tcpobs.events import Events, Options

    class Finding(NamedTuple):
        """What was found of one thing. `works` is None for a plain fact, and for what was not looked at."""

        name: str
        works: bool | None
        text: str
        remedy: str

else:
    Finding = namedtuple("Finding", "name works text remedy")

REINSTALL = "install tcpobs again, or point TCPOBS_LIBBPF to another one"

EXAMPLES = """\
examples:
  tcpobs doctor               everything, on one screen
  tcpobs doctor --json        the same for a script
  tcpobs doctor --btf FILE    with this file of the kernel's types

It tries each mechanism by loading and attaching a program, and detaches it at once. The exit status is
0 when `states` and `life` can run, else 1. Without root it says what it could not look at."""


KEPT = "no capability, once all is attached; argdist and life --open, --every, --summary keep CAP_BPF"

UPROBES = "/sys/bus/event_source/devices/uprobe"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its flags."""
    parser.epilog = EXAMPLES
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument(
        "--btf", metavar="FILE", help="the kernel's types, where it does not carry them itself"
    )


def run(arguments: argparse.Namespace) -> int:
    """Runs the command; returns the exit status."""
    output = Output()
    btf = arguments.btf
    tools = [_tool("states", partial(states, btf=btf)), _tool("life", partial(sessions, btf=btf))]
    able = all(tool.works for tool in tools)
    if privileges.may_trace():
        tools.append(_tool("life --existing", partial(sessions, existing=True, btf=btf)))
        tools.append(_tool("life --open", partial(sessions, still_open=True, btf=btf)))
    findings = [
        *_kernel(btf),
        _libbpf(),
        _capabilities(),
        *_mechanisms(btf),
        _user_functions(),
        _compiler(),
        _journal(),
        *tools,
        Finding("while running", None, KEPT, ""),
    ]
    with suppress(BrokenPipeError):  # the status says it, too
        output.write(_as_json(able, findings) if arguments.json else _as_text(findings))
    return 0 if able else 1


def _as_text(findings: list[Finding]) -> str:
    system = os.uname()
    lines = [f"tcpobs {__version__} on {system.sysname} {system.release} {system.machine}"]
    for name, works, text, remedy in findings:
        answer = {True: "yes", False: "no", None: "-"}[works]
        lines.append(f"{name:<22} {answer:<4} {text}")
        if remedy:
            lines.append(f"{'':<22}      to do: {remedy}")
    return "".join(f"{line}\n" for line in lines)


def _as_json(able: bool, findings: list[Finding]) -> str:
    import json

    system = os.uname()
    found = {
        "able": able,
        "tcpobs": __version__,
        "kernel": system.release,
        "machine": system.machine,
        "findings": [
            {"name": name, "works": works, "text": text, "remedy": remedy or None}
            for name, works, text, remedy in findings
        ],
    }
    return json.dumps(found, indent=2) + "\n"


# ---- the host


def _kernel(btf: str | None) -> list[Finding]:
    return [_types(btf), _lockdown(), _jit(), _tracefs(), _cgroup()]


def _types(btf: str | None) -> Finding:
    name, path = "kernel types (BTF)", btf or host.KERNEL_BTF
    if not os.path.exists(path):
        remedy = "give them with --btf FILE, or take a kernel built with CONFIG_DEBUG_INFO_BTF"
        return Finding(name, False, f"{path} is missing", remedy)
    try:
        host.check_btf(path)
    except LibraryMissing:
        return Finding(name, None, f"{path}; not looked into, for libbpf is missing", "")
    except TcpobsError as error:
        return Finding(name, False, str(error), "give them with --btf FILE")
    return Finding(name, True, f"{path}, {os.path.getsize(path) / 1e6:.1f} MB", "")


def _lockdown() -> Finding:
    text = host.read(host.LOCKDOWN).strip()
    if not text:
        why = "not looked at" if os.path.exists(host.LOCKDOWN) else f"{host.LOCKDOWN} is not there"
        return Finding("lockdown", None, why, "")
    mode = text.partition("[")[2].partition("]")[0]
    if mode != "confidentiality":
        return Finding("lockdown", None, mode, "")
    remedy = "boot with lockdown=integrity or none: BPF may not read kernel memory"
    return Finding("lockdown", False, mode, remedy)


def _jit() -> Finding:
    path = "/proc/sys/net/core/bpf_jit_enable"
    value = host.read(path).strip()
    if not value:
        return Finding("BPF JIT", None, f"not looked at: {path} cannot be read", "")
    if value == "0":
        return Finding(
            "BPF JIT", False, "off: programs run several times slower", "sysctl net.core.bpf_jit_enable=1"
        )
    return Finding("BPF JIT", True, f"net.core.bpf_jit_enable is {value}", "")


def _tracefs() -> Finding:
    place = host.tracefs()
    if not place:
        return Finding("tracefs", False, "not mounted; only the hook tracepoint needs it", "")
    closed = "" if os.access(f"{place}/events", os.R_OK) else ", closed to this user"
    return Finding("tracefs", True, place + closed, "")


def _cgroup() -> Finding:
    if os.path.exists("/sys/fs/cgroup/cgroup.controllers"):
        return Finding("cgroup", None, "version 2", "")
    if os.path.exists("/sys/fs/cgroup/unified/cgroup.controllers"):
        return Finding("cgroup", None, "versions 1 and 2 (hybrid)", "")
    if os.path.isdir("/sys/fs/cgroup/memory"):
        return Finding("cgroup", None, "version 1", "")
    return Finding("cgroup", None, "none is mounted at /sys/fs/cgroup", "")


def _libbpf() -> Finding:
    try:
        version = ".".join(map(str, library().version))
    except LibraryMissing as error:
        return Finding("libbpf", False, str(error), REINSTALL)
    return Finding("libbpf", True, f"{version}, {library().path}", "")


def _capabilities() -> Finding:
    if privileges.may_trace():
        held = [capability.name for capability in Capability if privileges.has(capability)]
        return Finding("capabilities", True, ", ".join(held), "")
    cause, remedy = host.unprivileged()
    return Finding("capabilities", False, cause, remedy)


# ---- the mechanisms


def _mechanisms(btf: str | None) -> list[Finding]:
    """Each hook, storage, transport and accept, tried; and each walk over open sessions."""
    return [
        *_ways(btf),
        *(
            _tried_if_allowed(f"walk {storage}", partial(sessions, still_open=True, storage=storage, btf=btf))
            for storage in host.STORAGES
        ),
    ]


def _ways(btf: str | None) -> list[Finding]:
    return [
        _mechanism(part, choice, btf)
        for part, choices in (
            ("hook", host.HOOKS),
            ("storage", host.STORAGES),
            ("transport", host.TRANSPORTS),
            ("accept", host.ACCEPTS[:-1]),
        )
        for choice in choices
    ]


def _mechanism(part: str, choice: str, btf: str | None) -> Finding:
    forced: Options = {"btf": btf}
    forced[part] = choice  # type: ignore[literal-required]
    # The programs of states are the most; it looks at who accepts if owners are asked for.
    return _tried_if_allowed(f"{part} {choice}", lambda: states(owners=part == "accept", **forced))


def _tried_if_allowed(name: str, start: Callable[[], Events[Any]]) -> Finding:
    if not privileges.may_trace():
        return Finding(name, None, "not looked at, for want of privileges", "")
    works, text, _ = _tried(start)
    # Nobody needs all of them: what to do is said where a tool cannot run.
    return Finding(name, works, text, "")


def _tool(name: str, start: Callable[[], Events[Any]]) -> Finding:
    """What a tool will choose here."""
    return Finding(f"tcpobs {name}", *_tried(start))


def _tried(start: Callable[[], Events[Any]]) -> tuple[bool, str, str]:
    """Whether it traces; how, or why not; and what to do."""
    try:
        with start() as events:
            return True, host.describe(events.way), ""
    except LibraryMissing as error:
        return False, str(error), REINSTALL
    except HostError as error:
        return False, error.cause, error.remedy
    except TcpobsError as error:
        return False, str(error), ""


# ---- what else tools use


def _user_functions() -> Finding:
    name = "user functions"
    if os.path.exists(UPROBES):
        return Finding(name, True, "argdist probes libraries, programs and USDT by uprobes", "")
    cause = "this kernel has no uprobes (CONFIG_UPROBES)"
    return Finding(name, False, cause, "argdist sees functions of the kernel and tracepoints only")


def _compiler() -> Finding:
    found = compiler.find()
    if found:
        return Finding("compiler", True, " ".join(found), "")
    return Finding(
        "compiler",
        False,
        "none; only argdist needs one",
        "install clang or the Python package ziglang, or set TCPOBS_CLANG",
    )


def _journal() -> Finding:
    name = "journal (states -Y)"
    try:
        Journal()
    except HostError as error:
        return Finding(name, False, error.cause, error.remedy)
    return Finding(name, True, "systemd-journald", "")
