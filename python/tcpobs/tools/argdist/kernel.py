"""The kernel's types, functions and constants, from its BTF."""

from __future__ import annotations

import ctypes
import errno
import os
import struct

from tcpobs import host
from tcpobs.errors import HostError, TcpobsError
from tcpobs.libbpf.btf import Btf, Kind
from tcpobs.libbpf.btf import Type as BtfType
from tcpobs.libbpf.errors import LibbpfError, LibraryMissing
from tcpobs.tools.argdist import types
from tcpobs.tools.argdist.names import did_you_mean
from tcpobs.tools.argdist.types import Array, Field, Float, Function, Integer, Pointer, Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from tcpobs.tools.argdist.types import Type

KALLSYMS = "/proc/kallsyms"

_BY_SIZE = {
    (1, False): "unsigned char",
    (2, False): "unsigned short",
    (4, False): "unsigned int",
    (8, False): "unsigned long",
    (1, True): "signed char",
    (2, True): "short",
    (4, True): "int",
    (8, True): "long",
}
_SIGNED, _BOOL = 1, 4  # BTF_INT_*

# include/linux/gfp_types.h: macros, so not in BTF; but their bits are an enum since Linux 6.10.
_GFP_BITS = {
    "__GFP_HIGH": "HIGH",
    "__GFP_IO": "IO",
    "__GFP_FS": "FS",
    "__GFP_ZERO": "ZERO",
    "__GFP_DMA": "DMA",
    "__GFP_DMA32": "DMA32",
    "__GFP_HIGHMEM": "HIGHMEM",
    "__GFP_MOVABLE": "MOVABLE",
    "__GFP_RECLAIMABLE": "RECLAIMABLE",
    "__GFP_WRITE": "WRITE",
    "__GFP_NOWARN": "NOWARN",
    "__GFP_RETRY_MAYFAIL": "RETRY_MAYFAIL",
    "__GFP_NOFAIL": "NOFAIL",
    "__GFP_NORETRY": "NORETRY",
    "__GFP_MEMALLOC": "MEMALLOC",
    "__GFP_COMP": "COMP",
    "__GFP_NOMEMALLOC": "NOMEMALLOC",
    "__GFP_HARDWALL": "HARDWALL",
    "__GFP_THISNODE": "THISNODE",
    "__GFP_ACCOUNT": "ACCOUNT",
    "__GFP_DIRECT_RECLAIM": "DIRECT_RECLAIM",
    "__GFP_KSWAPD_RECLAIM": "KSWAPD_RECLAIM",
}
_GFP_SUMS = {
    "__GFP_RECLAIM": ("__GFP_DIRECT_RECLAIM", "__GFP_KSWAPD_RECLAIM"),
    "GFP_ATOMIC": ("__GFP_HIGH", "__GFP_KSWAPD_RECLAIM"),
    "GFP_KERNEL": ("__GFP_RECLAIM", "__GFP_IO", "__GFP_FS"),
    "GFP_KERNEL_ACCOUNT": ("GFP_KERNEL", "__GFP_ACCOUNT"),
    "GFP_NOWAIT": ("__GFP_KSWAPD_RECLAIM", "__GFP_NOWARN"),
    "GFP_NOIO": ("__GFP_RECLAIM",),
    "GFP_NOFS": ("__GFP_RECLAIM", "__GFP_IO"),
    "GFP_USER": ("__GFP_RECLAIM", "__GFP_IO", "__GFP_FS", "__GFP_HARDWALL"),
    "GFP_DMA": ("__GFP_DMA",),
    "GFP_DMA32": ("__GFP_DMA32",),
    "GFP_HIGHUSER": ("GFP_USER", "__GFP_HIGHMEM"),
    "GFP_HIGHUSER_MOVABLE": ("GFP_HIGHUSER", "__GFP_MOVABLE"),
}


class KernelTypes:
    """What the running kernel's BTF knows, or that of a file; opened at the first question."""

    def __init__(self, path: str | None = None, *, core: bool = True) -> None:
        """`core`: the records are a kernel's, and their fields found anew on each (CO-RE)."""
        self._path = path
        self._core = core
        self._opened: Btf | None = None
        self._converted: dict[int, Type] = {}

    @property
    def _btf(self) -> Btf:
        if self._opened is None:
            try:
                self._opened = Btf.of_file(self._path) if self._path else Btf.of_kernel()
            except LibraryMissing:
                raise
            except LibbpfError:
                if self._path:
                    raise TcpobsError(f"{self._path} cannot be read as BTF") from None
                raise HostError(
                    "this kernel carries no type information", "give it with --btf FILE"
                ) from None
        return self._opened

    def close(self) -> None:
        """Frees it."""
        if self._opened:
            self._opened.close()
            self._opened = None

    def find(self, spelling: str) -> Type | None:
        """The type of this name: `struct sock`, `enum pid_type`, or a typedef."""
        keyword, _, name = spelling.rpartition(" ")
        kinds = {
            "struct": (Kind.STRUCT,),
            "union": (Kind.UNION,),
            "enum": (Kind.ENUM, Kind.ENUM64),
        }.get(keyword, (Kind.TYPEDEF,))
        for kind in kinds:
            found = self._btf.find(name, kind)
            if found:
                return self._convert(found)
        return None

    def prototype(self, function: str) -> Function | None:
        """A function's, or None if the BTF does not have it (or has several of that name)."""
        found = self._btf.find(function, Kind.FUNC)
        if not found:
            return None
        prototype = self._convert(found.target)
        return prototype if isinstance(prototype, Function) else None

    def constant(self, name: str) -> int | None:
        """An enumerator's value, or that of one of the GFP flags."""
        if name in _GFP_SUMS:
            parts = [self.constant(part) for part in _GFP_SUMS[name]]
            if None in parts:
                return None
            value = 0
            for part in parts:
                value |= part or 0
            return value
        if name in _GFP_BITS:
            bit = self._btf.enumerator(f"___GFP_{_GFP_BITS[name]}_BIT")
            return None if bit is None else 1 << bit
        return self._btf.enumerator(name)

    def _convert(self, type: BtfType) -> Type:
        known = self._converted.get(type.id)
        if known is None:
            known = self._converted[type.id] = self._converted_anew(type)
        return known

    def _converted_anew(self, type: BtfType) -> Type:
        if type.kind in (Kind.CONST, Kind.VOLATILE, Kind.RESTRICT, Kind.TYPE_TAG):
            return self._convert(type.target)
        if type.kind is Kind.TYPEDEF:
            target = self._convert(type.target)
            if isinstance(target, Record) and not target.spelling:
                target.alias = type.name
            return target
        if type.kind is Kind.INT:
            signed = bool(type.encoding & _SIGNED)
            if type.encoding & _BOOL:
                return Integer("bool", type.size, False)
            if type.name == "char":
                return types.CHAR
            return Integer(_BY_SIZE.get((type.size, signed), type.name), type.size, signed)
        if type.kind in (Kind.ENUM, Kind.ENUM64):
            names = {value: name for name, value in reversed(type.enumerators.items())}
            spelling = f"enum {type.name}" if type.name else ""
            return Integer(spelling, type.size, any(value < 0 for value in names), names)
        if type.kind is Kind.PTR:
            return self._pointer(type)
        if type.kind is Kind.ARRAY:
            return Array(self._convert(type.target), type.length)
        if type.kind in (Kind.STRUCT, Kind.UNION):
            return Record(
                type.kind.name.lower(), type.name, type.size, lambda: self._fields(type), kernel=self._core
            )
        if type.kind is Kind.FWD:
            keyword = "union" if type.is_union else "struct"
            known = self.find(f"{keyword} {type.name}")
            return known or Record(keyword, type.name, 0, list, kernel=self._core)
        if type.kind is Kind.FUNC_PROTO:
            parameters = [(p.name, p.type) for p in type.parameters]
            return Function(
                self._convert(type.target),
                tuple((name, self._convert(target)) for name, target in parameters if target.id),
                any(not target.id for _, target in parameters),
            )
        if type.kind is Kind.FLOAT:
            return Float(type.name, type.size)
        return types.VOID

    def _pointer(self, type: BtfType) -> Pointer:
        """To what; a pointer is made before its target is looked into: types go in circles."""
        target, user = type.target, False
        while target.kind in (Kind.CONST, Kind.VOLATILE, Kind.RESTRICT, Kind.TYPE_TAG):
            user = user or (target.kind is Kind.TYPE_TAG and target.name == "user")
            target = target.target
        return Pointer(self._convert(target), user)

    def _fields(self, type: BtfType) -> list[Field]:
        return [Field(m.name, self._convert(m.type), m.offset, m.bit_size) for m in type.members]


class Symbols:
    """The functions in /proc/kallsyms, read at the first question: they are some 100,000."""

    def __init__(self) -> None:
        self._found: dict[str, list[int]] | None = None

    @property
    def addresses(self) -> dict[str, list[int]]:
        """Each function's addresses, several where several have its name; 0 where they are hidden."""
        if self._found is None:
            self._found = {}
            with open(KALLSYMS) as file:
                for line in file:
                    address, kind, rest = line.split(" ", 2)
                    if kind in "tTwW":
                        name = rest.split("\t", 1)[0].rstrip()
                        self._found.setdefault(name, []).append(int(address, 16))
        return self._found

    def objection(self, name: str) -> str:
        """Why a kernel function cannot be probed by this name, as far as the symbols tell; or nothing."""
        count = len(self.addresses.get(name, ()))
        if count == 1:
            return ""
        if count:
            return f"the kernel has {count} functions {name!r}, and cannot tell them apart"
        parts = tuple(f"{name}.{kind}" for kind in ("isra", "part", "constprop", "cold"))
        made = [symbol for symbol in self.addresses if symbol.startswith(parts)]
        if made:
            return f"the compiler made {made[0]} of this kernel function, and it cannot be probed by its name"
        close = did_you_mean(name, self.addresses)
        return f"the kernel has no function {name!r}, or inlines it wherever it is called{close}"


def is_ambiguous(function: str) -> bool:
    """Whether the kernel has several functions of this name: fentry takes the first, and says nothing.

    Kprobes look for others of the name before all else (Linux 6.6, and 5.10 and 6.1 in their later versions).
    So one is asked for where none can be, one byte behind the beginning: that costs less than all symbols.
    """
    try:
        with open("/sys/bus/event_source/devices/kprobe/type") as file:
            kind = int(file.read())
    except OSError:
        return False
    text = ctypes.create_string_buffer(function.encode())
    size = 72  # struct perf_event_attr (linux/perf_event.h): type, size, ..., kprobe_func, probe_offset
    attributes = struct.pack("=II48xQQ", kind, size, ctypes.addressof(text), 1)
    number = 241 if os.uname().machine == "aarch64" else 298  # perf_event_open
    fd = ctypes.CDLL(None, use_errno=True).syscall(number, attributes, -1, 0, -1, 8)  # PERF_FLAG_FD_CLOEXEC
    if fd >= 0:
        os.close(fd)
        return False
    return ctypes.get_errno() == errno.EADDRNOTAVAIL


def matching(pattern: str) -> list[str]:
    """The kernel's functions that can be probed and match, as far as tracefs tells what can."""
    import fnmatch

    place = host.tracefs()
    listed = host.read(f"{place}/available_filter_functions") if place else ""
    names = [line.split(None, 1)[0] for line in listed.splitlines()] or list(Symbols().addresses)
    return sorted(set(fnmatch.filter(names, pattern)))
