"""A typed binding of libbpf by ctypes: objects, programs, links, maps, ring and perf buffers, BTF.

It knows nothing of TCP and could stand alone. Everything that holds something of the kernel's is a
context manager; every failure is a LibbpfError.
"""

from tcpobs.libbpf.barrier import Barrier
from tcpobs.libbpf.btf import Btf, Kind, Type
from tcpobs.libbpf.errors import LibbpfError, LibraryMissing
from tcpobs.libbpf.library import library, show_messages
from tcpobs.libbpf.map import Map, MapType
from tcpobs.libbpf.object import Object, strip_dwarf
from tcpobs.libbpf.perfbuf import PerfBuffers
from tcpobs.libbpf.program import Link, Program, ProgramInfo, RunStatistics
from tcpobs.libbpf.ringbuf import RingBuffer

__all__ = [
    "Barrier",
    "Btf",
    "Kind",
    "LibbpfError",
    "LibraryMissing",
    "Link",
    "Map",
    "MapType",
    "Object",
    "PerfBuffers",
    "Program",
    "ProgramInfo",
    "RingBuffer",
    "RunStatistics",
    "Type",
    "library",
    "show_messages",
    "strip_dwarf",
]
