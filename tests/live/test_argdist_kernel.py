"""tcpobs argdist on the kernel's functions: here is a process that calls them a known number of times.

Not every kernel has kprobes, and the build machine's has not: `make test-vm` runs these on others.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Callable

import pytest

from live.asking import ARGDIST, Answer, ask, asking, ended, finish
from live.features import MISSING, OTHER_TYPES
from live.tcp import Pair, connect, wait
from tcpobs.cli import main
from tcpobs.libbpf.btf import Btf, Kind

BY_FENTRY = pytest.mark.subject("argdist: kernel functions by fentry and fexit")
BY_KPROBE = pytest.mark.subject("argdist: kernel functions by kprobe and kretprobe")
FENTRY = pytest.param(["--hook", "fentry"], id="fentry", marks=BY_FENTRY)
KPROBE = pytest.param(["--hook", "kprobe"], id="kprobe", marks=BY_KPROBE)
CHOSEN = pytest.param([], id="fentry", marks=BY_FENTRY)
"""Without fexit, it is to find that out by itself."""
pytestmark = [
    pytest.mark.essential,
    pytest.mark.needs("kprobes"),
    pytest.mark.subject("argdist: all of the kernel, and its errors"),
]

AT_RETURN = [CHOSEN if "fexit's return value" in MISSING else FENTRY, KPROBE]
TRACING = Path("/sys/kernel/tracing")
SENT = [100] * 7 + [5000] * 3
"""The bytes of each send()."""

OPENED, ASKED, RESIZED, CHANGED = 5, 11, 4, 6
READERS = 0 if "returns of several at once" in MISSING else 4
"""How often the process opens a file, asks for its PID, resizes a pipe, changes a mode; its threads."""

RING = 64 * 40
"""Bytes that the kernel allocates for a pipe of 64 pages: struct pipe_buffer has 40."""


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of their own for the objects."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def functions() -> frozenset[str]:
    """The kernel's functions that can be traced."""
    with open(TRACING / "available_filter_functions") as file:
        return frozenset(line.split()[0] for line in file)


@pytest.fixture(scope="module")
def kmalloc(functions: frozenset[str]) -> str:
    """__kmalloc, or what became of it in Linux 6.10."""
    return "__kmalloc" if "__kmalloc" in functions else "__kmalloc_noprof"


@pytest.fixture
def pair() -> Iterator[Pair]:
    """A session whose client has some options set, to be seen in its bit fields."""
    pair = connect(socket.AF_INET)
    with pair.client, pair.server:
        for level, option in (
            (socket.SOL_SOCKET, socket.SO_REUSEADDR),
            (socket.SOL_SOCKET, socket.SO_REUSEPORT),
            (socket.IPPROTO_TCP, socket.TCP_NODELAY),
        ):
            pair.client.setsockopt(level, option, 1)
        pair.client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
        yield pair


@contextmanager
def waiting(work: Callable[[], object]) -> Iterator[tuple[str, Callable[[], None]]]:
    """A process that works when it is told to: its PID, and what tells it and waits for its end."""
    start, begin = os.pipe()
    pid = os.fork()
    if not pid:
        status = 1
        try:
            os.close(begin)
            os.read(start, 1)
            work()
            status = 0
        finally:
            os._exit(status)
    os.close(start)
    statuses: list[int] = []

    def go() -> None:
        os.close(begin)
        statuses.append(os.waitpid(pid, 0)[1])
        assert statuses == [0]

    yield str(pid), go
    if not statuses:
        go()


def ask_in_full(work: Callable[[], object], *arguments: str) -> tuple[Answer, str]:
    """Asks about a process that works: an answer from which nothing is missing, and its PID.

    A preemptible kernel leaves the programs of fentry while they run, and skips them for others then. It says
    so; here it is asked again.
    """
    for _ in range(5):
        with waiting(work) as (pid, go):
            answer = ask(go, "-p", pid, *arguments)
        lost = [answer.lost(number) for number in range(answer.many)]
        if not any(lost):
            break
        assert all(losses.keys() <= {"skipped"} for losses in lost)
    assert not any(lost)
    return answer, pid


def send(pair: Pair) -> None:
    """Sends, and has it received."""
    for size in SENT:
        assert pair.client.send(bytes(size)) == size
        left = size
        while left:
            left -= len(pair.server.recv(left))


# ---- arguments


@pytest.mark.parametrize("hook", [FENTRY, KPROBE])
def test_arguments(hook: list[str], kmalloc: str, pair: Pair) -> None:
    file = Path(f"/dev/shm/opened-{os.getpid()}")
    file.touch()
    reader, writer = os.pipe()

    def work() -> None:
        send(pair)
        for _ in range(OPENED):
            os.close(os.open(file, os.O_RDONLY))
        for _ in range(ASKED):
            os.getpid()
        for _ in range(RESIZED):
            fcntl.fcntl(writer, 1031, 64 * 4096)  # F_SETPIPE_SZ

    name, tcp = "path->dentry->d_name.name", "p::tcp_sendmsg"
    asked = {
        f"{tcp}()": {(): 10},
        f"{tcp}(struct sock *sk, struct msghdr *msg, size_t size):u16,u32,size_t:"
        "sk->__sk_common.skc_family,sk->sk_protocol,size:size==100": {(2, 6, 100): 7},
        # bit fields, and one that has become a whole byte; an enum; a place; and arithmetic
        f"{tcp}():u8,u8,int,u32,enum sock_type,u64,u64,u16,int:sk->__sk_common.skc_reuse,"
        "sk->__sk_common.skc_reuseport,((struct tcp_sock *)sk)->nonagle & 1,sk->sk_userlocks & 1,sk->sk_type,"
        "sizeof(struct sock),(u64)&sk->__sk_common.skc_family-(u64)sk,*(u16 *)((char *)sk+16),"
        "size > 1000 ? (int)size / 1000 : -1": {
            (1, 1, 1, 1, "SOCK_STREAM", sizeof("sock"), 16, 2, 5): 3,
            (1, 1, 1, 1, "SOCK_STREAM", sizeof("sock"), 16, 2, -1): 7,
        },
        f'p::vfs_open(struct path *path):char*,char:{name},{name}[3]:STRCMP("opened-", {name})': {
            (file.name, ord("n")): OPENED
        },
        f'p::do_sys_openat2():char*:filename:STRCMP("{file}", filename)': {(str(file),): OPENED},
        "p::__task_pid_nr_ns():enum pid_type:type:type==PIDTYPE_TGID": {("PIDTYPE_TGID",): ASKED},
        f"p::{kmalloc}(size_t sz, gfp_t flags):size_t:sz:sz == {RING} && flags&GFP_ATOMIC": {
            (RING,): RESIZED
        },
    }
    specifiers = [word for text in asked for word in ("-C", text)]
    specifiers += ["-H", f"p::{kmalloc}(u64 size):u64:size:size == {RING}"]
    try:
        answer, _ = ask_in_full(work, *hook, *gfp_atomic(), *specifiers)
    finally:
        file.unlink()
        os.close(reader)
        os.close(writer)
    assert {text: answer.counts(number) for number, text in enumerate(asked)} == asked
    assert answer.buckets(len(asked)) == {(2048, 4095): RESIZED}


def sizeof(struct: str) -> int:
    """A kernel's, by its types."""
    with Btf.of_kernel() as btf:
        found = btf.find(struct, Kind.STRUCT)
        assert found
        return found.size


def gfp_atomic() -> list[str]:
    """The macro's value, for kernels whose types do not have the bits (gfp.h of Linux 5.10 and 6.1)."""
    with Btf.of_kernel() as btf:
        known = btf.enumerator("___GFP_HIGH_BIT") is not None
    return [] if known else ["-D", "GFP_ATOMIC=0xa20"]


# ---- returns


@pytest.mark.parametrize("hook", AT_RETURN)
def test_returns(hook: list[str], kmalloc: str, pair: Pair) -> None:
    """What functions return, what they were given then, and how long it took."""
    pipes = [os.pipe() for _ in range(READERS)]
    reader, writer = os.pipe()

    def work() -> None:
        send(pair)
        for _ in range(RESIZED):
            fcntl.fcntl(writer, 1031, 64 * 4096)  # F_SETPIPE_SZ
        read_at_once(pipes)

    asked = {
        "r::tcp_sendmsg()": {(100,): 7, (5000,): 3},
        "r::tcp_sendmsg():int,size_t:$retval,$entry(size)": {(100, 100): 7, (5000, 5000): 3},
    }
    histograms = {
        "r::tcp_sendmsg():u64:$latency": len(SENT),
        f"r::{kmalloc}(size_t size):u64:$latency/$entry(size):$entry(size)=={RING}#ns per byte": RESIZED,
    }
    others = []
    if READERS:  # those that wait, of many: where a kretprobe has room for more than one
        asked[
            "r::vfs_read():s64,size_t:$retval,$entry(count):$entry(count) > 1000 && $entry(count) < 2000"
        ] = {(number + 1, 1001 + number): 1 for number in range(READERS)}
        histograms[
            "r::vfs_read(void *file, void *buf, size_t count):size_t:$entry(count):$latency > 1000000"
        ] = READERS
        others = ["r::vfs_read():u32:$PID:$latency > 100000", "r::vfs_read():char*:$COMM:$latency > 100000"]
    specifiers = [word for text in (*asked, *others) for word in ("-C", text)]
    specifiers += [word for text in histograms for word in ("-H", text)]
    answer, pid = ask_in_full(work, *hook, *specifiers)
    for ends in (*pipes, (reader, writer)):
        for end in ends:
            os.close(end)
    assert {text: answer.counts(number) for number, text in enumerate(asked)} == asked
    first = len(asked) + len(others)
    for number, (text, calls) in enumerate(histograms.items()):
        buckets = answer.buckets(first + number)
        assert (buckets[512, 1023] if "count" in text else sum(buckets.values())) == calls
    if others:
        pids, names = (answer.ones(len(asked) + number) for number in range(2))
        assert list(pids) == [int(pid)]
        assert pids[int(pid)] >= READERS
        assert sum(names.values()) >= READERS


def read_at_once(pipes: list[tuple[int, int]]) -> None:
    """A thread for each pipe, that asks for 1001 bytes or more; all wait before each gets its one or more."""

    def read(number: int) -> None:
        assert len(os.read(pipes[number][0], 1001 + number)) == number + 1

    threads = [threading.Thread(target=read, args=(number,)) for number in range(len(pipes))]
    for thread in threads:
        thread.start()
    for number, thread in enumerate(threads):  # proc_pid_syscall(5)
        doing = Path(f"/proc/self/task/{thread.native_id}/syscall")
        asks = f" {1001 + number:#x} "
        wait(lambda doing=doing, asks=asks: asks in doing.read_text())  # type: ignore[misc]
    end = time.monotonic() + 0.002
    wait(lambda: time.monotonic() > end)
    for number, (_, writer) in enumerate(pipes):
        os.write(writer, bytes(number + 1))
    for thread in threads:
        thread.join()


@pytest.mark.needs("returns of several at once")
@pytest.mark.parametrize("hook", AT_RETURN)
def test_recursion(hook: list[str], stacked: Path) -> None:
    """A change in an overlay file system calls itself for the one below it: the inner one is the shorter."""

    def work() -> None:
        for number in range(CHANGED):
            os.chmod(stacked, 0o600 + number)

    answer, _ = ask_in_full(
        work,
        *hook,
        *("-C", "r::notify_change():char*,u64:$entry(dentry)->d_sb->s_type->name,$latency"),
        *("-C", "r::notify_change():int:$retval"),
    )
    calls: Counter[object] = Counter()
    ns: Counter[object] = Counter()
    for (name, latency), count in answer.counts().items():
        assert isinstance(latency, int)
        calls[name] += count
        ns[name] += latency * count
    assert calls == {"overlay": CHANGED, "tmpfs": CHANGED}
    assert ns["overlay"] > ns["tmpfs"]
    assert answer.ones(1) == {0: 2 * CHANGED}


@pytest.fixture
def stacked(tmp_path: Path) -> Iterator[Path]:
    """A file in an overlay over a tmpfs."""
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", tmp_path], check=True)
    try:
        lower, upper, work, merged = (tmp_path / name for name in ("lower", "upper", "work", "merged"))
        for folder in (lower, upper, work, merged):
            folder.mkdir()
        (upper / "file").touch()
        options = f"lowerdir={lower},upperdir={upper},workdir={work}"
        subprocess.run(["mount", "-t", "overlay", "-o", options, "overlay", merged], check=True)
        try:
            yield merged / "file"
        finally:
            subprocess.run(["umount", merged], check=True)
    finally:
        subprocess.run(["umount", tmp_path], check=True)


# ---- the rest of the kernel


def test_events_and_the_scheduler(functions: frozenset[str], loop: str) -> None:
    """A block device read, an interrupt, and what a limited process has left of its time."""
    runtime = "__account_cfs_rq_runtime" if "__account_cfs_rq_runtime" in functions else "update_curr"
    left = "cfs_rq->runtime_remaining"

    def work() -> None:
        subprocess.run(
            ["dd", f"if={loop}", "of=/dev/null", "bs=4096", "count=5", "iflag=direct", "status=none"],
            check=True,
        )
        for number in range(20):
            assert not os.path.exists(f"/no-such-{os.getpid()}-{number}")  # virtiofs asks the host
        with limited():
            spent = time.process_time() + 0.3
            while time.process_time() < spent:
                pass

    answer = ask(
        work,
        *("-I", "kernel/sched/sched.h"),
        *("-H", "t:block:block_rq_complete():u32:args->nr_sector"),
        *("-C", "t:irq:irq_handler_entry():int:args->irq"),
        *("-C", "t:irq:irq_handler_entry():char*:args->name"),
        *("-C", f"p::{runtime}(struct cfs_rq *cfs_rq):s64:{left}:{left}"),
    )
    assert answer.buckets(0) == {(8, 15): 5}
    assert answer.calls(1) > 0
    assert all(isinstance(irq, int) and 0 < irq < 1000 for irq in answer.ones(1))
    assert any("virtio" in str(name) for name in answer.ones(2))
    # In ns; a process may overdraw it.
    assert len(answer.ones(3)) > 1
    assert all(isinstance(ns, int) and abs(ns) < 1e9 for ns in answer.ones(3))
    assert "kernel/sched/sched.h is not on this host" in answer.err


@pytest.fixture
def loop() -> Iterator[str]:
    """A block device."""
    subprocess.run(["modprobe", "loop"], check=True)
    image = Path(f"/dev/shm/image-{os.getpid()}")
    image.write_bytes(bytes(1 << 20))
    try:
        command = ["losetup", "--find", "--show", str(image)]
        made = subprocess.run(command, check=True, capture_output=True, text=True)
        yield made.stdout.strip()
        subprocess.run(["losetup", "--detach", made.stdout.strip()], check=True)
    finally:
        image.unlink()


@contextmanager
def limited() -> Iterator[None]:
    """Gives this process half of a CPU (Documentation/admin-guide/cgroup-v2.rst)."""
    top = Path("/sys/fs/cgroup")
    group = top / f"test-{os.getpid()}"
    (top / "cgroup.subtree_control").write_text("+cpu")
    group.mkdir()
    try:
        (group / "cpu.max").write_text("50000 100000")
        (group / "cgroup.procs").write_text(str(os.getpid()))
        yield
    finally:
        (top / "cgroup.procs").write_text(str(os.getpid()))
        group.rmdir()


@pytest.mark.subject("argdist: functions of a library")
def test_user_functions() -> None:
    """With what each kernel has for them; all else is in test_argdist."""
    libc = ctypes.CDLL(None)

    def work() -> None:
        for number in range(20):
            libc.labs(ctypes.c_long(-number))

    asked = {
        "p:c:labs(long n):long:n:n < -17": {(-18,): 1, (-19,): 1},
        "r:c:labs(long n):long,long:$retval,$entry(n)": {(number, -number): 1 for number in range(20)},
        "r:c:labs():char:(char)($latency > 0)": {(1,): 20},
    }
    if "addresses of returns" not in MISSING:  # both take what a program was attached with (Linux 5.15)
        asked["p:c:labs*()"] = {("labs",): 20}
    with waiting(work) as (pid, go):
        answer = ask(go, "-p", pid, *(word for text in asked for word in ("-C", text)))
    assert {text: answer.counts(number) for number, text in enumerate(asked)} == asked


def test_wildcards(pair: Pair) -> None:
    with waiting(lambda: send(pair)) as (pid, go):
        back = [] if "addresses of returns" in MISSING else ["-C", "r::tcp_send*()"]
        # One by one, each takes its time.
        many = "p::tcp_send*()" if "kprobe.multi" in MISSING else "p::tcp_*()"
        answer = ask(go, "-p", pid, "-C", many, *back)
    assert answer.ones()["tcp_sendmsg"] == len(SENT)
    assert len(answer.ones()) > 1
    assert all(str(name).startswith("tcp_") for name in answer.ones())
    if back:
        assert answer.ones(1)["tcp_sendmsg"] == len(SENT)


# ---- objects and types of other kernels


@pytest.mark.needs("another kernel's types")
@pytest.mark.subject("argdist: objects compiled for another kernel")
def test_object_of_another_kernel(pair: Pair, tmp_path: Path) -> None:
    """Compiled for it, run here: 5.10's, or on 5.10 that of 6.12."""
    object, file = tmp_path / "object", Path(f"/dev/shm/opened-{os.getpid()}")
    file.touch()

    def work() -> None:
        send(pair)
        for _ in range(OPENED):
            os.close(os.open(file, os.O_RDONLY))

    name = "path->dentry->d_name.name"
    asked = {
        "p::tcp_sendmsg():u16,u16,u32,size_t:sk->sk_type,sk->sk_protocol,sk->sk_userlocks & 1,size": {
            (1, 6, 1, 100): 7,
            (1, 6, 1, 5000): 3,
        },
        "p::tcp_sendmsg():int,u64:((struct tcp_sock *)sk)->nonagle & 1,sizeof(struct sock)": {
            (1, sizeof("sock")): 10
        },
        f'p::vfs_open():char*:{name}:STRCMP("opened-", {name})': {(file.name,): OPENED},
    }
    specifiers = [word for text in asked for word in ("-C", text)]
    try:
        made = ended("--btf", str(OTHER_TYPES), "--compile-only", str(object), *specifiers)
        assert made.returncode == 0, made.stderr
        for hook in ("fentry", "kprobe"):
            with waiting(work) as (pid, go):
                options = ["-p", pid, "--hook", hook, "--object", str(object)]
                with asking("--json", "-i", "600", *options) as command:
                    go()
                    answer = Answer(*finish(command), len(asked))
            assert {text: answer.counts(number) for number, text in enumerate(asked)} == asked
    finally:
        file.unlink()


def test_types_only_in_a_file(pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel without its types, as one is where they are covered up: kprobes need only the file."""
    types = tmp_path / "types"
    types.write_bytes(Path("/sys/kernel/btf/vmlinux").read_bytes())
    cover = 'mount -t tmpfs tmpfs /sys/kernel/btf && exec "$@"'
    command = ["unshare", "--mount", "sh", "-c", cover, "sh", *ARGDIST]
    monkeypatch.setattr("live.asking.ARGDIST", command)
    with waiting(lambda: send(pair)) as (pid, go):
        answer = ask(
            go,
            *("-p", pid, "--btf", str(types)),
            *("-C", "p::tcp_sendmsg():u16,size_t:sk->__sk_common.skc_family,size"),
            *("-C", "r::tcp_sendmsg():int:$retval"),
        )
    assert answer.counts() == {(2, 100): 7, (2, 5000): 3}
    assert answer.ones(1) == {100: 7, 5000: 3}
    done = ended("-C", "p::tcp_sendmsg():size_t:size", "-n", "1")
    assert done.returncode == 1
    assert "--btf FILE" in done.stderr


# ---- errors


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[..., str]]:
    """What it says of a specifier that it does not take: in this process, for Python is slow to start."""

    def refused(specifier: str, *options: str) -> str:
        assert main(["argdist", "-n", "1", *options, "-C", specifier]) in (1, 2)
        out, err = capfd.readouterr()
        assert out == ""
        assert err.startswith("tcpobs: ")
        return err

    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    yield refused
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def test_errors_of_names(kmalloc: str, functions: frozenset[str], refused: Callable[..., str]) -> None:
    """No such function; one that the compiler made another of; two of one name; a macro; no such way."""
    addresses: dict[str, set[str]] = {}
    with open("/proc/kallsyms") as file:
        for line in file:
            address, kind, name, *module = line.split()
            if kind in "tT" and not module:
                addresses.setdefault(name, set()).add(address)
    parts = sorted(name for name in functions if ".isra." in name and name.partition(".")[0] not in addresses)
    twins = sorted(name for name in functions & addresses.keys() if len(addresses[name]) > 1)
    with Btf.of_kernel() as btf:  # one where fentry would take the first
        twin = next(name for name in twins if btf.find(name, Kind.FUNC))

    assert "did you mean tcp_sendmsg" in refused("p::tcp_sendmsgg()")
    said = refused(f"p::{parts[0].partition('.')[0]}()")
    assert parts[0].partition(".isra")[0] + "." in said
    assert "cannot be probed by its name" in said
    assert f"functions {twin!r}" in refused(f"p::{twin}()")
    if gfp_atomic():
        assert "-D NAME=VALUE" in refused(f"p::{kmalloc}(size_t sz, gfp_t flags):size_t:sz:flags&GFP_ATOMIC")
    assert "cannot be traced by fentry" in refused("p::tcp_send*()", "--hook", "fentry")
    if "fexit's return value" in MISSING:
        assert "bpf_get_func_ret" in refused("r::tcp_sendmsg()", "--hook", "fentry")
    if "addresses of returns" in MISSING:
        assert "bpf_get_func_ip" in refused("r::tcp_send*()")


def test_not_traceable(refused: Callable[..., str]) -> None:
    """What handles breakpoints can hold none."""
    function = "el1h_64_sync_handler" if os.uname().machine == "aarch64" else "exc_int3"
    said = f"cannot attach p::{function}(): the kernel does not take a probe there"
    assert said in refused(f"p::{function}()")
