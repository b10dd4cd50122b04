"""The same question again: its object and its plan as they were, with nothing parsed, looked up or compiled.

They are in the cache of compiled objects, under a key of all that they were made from: the command line,
tcpobs and the compiler, the kernel, and the files and events that the specifiers name.
"""

from __future__ import annotations

import os
import re
import struct

from tcpobs.errors import TcpobsError
from tcpobs.tools.argdist import compile
from tcpobs.tools.argdist.plan import Plan

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator


class Recall:
    """Of one command line."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._key: str | None = None
        # What a user's header includes is not known before the compiler has read it.
        if not arguments.include:
            try:
                self._key = compile.key(list(_inputs(arguments)), arguments.define)
            except (TcpobsError, OSError):
                return  # whoever looks closer will say what is wrong

    def read(self) -> tuple[bytes, Plan] | None:
        """The object and the plan, if they are there."""
        entry = compile.recall(self._key) if self._key else None
        if not entry:
            return None
        (size,) = struct.unpack_from("=I", entry)
        try:
            return entry[4 + size :], Plan.from_json(entry[4 : 4 + size].decode())
        except TcpobsError:
            return None

    def write(self, object: bytes, plan: Plan) -> None:
        """Keeps them."""
        if self._key:
            text = plan.to_json().encode()
            compile.keep(self._key, struct.pack("=I", len(text)) + text + object)


def _inputs(arguments: argparse.Namespace) -> Iterator[str]:
    """What an object and its plan are made from, besides the compiler and what comes with tcpobs."""
    yield repr((arguments.asked, arguments.string_size, arguments.linear, bool(arguments.compile_only)))
    kernel = os.uname()
    yield f"{kernel.release} {kernel.version}"
    if arguments.btf:
        yield _dated(arguments.btf)
    for _, text in arguments.asked:
        kind, place, name, *_ = *(part.strip() for part in text.split(":", 2)), "", ""
        if kind == "t":
            from tcpobs.tools.argdist import tracepoints

            yield repr(tracepoints.find(place, re.split(r"[(:#]", name)[0].strip()))
        elif place:
            from tcpobs.tools.argdist.elf import Elf
            from tcpobs.tools.argdist.libraries import find_binary

            with Elf(find_binary(place, arguments.pid)) as elf:
                yield _dated(elf.path)
                debug = elf.debug_file()
                yield _dated(debug) if debug else ""


def _dated(path: str) -> str:
    """A file, as it is now."""
    status = os.stat(path)
    changed = f"{status.st_mtime_ns} {status.st_ctime_ns}"
    return f"{path} {status.st_dev} {status.st_ino} {status.st_size} {changed}"
