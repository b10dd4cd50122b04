"""Waiting until no program runs that began before."""

from __future__ import annotations

import ctypes
import os
from ctypes import c_size_t, c_uint32, c_uint64

from tcpobs.libbpf.library import library
from tcpobs.libbpf.resource import Resource

_ARRAY, _ARRAY_OF_MAPS = 2, 12  # BPF_MAP_TYPE_*


class _CreateOptions(ctypes.Structure):
    """The start of struct bpf_map_create_opts of bpf.h."""

    _fields_ = [
        ("sz", c_size_t),
        ("btf_fd", c_uint32),
        ("btf_key_type_id", c_uint32),
        ("btf_value_type_id", c_uint32),
        ("btf_vmlinux_value_type_id", c_uint32),
        ("inner_map_fd", c_uint32),
        ("map_flags", c_uint32),
        ("map_extra", c_uint64),
    ]


class Barrier(Resource):
    """Two small maps, one in the other.

    The kernel returns from an update of a map of maps once every program that may use the old value has ended
    (maybe_wait_bpf_programs, kernel/bpf/syscall.c, Linux 5.0): that is all they are for.
    """

    def __init__(self) -> None:
        self._inner: int = library().bpf_map_create(_ARRAY, b"barrier_inner", 4, 4, 1, None)
        options = _CreateOptions(sz=ctypes.sizeof(_CreateOptions), inner_map_fd=self._inner)
        try:
            self._outer: int = library().bpf_map_create(
                _ARRAY_OF_MAPS, b"barrier", 4, 4, 1, ctypes.byref(options)
            )
        except BaseException:
            os.close(self._inner)
            raise

    def wait(self) -> None:
        """Returns when every program that was running has ended (but sleepable ones)."""
        inner = self._inner.to_bytes(4, "little")
        library().bpf_map_update_elem(self._outer, bytes(4), inner, 0)

    def close(self) -> None:
        """Frees them."""
        if self._outer >= 0:
            os.close(self._outer)
            os.close(self._inner)
            self._outer = -1
