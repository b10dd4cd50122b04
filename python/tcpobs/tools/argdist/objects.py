"""Object files that carry what they are for: made on one host, run on others of its architecture."""

from __future__ import annotations

import hashlib
import os
import struct

from tcpobs.errors import TcpobsError
from tcpobs.tools.argdist.plan import Plan

_MAGIC = b"tcpobs argdist\n"
_DIGEST = 32
"""Bytes of the SHA-256 before it, of all the rest."""


def write(path: str, object: bytes, plan: Plan) -> None:
    """Writes an object with its plan behind it, where ELF readers do not look. Through no link."""
    text = plan.to_json().encode()
    data = object + text + struct.pack("=I", len(text))
    data += hashlib.sha256(data).digest() + _MAGIC
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
        try:
            with open(fd, "wb") as file:
                file.write(data)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        raise TcpobsError(f"{path} cannot be written: {error.strerror}") from None


def read(path: str) -> tuple[bytes, Plan]:
    """The object and the plan in a file. Raises TcpobsError when it cannot be used here."""
    try:
        with open(path, "rb") as file:
            data = file.read(1 << 26)
    except OSError as error:
        raise TcpobsError(f"{path} cannot be read: {error.strerror}") from None
    whole = len(data) - len(_MAGIC) - _DIGEST
    end = whole - 4
    if end < 0 or not data.endswith(_MAGIC):
        raise TcpobsError(f"{path} is no object of argdist: make it with --compile-only")
    if hashlib.sha256(data[:whole]).digest() != data[whole : whole + _DIGEST]:
        raise TcpobsError(f"{path} is damaged: make it again with --compile-only")
    (size,) = struct.unpack_from("=I", data, end)
    try:
        if size > end:
            raise TcpobsError("it is cut short")
        plan = Plan.from_json(data[end - size : end].decode(errors="replace"))
    except TcpobsError as error:
        raise TcpobsError(f"{path} cannot be used: {error}") from None
    machine = os.uname().machine
    if plan.machine != machine:
        raise TcpobsError(f"{path} was made for {plan.machine}, and this host is {machine}: compile it there")
    return data[: end - size], plan
