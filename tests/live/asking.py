"""tcpobs argdist, as a user runs it, over programs that call functions a known number of times."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Union

from live.tcp import DEADLINE, is_loaded, programs_of, read_rest, wait

ARGDIST = [os.path.join(os.path.dirname(sys.executable), "tcpobs"), "argdist"]
SOURCES = Path(__file__).parent / "argdist"
START = 90.0
"""Seconds in which it has started: the compiler is slow in a VM, where others run."""

Value = Union[int, str]
Counts = dict[tuple[Value, ...], int]


class Answer:
    """What it printed with --json: the intervals' counts summed, by the specifiers' order."""

    def __init__(self, out: str, err: str, many: int = 1) -> None:
        self.lines: list[dict[str, Any]] = [json.loads(line) for line in out.splitlines()]
        self.err = err
        self.many = many
        """How many specifiers there are: each has a line in each interval."""

    def counts(self, number: int = 0) -> Counts:
        """A specifier's, by the values."""
        summed: Counts = {}
        for line in self._of(number):
            for row in line["counts"]:
                values = tuple(row["values"].values())
                summed[values] = summed.get(values, 0) + row["count"]
        return summed

    def ones(self, number: int = 0) -> dict[Value, int]:
        """The same, where there is one value."""
        return {value: count for (value,), count in self.counts(number).items()}

    def calls(self, number: int = 0) -> int:
        """All that it counted."""
        return sum(self.counts(number).values())

    def buckets(self, number: int = 0) -> dict[tuple[int | None, int | None], int]:
        """A histogram's, those that are not empty."""
        summed: Counter[tuple[int | None, int | None]] = Counter()
        for line in self._of(number):
            for row in line["histogram"]:
                summed[row["low"], row["high"]] += row["count"]
        return {ends: count for ends, count in summed.items() if count}

    def lost(self, number: int = 0) -> dict[str, int]:
        """What the last line says: it is since the beginning."""
        found: dict[str, int] = self._of(number)[-1].get("lost", {})
        return found

    def _of(self, number: int) -> list[dict[str, Any]]:
        return self.lines[number :: self.many]


def is_armed(command: subprocess.Popen[str]) -> bool:
    """Whether it waits for signals and the interval's end: it does so when everything is attached."""
    with open(f"/proc/{command.pid}/stack") as file:
        return "sigtimedwait" in file.read()


@contextmanager
def asking(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """The command, armed."""
    command = subprocess.Popen(
        [*ARGDIST, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        wait(lambda: command.poll() is not None or is_armed(command), START)
        if command.returncode is not None:
            raise AssertionError(command.communicate()[1])
        yield command
    finally:
        command.kill()
        command.communicate()


def finish(command: subprocess.Popen[str], number: int = signal.SIGINT) -> tuple[str, str]:
    """Ends it by a signal, cleanly; what it printed. Nothing of it stays in the kernel."""
    programs = programs_of(command.pid)
    assert programs
    command.send_signal(number)
    out, err = read_rest(command)
    assert command.returncode == 0, err
    wait(lambda: not any(map(is_loaded, programs)))
    return out, err


def ask(work: Callable[[], object], *arguments: str) -> Answer:
    """Asks while something works: all that was counted then."""
    with asking("--json", "-i", "600", *arguments) as command:
        work()
        return Answer(*finish(command), sum(argument in ("-C", "-H") for argument in arguments))


def lines_until(command: subprocess.Popen[str], calls: int, many: int = 1) -> str:
    """Its next intervals with --json, until each of so many specifiers has counted these calls."""
    assert command.stdout
    out = ""
    while True:
        for _ in range(many):
            line = command.stdout.readline()
            assert line, "it ended"
            out += line
        answer = Answer(out, "", many)
        if all(answer.calls(number) >= calls for number in range(many)):
            return out


def ended(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command where it ends by itself."""
    return subprocess.run([*ARGDIST, *arguments], capture_output=True, text=True, timeout=DEADLINE)


class Work:
    """A program that has started and waits until it may work."""

    def __init__(self, *command: str) -> None:
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        self.pid = self.process.pid
        self.said = []
        assert self.process.stdout
        for line in self.process.stdout:
            if line == "ready\n":
                break
            self.said.append(line.strip())

    def __call__(self) -> str:
        """Lets it work, to its end; what it printed."""
        out, _ = self.process.communicate(timeout=DEADLINE)
        assert self.process.returncode == 0
        return out


@contextmanager
def ready(*command: str) -> Iterator[Work]:
    """A program that waits until it may work."""
    work = Work(*command)
    try:
        yield work
    finally:
        work.process.kill()
        work.process.communicate()


def gcc(to: Path, *arguments: str) -> str:
    """Compiles; the path of what came out."""
    subprocess.run(
        ["gcc", "-O2", "-Wall", "-Wextra", "-pthread", "-o", to, *arguments], check=True, cwd=SOURCES
    )
    return str(to)
