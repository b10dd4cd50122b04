"""The structs of libc that calls are full of, for a libc without debug information.

The layouts are those of glibc and musl on x86_64 and aarch64, which agree, but for `stat` between the two.
"""

from __future__ import annotations

import os
import re

from tcpobs.tools.argdist.types import INTEGERS, VOID, Array, Field, Pointer, Record, size_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from tcpobs.tools.argdist.types import Type

_STAT_X86_64 = """
struct stat {
    unsigned long st_dev; unsigned long st_ino; unsigned long st_nlink;
    unsigned int st_mode; unsigned int st_uid; unsigned int st_gid; int __pad0;
    unsigned long st_rdev; long st_size; long st_blksize; long st_blocks;
    struct timespec st_atim; struct timespec st_mtim; struct timespec st_ctim; long __reserved[3];
};
"""
_STAT_AARCH64 = """
struct stat {
    unsigned long st_dev; unsigned long st_ino; unsigned int st_mode; unsigned int st_nlink;
    unsigned int st_uid; unsigned int st_gid; unsigned long st_rdev; unsigned long __pad1;
    long st_size; int st_blksize; int __pad2; long st_blocks;
    struct timespec st_atim; struct timespec st_mtim; struct timespec st_ctim; int __reserved[2];
};
"""
_HEADER = """
struct timespec { long tv_sec; long tv_nsec; };
struct timeval { long tv_sec; long tv_usec; };
struct iovec { void *iov_base; size_t iov_len; };
struct sockaddr { unsigned short sa_family; char sa_data[14]; };
struct in_addr { unsigned int s_addr; };
struct in6_addr { unsigned char s6_addr[16]; };
struct sockaddr_in {
    unsigned short sin_family; unsigned short sin_port; struct in_addr sin_addr; unsigned char sin_zero[8];
};
struct sockaddr_in6 {
    unsigned short sin6_family; unsigned short sin6_port; unsigned int sin6_flowinfo;
    struct in6_addr sin6_addr; unsigned int sin6_scope_id;
};
struct sockaddr_un { unsigned short sun_family; char sun_path[108]; };
struct pollfd { int fd; short events; short revents; };
struct msghdr {
    void *msg_name; unsigned int msg_namelen; struct iovec *msg_iov; size_t msg_iovlen;
    void *msg_control; size_t msg_controllen; int msg_flags;
};
"""


def find(spelling: str) -> Record | None:
    """`struct timespec` and its like; None for what is not in the table."""
    return _records().get(" ".join(spelling.split()))


_known: dict[str, Record] = {}


def _records() -> dict[str, Record]:
    if not _known:
        text = _HEADER + (_STAT_AARCH64 if os.uname().machine == "aarch64" else _STAT_X86_64)
        for name, body in re.findall(r"struct (\w+) \{(.*?)\};", text, re.DOTALL):
            _known[f"struct {name}"] = _laid_out(name, body)
    return _known


def _laid_out(name: str, body: str) -> Record:
    """Each member where its natural alignment puts it."""
    fields = []
    place = widest = 0
    for kind, star, member, length in re.findall(r"([\w ]+?) (\*?)(\w+)(?:\[(\d+)\])?;", body):
        kind = kind.strip()
        type: Type = VOID if kind == "void" else _known.get(kind) or INTEGERS[kind]
        if star:
            type = Pointer(type)
        if length:
            type = Array(type, int(length))
        alignment = _alignment(type)
        widest = max(widest, alignment)
        place += -place % alignment
        fields.append(Field(member, type, place * 8))
        place += size_of(type)
    return Record("struct", name, place + -place % widest, lambda: fields)


def _alignment(type: Type) -> int:
    if isinstance(type, Array):
        return _alignment(type.element)
    if isinstance(type, Record):
        return max(_alignment(member.type) for member in type.fields)
    return size_of(type)
