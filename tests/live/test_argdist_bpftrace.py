"""argdist beside bpftrace: the same questions about the same calls, at the same time, the same answers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from live.asking import Answer, Work, asking, finish, gcc, ready
from live.tcp import DEADLINE, wait

pytestmark = pytest.mark.native

BPFTRACE = shutil.which("bpftrace")
CLOSE = """
import os, sys
print("ready", flush=True)
sys.stdin.read()
for i in range(1000):
    try:
        os.close(1_000_000 + i % 7)
    except OSError:
        pass
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> str:
    return gcc(tmp_path_factory.mktemp("work") / "program", "workload.c")


class Peer:
    """bpftrace, armed; it ends when the process that works does."""

    def __init__(self, pid: int, program: str) -> None:
        assert BPFTRACE, "install bpftrace"
        end = f"tracepoint:syscalls:sys_enter_exit_group /pid == {pid}/ {{ exit(); }}"
        self._process = subprocess.Popen(
            [BPFTRACE, "-f", "json", "-e", f"{program} {end}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            wait(self._is_armed)
        except BaseException:
            self.kill()
            raise

    def _is_armed(self) -> bool:
        """Whether it waits for events: it does so when everything is attached."""
        if self._process.poll() is not None:
            raise AssertionError(self._process.communicate()[1])
        stack = Path(f"/proc/{self._process.pid}/stack").read_text()
        return "epoll" in stack or "ep_poll" in stack

    def finish(self) -> Any:
        """What it found: the map that it has."""
        out, err = self._process.communicate(timeout=DEADLINE)
        assert self._process.returncode == 0, err
        lines = map(json.loads, filter(None, out.splitlines()))
        (data,) = (line["data"] for line in lines if line["type"] in ("map", "hist"))
        return data["@"]

    def kill(self) -> None:
        """Ends it at once."""
        self._process.kill()
        self._process.communicate()


@contextmanager
def beside(work: Work, program: str) -> Iterator[Peer]:
    """bpftrace, at the end of which nothing of it is left."""
    peer = Peer(work.pid, program)
    try:
        yield peer
    finally:
        peer.kill()


def both(work: Work, ours: list[str], theirs: str) -> tuple[Answer, Any]:
    """The two answers about what a process did."""
    with asking("--json", "-i", "600", *ours) as command, beside(work, theirs) as peer:
        work()
        found = peer.finish()
        return Answer(*finish(command), 1), found


def folded(buckets: list[dict[str, int]]) -> dict[tuple[int | None, int | None], int]:
    """A histogram of bpftrace's in our steps: it counts 0 and 1 each by itself."""
    found: Counter[tuple[int | None, int | None]] = Counter()
    for bucket in buckets:
        low, high = bucket.get("min"), bucket.get("max")
        found[(0, 1) if (low, high) in ((0, 0), (1, 1)) else (low, high)] += bucket["count"]
    return {ends: count for ends, count in found.items() if count}


def test_count_of_calls(program: str) -> None:
    with ready(program, "hits", "100003") as work:
        ours, theirs = both(
            work,
            ["-C", f"p:{program}:hit(u32 value):u32:value"],
            f"uprobe:{program}:hit {{ @[arg0] = count(); }}",
        )
    assert ours.ones() == {int(value): count for value, count in theirs.items()}
    assert ours.calls() == 2 * 100003 or ours.calls() == 100003


def test_count_of_returns(program: str) -> None:
    with ready(program, "numbers") as work:
        ours, theirs = both(
            work,
            ["-C", f"r:{program}:number():int:$retval"],
            f"uretprobe:{program}:number {{ @[(int32)retval] = count(); }}",
        )
    assert ours.ones() == {int(value): count for value, count in theirs.items()}
    assert ours.ones()[-6] == 7


def test_count_of_texts(program: str) -> None:
    with ready(program, "names") as work:
        ours, theirs = both(
            work,
            ["-z", "64", "-C", f"p:{program}:name(char *text):char*:text"],
            f"uprobe:{program}:name {{ @[str(arg0)] = count(); }}",
        )
    same = ("alpha", "beta:1,2", "x" * 63)
    assert {text: ours.ones()[text] for text in same} == {text: theirs[text] for text in same}
    assert ours.calls() == sum(theirs.values())


def test_histogram(program: str) -> None:
    with ready(program, "hits", "50000") as work:
        ours, theirs = both(
            work,
            ["-H", f"p:{program}:hit(u32 value):u32:value"],
            f"uprobe:{program}:hit {{ @ = hist(arg0); }}",
        )
    assert ours.buckets() == folded(theirs)


def test_signed_histogram(program: str) -> None:
    with ready(program, "numbers") as work:
        ours, theirs = both(
            work,
            ["-H", f"p:{program}:number(int value):int:value"],
            f"uprobe:{program}:number {{ @ = hist((int32)arg0); }}",
        )
    assert ours.buckets() == folded(theirs)
    assert ours.buckets()[None, -1] == 7


def test_tracepoint() -> None:
    with ready(sys.executable, "-c", CLOSE) as work:
        ours, theirs = both(
            work,
            ["-p", str(work.pid), "-C", "t:syscalls:sys_enter_close():u64:args->fd"],
            f"tracepoint:syscalls:sys_enter_close /pid == {work.pid}/ {{ @[args->fd] = count(); }}",
        )
    assert ours.ones() == {int(value): count for value, count in theirs.items()}
    assert ours.ones()[1_000_000] == 143
