"""Every kernel field that the programs read: where this kernel has it, and what it is on others."""

from __future__ import annotations

import ctypes
import os
import re
import socket
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import tcpobs
from live.tcp import WAYS, client_first, connect, gather
from tcpobs import host
from tcpobs.libbpf import Btf, Kind, library

if TYPE_CHECKING:
    from collections.abc import Callable

    from tcpobs.libbpf import Type

pytestmark = [pytest.mark.essential, pytest.mark.subject("kernel fields, each where this kernel has it")]

SOCK = "tcp_sock.inet_conn.icsk_inet.sk"
FIELDS = {
    f"{SOCK}.sk_protocol": "a bit field before Linux 5.6",
    f"{SOCK}.sk_lock.owned": "",
    f"{SOCK}.__sk_common.skc_family": "",
    f"{SOCK}.__sk_common.skc_state": "",
    f"{SOCK}.__sk_common.skc_dport": "",
    f"{SOCK}.__sk_common.skc_daddr": "",
    f"{SOCK}.__sk_common.skc_v6_daddr": "only with CONFIG_IPV6",
    f"{SOCK}.__sk_common.skc_v6_rcv_saddr": "only with CONFIG_IPV6",
    "tcp_sock.inet_conn.icsk_inet.inet_saddr": "moves with every change of struct sock",
    "tcp_sock.inet_conn.icsk_inet.inet_sport": "moves with every change of struct sock",
    "tcp_sock.bytes_acked": "moved when tcp_sock was sorted by cache lines (Linux 6.8)",
    "tcp_sock.bytes_received": "moved when tcp_sock was sorted by cache lines (Linux 6.8)",
    f"{SOCK}.__sk_common.skc_flags": "",
    f"{SOCK}.__sk_common.skc_net.net": "",
    f"{SOCK}.sk_err": "",
    f"{SOCK}.sk_shutdown": "",
    f"{SOCK}.sk_lingertime": "",
    "tcp_sock.inet_conn.icsk_ca_ops": "",
    "tcp_sock.inet_conn.icsk_retransmits": "",
    "tcp_sock.inet_conn.icsk_probes_out": "",
    "tcp_sock.srtt_us": "",
    "tcp_sock.rtt_min.s[0].v": "",
    "tcp_sock.total_retrans": "",
    "tcp_sock.lost": "",
    "tcp_sock.segs_in": "",
    "tcp_sock.segs_out": "",
    "tcp_sock.data_segs_in": "",
    "tcp_sock.delivered": "",
}
"""The fields of a socket, by their path from the struct that reads start at."""

TRACEPOINT = {
    "trace_event_raw_inet_sock_set_state.skaddr",
    "trace_event_raw_inet_sock_set_state.oldstate",
    "trace_event_raw_inet_sock_set_state.newstate",
}

SYSTEM_CALL = {"x86_64": "pt_regs.orig_ax", "aarch64": "pt_regs.syscallno"}[os.uname().machine]

OTHERS = {
    "bpf_iter__task_file.file",
    "bpf_iter__task_file.task",
    "cgroup.kn",
    "cgroup.level",
    "cred.uid.val",
    "css_set.dfl_cgrp",
    "fdtable.fd",
    "fdtable.max_fds",
    "file.f_inode",
    "file.private_data",
    "files_struct.fdt",
    "inode.i_mode",
    "kernfs_node.id",
    "net.ns.inum",
    SYSTEM_CALL,
    "socket.sk",
    "task_struct.cgroups",
    "task_struct.comm",
    "task_struct.cred",
    "task_struct.files",
    "task_struct.flags",
    "task_struct.pid",
    "task_struct.tgid",
    "tcp_congestion_ops.name",
}
"""The fields of what else is looked at."""

ANCESTORS = {"cgroup.ancestors", "cgroup.ancestor_ids"}
"""Of which a kernel has one: the second before Linux 6.1."""


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What libbpf says while it loads."""
    said: list[str] = []
    monkeypatch.setattr(library(), "on_message", lambda level, text: said.append(text))
    return said


def places(messages: list[str]) -> dict[str, int]:
    """Where libbpf found each field, in bytes from the start of its struct."""
    found = {}
    for text in messages:
        match = re.search(r"<byte_off> \[\d+\] struct (\S+) \([\d:]+ @ offset (\d+)\)", text)
        if match and "matching candidate" in text:
            found[match[1]] = int(match[2])
    return found


def offset(type: Type, path: str) -> int:
    """Where a field is, in bits, as the kernel's BTF has it: the names between may be anonymous."""
    name, _, rest = path.replace("[0]", "").partition(".")
    if type.resolve().kind is Kind.ARRAY:
        type = type.resolve().target
    for member in type.resolve().members:
        if member.name == name:
            return member.offset + (offset(member.type, rest) if rest else 0)
    for member in type.resolve().members:
        if not member.name:
            try:
                return member.offset + offset(member.type, path)
            except KeyError:
                continue
    raise KeyError(path)


def test_each_field_is_found_where_the_kernel_has_it(
    messages: list[str], record_testsuite_property: Callable[[str, object], None]
) -> None:
    for tool in ("states", "life"):
        beside = ["snapshot", *["open_hash"] * (tool == "life")]
        for way in WAYS:
            if (way.storage, way.transport) == ("hash", "ringbuf"):
                with host.open_object(tool, way, None, beside)[0] as object:
                    object.load()
    found = {path: place for path, place in places(messages).items() if "." in path}
    for path in [path for path in found if "pt_regs." in path and path != SYSTEM_CALL]:
        del found[path]  # arguments of kprobes
    assert {path for path in found if path.startswith("tcp_sock.")} == set(FIELDS)
    assert len(ANCESTORS & set(found)) == 1
    assert set(found) - set(FIELDS) - ANCESTORS == TRACEPOINT | OTHERS
    with Btf.of_kernel() as btf:
        for path in found:
            struct_name, _, fields = path.partition(".")
            type = btf.find(struct_name, Kind.STRUCT)
            assert type
            assert offset(type, fields) == found[path] * 8, path
    for path in FIELDS:
        record_testsuite_property(f"field {path}", found[path])


def as_bit_field(kernel: bytes) -> bytes:
    """A kernel's BTF in which sk_protocol is what it was before Linux 5.6: `unsigned int sk_protocol : 8`."""
    with Btf.of_kernel() as btf:
        sock, unsigned = btf.find("sock", Kind.STRUCT), btf.find("unsigned int", Kind.INT)
        assert sock
        assert unsigned
        index = next(i for i, member in enumerate(sock.members) if member.name == "sk_protocol")
        member = sock.members[index]
        assert member.offset % 8 == 0
        # Its struct btf_type, then a struct btf_member for each field (include/uapi/linux/btf.h).
        place = kernel.index(ctypes.string_at(sock._address, 12 + 12 * len(sock.members)))
    data = bytearray(kernel)
    assert data[place + 7] & 0x80, "struct sock has no bit field: its offsets would all have to change"
    struct.pack_into("=II", data, place + 12 + 12 * index + 4, unsigned.id, member.offset | 8 << 24)
    return bytes(data)


def test_a_protocol_that_is_a_bit_field(tmp_path: Path) -> None:
    """Types say so, memory is the same: TCP is recognized, as on kernels before 5.6."""
    types = tmp_path / "older.btf"
    types.write_bytes(as_bit_field(Path(host.KERNEL_BTF).read_bytes()))
    with tcpobs.sessions(btf=str(types)) as events:
        pair = connect(socket.AF_INET)
        port = pair.ports[1]
        client_first(pair)
        seen = gather(events, lambda seen: len([s for s in seen if port in (s.lport, s.rport)]) == 2)
    assert {s.pid for s in seen if port in (s.lport, s.rport)} == {os.getpid()}
