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

from vm import kernels, machine, roots, tested
from vm.packages import BUILD, ROOT, PackageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

MOST_MACHINES = 4
"""At a time, each with 2 GiB of memory."""

SECONDS = 2400
"""What a kernel's tests may take, two VMs at a time on two cores."""

TESTS = {
    "essential": "tests/live -m essential",
    "more": "tests/live -m 'essential or many or ways'",
    "bcc": "tests/bcc",
}
"""pytest's arguments, by what kernels.txt says."""

TOTAL = "**all live tests**"

PYTEST = (
    "$python -m pytest -q --tb=short -p no:cacheprovider -p no:hypothesispytest -p no:xdist"
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
    """Runs tests/live on a kernel: the essential ones, or all."""

    def prepare(kernel: kernels.Kernel) -> tuple[str, Path]:
        return LIVE[line.architecture], roots.arm64_root() if line.architecture == "arm64" else Path("/")

    return _tested(Outcome(line.name, next(t for t in line.tests if t != "bcc")), line, prepare)


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
    about = f"{outcome.name}, {outcome.tests}"
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
        print(f"{about}: running in a VM, which takes minutes", flush=True)
        pytest = PYTEST.format(tests=TESTS[outcome.tests])
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
    """Has the types of the kernel whose objects are tried on this one (live.features.OTHER_TYPES)."""
    if line.architecture == "amd64":
        other = "6.12" if line.name == "5.10" else "5.10"
        found = kernels.find(next(each for each in kernels.lines() if each.name == other))
        if found:
            kernels.types(found)


def _read(outcome: Outcome, junit: str) -> None:
    """Counts the tests of a junit report by their subjects, and keeps it."""
    (BUILD / f"{outcome.name}-{outcome.tests}.xml").write_text(junit)
    suite = next(ElementTree.fromstring(junit).iter("testsuite"))
    for entry in suite.iterfind("properties/property"):
        outcome.properties[entry.attrib["name"]] = entry.attrib["value"]
    for case in suite.iter("testcase"):
        bad = any(case.find(kind) is not None for kind in ("failure", "error", "skipped"))
        count = outcome.failed if bad else outcome.passed
        count.update([TOTAL, *(entry.attrib["value"] for entry in case.iterfind("properties/property"))])


# ---- the report


def _subjects(outcomes: Sequence[Outcome]) -> list[str]:
    """The lines of the table: the tests' subjects, in the order of the kernel that has the most of them."""
    most = max(outcomes, key=lambda outcome: len(outcome.passed))
    others = (subject for outcome in outcomes for subject in (*outcome.passed, *outcome.failed))
    subjects = [subject for subject in dict.fromkeys([*most.passed, *others]) if subject != TOTAL]
    return [*subjects, TOTAL]


def _cell(outcome: Outcome, subject: str) -> str:
    if outcome.error:
        return "**error**"
    failed, passed = outcome.failed[subject], outcome.passed[subject]
    if failed:
        return f"**{failed} of {failed + passed} failed**"
    limit = outcome.properties.get(f"limit {subject}")
    if limit and not passed:
        return f"no: {limit}"
    return str(passed) if passed else "–"


def table(outcomes: Sequence[Outcome]) -> str:
    """What was tested, and how much of it passed, on each kernel."""
    lines = [["", *(outcome.name for outcome in outcomes)], ["---"] * (len(outcomes) + 1)]
    lines += [["kernel", *(outcome.release.replace("-cloud", "") for outcome in outcomes)]]
    lines += [[name, *(_cell(outcome, name) for outcome in outcomes)] for name in _subjects(outcomes)]
    owners = (outcome.properties.get("owners", "**none**") for outcome in outcomes)
    lines += [["ends by owner: right / nobody's / unknown / wrong", *owners]]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def fields(outcomes: Sequence[Outcome]) -> str:
    """Where each kernel has the fields that the programs read."""
    lines = [["field of `struct tcp_sock`", *(outcome.name for outcome in outcomes)]]
    lines += [["---"] * (len(outcomes) + 1)]
    properties = dict.fromkeys(name for outcome in outcomes for name in outcome.properties)
    for name in (name for name in properties if name.startswith("field ")):
        places = [outcome.properties.get(name, "**none**") for outcome in outcomes]
        lines.append([f"`{name.partition('.')[2]}`", *places])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def report(outcomes: Sequence[Outcome], bcc: Sequence[Outcome], seconds: float) -> str:
    """docs/kernels.md."""
    absent = "".join(f"\nNot run: {o.name}, for {o.absent}.\n" for o in outcomes if o.absent)
    run = [outcome for outcome in outcomes if not outcome.absent]
    beside = "".join(
        f"On {each.name}, side by side with BCC's tools (`tests/bcc`): {each.passed[TOTAL]} tests.\n"
        for each in bcc
    )
    more = ", ".join(outcome.name for outcome in run if outcome.tests == "more")
    packages = "".join(f"- {outcome.name}: {outcome.package}, {outcome.seconds:.0f} s\n" for outcome in run)
    return f"""\
# Kernels

Written by `make test-vm`, {datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC, on {platform.machine()}; it took \
{seconds / 60:.1f} minutes. SHA-256 of what was tested: `{tested.digest()}` (tests/vm/tested.py).

Each column is one of Debian's kernels, booted in a VM with one emulated CPU. The tests of `tests/live` that
depend on the kernel ran on each, and more of them on {more}: – was not run there. The figures count tests
that passed. `no` is a limit of that kernel, with its cause, and a test checks that tcpobs names it. The tests
of a way (hook, storage, transport, accept) ran with it forced. The last line counts the ends of sessions in
`test_owners`, the best way: those with their owner's PID, those that no process acted on, with 0, and those
with 0 or another PID instead of their owner's. On arm64, the aarch64 wheel was installed in a Debian 13 for
arm64, and tested there.

{table(run)}{absent}
{beside}[bench/results.md](../bench/results.md) has the costs.

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
    jobs = sorted(
        names, key=lambda name: ("more" in lines[name].tests, lines[name].architecture), reverse=True
    )
    pool = ThreadPoolExecutor(min(os.cpu_count() or 1, MOST_MACHINES))
    try:
        running = {name: pool.submit(live, lines[name]) for name in jobs}
        beside = [pool.submit(beside_bcc, lines[name]) for name in names if "bcc" in lines[name].tests]
        outcomes = [running[name].result() for name in names]
        bcc = [each.result() for each in beside]
    finally:
        machine.stopping.set()
        pool.shutdown(cancel_futures=True)
    print(table([outcome for outcome in outcomes if not outcome.absent]))
    good = all(outcome.good for outcome in (*outcomes, *bcc))
    if good and not arguments:
        text = report(outcomes, bcc, time.monotonic() - start)
        good = "**none**" not in text
        (tested.REPORT if good else BUILD / "kernels.md").write_text(text)
    if not good:
        print("not all is well: docs/kernels.md is left as it was", file=sys.stderr)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
