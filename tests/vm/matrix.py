"""Runs the live tests on every kernel of the list, each in a VM, and reports.

usage: python -m vm.matrix             all of them, and the report into docs/kernels.md
       python -m vm.matrix NAME ...    these
"""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from live.tcp import ALL_WAYS
from live.test_fields import FIELDS
from tcpobs import host
from vm import kernels, machine, roots
from vm.packages import BUILD, ROOT, PackageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

BESIDE_BCC = "6.1"
"""The kernel where BCC, of the same Debian, is compared with."""

MOST_MACHINES = 4
"""At a time, each with 2 GiB of memory."""

WHOLE = "6.12"
"""The kernel where all of tests/live runs."""

_FILES = (
    *("test_cgroups", "test_command", "test_course"),
    *("test_ends", "test_filters", "test_snapshot", "test_summary"),
)
_TESTS = (
    *("test_bad_specifiers", "test_bad_flags", "test_damaged_objects"),
    "(test_every_owner_is_right and not default)",
)
ELSEWHERE = " ".join(f"--ignore=tests/live/{name}.py" for name in _FILES)
ELSEWHERE += f" -k 'not {' and not '.join(_TESTS)}'"
"""pytest's arguments on the others: without what hangs on the kernel least, or takes longest in a VM."""

SECONDS = 2400
"""What a kernel's tests may take, two VMs at a time on two cores."""

REPORT = ROOT / "docs" / "kernels.md"

PYTEST = (
    "$python -m pytest -q --tb=short -p no:cacheprovider -p no:hypothesispytest"
    " --junitxml=/tmp/junit.xml {tests} >&2"
)
LIVE = {
    "amd64": "python=.venv/bin/python",
    # As a user has it: the wheel, installed there.
    "arm64": f"python=/{roots.ENVIRONMENT}/bin/python3\n"
    "$python -m pip install --quiet --no-compile --no-index --find-links build/dependencies"
    " dist/tcpobs-*manylinux*_aarch64.whl >&2 || exit",
}
BCC = """\
ln -sfn "$PWD/{headers}"/usr/src/* /usr/src/ && ln -sfn "$PWD/{headers}"/usr/lib/linux-kbuild-* /usr/lib/ &&
cp -a "{headers}"/lib/modules/*/. "/lib/modules/$(uname -r)/" || exit
python=.venv/bin/python"""
"""BCC looks for the kernel's headers there."""


@dataclass
class Outcome:
    """What the tests on one kernel came to. `error` says why there is no result."""

    name: str
    tests: str
    release: str = ""
    package: str = ""
    error: str = ""
    absent: str = ""
    seconds: float = 0.0
    passed: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    properties: dict[str, str] = field(default_factory=dict)

    @property
    def good(self) -> bool:
        """Whether every test passed, or there was no such kernel to be had."""
        return bool(self.absent) or (not self.error and not self.failed and bool(self.passed))


# ---- running


def live(line: kernels.Line) -> Outcome:
    """Runs tests/live on a kernel."""

    def prepare(kernel: kernels.Kernel) -> tuple[str, Path]:
        return LIVE[line.architecture], roots.arm64_root() if line.architecture == "arm64" else Path("/")

    return _tested(Outcome(line.name, "live"), line, prepare)


def beside_bcc(line: kernels.Line) -> Outcome:
    """Runs tests/bcc on a kernel."""

    def prepare(kernel: kernels.Kernel) -> tuple[str, Path]:
        kernels.headers(line, kernel)
        return BCC.format(headers=kernel.headers.relative_to(ROOT)), Path("/")

    return _tested(Outcome(line.name, "bcc"), line, prepare)


_FETCHING = threading.Lock()
"""Kernels of one suite share files while they are fetched and unpacked."""


def _tested(
    outcome: Outcome, line: kernels.Line, prepare: Callable[[kernels.Kernel], tuple[str, Path]]
) -> Outcome:
    about = f"{outcome.name}, tests/{outcome.tests}"
    try:
        with _FETCHING:
            kernel = kernels.find(line)
            before, root = prepare(kernel) if kernel else ("", Path("/"))
            _other_types(line)
        if not kernel:
            outcome.absent = f"{line.suite} has no release candidate now"
            print(f"{about}: {outcome.absent}", flush=True)
            return outcome
        outcome.release, outcome.package = kernel.release, kernel.package
        less = "" if outcome.tests != "live" or line.name == WHOLE else f" {ELSEWHERE}"
        pytest = PYTEST.format(tests=f"tests/{outcome.tests}{less}")
        command = f"{before}\n{pytest}\nstatus=$?; cat /tmp/junit.xml; exit $status"
        done = machine.run(kernel, command, root, seconds=SECONDS)
        outcome.seconds = done.seconds
        _read(outcome, done.out)
        last = (done.err.strip().splitlines() or ["nothing was said"])[-1]
        print(f"{about}: {last}", flush=True)
        if done.status:
            print(done.err, file=sys.stderr, flush=True)
            if not outcome.failed:
                outcome.error = f"pytest ended with {done.status}"
    except (
        *(PackageError, machine.MachineError, roots.RootError),
        *(ElementTree.ParseError, OSError, subprocess.CalledProcessError),
    ) as error:
        outcome.error = str(error)
        print(f"{about}: {error}", file=sys.stderr, flush=True)
    return outcome


def _other_types(line: kernels.Line) -> None:
    """Has the types of the kernel whose objects are tried on this one (live.asking.OTHER_TYPES)."""
    if line.architecture == "amd64":
        other = "6.12" if line.name == "5.10" else "5.10"
        found = kernels.find(next(each for each in kernels.lines() if each.name == other))
        if found:
            kernels.types(found)


def _read(outcome: Outcome, junit: str) -> None:
    """Counts the tests of a junit report by what they are about (see _subjects), and keeps it."""
    (BUILD / f"{outcome.name}-{outcome.tests}.xml").write_text(junit)
    suite = next(ElementTree.fromstring(junit).iter("testsuite"))
    for entry in suite.iterfind("properties/property"):
        outcome.properties[entry.attrib["name"]] = entry.attrib["value"]
    for case in suite.iter("testcase"):
        bad = any(case.find(kind) is not None for kind in ("failure", "error", "skipped"))
        count = outcome.failed if bad else outcome.passed
        count.update(["all", *_subjects(case.attrib["classname"], case.attrib["name"])])


# ---- the report

WAYS = {"-".join(way): host.describe(way) for way in ALL_WAYS}
SUBJECTS = {
    **WAYS,
    "test_types_from_a_file": "types from a file (`--btf`)",
    "test_fields": "kernel fields, each where this kernel has it",
    "argdist-fentry": "argdist: kernel functions by fentry and fexit",
    "argdist-kprobe": "argdist: kernel functions by kprobe and kretprobe",
    "test_argdist_kernel": "argdist: all of kernel functions and their errors",
    "test_object_of_another_kernel": "argdist: objects compiled for another kernel",
    "test_user_functions": "argdist: functions of a library",
    "test_owners": "owners, beside workloads that write down the true ones",
    "test_privileges": "least privilege, and giving it up",
    "test_doctor": "`tcpobs doctor`",
    "test_command": "the command: output, ends, errors",
    "test_journal": "the journal",
    "test_libbpf": "the libbpf binding",
    "test_peers": "side by side with libbpf-tools",
    "all": "**all live tests**",
}
"""The lines of the table. A test that runs each way counts in the line of its way, too."""


def _subjects(module: str, test: str) -> list[str]:
    way = next((way for way in WAYS if f"{way}]" in test or f"{way}-" in test), None)
    name, _, variant = test.rstrip("]").partition("[")
    names = [way, variant, name, module.rpartition(".")[2]]
    return [name for name in names if name in SUBJECTS and name]


def _cell(outcome: Outcome, subject: str) -> str:
    if outcome.error:
        return "**error**"
    failed, passed = outcome.failed[subject], outcome.passed[subject]
    if failed:
        return f"**{failed} of {failed + passed} failed**"
    if outcome.name != WHOLE and subject in _FILES:
        return "–"
    limit = outcome.properties.get(f"limit {subject}")
    if limit and not passed:
        return f"no: {limit}"
    return str(passed) if passed else "**none**"


def table(outcomes: Sequence[Outcome]) -> str:
    """What was tested, and how much of it passed, on each kernel."""
    lines = [["", *(outcome.name for outcome in outcomes)], ["---"] * (len(outcomes) + 1)]
    lines += [["kernel", *(outcome.release.replace("-cloud", "") for outcome in outcomes)]]
    lines += [[text, *(_cell(outcome, name) for outcome in outcomes)] for name, text in SUBJECTS.items()]
    owners = (outcome.properties.get("owners", "**none**") for outcome in outcomes)
    lines += [["ends by owner: right / nobody's / unknown / wrong", *owners]]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def fields(outcomes: Sequence[Outcome]) -> str:
    """Where each kernel has the fields that the programs read."""
    lines = [["field of `struct tcp_sock`", *(outcome.name for outcome in outcomes)]]
    lines += [["---"] * (len(outcomes) + 1)]
    for path in FIELDS:
        places = [outcome.properties.get(f"field {path}", "**none**") for outcome in outcomes]
        lines.append([f"`{path.partition('.')[2]}`", *places])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def report(outcomes: Sequence[Outcome], bcc: Outcome, seconds: float) -> str:
    """docs/kernels.md."""
    absent = "".join(f"\nNot run: {o.name}, for {o.absent}.\n" for o in outcomes if o.absent)
    run = [outcome for outcome in outcomes if not outcome.absent]
    packages = "".join(f"- {outcome.name}: {outcome.package}, {outcome.seconds:.0f} s\n" for outcome in run)
    return f"""\
# Kernels

Written by `make test-vm`, {datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC, on {platform.machine()}; it took \
{seconds / 60:.1f} minutes.

Each column is one of Debian's kernels, booted in a VM with one emulated CPU, where `tests/live` ran: all of
it on {WHOLE}, and on the others what hangs on the kernel most; – is not run there. The figures are tests that
passed. `no` is a limit of that kernel, with its cause, and a test checks that tcpobs names it. Those of a way
(hook, storage, transport, accept) ran with it forced. The last line counts the ends of sessions in
`test_owners`, the best way: those with their owner's PID, those that no process acted on, with 0, and those
with 0 or another PID instead of their owner's. On arm64, the aarch64 wheel was installed in a Debian 13 for
arm64, and tested there.

{table(run)}{absent}
On {bcc.name}, side by side with BCC's tcpstates and tcplife (`tests/bcc`): \
{_cell(bcc, "all")} {"tests" if bcc.good else ""}; [bench/results.md](../bench/results.md) has the costs.

The packages, and how long each took:

{packages}
## Where they have what the programs read

Bytes from the start of the struct, as libbpf found them by CO-RE, and checked against the kernel's own types.

{fields(run)}"""


# ---- both


def main(arguments: Sequence[str]) -> int:
    """Returns the exit status: 0 when all is well."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    start = time.monotonic()
    lines = {line.name: line for line in kernels.lines()}
    unknown = [name for name in arguments if name not in lines]
    if unknown:
        print(f"no kernel {unknown[0]}: {kernels.LIST.name} has {', '.join(lines)}", file=sys.stderr)
        return 2
    names = list(arguments) or list(lines)
    # What takes longest comes first, so that the last ones end together.
    jobs = sorted(names, key=lambda name: (name == WHOLE, lines[name].architecture), reverse=True)
    pool = ThreadPoolExecutor(min(os.cpu_count() or 1, MOST_MACHINES))
    try:
        bcc = pool.submit(beside_bcc, lines[BESIDE_BCC]) if BESIDE_BCC in names else None
        running = {name: pool.submit(live, lines[name]) for name in jobs}
        outcomes = [running[name].result() for name in names]
        everything = [*outcomes, bcc.result()] if bcc else outcomes
    finally:
        machine.stopping.set()
        pool.shutdown(cancel_futures=True)
    print(table([outcome for outcome in outcomes if not outcome.absent]))
    good = all(outcome.good for outcome in everything)
    if good and bcc and not arguments:
        text = report(outcomes, bcc.result(), time.monotonic() - start)
        good = "**none**" not in text
        (REPORT if good else BUILD / "kernels.md").write_text(text)
    if not good:
        print("not all is well: docs/kernels.md is left as it was", file=sys.stderr)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
