"""The binding on the live kernel: loading, errors, maps, ring buffers, program info, BTF."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from live.tcp import client_first, connect, is_loaded, wait, wait_over
from tcpobs import compiler
from tcpobs.libbpf import Btf, Kind, LibbpfError, Object, RingBuffer, RunStatistics

pytestmark = [pytest.mark.essential, pytest.mark.subject("the libbpf binding")]

SOURCE = """
#include "vmlinux.h"
#include <bpf/bpf_helpers.h>
struct { __uint(type, BPF_MAP_TYPE_RINGBUF); __uint(max_entries, 65536); } ring SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_HASH); __uint(max_entries, 100); __type(key, __u32);
         __type(value, __u64); } hash SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_PERCPU_ARRAY); __uint(max_entries, 3); __type(key, __u32);
         __type(value, __u32); } array SEC(".maps");
char LICENSE[] SEC("license") = "Dual BSD/GPL";
const volatile __u32 only_pid = 0;
const volatile __s16 tag = -7;
__u64 number = 0, full = 0;
SEC("raw_tp/sys_enter")
int count(void *ctx)
{
	struct { __u64 number; __u32 pid; __s16 tag; __u16 pad; } *record;
	if (bpf_get_current_pid_tgid() >> 32 != only_pid)
		return 0;
	record = bpf_ringbuf_reserve(&ring, sizeof(*record), 0);
	if (!record) {
		full++;
		return 0;
	}
	record->number = number++;
	record->pid = only_pid;
	record->tag = tag;
	record->pad = 0;
	bpf_ringbuf_submit(record, BPF_RB_NO_WAKEUP);
	return 0;
}
SEC("?raw_tp/sys_enter")
int refused(void *ctx)
{
	return *(volatile int *)0;
}
"""


@pytest.fixture(scope="module")
def data() -> bytes:
    """A small object of our own, compiled here."""
    root = Path(__file__).parents[2]
    clang = compiler.find()
    assert clang
    command = [*clang, "-target", "bpf", "-mcpu=v3", "-O2", "-g", "-w", "-x", "c"]
    command += [f"-I{root}/build/include", f"-I{root}/vmlinux/{os.uname().machine}", "-c", "-o", "-", "-"]
    return subprocess.run(command, input=SOURCE.encode(), stdout=subprocess.PIPE, check=True).stdout


@pytest.fixture
def small(data: bytes) -> Iterator[Object]:
    """The object, loaded."""
    with Object(data, "small") as object:
        object.variables["only_pid"] = os.getpid()
        object.load()
        yield object


def syscalls(count: int) -> None:
    for _ in range(count):
        os.getppid()


def test_ring_buffer_keeps_order_around_its_end(small: Object) -> None:
    """Far more than the buffer holds, read in pieces: no record lost, none twice, none torn."""
    expected, pid = 0, os.getpid()
    with RingBuffer(small.maps["ring"], 16) as ring:
        assert ring.read(10) == b""
        small.attach("count")
        for _ in range(80):
            syscalls(50)
            for _ in range(3):  # reading makes system calls too: there is always more
                for record in struct.iter_unpack("=8xQIh2x", ring.read(77)):
                    assert record == (expected, pid, -7)
                    expected += 1
    assert expected >= 4000
    assert small.variables["full"] == 0


def test_ring_buffer_that_is_full(small: Object) -> None:
    """What did not fit is counted by the program; what did is there."""
    small.attach("count")
    syscalls(10_000)
    small.detach()
    with RingBuffer(small.maps["ring"], 16) as ring:
        seen = b"".join(iter(lambda: ring.read(1000), b""))
    counted: Any = {name: small.variables[name] for name in ("number", "full")}
    assert len(seen) // 24 == counted["number"] <= 65536 // 24
    assert counted["number"] + counted["full"] >= 10_000


def test_a_record_of_another_size_is_an_error(small: Object) -> None:
    small.attach("count")
    syscalls(3)
    small.detach()
    with RingBuffer(small.maps["ring"], 8) as ring, pytest.raises(LibbpfError, match="record of 16 bytes"):
        ring.read(2)


def test_hash_map(small: Object) -> None:
    """All of it: update, lookup, delete, and every entry in batches and one by one."""
    table = small.maps["hash"]
    wanted = {struct.pack("I", i): struct.pack("Q", i * i) for i in range(90)}
    for key, value in wanted.items():
        table.update(key, value)
    assert dict(table.items()) == dict(table._one_by_one()) == wanted
    assert table.lookup(struct.pack("I", 7)) == struct.pack("Q", 49)
    table.delete(struct.pack("I", 7))
    assert table.lookup(struct.pack("I", 7)) is None
    with pytest.raises(LibbpfError, match="No such file"):
        table.delete(struct.pack("I", 7))
    with pytest.raises(LibbpfError, match="1 bytes where the map has 4"):
        table.lookup(b"x")


def test_per_cpu_map(small: Object) -> None:
    """A value is that of all possible CPUs, eight bytes each."""
    table = small.maps["array"]
    assert table.value_size % 8 == 0
    value = struct.pack("=II", 5, 0) * (table.value_size // 8)
    table.update(struct.pack("I", 2), value)
    assert table.lookup(struct.pack("I", 2)) == value
    assert len(dict(table.items())) == 3


def test_variables(small: Object) -> None:
    assert small.variables["tag"] == -7
    assert small.variables["number"] == 0
    small.attach("count")
    syscalls(10)
    small.detach()
    number = small.variables["number"]
    assert isinstance(number, int)
    assert number >= 10
    small.variables["number"] = 3
    assert small.variables["number"] == 3
    with pytest.raises(LibbpfError, match="tag is constant once the object is loaded"):
        small.variables["tag"] = 1


def test_what_is_closed_is_an_error_and_no_crash(data: bytes) -> None:
    object = Object(data, "small")
    program, table, btf = object.programs["count"], object.maps["hash"], object.btf
    object.close()
    object.close()
    for use in (
        lambda: object.load(),
        lambda: object.variables["number"],
        lambda: program.info,
        lambda: table.max_entries,
        lambda: btf.find("sock", Kind.STRUCT),
    ):
        with pytest.raises(LibbpfError, match="closed"):
            use()


def test_the_verifier_is_heard(data: bytes) -> None:
    with Object(data, "small") as object:
        object.programs["refused"].autoload = True
        with pytest.raises(LibbpfError) as caught:
            object.load()
    assert "BEGIN PROG LOAD LOG" in caught.value.log
    assert "invalid mem access" in caught.value.log


def test_program_info_and_statistics(small: Object) -> None:
    with RunStatistics():
        small.attach("count")
        syscalls(100)
        small.detach()
        info = small.programs["count"].info
    assert info.run_cnt >= 100
    assert info.run_time_ns > 0
    assert info.recursion_misses == 0


def test_closing_unloads_on_every_way_out(data: bytes) -> None:
    programs = []

    def fail() -> None:
        with Object(data, "small") as object:
            object.load()
            object.attach("count")
            programs.append(object.programs["count"].info.id)
            assert is_loaded(programs[0])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    wait(lambda: not is_loaded(programs[0]))


def test_types_of_the_kernel() -> None:
    with Btf.of_kernel() as btf:
        sock = btf.find("sock", Kind.STRUCT)
        assert sock
        assert "__sk_common" in [member.name for member in sock.members]
        states = next(t for t in btf if t.kind is Kind.ENUM and "TCP_SYN_SENT" in t.enumerators)
        assert states.enumerators["TCP_SYN_SENT"] == 2
        assert btf.find("no_such_struct", Kind.STRUCT) is None
        assert "struct sock_common __sk_common;" in btf.declare([sock])


def test_many_traces_at_once() -> None:
    """Objects do not get into each other's way."""
    import tcpobs

    with ExitStack() as stack:
        traces = [stack.enter_context(tcpobs.states()) for _ in range(5)]
        pair = connect(socket.AF_INET)
        port = pair.ports[1]
        client_first(pair)
        wait_over(port)
        for trace in traces:
            trace.stop()
            assert len([event for event in trace if port in (event.lport, event.rport)]) == 12
