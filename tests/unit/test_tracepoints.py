"""Tracepoints from format files, kept here as kernels have them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcpobs import host
from tcpobs.errors import HostError, TcpobsError
from tcpobs.tools.argdist import tracepoints
from tcpobs.tools.argdist.tracepoints import Field

if TYPE_CHECKING:
    from pathlib import Path

COMMON = """\
format:
	field:unsigned short common_type;	offset:0;	size:2;	signed:0;
	field:unsigned char common_flags;	offset:2;	size:1;	signed:0;
	field:unsigned char common_preempt_count;	offset:3;	size:1;	signed:0;
	field:int common_pid;	offset:4;	size:4;	signed:1;

"""
BLOCK = f"""\
name: block_rq_complete
ID: 2107
{COMMON}\
	field:dev_t dev;	offset:8;	size:4;	signed:0;
	field:sector_t sector;	offset:16;	size:8;	signed:0;
	field:unsigned int nr_sector;	offset:24;	size:4;	signed:0;
	field:int error;	offset:28;	size:4;	signed:1;
	field:char rwbs[10];	offset:34;	size:10;	signed:0;
	field:__data_loc char[] cmd;	offset:44;	size:4;	signed:0;

print fmt: "field:int trap;	offset:0;	size:4;	signed:1; %d", REC->dev
"""
WRITE = f"""\
name: sys_enter_write
ID: 840
{COMMON}\
	field:int __syscall_nr;	offset:8;	size:4;	signed:1;
	field:unsigned int fd;	offset:16;	size:8;	signed:0;
	field:const char * buf;	offset:24;	size:8;	signed:0;
"""


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A tracefs of three tracepoints."""
    for category, name, text in [
        ("block", "block_rq_complete", BLOCK),
        ("block", "block_rq_issue", BLOCK),
        ("syscalls", "sys_enter_write", WRITE),
        ("ftrace", "function", COMMON),
    ]:
        folder = tmp_path / "events" / category / name
        folder.mkdir(parents=True)
        (folder / "format").write_text(text)
    (tmp_path / "events/enable").write_text("0\n")
    (tmp_path / "events/block/enable").write_text("0\n")
    (tmp_path / "format").write_text(BLOCK)
    monkeypatch.setattr(host, "tracefs", lambda: str(tmp_path))
    return tmp_path / "events"


def test_fields(events: Path) -> None:
    found = tracepoints.find("block", "block_rq_complete")
    assert (found.category, found.name, found.size) == ("block", "block_rq_complete", 48)
    assert [field.name for field in found.fields[:4]] == [
        "common_type",
        "common_flags",
        "common_preempt_count",
        "common_pid",
    ]
    assert found.fields[4:] == (
        Field("dev", "dev_t", 8, 4, False, "number"),
        Field("sector", "sector_t", 16, 8, False, "number"),
        Field("nr_sector", "unsigned int", 24, 4, False, "number"),
        Field("error", "int", 28, 4, True, "number"),
        Field("rwbs", "char[10]", 34, 10, False, "array"),
        Field("cmd", "char[]", 44, 4, False, "data_loc"),
    )


def test_system_call(events: Path) -> None:
    assert tracepoints.find("syscalls", "sys_enter_write").fields[4:] == (
        Field("__syscall_nr", "int", 8, 4, True, "number"),
        Field("fd", "unsigned int", 16, 8, False, "number"),
        Field("buf", "const char *", 24, 8, False, "pointer"),
    )


@pytest.mark.parametrize(
    ("declared", "name", "type", "size", "kind"),
    [
        ("const char *const *argv", "argv", "const char *const *", 8, "pointer"),
        ("struct task_struct * p", "p", "struct task_struct *", 8, "pointer"),
        ("void (*function)(struct timer_list *)", "function", "void (*)(struct timer_list *)", 8, "pointer"),
        ("char comm[TASK_COMM_LEN]", "comm", "char[TASK_COMM_LEN]", 16, "array"),
        ("__u8 m[2][3]", "m", "__u8[2][3]", 6, "array"),
        ("unsigned long args[]", "args", "unsigned long[]", 0, "array"),
        ("struct in_addr a", "a", "struct in_addr", 4, "array"),
        ("kuid_t128 a", "a", "kuid_t128", 16, "array"),
        ("enum zone_type zone", "zone", "enum zone_type", 4, "number"),
        ("bool on", "on", "bool", 1, "number"),
        ("__rel_loc char[] text", "text", "char[]", 4, "rel_loc"),
        ("__data_loc cpumask_t cpumask", "cpumask", "cpumask_t", 4, "data_loc"),
        ("__data_loc unsigned int[] lengths", "lengths", "unsigned int[]", 4, "data_loc"),
    ],
)
def test_kinds(declared: str, name: str, type: str, size: int, kind: str) -> None:
    text = f"\tfield:{declared};\toffset:8;\tsize:{size};\tsigned:0;\n"
    assert tracepoints.parse("c", "n", text).fields == (Field(name, type, 8, size, False, kind),)


@given(st.text())
def test_any_text_is_parsed(text: str) -> None:
    tracepoints.parse("c", "n", text)
    tracepoints.parse("c", "n", f"field:{text};\toffset:8;\tsize:4;\tsigned:1;")


@pytest.mark.parametrize(
    ("category", "name", "said"),
    [
        ("blok", "block_rq_complete", "no tracepoints of category 'blok'; did you mean block?"),
        ("block", "block_rq_isue", "no tracepoint block:block_rq_isue; did you mean block_rq_issue"),
        (
            "block",
            "sys_enter_write",
            "no tracepoint block:sys_enter_write; there is syscalls:sys_enter_write",
        ),
        ("block", "enable", "no tracepoint block:enable"),
        ("enable", "it", "no tracepoints of category 'enable'"),
        ("zzz", "x", "no tracepoints of category 'zzz'"),
    ],
)
def test_unknown(category: str, name: str, said: str, events: Path) -> None:
    with pytest.raises(TcpobsError) as caught:
        tracepoints.find(category, name)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("category", "name"),
    [
        ("..", "."),
        ("block", ".."),
        (".", "block"),
        ("", ""),
        ("block", ""),
        ("block/..", "block"),
        ("/etc", "x"),
        ("block", "block_rq_issue/../block_rq_issue"),
        ("block", "a\0b"),
    ],
)
def test_no_way_out_of_the_folder(category: str, name: str, events: Path) -> None:
    with pytest.raises(TcpobsError, match="is not the name of a tracepoint"):
        tracepoints.find(category, name)


def test_matching(events: Path) -> None:
    assert list(tracepoints.matching("block:*")) == [
        ("block", "block_rq_complete"),
        ("block", "block_rq_issue"),
    ]
    assert list(tracepoints.matching("*:*_[iw]*")) == [
        ("block", "block_rq_issue"),
        ("syscalls", "sys_enter_write"),
    ]
    assert list(tracepoints.matching("sys*")) == [("syscalls", "sys_enter_write")]
    assert len(list(tracepoints.matching("*"))) == 3
    assert list(tracepoints.matching("../*:*")) == list(tracepoints.matching("BLOCK:*")) == []


def test_no_tracefs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "tracefs", lambda: None)
    for call in (lambda: tracepoints.find("a", "b"), lambda: list(tracepoints.matching("*"))):
        with pytest.raises(HostError, match="mount -t tracefs tracefs /sys/kernel/tracing"):
            call()


def test_closed(events: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(path: str, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(tracepoints, "open", closed, raising=False)
    monkeypatch.setattr(os, "scandir", closed)
    for call in (
        lambda: tracepoints.find("block", "block_rq_issue"),
        lambda: list(tracepoints.matching("*")),
    ):
        with pytest.raises(HostError, match=r"/events.* cannot be read \(Permission denied\): it takes root"):
            call()
