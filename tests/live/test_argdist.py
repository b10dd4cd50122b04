"""argdist on the live kernel: programs call functions a known number of times, and it counts to the last."""

from __future__ import annotations

import ctypes
import gc
import math
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Callable

import pytest

from live.asking import ARGDIST, Answer, ask, asking, ended, finish, gcc, lines_until, ready
from live.tcp import DEADLINE, is_loaded, programs_of, wait

pytestmark = pytest.mark.native

VARIANTS = {
    "pie": ["-g", "-fPIE", "-pie"],
    "no-pie": ["-g", "-fno-pie", "-no-pie"],
    "static": ["-g", "-static"],
    "stripped": ["-s", "-rdynamic"],
}
PYTHON = "/usr/bin/python3"
"""Debian's: it has USDT probes."""


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of compiled objects of the tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the programs are made."""
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def program(folder: Path) -> str:
    """With debug information."""
    return gcc(folder / "program", "-g", "workload.c")


@pytest.fixture(scope="module")
def plain(folder: Path) -> str:
    """Without."""
    return gcc(folder / "plain", "workload.c")


@pytest.fixture(scope="module")
def library(folder: Path) -> str:
    """A shared one, without debug information."""
    return _library(folder / "libcalls.so.1")


@pytest.fixture(scope="module")
def usdt(folder: Path) -> str:
    return gcc(folder / "usdt", "usdt.c")


def _library(to: Path, *arguments: str) -> str:
    return gcc(to, "-shared", "-fPIC", "-Wl,--version-script=library.map", *arguments, "library.c")


def counting(*specifiers: str) -> list[str]:
    """The arguments that count each."""
    return [argument for specifier in specifiers for argument in ("-C", specifier)]


def run(*command: str) -> None:
    """A program that waits to work, to its end."""
    with ready(*command) as work:
        work()


# ---- values at the entry

NUMBERS = {0: 1, 1: 2, 2: 3, 3: 4, 4: 5, -3: 7}
"""What number() is called with in the scenario of that name, and how often."""

CALLS = sum(NUMBERS.values())


def test_integers(program: str) -> None:
    answer = ask(
        lambda: run(program, "numbers"),
        *counting(
            f"p:{program}:number():int:value",
            f"p:{program}:number()",
            f"p:{program}:number():int:value:value > 1 && value != 3",
            f"p:{program}:number():int,u8:value * 2 - 1, value < 0 ? 1 : 0",
            f"p:{program}:number():u32:value / 2",
            f"p:{program}:number():s8,bool:-7 / 2 % 3,value == 4",
            f"p:{program}:number():int:value#four: the, label",
        ),
    )
    assert answer.ones() == NUMBERS
    assert answer.counts(1) == {(): CALLS}
    assert answer.ones(2) == {2: 3, 4: 5}
    assert answer.counts(3) == {(2 * value - 1, int(value < 0)): count for value, count in NUMBERS.items()}
    assert answer.ones(4) == {0: 3, 1: 7, 2: 5, 2**32 - 1: 7}
    assert answer.counts(5) == {(0, 0): CALLS - 5, (0, 1): 5}
    assert {line["label"] for line in answer.lines if line["label"]} == {"four: the, label"}
    assert answer.ones(6) == NUMBERS
    assert answer.err == ""


def test_every_register(program: str, plain: str) -> None:
    """Six parameters of all widths, also where only the user knows their types."""
    types = "int,long,unsigned char,short,unsigned int,void*:a,b,c,d,e,f"
    signature = "int a, long b, unsigned char c, short d, unsigned int e, void *f"
    for path, specifier in (
        (program, f"p:{program}:many():{types}"),
        (plain, f"p:{plain}:many({signature}):{types}"),
    ):
        answer = ask(lambda path=path: run(path, "numbers"), "-C", specifier)  # type: ignore[misc]
        assert answer.counts() == {
            (-1, -5000000000, 200, -300, 4000000000, "0x1000"): 2,
            (16, 1, 2, 3, 4, "0x0"): 1,
        }


def test_text(program: str) -> None:
    texts = {"alpha": 3, "beta:1,2": 2, "": 5, "\x1b[2J\n\xe9\\xff": 1}
    answer = ask(
        lambda: run(program, "names"),
        *counting(
            f"p:{program}:name():char*:text",
            f'p:{program}:name():char*:text:STRCMP("beta:1,2", text)#beta: 1, 2',
            f'p:{program}:name():int:STRCMP("al", text) ? 1 : STRCMP("beta", text) ? 2 : 3',
            f'p:{program}:name():char:*text:!STRCMP("x", text)',
            f"p:{program}:name():char:text[4]:text[0] == 'a' || text[0] == 'b'",
        ),
    )
    assert answer.ones() == {**texts, "x" * 79: 1}
    assert answer.ones(1) == {"beta:1,2": 2}
    assert answer.ones(2) == {1: 3, 2: 2, 3: 7}
    assert answer.ones(3) == {ord("a"): 3, ord("b"): 2, 0: 5, 0x1B: 1}
    assert answer.ones(4) == {ord("a"): 3, ord(":"): 2}


@pytest.mark.parametrize("size", [1, 2, 8, 384])
def test_the_size_of_text(program: str, size: int) -> None:
    answer = ask(lambda: run(program, "names"), "-z", str(size), "-C", f"p:{program}:name():char*:text")
    found: dict[str, int] = {}
    for text, count in (("x" * 200, 1), ("alpha", 3), ("beta:1,2", 2)):
        found[text[: size - 1]] = found.get(text[: size - 1], 0) + count
    ones = {value: count for value, count in answer.ones().items() if value and "\x1b" not in str(value)}
    assert ones == {text: count for text, count in found.items() if text}
    assert answer.calls() == 12


STRUCTS: list[tuple[str, str, int | str, int | str]] = [
    ("long", "request->when.tv_nsec", 999999999, 4),
    ("char", "request->inner.kind", ord("k"), 0),
    ("int", "request->inner.at[2].x", 3, 0),
    ("short", "request->inner.at[2].y", -3, 0),
    ("int", "(&request->inner.at[0])[1].y", -2, 0),
    ("int", "(request->inner.at + 2)->y", -3, 0),
    ("u64", "request->whole", 0x8877665544332211, 0),
    ("u8", "request->bytes[7]", 0x88, 0),
    ("u8", "request->bytes[by / 100]", 0x22, 0),
    ("int", "request->low", 5, 0),
    ("int", "request->middle", -7, 0),
    ("int", "request->wide", 70000, 0),
    ("long", "request->far", -5000000000, 0),
    ("bool", "request->flag", 1, 0),
    ("int", "request->list[1][2]", -22, 0),
    ("int", "request->list[by / 100 - 1][2]", 12, 0),
    ("int", "*request->list[1]", 20, 0),
    ("char*", "request->text", "in the struct", ""),
    ("char*", "request->text + 3", "the struct", ""),
    ("char*", "&request->text[7]", "struct", ""),
    ("char*", "request->name", "first", "second"),
    ("char*", "request->next->name", "second", ""),
    ("char*", "request->next ? request->next->name : request->name", "second", "second"),
    ("long", "request->next ? request->next->when.tv_sec : -1", 3, -1),
    ("enum colour", "request->colour", "GREEN", 0),
    ("enum colour", "request->next ? NONE : RED", "NONE", "RED"),
    ("int", "request->colour == GREEN", 1, 0),
    ("size_t", "sizeof(struct point)", 8, 8),
    ("size_t", "sizeof(request->inner.at)", 24, 24),
    ("int", "((struct point *)&request->inner.at[1])->x", 2, 0),
    ("int", "by", 100, 200),
    ("int", 'STRCMP("in the", request->text)', 1, 0),
    ("u64", "(u64)&request->inner.at[1] - (u64)&request->inner.at[0]", 8, 8),
    ("long", "&request->inner.at[2] - &request->inner.at[0]", 2, 2),
]


def test_structs_by_debug_information(program: str) -> None:
    """All in one object."""
    specifiers = [f"p:{program}:serve():{type}:{expression}" for type, expression, _, _ in STRUCTS]
    answer = ask(lambda: run(program, "structs"), *counting(*specifiers))
    found = {expression: answer.ones(number) for number, (_, expression, _, _) in enumerate(STRUCTS)}
    wanted = {
        expression: {first: 5} if first == second else {first: 3, second: 2}
        for _, expression, first, second in STRUCTS
    }
    assert found == wanted


def test_structs_of_libc_without_debug_information(plain: str) -> None:
    answer = ask(
        lambda: run(plain, "structs"),
        *counting(
            f"p:{plain}:moment(struct timespec *when):long:when->tv_nsec",
            f"p:{plain}:moment(const struct timespec *when):long,int:when->tv_sec,when->tv_nsec < 10",
            f"p:{plain}:serve(struct timespec *when, int by):long,int:when->tv_nsec,by",
        ),
    )
    assert answer.ones() == {999999999: 1, 4: 2}
    assert answer.counts(1) == {(1, 0): 1, (3, 1): 2}
    assert answer.counts(2) == {(999999999, 100): 3, (4, 200): 2}


def test_who_calls(program: str) -> None:
    with ready(program, "threads", "5") as work:
        answer = ask(work, "-C", f"p:{program}:number():u32,u32,char*:$PID,$TID,$COMM")
    tids = [int(tid) for tid in work.said]
    assert answer.counts() == {(work.pid, tid, "program"): 5 for tid in tids}


# ---- values at the return


def test_return_values(program: str, plain: str) -> None:
    answer = ask(
        lambda: run(program, "numbers"),
        *counting(
            f"r:{program}:number()",
            f"r:{program}:number():int,int:$retval,$entry(value)",
            f"r:{program}:number():int:$entry(value):$retval < 0 || $entry(value) == 4",
            f"r:{program}:many():long:$retval",
        ),
    )
    assert answer.ones() == {2 * value: count for value, count in NUMBERS.items()}
    assert answer.counts(1) == {(2 * value, value): count for value, count in NUMBERS.items()}
    assert answer.ones(2) == {-3: 7, 4: 5}
    assert answer.ones(3) == {-1000000100: 2, 26: 1}
    assert list(answer.lines[0]["counts"][0]["values"]) == ["retval"]
    answer = ask(lambda: run(plain, "numbers"), "-C", f"r:{plain}:number(int value):int:(int)$retval")
    assert answer.ones() == {2 * value: count for value, count in NUMBERS.items()}


def test_returned_text(program: str) -> None:
    answer = ask(
        lambda: run(program, "names"),
        *counting(
            f'r:{program}:name():char*:$retval:STRCMP("alpha", $retval)',
            f"r:{program}:name():char*:(char*)$retval:$entry(text)[0] == 'b'",
            f"r:{program}:name():char*:$entry(text):$entry(text) == $retval && $entry(text)[0] == 'a'",
        ),
    )
    assert (answer.ones(), answer.ones(1), answer.ones(2)) == ({"alpha": 3}, {"beta:1,2": 2}, {"alpha": 3})


def test_latency_is_at_least_the_time_it_took(program: str) -> None:
    naps = f"r:{program}:nap():int:$entry(ms)"
    answer = ask(
        lambda: run(program, "naps"),
        *counting(
            naps, f"{naps}:$latency >= $entry(ms) * 1000000", f"{naps}:$latency < $entry(ms) * 1000000"
        ),
        "-H",
        f"r:{program}:nap():u64:$latency/$entry(ms)#ns per ms",
    )
    assert answer.ones(0) == answer.ones(1) == {1: 1, 20: 1, 40: 1}
    assert answer.ones(2) == {}
    buckets = answer.buckets(3)
    assert sum(buckets.values()) == 3
    assert all(high is not None and high >= 1000000 for _, high in buckets)


def factorials(*calls: int) -> dict[tuple[int | str, ...], int]:
    """(n, n!) of each call that calls of factorial() lead to, and how often."""
    return {(n, math.factorial(n)): sum(n <= call for call in calls) for n in range(1, max(calls) + 1)}


def test_recursion(program: str) -> None:
    """Every call's own entry value goes with its own return value and time."""
    pairs = f"r:{program}:factorial():long,long:$entry(n),$retval"
    timed = f"r:{program}:factorial():long,long:$entry(n),$retval:$latency > 0"
    answer = ask(
        lambda: run(program, "recursion"), *counting(pairs, timed, f"p:{program}:factorial():long:n")
    )
    assert answer.counts() == answer.counts(1) == factorials(6, 6, 6)
    assert answer.ones(2) == dict.fromkeys(range(1, 7), 3)
    assert answer.lost() == {}


def test_threads(program: str) -> None:
    """Four at a time, each with its own stack of calls."""
    answer = ask(
        lambda: run(program, "threads", "300"),
        *counting(
            f"r:{program}:factorial():long,long:$entry(n),$retval",
            f"p:{program}:number():int:value",
            f"r:{program}:nap():int:$entry(ms):$latency > 0",
        ),
    )
    assert answer.counts() == {pair: 300 * count for pair, count in factorials(3, 4, 5, 6).items()}
    assert answer.ones(1) == dict.fromkeys(range(4), 300)
    assert answer.ones(2) == {0: 1200}
    assert answer.lost() == {}


def test_jumps_out_of_a_function(program: str) -> None:
    """What never returns is told, and the next call's values are its own."""
    answer = ask(
        lambda: run(program, "jumps"),
        *counting(
            f"r:{program}:jump_out():int,int:$entry(value),$retval", f"p:{program}:jump_out():int:value"
        ),
    )
    assert answer.counts() == {(value, value * 10): 10 for value in range(0, 10, 2)}
    assert answer.ones(1) == dict.fromkeys(range(10), 10)
    # 50 jumped; of the last one nobody knows that it is not still running.
    assert answer.lost() == {"returns": 49}
    assert "tcpobs: lost so far: 49: calls never returned\n" in answer.err


# ---- all of them


def test_five_million(program: str) -> None:
    """From two threads, with outputs all the time: nothing is lost, and nothing counted twice."""
    with (
        ready(program, "hits", "2500000") as work,
        asking(
            "--json", "-i", "0.2", "-C", f"p:{program}:hit():u32:value", "-H", f"p:{program}:hit():u32:value"
        ) as command,
    ):
        lines: list[str] = []
        assert command.stdout
        reader = threading.Thread(target=lines.extend, args=(command.stdout,))
        reader.start()
        work.process.communicate(timeout=300)
        command.send_signal(signal.SIGINT)
        reader.join(DEADLINE)
        assert command.wait(DEADLINE) == 0
        assert command.stderr
        answer = Answer("".join(lines), command.stderr.read(), 2)
    assert answer.ones() == dict.fromkeys(range(8), 625_000)
    assert answer.buckets(1) == {(0, 1): 1_250_000, (2, 3): 1_250_000, (4, 7): 2_500_000}
    assert len([line for line in answer.lines if line.get("counts")]) > 5
    assert answer.err == ""


# ---- programs and libraries of every kind


@pytest.mark.parametrize("variant", VARIANTS)
def test_programs(variant: str, folder: Path) -> None:
    path = gcc(folder / variant, *VARIANTS[variant], "workload.c")
    answer = ask(
        lambda: run(path, "numbers"),
        *counting(
            f"p:{path}:number(int value):int:value",
            f"r:{path}:number(int value):int,int:$retval,$entry(value)",
        ),
    )
    assert answer.ones() == NUMBERS
    assert answer.counts(1) == {(2 * value, value): count for value, count in NUMBERS.items()}


def test_versioned_symbols(library: str) -> None:
    """Without a version it is the one that programs are linked to."""
    calls = ctypes.CDLL(library)
    dlvsym = ctypes.CDLL(None).dlvsym
    dlvsym.restype, dlvsym.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p]

    def work() -> None:
        for number, version in ((3, b"CALLS_1"), (5, b"CALLS_2")):
            function = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)(
                dlvsym(calls._handle, b"versioned", version)
            )
            for value in range(number):
                function(value)

    answer = ask(
        work,
        *counting(
            f"r:{library}:versioned(int value):int,int:$entry(value),$retval",
            f"r:{library}:versioned@CALLS_1(int value):int,int:$entry(value),$retval",
            f"r:{library}:versioned@@CALLS_2(int value):int,int:$entry(value),$retval",
        ),
    )
    assert answer.counts() == answer.counts(2) == {(value, value + 2): 1 for value in range(5)}
    assert answer.counts(1) == {(value, value + 1): 1 for value in range(3)}


@pytest.mark.parametrize("kind", ["p", "r"])
def test_wildcards(kind: str, library: str) -> None:
    """A line for each function: of two names for one, that without underscores."""
    calls = ctypes.CDLL(library)

    def work() -> None:
        for times, name in enumerate(("family_first", "__family_first", "family_second", "not_of_it"), 1):
            for _ in range(times):
                calls[name]()

    answer = ask(work, *counting(f"{kind}:{library}:*family*()", f"{kind}:{library}:n*"))
    assert answer.ones() == {"family_first": 3, "family_second": 3}
    assert answer.ones(1) == {"not_of_it": 4}


def test_the_process_and_no_other(program: str) -> None:
    with ready(program, "numbers") as one, ready(program, "numbers") as other:
        answer = ask(
            lambda: (other(), one()),
            "-p",
            str(one.pid),
            *counting(
                f"p:{program}:number():int,u32:value,$PID",
                f"r:{program}:number():int,u32:$entry(value),$PID",
                f"p:{program}:numbe?()",
            ),
        )
    assert (
        answer.counts() == answer.counts(1) == {(value, one.pid): count for value, count in NUMBERS.items()}
    )
    assert answer.ones(2) == {"number": CALLS}


def test_the_thread_and_no_other(program: str) -> None:
    with ready(program, "threads", "20") as work:
        tid = work.said[2]
        answer = ask(
            work,
            "-t",
            tid,
            *counting(
                f"p:{program}:number():u32,u32:$PID,$TID",
                f"r:{program}:number():u32:$TID",
                f"p:{program}:numbe?()",
                "t:sched:sched_process_exit():u32:$TID",
            ),
        )
    assert answer.counts() == {(work.pid, int(tid)): 20}
    assert answer.ones(1) == {int(tid): 20}
    assert answer.ones(2) == {"number": 20}
    assert answer.ones(3) == {int(tid): 1}


CALLER = "import ctypes, sys; calls = ctypes.CDLL(sys.argv[1]); print('ready', flush=True); sys.stdin.read()"


def test_another_mount_namespace(library: str, folder: Path) -> None:
    """At the same path is another build: -p sees what the process sees."""
    other = _library(folder / "other.so", "-DANOTHER_BUILD")
    here = [sys.executable, "-c", f"{CALLER}\nfor value in range(5): calls.number(value)", library]
    there = [sys.executable, "-c", f"{CALLER}\nfor value in range(10, 13): calls.number(value)", library]
    apart = 'mount --bind "$1" "$2" && shift 2 && exec "$@"'
    isolated = [
        "unshare",
        "--mount",
        "--propagation",
        "private",
        "sh",
        "-c",
        apart,
        "sh",
        other,
        library,
        *there,
    ]
    with ready(*here) as ours, ready(*isolated) as theirs:
        both = [f"p:{library}:number(int value):int:value", "p:calls:number(int value):int:value"]
        with asking("--json", "-i", "600", "-p", str(ours.pid), *counting(*both)) as first:
            answer = ask(lambda: (ours(), theirs()), "-p", str(theirs.pid), *counting(*both))
            first_answer = Answer(*finish(first), 2)
    for number in range(2):
        assert answer.ones(number) == dict.fromkeys(range(10, 13), 1)
        assert first_answer.ones(number) == dict.fromkeys(range(5), 1)


def test_a_library_by_its_short_name() -> None:
    """Every process's, too."""
    libc = ctypes.CDLL(None)
    answer = ask(
        lambda: [libc.strtol(b"1234", None, base) for base in (8, 8, 10)],
        "-p",
        str(os.getpid()),
        *counting("p:c:strtol(char *text, char **end, int base):int,char*:base,text"),
    )
    assert answer.counts() == {(8, "1234"): 2, (10, "1234"): 1}


# ---- USDT


def test_usdt_arguments(usdt: str) -> None:
    sizes = ",".join(f"arg{number}" for number in range(1, 9))
    twelve = ",".join(f"arg{number}" for number in range(1, 13))
    answer = ask(
        lambda: run(usdt),
        *counting(
            f"u:{usdt}:sizes():s8,u8,s16,u16,s32,u32,s64,u64:{sizes}",
            f"u:{usdt}:work.twelve():{','.join(['int'] * 12)}:{twelve}",
            f"u:{usdt}:work.bare()",
            f"u:{usdt}:rest.bare()",
            f"u:{usdt}:text():char*:(char*)arg1:arg2 > 1",
        ),
        "-H",
        f"u:{usdt}:twelve():u32:arg12",
    )
    values = (-8, 200, -300, 60000, -70000, 4000000000, -5000000000, 18000000000000000000)
    assert answer.counts() == {values: 6}
    assert answer.counts(1) == {(*range(1, 10), i, i % 2, 1200 + i): 1 for i in range(6)}
    assert answer.counts(2) == {(): 6}
    assert answer.counts(3) == {(): 3}
    assert answer.ones(4) == {"one": 3, "other": 1}
    assert answer.buckets(5) == {(1024, 2047): 6}


@pytest.mark.parametrize("all_processes", [True, False])
def test_usdt_semaphores(all_processes: bool, folder: Path) -> None:
    """The program asks whether anybody looks: somebody does while it is armed, and nobody afterwards."""
    path = gcc(folder / "semaphores", "-DSEMAPHORES", "usdt.c")
    with ready(path) as work, ready(path) as later:
        said = []
        flags = [] if all_processes else ["-p", str(work.pid)]
        answer = ask(lambda: said.append(work()), *flags, "-C", f"u:{path}:work.sizes():s64:arg7")
        assert (answer.ones(), said) == ({-5000000000: 6}, ["6\n"])
        assert later() == "0\n"


def test_usdt_of_python() -> None:
    path = os.path.realpath(PYTHON)
    script = "import gc, sys; gc.disable(); print('ready', flush=True); sys.stdin.read()\n"
    script += "for _ in range(7): gc.collect(1)"
    with ready(path, "-c", script) as work:
        answer = ask(
            work,
            "-p",
            str(work.pid),
            *counting(f"u:{path}:python.gc__start():int:arg1:arg1 == 1", f"u:{path}:gc__start():int:arg1"),
        )
    assert answer.ones() == {1: 7}
    assert answer.ones(1)[1] == 7


# ---- tracepoints


def test_system_calls(tmp_path: Path) -> None:
    path = str(tmp_path / "a file: with, a name")
    open(path, "w").close()

    def work() -> None:
        for _ in range(9):
            os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        os.close(os.open(path, os.O_WRONLY | os.O_CLOEXEC))

    event, ours = "t:syscalls:sys_enter_openat()", f'STRCMP("{path}", args->filename)'
    answer = ask(
        work,
        "-p",
        str(os.getpid()),
        "-z",
        "200",
        *counting(
            f"{event}:char*,int:args->filename,args->flags & 3:{ours}",
            f"{event}:char*:args->filename + {len(str(tmp_path)) + 1}:{ours}",
            event,
        ),
    )
    assert answer.counts() == {(path, os.O_RDONLY): 9, (path, os.O_WRONLY): 1}
    assert answer.ones(1) == {"a file: with, a name": 10}
    assert answer.calls(2) >= 10


def test_located_text_and_arrays(tmp_path: Path) -> None:
    """__data_loc strings and char[16], of processes that exec and rename themselves."""
    path = str(tmp_path / "sleeper")
    shutil.copy(shutil.which("true") or "", path)

    def work() -> None:
        for _ in range(4):
            subprocess.run([path], check=True)
        for name in ("first name", "second"):
            with open(f"/proc/self/task/{threading.get_native_id()}/comm", "w") as file:
                file.write(name)

    with open("/proc/thread-self/comm") as file:
        before = file.read().rstrip("\n")
    ours = f"args->pid == {threading.get_native_id()}"
    answer = ask(
        work,
        *counting(
            f't:sched:sched_process_exec():char*:args->filename:STRCMP("{path}", args->filename)',
            f"t:task:task_rename():char*:args->newcomm:{ours}",
            f"t:task:task_rename():char*,char:args->oldcomm,args->newcomm[1]:{ours}",
            't:sched:sched_process_exit():char*,int:args->comm,args->pid==$PID:STRCMP("sleeper", args->comm)',
        ),
    )
    with open("/proc/thread-self/comm", "w") as file:
        file.write(before)
    assert answer.ones() == {path: 4}
    assert answer.ones(1) == {"first name": 1, "second": 1}
    assert answer.counts(2) == {(before.strip(), ord("i")): 1, ("first name", ord("e")): 1}
    assert answer.counts(3) == {("sleeper", 1): 4}


# ---- what the manual shows


def test_the_examples_for_processes(tmp_path: Path) -> None:
    """Those of SPEC.md that are about a process's functions, on this one."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    back, there = os.pipe()
    longest = b"0123456789" * 13

    def work() -> None:
        for size in (16, 1_000_003, 16):
            libc.free(libc.malloc(size))
        for text in (b"test", b"testing", b"another", longest):
            libc.write(there, text, len(text))
        for size in (3, 1, 100):
            libc.read(back, ctypes.create_string_buffer(100), size)
        for nanoseconds in (1, 500, 500):
            libc.nanosleep(struct.pack("=qq", 0, nanoseconds), None)
        libc.sleep(0)

    try:
        answer = ask(
            work,
            *("-p", str(os.getpid()), "-z", "120", "-T", "5"),
            *counting(
                "p:c:malloc(size_t size):size_t:size:size==1000003",
                "p:c:malloc(size_t size):size_t:size:size==16",
                f"p:c:write(int fd):int:fd:fd=={there}",
                f"p:c:write(int fd, char* buf, size_t len):char*:buf:fd=={there}",
                f'p:c:write(int fd, char *buf):char*:buf:STRCMP("test", buf) && fd == {there}',
                "p:c:nanosleep(struct timespec *req):long:req->tv_nsec",
                f"r:c:read(int fd):long:$retval:$entry(fd)=={back}",
            ),
            *("-H", f"p:c:write(int fd, const void *buf, size_t count):size_t:count:fd=={there}"),
            *("-H", "p:c:sleep(u32 seconds):u32:seconds"),
            *("-H", f"r:c:read(int fd):u64:$latency:$entry(fd)=={back}"),
            *("-H", "r:c:nanosleep()"),
        )
    finally:
        os.close(back)
        os.close(there)
    assert answer.ones(0) == {1_000_003: 1}
    assert answer.ones(1)[16] >= 2
    assert answer.ones(2) == {there: 4}
    assert answer.ones(3) == {"test": 1, "testing": 1, "another": 1, longest[:119].decode(): 1}
    assert answer.ones(4) == {"test": 1, "testing": 1}
    assert answer.ones(5) == {0: 1, 1: 1, 500: 2}  # sleep() calls it, too
    assert answer.ones(6) == {3: 1, 1: 1, 100: 1}
    assert answer.buckets(7) == {(4, 7): 3, (128, 255): 1}
    assert answer.buckets(8) == {(0, 1): 1}
    assert sum(answer.buckets(9).values()) == 3
    assert answer.buckets(10) == {(0, 1): 4}


# ---- compiled here, run there


def test_an_object_from_a_file(program: str, tmp_path: Path) -> None:
    """It carries its specifiers, labels and all, and needs no compiler."""
    made = str(tmp_path / "made.o")
    asked = [
        *counting(
            f"p:{program}:number():int:value#one: two", f"r:{program}:number():int,int:$entry(value),$retval"
        ),
        *counting(f"p:{program}:numbe?()"),
        *("-H", f"p:{program}:number():int:value", "--linear", "0,4,2"),
    ]
    done = ended(*asked, "--compile-only", made)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    direct = ask(lambda: run(program, "numbers"), *asked)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TCPOBS_CLANG", "/nonexistent")
        with asking("--json", "-i", "600", "--object", made) as command:
            run(program, "numbers")
            loaded = Answer(*finish(command), 4)
    for answer in (direct, loaded):
        for line in answer.lines:
            del line["time"]
            line.get("counts", []).sort(key=str)
    assert loaded.lines == direct.lines
    assert loaded.ones() == NUMBERS


@pytest.fixture(scope="module")
def made(program: str, folder: Path) -> bytes:
    """An object that is whole."""
    path = str(folder / "whole.o")
    assert ended("-C", f"p:{program}:number():int:value", "--compile-only", path).returncode == 0
    return Path(path).read_bytes()


def _cut(part: float) -> Callable[[bytes], bytes]:
    return lambda data: data[: int(len(data) * part)]


def _without_middle(data: bytes) -> bytes:
    return data[: len(data) // 3] + data[len(data) // 2 :]


def _with_noise(seed: int) -> Callable[[bytes], bytes]:
    def damage(data: bytes) -> bytes:
        damaged = bytearray(data)
        for step in range(8):
            damaged[(seed * 7919 + step * 104729) % len(data)] ^= 0x55
        return bytes(damaged)

    return damage


def _of_another_machine(data: bytes) -> bytes:
    machine, other = (
        os.uname().machine.encode(),
        b"aarch64" if os.uname().machine == "x86_64" else b"x86_64",
    )
    return data.replace(b'"machine":"%s"' % machine, b'"machine":"%s"' % other)


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": _cut(0),
    "cut to the half": _cut(0.5),
    "cut at the end": lambda data: data[:-1],
    "without the middle": _without_middle,
    "without the ELF": lambda data: data[data.index(b'{"version"') :],
    "noise": lambda _: bytes(range(256)) * 20,
    "no ELF": lambda data: b"\x7fELG" + data[4:],
    "longer": lambda data: data + b"\0",
    "another version": lambda data: data.replace(b'"version":1', b'"version":0'),
    "a huge plan": lambda data: data[:-19] + struct.pack("=I", 0xFFFFFFFF) + data[-15:],
    "another machine": _of_another_machine,
    **{f"noise {seed}": _with_noise(seed) for seed in range(6)},
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_objects(damage: str, made: bytes, tmp_path: Path) -> None:
    path = tmp_path / "damaged.o"
    path.write_bytes(DAMAGES[damage](made))
    done = ended("--object", str(path), "-d", "0.1")
    (line,) = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (1, "")
    assert line.startswith(f"tcpobs: {path} ")


def test_an_object_that_is_not_there(tmp_path: Path) -> None:
    done = ended("--object", str(tmp_path / "none"))
    assert (done.returncode, done.stderr) == (
        1,
        f"tcpobs: {tmp_path}/none cannot be read: No such file or directory\n",
    )
    done = ended("--object", str(tmp_path))
    assert (done.returncode, done.stderr) == (1, f"tcpobs: {tmp_path} cannot be read: Is a directory\n")


def test_an_object_that_cannot_be_written(program: str, tmp_path: Path) -> None:
    path = tmp_path / "no folder" / "made.o"
    done = ended("-C", f"p:{program}:number()", "--compile-only", str(path))
    assert (done.returncode, done.stderr) == (
        1,
        f"tcpobs: {path} cannot be written: No such file or directory\n",
    )


# ---- the output

TIME = r"\[\d\d:\d\d:\d\d\]\n"


def blocks(out: str) -> list[str]:
    """Each interval's text, without its time."""
    found = re.split(TIME, out)
    assert found[0] == ""
    return found[1:]


def test_the_text_of_counts_and_histograms(program: str) -> None:
    calls, named = (
        f"p:{program}:number()",
        f"p:{program}:number():int,int:value,  value*2:value >= 3#what: it, is",
    )
    back, histogram = f"r:{program}:number()", f"p:{program}:number():int:value+3"
    with asking(
        "-i", "600", *counting(calls, named, back), "-H", histogram, "-H", f"{histogram}#sum"
    ) as command:
        run(program, "numbers")
        out, err = finish(command)
    rows = """\
         0 -> 1          : 7        |********************                    |
         2 -> 3          : 1        |**                                      |
         4 -> 7          : 14       |****************************************|
"""
    assert blocks(out) == [
        f"""\
{calls}
	COUNT      EVENT
	22         total calls
what: it, is
	COUNT      EVENT
	4          value = 3, value*2 = 6
	5          value = 4, value*2 = 8
{back}
	COUNT      EVENT
	1          retval = 0
	2          retval = 2
	3          retval = 4
	4          retval = 6
	5          retval = 8
	7          retval = -6
{histogram}
     value+3             : count     distribution
{rows}sum
     sum                 : count     distribution
{rows}"""
    ]
    assert err == ""


def test_the_text_of_wide_and_linear_histograms(program: str) -> None:
    wide = f"p:{program}:many():long:b"
    with asking("-i", "600", "-H", f"p:{program}:many():u64:b < 0 ? -b : b#abs") as command:
        run(program, "numbers")
        out, _ = finish(command)
    (block,) = blocks(out)
    lines = block.splitlines()
    assert lines[:3] == [
        "abs",
        "               abs                           : count     distribution",
        "                   0 -> 1                    : 1        |**********          |",
    ]
    assert lines[-1] == "          4294967296 -> 8589934591           : 2        |********************|"
    assert len(lines) == 2 + 33
    with asking(
        "-i", "600", "-H", f"p:{program}:number():int:value", "-H", wide, "--linear", "0,3,2"
    ) as command:
        run(program, "numbers")
        out, _ = finish(command)
    assert blocks(out) == [
        f"""\
p:{program}:number():int:value
     value               : count     distribution
       ... -> -1         : 7        |****************************************|
         0 -> 1          : 3        |*****************                       |
         2 -> 3          : 7        |****************************************|
         4 -> ...        : 5        |****************************            |
{wide}
     b                   : count     distribution
       ... -> -1         : 2        |****************************************|
         0 -> 1          : 1        |********************                    |
"""
    ]


def test_linear_histograms(program: str) -> None:
    answer = ask(lambda: run(program, "numbers"), "-H", f"p:{program}:number():int:value", "--linear=-3,4,3")
    assert answer.buckets() == {(-3, -1): 7, (0, 2): 6, (3, 4): 9}


def test_negative_numbers_in_a_histogram(program: str) -> None:
    answer = ask(lambda: run(program, "numbers"), "-H", f"p:{program}:number():int:value")
    assert answer.buckets() == {(None, -1): 7, (0, 1): 3, (2, 3): 7, (4, 7): 5}
    answer = ask(lambda: run(program, "numbers"), "-H", f"p:{program}:number():u32:value")
    assert answer.buckets() == {(0, 1): 3, (2, 3): 7, (4, 7): 5, (2**31, 2**32 - 1): 7}


def test_a_name_that_would_break_the_terminal(program: str) -> None:
    with asking("-i", "600", "-C", f"p:{program}:name():char*:text:text[0] == 27") as command:
        run(program, "names")
        out, _ = finish(command)
    assert blocks(out)[0].splitlines()[2] == "\t1          text = \\x1b[2J\\n\xe9\\xff"


def test_the_most_frequent(program: str) -> None:
    value = f"p:{program}:number():int:value"
    answer = ask(lambda: run(program, "numbers"), "-T", "2", "-C", value)
    assert answer.ones() == {4: 5, -3: 7}
    with asking("-i", "600", "-T", "2", "-C", value) as command:
        run(program, "numbers")
        out, _ = finish(command)
    assert blocks(out) == [f"{value}\n\tCOUNT      EVENT\n\t5          value = 4\n\t7          value = -3\n"]


@pytest.mark.parametrize("cumulative", [True, False])
def test_cumulative(cumulative: bool, program: str) -> None:
    """Or each interval for itself."""
    specifiers = [f"p:{program}:number():int:value", f"p:{program}:number()"]
    flags = ["-c"] * cumulative
    with asking("--json", "-i", "0.1", *flags, *counting(*specifiers)) as command:
        run(program, "numbers")
        first = lines_until(command, CALLS, 2)
        run(program, "numbers")
        rest, err = finish(command)
    answer = Answer(first + rest, err, 2)
    last = Answer("".join(f"{line}\n" for line in rest.splitlines()[-2:]), err, 2)
    if cumulative:
        assert last.ones() == {value: 2 * count for value, count in NUMBERS.items()}
        assert last.counts(1) == {(): 2 * CALLS}
    else:
        assert answer.ones() == {value: 2 * count for value, count in NUMBERS.items()}
        assert answer.counts(1) == {(): 2 * CALLS}


def test_the_number_of_outputs(program: str) -> None:
    done = ended("-n", "3", "-i", "0.05", "-C", f"p:{program}:number()")
    assert (done.returncode, done.stderr) == (0, "")
    assert blocks(done.stdout) == [f"p:{program}:number()\n\tCOUNT      EVENT\n"] * 3


def test_the_duration(program: str) -> None:
    """Its end is an output, too, and no interval is longer."""
    done = ended("-d", "0.1", "--json", "-i", "600", "-C", f"p:{program}:number()")
    assert (done.returncode, done.stderr, len(done.stdout.splitlines())) == (0, "", 1)
    done = ended("-d", "0.25", "--json", "-i", "0.1", "-C", f"p:{program}:number()")
    assert (done.returncode, done.stderr, len(done.stdout.splitlines())) == (0, "", 3)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_what_was_gathered(number: int, program: str) -> None:
    with asking("-i", "600", "-C", f"p:{program}:number()") as command:
        run(program, "numbers")
        out, err = finish(command, number)
    assert (blocks(out), err) == (
        [f"p:{program}:number()\n\tCOUNT      EVENT\n\t22         total calls\n"],
        "",
    )


def test_a_killed_one_leaves_nothing_attached(program: str) -> None:
    with asking("-C", f"p:{program}:number()", "-C", "t:sched:sched_process_exec()") as command:
        programs = programs_of(command.pid)
        assert len(programs) == 2
        command.kill()
        command.wait(DEADLINE)
        wait(lambda: not any(map(is_loaded, programs)))


def test_a_closed_pipe_ends_it(program: str) -> None:
    script = f"set -o pipefail; {' '.join(ARGDIST)} -i 0.05 -C 'p:{program}:number()' | head -n 1"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=DEADLINE)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(TIME, done.stdout)


def test_no_room_for_keys_is_told(program: str) -> None:
    asked = ["--max-keys", "2", *counting(f"p:{program}:number():int:value", f"p:{program}:number()")]
    answer = ask(lambda: run(program, "numbers"), *asked)
    lost = answer.lost()["keys"]
    assert len(answer.ones()) == 2
    assert answer.calls() + lost == CALLS
    assert answer.counts(1) == {(): CALLS}
    assert answer.lost(1) == {}
    assert answer.err == f"tcpobs: lost so far: {lost}: no room for another value (raise --max-keys)\n"


def test_keys_are_of_one_interval(program: str) -> None:
    """What was shown makes room."""
    with asking(
        "--json", "-i", "0.1", "--max-keys", "6", "-C", f"p:{program}:number():u32,int:$PID,value"
    ) as command:
        out = ""
        for _ in range(3):
            run(program, "numbers")
            out += lines_until(command, CALLS)
        rest, err = finish(command)
    answer = Answer(out + rest, err)
    assert answer.calls() == 3 * CALLS
    assert err == ""


def test_the_generated_program(program: str) -> None:
    done = ended("--ebpf", "-C", f"p:{program}:number():int:value")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"/* p:{program}:number():int:value */" in done.stdout
    assert ended("-v", "-d", "0.05", "-C", f"p:{program}:number():int:value").stdout.startswith(done.stdout)


# ---- bad input

BAD: list[tuple[str, str, str, str]] = [
    # flag, specifier, what the caret points at, what it says
    ("-C", "x:c:malloc()", "x:c", "unknown probe type 'x'"),
    ("-C", "", "", "unknown probe type ''"),
    ("-C", "malloc", "malloc", "unknown probe type 'malloc'"),
    ("-C", "p:c", "", "a specifier is TYPE:LIBRARY:FUNCTION"),
    ("-C", "p:c:", "", "the function's name is missing"),
    ("-C", "p:c:()", "()", "the function's name is missing"),
    ("-C", "t::sched_process_exec()", ":sched", "the category, as t:block:block_rq_complete() is missing"),
    ("-C", "p:c:malloc(size_t size", "(size_t", "this '(' is never closed"),
    ("-C", "p:c:malloc(size_t size))", ")", "nothing is open for this ')'"),
    ("-C", "p:c:malloc(size_t size]", "]", "this ']' closes another kind of bracket"),
    ("-C", 'p:{program}:name():char*:text:STRCMP("a, text)', '"a, text)', "this quote is never closed"),
    ("-C", "p:{program}:number():int,int:value", "int:value", "2 types for 1 expression"),
    ("-C", "p:{program}:number():int:value,value", "int:value", "1 type for 2 expressions"),
    ("-C", "p:{program}:number():int:value:value:value", "value", "too many parts"),
    ("-C", "p:{program}:number():int", "", "types need expressions after them"),
    ("-C", "p:{program}:number():imt:value", "imt:value", "unknown type 'imt'; did you mean "),
    (
        "-C",
        "p:{program}:serve():int:((struct requst *)request)->low",
        "requst",
        "unknown type 'struct requst'",
    ),
    (
        "-C",
        "p:{program}:serve():int:request->lwo",
        "lwo",
        "struct request has no field 'lwo'; did you mean low",
    ),
    ("-C", "p:{program}:serve():int:request->inner.at[0].z", "z", "struct point has no field 'z'"),
    ("-C", "p:{program}:serve():int:request.low", "low", "use ->"),
    ("-C", "p:{program}:serve():int:by->low", "low", "this is no pointer"),
    ("-C", "p:{program}:number():int:valeu", "valeu", "unknown name 'valeu'; did you mean value"),
    ("-C", "p:{program}:number():int:$PIT", "$PIT", "unknown $PIT; did you mean $PID"),
    (
        "-C",
        "r:{program}:number():int:$entry(valeu)",
        "valeu",
        "there is no parameter 'valeu'; did you mean value",
    ),
    ("-C", "r:{program}:number():int:value", "value", "use $entry(value)"),
    ("-C", "p:{program}:number():u64:$latency", "$latency", "$latency is known at the return only"),
    ("-C", "p:{program}:number():int:$retval", "$retval", "$retval is known at the return only"),
    ("-C", "p:{program}:number():int:$entry(value)", "value)", "$entry is for returns"),
    ("-H", "p:{program}:number():int,int:value,value", "value", "a histogram is of one expression"),
    ("-H", "p:{program}:number()", "", "a histogram needs a value"),
    ("-H", "p:{program}:name():char*:text", "char*:text", "a histogram is of an integer"),
    ("-H", "p:{program}:serve():struct request:*request", "request", "this is a struct"),
    (
        "-H",
        "p:{program}:serve():double:request->weight",
        "request->weight",
        "BPF has no floating-point numbers",
    ),
    ("-C", "p:{program}:serve():long:request->when", "request->when", "this is a struct"),
    ("-C", "p:{program}:serve():long:*request + 1", "request +", "this is a struct"),
    ("-C", "p:{program}:serve():long:by:request->when", "request->when", "this is a struct"),
    ("-C", "p:{program}:serve():double:request->weight", "double", "BPF has no floating-point numbers"),
    ("-C", "p:{program}:number():int:1.5", "1.5", "BPF has no floating-point numbers"),
    ("-C", "p:{program}:number():int:value+", "value+", "this is no expression in C"),
    ("-C", "p:{program}:number():int:value value", "value", "this is no expression in C"),
    ("-C", "p:{program}:number():int:value++", "value++", "an expression may only read"),
    ("-C", "p:{program}:number():int:value = 1", "value = 1", "it may only read"),
    ("-C", "p:{program}:number():int:system(value)", "system", "there is no function 'system' here"),
    (
        "-C",
        "p:{program}:number():int:STRCMP(value, value)",
        "STRCMP",
        "STRCMP takes a text and an expression",
    ),
    ("-C", 'p:{program}:number():int:STRCMP("a", value)', "value)", "this is a number, not text"),
    ("-C", "p:{program}:number():char*:value", "value", "this is a number, not text"),
    ("-C", "p:{program}:nummber()", "nummber", "has no function 'nummber'; did you mean number"),
    ("-C", "p:{program}:no_such_*()", "no_such_*", "no function of {program} matches this"),
    ("-C", "p:{program}:num*():int:value", "num*", "a wildcard counts calls (-C), without an expression"),
    ("-C", "p:nosuchlibrary:f()", "nosuchlibrary", "no library or program nosuchlibrary"),
    ("-C", "p:/no/such/file:f()", "/no/such/file", "no file /no/such/file"),
    ("-C", "p:/etc/passwd:f()", "/etc/passwd", "/etc/passwd"),
    ("-C", "p::tcp_sendmsgg()", "tcp_sendmsgg", "the kernel has no function 'tcp_sendmsgg'"),
    ("-C", "t:sched:sched_process_exe()", "sched:sched", "no tracepoint sched:sched_process_exe"),
    ("-C", "t:scheed:sched_process_exec()", "scheed", "no tracepoint"),
    ("-C", "t:sched:sched_process_exec():int:args->pod", "pod", "has no field 'pod'; did you mean pid"),
    ("-C", "t:sched:sched_process_exec(int x)", "int x", "this kind of probe has no signature"),
    ("-C", "u:{usdt}:sizzes()", "sizzes", "has no USDT probe 'sizzes'; did you mean sizes"),
    ("-C", "u:{usdt}:bare()", "bare", "several providers have it: write rest.bare or work.bare"),
    ("-C", "u:{usdt}:sizes():int:arg9", "arg9", "unknown name 'arg9'"),
    ("-C", "u::sizes()", ":sizes", "the library or path is missing"),
]


@pytest.mark.parametrize(
    ("flag", "specifier", "place", "says"), BAD, ids=[f"{row[0]} {row[1]}" for row in BAD]
)
def test_bad_specifiers(
    flag: str,
    specifier: str,
    place: str,
    says: str,
    program: str,
    usdt: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """In this process, for there are many: before anything is attached, and so before libbpf is loaded."""
    from tcpobs import cli

    specifier, says = (
        text.replace("{program}", program).replace("{usdt}", usdt) for text in (specifier, says)
    )
    gc.collect()  # what earlier tests left behind is not this one's
    fds = os.listdir("/proc/self/fd")
    assert cli.main(["argdist", "-d", "0.01", flag, specifier]) == 2
    gc.collect()
    assert os.listdir("/proc/self/fd") == fds
    out, err = capfd.readouterr()
    assert out == ""
    message, shown, caret = err.splitlines()
    assert says in message
    assert message.startswith("tcpobs: ")
    assert shown == f"  {specifier}"
    assert caret.strip() == "^"
    assert (
        specifier[caret.index("^") - 2 :].startswith(place)
        if place
        else caret.index("^") - 2 == len(specifier)
    )


def test_what_the_compiler_refuses(program: str) -> None:
    """The user's own line; the compiler's with -v."""
    specifier = f"p:{program}:number():int:value + X"
    done = ended("-d", "0.01", "-D", "X=(", "-C", f"p:{program}:number()", "-C", specifier)
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr == f"tcpobs: the compiler refuses it: expected expression (-v shows all)\n  {specifier}\n"
    )
    done = ended("-d", "0.01", "-D", "X=(", "-v", "-C", specifier)
    assert "<stdin>:" in done.stderr
    assert ended("-n", "1", "-i", "0.01", "-D", "X=5", "-C", specifier).returncode == 0


FLAGS = [
    [],
    ["-C"],
    ["-C", "p:c:malloc()", "-i", "x"],
    ["-C", "p:c:malloc()", "-i", "-1"],
    ["-C", "p:c:malloc()", "-n", "0"],
    ["-C", "p:c:malloc()", "-z", "385"],
    ["-C", "p:c:malloc()", "-z", "0"],
    ["-C", "p:c:malloc()", "-T", "0"],
    ["-C", "p:c:malloc()", "-p", "0"],
    ["-C", "p:c:malloc()", "-p", "x"],
    ["-C", "p:c:malloc()", "--max-keys", "0"],
    ["-C", "p:c:malloc()", "--linear", "1,2"],
    ["-C", "p:c:malloc()", "--linear", "2,1,1"],
    ["-C", "p:c:malloc()", "--object", "f"],
    ["-C", "p:c:malloc()", "--list", "f"],
]


@pytest.mark.parametrize("flags", FLAGS, ids=" ".join)
def test_bad_flags(flags: list[str]) -> None:
    done = ended(*flags)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr


def test_processes_that_are_not_there(program: str) -> None:
    for flag in ("-p", "-t"):
        done = ended(flag, "4194303", "-C", f"p:{program}:number()")
        (line, *_) = done.stderr.splitlines()
        assert done.returncode in (1, 2)
        assert "4194303" in line


@pytest.mark.needs("no kprobes")
@pytest.mark.parametrize("specifier", ["p::tcp_sendmsg():size_t:size", "r::tcp_sendmsg()", "p::tcp_send*()"])
def test_a_kernel_without_kprobes(specifier: str) -> None:
    done = ended("-C", specifier)
    (line,) = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (1, "")
    assert "take a kernel with CONFIG_KPROBES; tracepoints (t:...) work" in line


def test_no_compiler(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TCPOBS_CLANG", "/no/such/clang")
    done = ended("-C", f"p:{program}:number():int:value * 1234")
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1
    assert all(way in line for way in ("TCPOBS_CLANG", "clang-N", "tcpobs[compiler]"))
