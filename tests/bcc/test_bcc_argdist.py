"""Side by side with BCC's argdist: the same command line over the same calls prints the same rows.

Both run with the same arguments, cumulative, at the same time, over a process that calls functions of the
kernel and of libc. What each took to be armed, and its memory then, goes into the junit report as properties.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bcc.test_bcc import BCC_DEADLINE, peak
from live.asking import ARGDIST, Work, ready
from live.tcp import DEADLINE

SEND = "tcp_sendmsg(struct sock *sk, struct msghdr *msg, size_t size)"
QUESTIONS = {
    "sizes": ("-C", f"p::{SEND}:size_t:size"),
    "sent": ("-C", "r::tcp_sendmsg():int:$retval"),
    "both": ("-C", f"r::{SEND}:size_t,int:$entry(size),$retval"),
    "large": ("-C", f"p::{SEND}:size_t:size:size>100"),
    "devices": ("-C", "p::dev_get_by_name_rcu(struct net *net, const char *name):char*:name"),
    "sizes by power": ("-H", f"p::{SEND}:size_t:size"),
    "seeds": ("-C", "p:c:srandom(unsigned int seed):u32:seed"),
    "seeds by power": ("-H", "p:c:srandom(unsigned int seed):u32:seed"),
    "texts": ("-C", "p:c:atoi(char *text):char*:text"),
    "numbers": ("-C", "r:c:atoi():int:$retval"),
    "default": ("-C", "r:c:atoi()"),
    "calls": ("-C", "p:c:srandom()"),
}
"""By their labels."""

COSTS = ("sizes", "seeds")
"""The questions by which their costs are compared: a function of the kernel, and one of libc."""

SENDS = {1: 3, 7: 2, 64: 5, 1000: 4, 1448: 1, 30_000: 2}
SEEDS = {0: 1, 1: 2, 5: 3, 1 << 20: 4, (1 << 32) - 1: 5}
TEXTS = {"12": 6, "-7": 2, "none": 3}
DEVICES = {"lo": 4, "none0": 3}
"""What is called, and how often."""

WORK = f"""
import ctypes, socket, sys
libc = ctypes.CDLL("libc.so.6")
listener = socket.create_server(("127.0.0.1", 0))
client = socket.create_connection(listener.getsockname())
server, _ = listener.accept()
texts = {{text: ctypes.create_string_buffer(text.encode(), 128) for text in {TEXTS!r}}}
print("ready", flush=True)
sys.stdin.read()
for size, times in {SENDS!r}.items():
    for _ in range(times):
        client.sendall(bytes(size))
        server.recv(size, socket.MSG_WAITALL)
for seed, times in {SEEDS!r}.items():
    for _ in range(times):
        libc.srandom(ctypes.c_uint(seed))
for text, times in {TEXTS!r}.items():
    for _ in range(times):
        libc.atoi(texts[text])
for name, times in {DEVICES!r}.items():
    for _ in range(times):
        try:
            socket.if_nametoindex(name)
        except OSError:
            pass
"""

FIXED = """
import ctypes, runpy, sys
from bcc import libbcc
attach = libbcc.lib.bpf_attach_uprobe
attach.argtypes = [*attach.argtypes, ctypes.c_uint32]
libbcc.lib.bpf_attach_uprobe = lambda *arguments: attach(*arguments, 0)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""BCC's argdist, but for a fault of Debian 12's BCC (0.26): its Python does not give bpf_attach_uprobe the
last argument, ref_ctr_offset. What is in its place has to be the same for all who probe that function, or the
kernel says EINVAL: so nobody else could.
"""

Rows = dict[str, dict[str, int]]


class Tool:
    """A running argdist, and what it has printed; `seconds` and `resident` are those of its first output."""

    def __init__(self, *command: str) -> None:
        self.seconds = self.resident = 0.0
        self._outputs: list[list[str]] = []
        self._first = threading.Event()
        self._start = time.monotonic()
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            if re.match(r"\[\d\d:\d\d:\d\d\]", line):
                if not self._outputs:
                    self.seconds = time.monotonic() - self._start
                    self.resident = peak(self._process.pid)
                self._outputs.append([])
                self._first.set()
            elif self._outputs:
                self._outputs[-1].append(line.rstrip("\n"))
        self._first.set()

    def ready(self) -> Tool:
        """Waits for its first output."""
        assert self._first.wait(BCC_DEADLINE), "no output"
        assert self._outputs, "it ended before its first output"
        return self

    def later(self) -> Rows:
        """The rows of an output that has begun after now."""
        wanted, end = len(self._outputs) + 2, time.monotonic() + 6 * DEADLINE
        while len(self._outputs) < wanted:
            assert time.monotonic() < end, "no more output"
            time.sleep(0.1)
        return rows(self._outputs[wanted - 2])

    def finish(self) -> None:
        """Ends it as a user does. Where BCC was printing, its status is 1."""
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(6 * DEADLINE)
        finally:
            self._process.kill()
            self._reader.join()


def rows(lines: list[str]) -> Rows:
    """An output's counts: by label, by event or by a bucket's ends; those of nothing are left out."""
    found: dict[str, Counter[str]] = {}
    title = ""
    for line in lines:
        counted = re.fullmatch(r"\t(\d+)\s+(.*)", line)
        bucket = re.match(r"\s*(\d+) -> (\d+)\s*: (\d+)", line)
        header = re.fullmatch(r"\s+(.*?)\s*: count\s+distribution", line)
        if counted:
            # BCC's keys have what comes after a text's end, too: one text may have several rows.
            found.setdefault(title, Counter())[counted[2]] += int(counted[1])
        elif bucket:
            found.setdefault(title, Counter())[f"{bucket[1]} -> {bucket[2]}"] += int(bucket[3])
        elif header:
            title = header[1]
        elif not line.startswith("\t"):
            title = line
    return {label: {event: n for event, n in counts.items() if n} for label, counts in found.items()}


def arguments(pid: int, *labels: str) -> list[str]:
    """The command line."""
    asked = [part for label in labels for part in (QUESTIONS[label][0], f"{QUESTIONS[label][1]}#{label}")]
    return ["-c", "-p", str(pid), *asked]


def bcc_argdist() -> list[str]:
    path = shutil.which("argdist-bpfcc", path="/usr/sbin")
    assert path, "install bpfcc-tools"
    return ["/usr/bin/python3", "-c", FIXED, path]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """An empty one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def work() -> Iterator[Work]:
    with ready(sys.executable, "-c", WORK) as work:
        yield work


@pytest.fixture(scope="module")
def answers(work: Work) -> Iterator[tuple[Rows, Rows]]:
    """Ours and BCC's, of the same work."""
    asked = arguments(work.pid, *QUESTIONS)
    tools = []
    try:
        for command in (bcc_argdist(), ARGDIST):
            tools.append(Tool(*command, *asked))
            tools[-1].ready()
        work()
        theirs, ours = (tool.later() for tool in tools)
        yield ours, theirs
    finally:
        for tool in tools:
            tool.finish()


@pytest.mark.parametrize("label", QUESTIONS)
def test_rows(label: str, answers: tuple[Rows, Rows]) -> None:
    """None differs: of the faults that SPEC.md names, none is in these questions."""
    ours, theirs = (answer.get(label, {}) for answer in answers)
    # The original shows $entry(size) by the parameter's name, and text as Python shows bytes.
    ours = {event.replace("$entry(size)", "size"): count for event, count in ours.items()}
    theirs = {re.sub(r"b'(.*)'", r"\1", event): count for event, count in theirs.items()}
    assert ours
    assert ours == theirs


def test_truth(answers: tuple[Rows, Rows]) -> None:
    """What was called was counted."""
    ours, _ = answers
    assert ours["sizes"] == {f"size = {size}": times for size, times in SENDS.items()}
    assert ours["seeds"] == {f"seed = {seed}": times for seed, times in SEEDS.items()}
    assert ours["texts"] == {f"text = {text}": times for text, times in TEXTS.items()}
    assert ours["calls"] == {"total calls": sum(SEEDS.values())}


def test_costs(
    record_testsuite_property: Callable[[str, object], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No limits here: figures for the report. Both are armed an interval before their first output."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for prefix, command in (
        ("bcc_argdist", bcc_argdist()),
        ("tcpobs_argdist_cold", ARGDIST),
        ("tcpobs_argdist_cached", ARGDIST),
    ):
        tool = Tool(*command, *arguments(os.getpid(), *COSTS)).ready()
        tool.finish()
        record_testsuite_property(f"{prefix}_output_seconds", f"{tool.seconds - 1:.2f}")
        record_testsuite_property(f"{prefix}_resident_mb", f"{tool.resident:.1f}")
