"""Iterators: programs that run once for each of the kernel's things of a kind, when their file is read."""

from __future__ import annotations

import ctypes
import os
from ctypes import c_size_t, c_uint32, c_void_p

from tcpobs.libbpf.library import library
from tcpobs.libbpf.resource import Resource

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from tcpobs.libbpf.map import Map
    from tcpobs.libbpf.program import Program

CHUNK = 1 << 20
"""Bytes asked for in one read."""


class _Options(ctypes.Structure):
    """struct bpf_iter_attach_opts of libbpf.h."""

    _fields_ = [("sz", c_size_t), ("link_info", c_void_p), ("link_info_len", c_uint32)]


class _LinkInfo(ctypes.Structure):
    """union bpf_iter_link_info of include/uapi/linux/bpf.h, for a map."""

    _fields_ = [("map_fd", c_uint32)]


class BpfIterator(Resource):
    """A program of an `iter/...` section, ready to be run. Closing it detaches the program."""

    def __init__(self, program: Program, map: Map | None = None) -> None:
        """`map` is the one to walk through, for iter/bpf_map_elem and iter/bpf_sk_storage_map."""
        options = _Options(sz=ctypes.sizeof(_Options))
        if map:
            info = _LinkInfo(map.fd)
            options.link_info = ctypes.addressof(info)
            options.link_info_len = ctypes.sizeof(info)
        self._link: int = library().bpf_program__attach_iter(program.handle, ctypes.byref(options))

    def read(self) -> Iterator[bytes]:
        """Runs the program over everything; gives what it wrote (bpf_seq_write), in pieces as they come."""
        fd = library().bpf_iter_create(library().bpf_link__fd(self._link))
        try:
            while True:
                try:
                    piece = os.read(fd, CHUNK)
                except BlockingIOError:  # after a million things without output: there are more
                    continue
                if not piece:
                    return
                yield piece
        finally:
            os.close(fd)

    def close(self) -> None:
        """Detaches the program."""
        link, self._link = self._link, 0
        if link:
            library().bpf_link__destroy(link)
