"""Perf buffers: a buffer for each CPU, where the kernel has no ring buffer (before Linux 5.8).

libbpf opens and maps them; they are read here in bulk, as perf_event_open(2) lays them out:

    page 0          struct perf_event_mmap_page: data_head, the kernel's position, and data_tail, ours
    page 1 and on   the records: struct perf_event_header, and for a sample u32 size, the data, padding

Positions count bytes and never wrap; the place in the buffer is the position modulo its size.
"""

from __future__ import annotations

import ctypes
import mmap
import struct
from ctypes import c_uint32, c_uint64

from tcpobs.libbpf.errors import LibbpfError
from tcpobs.libbpf.library import library
from tcpobs.libbpf.resource import Resource
from tcpobs.libbpf.ringbuf import order_memory

TYPE_CHECKING = False
if TYPE_CHECKING:
    from tcpobs.libbpf.map import Map

HEADER_SIZE = 12
"""Bytes before a sample's data: struct perf_event_header, and the size of what follows."""

_SAMPLE = 9  # PERF_RECORD_SAMPLE; else it is PERF_RECORD_LOST, and the programs count those
_HEAD, _TAIL = 1024 // 8, 1032 // 8  # of struct perf_event_mmap_page, in words


class _Attributes(ctypes.Structure):
    """The first version of struct perf_event_attr (include/uapi/linux/perf_event.h)."""

    _fields_ = [
        ("type", c_uint32),
        ("size", c_uint32),
        ("config", c_uint64),
        ("sample_period", c_uint64),
        ("sample_type", c_uint64),
        ("read_format", c_uint64),
        ("flags", c_uint64),
        ("wakeup_watermark", c_uint32),
        ("bp_type", c_uint32),
        ("bp_addr", c_uint64),
    ]


_SOFTWARE, _BPF_OUTPUT, _RAW, _WATERMARK = 1, 10, 1 << 10, 1 << 14


class PerfBuffers(Resource):
    """The reading end of a perf event array whose records all have one size."""

    def __init__(self, map: Map, record_size: int, size: int) -> None:
        """Makes the buffers and puts them into the map.

        `record_size` is in bytes, without the header; `size` is that of all buffers together, which each
        round theirs up to a power of two of pages. A poll of `fds` wakes when a quarter of one is full.
        """
        cpus = library().libbpf_num_possible_cpus()
        pages = -(-size // (cpus * mmap.PAGESIZE))
        pages = 1 << (pages - 1).bit_length()
        attributes = _Attributes(
            type=_SOFTWARE,
            size=ctypes.sizeof(_Attributes),
            config=_BPF_OUTPUT,
            sample_period=1,
            sample_type=_RAW,
            flags=_WATERMARK,
            wakeup_watermark=pages * mmap.PAGESIZE // 4,
        )
        self.stride = (HEADER_SIZE + record_size + 7) // 8 * 8
        """Bytes from one record to the next."""
        self._handle: int = library().perf_buffer__new_raw(
            map.fd, pages, ctypes.byref(attributes), None, None, None
        )
        self._buffers: list[tuple[memoryview, memoryview]] = []
        self.fds: list[int] = []
        try:
            for index in range(library().perf_buffer__buffer_cnt(self._handle)):
                self._buffers.append(self._memory(index))
                self.fds.append(library().perf_buffer__buffer_fd(self._handle, index))
        except BaseException:
            self.close()
            raise

    def _memory(self, index: int) -> tuple[memoryview, memoryview]:
        """A buffer's first page, in words, and its data."""
        address, size = ctypes.c_void_p(), ctypes.c_size_t()
        library().perf_buffer__buffer(self._handle, index, ctypes.byref(address), ctypes.byref(size))
        assert address.value
        page = (c_uint64 * (mmap.PAGESIZE // 8)).from_address(address.value)
        data = (ctypes.c_uint8 * size.value).from_address(address.value + mmap.PAGESIZE)
        return memoryview(page).cast("B").cast("Q"), memoryview(data).cast("B")

    def read(self) -> bytes:
        """Takes all records out of the buffers: `stride` bytes each, the header first; CPU after CPU."""
        return b"".join([self._samples(self._drain(*buffer)) for buffer in self._buffers])

    def _drain(self, page: memoryview, data: memoryview) -> bytes:
        start, end = page[_TAIL], page[_HEAD]
        if start == end:
            return b""
        order_memory()
        place = start % len(data)
        records = bytes(data[place : place + end - start])
        records += data[: end - start - len(records)]
        order_memory()
        page[_TAIL] = end
        return records

    def _samples(self, records: bytes) -> bytes:
        """The samples of a run of records."""
        samples, place = [], 0
        while place < len(records):
            type, _, size = struct.unpack_from("=IHH", records, place)
            if size < 8 or (type == _SAMPLE and size != self.stride):
                raise LibbpfError(f"a record of {size} bytes in buffers of {self.stride}")
            if type == _SAMPLE:
                samples.append(records[place : place + size])
            place += size
        return b"".join(samples)

    def close(self) -> None:
        """Unmaps and closes the buffers."""
        self._buffers.clear()
        handle, self._handle = self._handle, 0
        if handle:
            library().perf_buffer__free(handle)
