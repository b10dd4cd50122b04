"""BTF: the types of an object or of the running kernel (Documentation/bpf/btf.rst)."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from enum import IntEnum

from tcpobs.libbpf.errors import LibbpfError
from tcpobs.libbpf.library import DumpCallback, library
from tcpobs.libbpf.resource import Handle, Resource

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from typing import Union

    Value = Union[int, bool, bytes, str, Sequence["Value"], dict[str, "Value"]]


class Kind(IntEnum):
    """BTF_KIND_* of include/uapi/linux/btf.h."""

    VOID = 0
    INT = 1
    PTR = 2
    ARRAY = 3
    STRUCT = 4
    UNION = 5
    ENUM = 6
    FWD = 7
    TYPEDEF = 8
    VOLATILE = 9
    CONST = 10
    RESTRICT = 11
    FUNC = 12
    FUNC_PROTO = 13
    VAR = 14
    DATASEC = 15
    FLOAT = 16
    DECL_TAG = 17
    TYPE_TAG = 18
    ENUM64 = 19


_TRANSPARENT = (Kind.TYPEDEF, Kind.VOLATILE, Kind.CONST, Kind.RESTRICT, Kind.TYPE_TAG)
_SIGNED, _CHAR, _BOOL = 1, 2, 4  # BTF_INT_*
_INTEGERS = {1: "b", 2: "h", 4: "i", 8: "q"}


class Member:
    """A field of a struct or union, or a variable of a data section.

    `offset` is in bits for fields and in bytes for variables; `bit_size` is 0 unless it is a bit field.
    """

    __slots__ = ("bit_size", "name", "offset", "type")

    def __init__(self, name: str, type: Type, offset: int, bit_size: int = 0) -> None:
        self.name = name
        self.type = type
        self.offset = offset
        self.bit_size = bit_size


class Type:
    """One type. Read from the BTF when made; it is valid while its Btf is open."""

    __slots__ = ("_address", "_flag", "_reference", "_vlen", "btf", "id", "kind", "name")

    def __init__(self, btf: Btf, id: int) -> None:
        self.btf = btf
        self.id = id
        self._address: int = library().btf__type_by_id(btf.handle, id) or 0
        if not self._address:
            raise LibbpfError(f"BTF has no type {id}")
        name, info, self._reference = struct.unpack("=III", ctypes.string_at(self._address, 12))
        self.name = btf.string(name)
        try:
            self.kind = Kind(info >> 24 & 0x1F)
        except ValueError:
            raise LibbpfError(f"BTF type {id} is of no known kind") from None
        self._vlen = info & 0xFFFF
        self._flag = bool(info >> 31)

    def __repr__(self) -> str:
        return f"<{self.kind.name.lower()} {self.name or '(anonymous)'} [{self.id}]>"

    def _entries(self, format: str, count: int) -> Iterator[tuple[int, ...]]:
        """What follows the type in the BTF: `count` entries of one struct format."""
        size = struct.calcsize(format) * count
        return struct.iter_unpack(format, ctypes.string_at(self._address + 12, size))

    @property
    def target(self) -> Type:
        """What a pointer, array, typedef, qualifier, function or variable refers to."""
        if self.kind is Kind.ARRAY:
            return Type(self.btf, next(self._entries("=III", 1))[0])
        return Type(self.btf, self._reference)

    @property
    def length(self) -> int:
        """The number of an array's elements."""
        return next(self._entries("=III", 1))[2]

    @property
    def size(self) -> int:
        """Bytes."""
        size: int = library().btf__resolve_size(self.btf.handle, self.id)
        if size < 0:
            raise LibbpfError(f"{self!r} has no size")
        return size

    @property
    def members(self) -> list[Member]:
        """The fields of a struct or union, in order."""
        members = []
        for name, type, offset in self._entries("=III", self._vlen):
            bit_size = offset >> 24 if self._flag else 0
            offset = offset & 0xFFFFFF if self._flag else offset
            members.append(Member(self.btf.string(name), Type(self.btf, type), offset, bit_size))
        return members

    @property
    def variables(self) -> list[Member]:
        """The variables of a data section, in order."""
        found = []
        for type, offset, _ in self._entries("=III", self._vlen):
            variable = Type(self.btf, type)
            found.append(Member(variable.name, variable.target, offset))
        return found

    @property
    def enumerators(self) -> dict[str, int]:
        """The names and values of an enum."""
        if self.kind is Kind.ENUM:
            pairs = self._entries("=Ii" if self._flag else "=II", self._vlen)
            return {self.btf.string(name): value for name, value in pairs}
        return {
            self.btf.string(name): (high << 32 | low) - (1 << 64 if self._flag and high >> 31 else 0)
            for name, low, high in self._entries("=III", self._vlen)
        }

    @property
    def parameters(self) -> list[Member]:
        """The parameters of a function prototype, in order."""
        return [
            Member(self.btf.string(name), Type(self.btf, type), 0)
            for name, type in self._entries("=II", self._vlen)
        ]

    @property
    def encoding(self) -> int:
        """An integer's BTF_INT_SIGNED, BTF_INT_CHAR, BTF_INT_BOOL."""
        return next(self._entries("=I", 1))[0] >> 24 & 0xF

    @property
    def is_union(self) -> bool:
        """Whether a forward declaration is a union's."""
        return self._flag

    def resolve(self) -> Type:
        """The type behind typedefs and qualifiers."""
        type = self
        while type.kind in _TRANSPARENT:
            type = type.target
        return type

    def integer_format(self) -> str:
        """The struct module's letter for an integer, bool, enum or pointer."""
        type = self.resolve()
        if type.kind is Kind.INT and type.encoding & _BOOL:
            return "?"
        if type.kind is Kind.PTR:
            return "Q"
        if type.kind is Kind.INT:
            signed = bool(type.encoding & _SIGNED)
        elif type.kind in (Kind.ENUM, Kind.ENUM64):
            signed = type._flag
        else:
            raise LibbpfError(f"{self!r} is not a number")
        letter = _INTEGERS.get(type.size)
        if letter is None:
            raise LibbpfError(f"{self!r} has {type.size} bytes")
        return letter if signed else letter.upper()

    def pack(self, value: Value) -> bytes:
        """The bytes of a value of this type.

        Numbers and bools for themselves; bytes (or a sequence) for an array, filled up with zeros; a dict
        for a struct, the fields left out being zero.
        """
        type = self.resolve()
        if isinstance(value, dict):
            data = bytearray(type.size)
            members = {member.name: member for member in type.members}
            for name, field in value.items():
                if name not in members:
                    raise LibbpfError(f"{type!r} has no field {name}")
                start = members[name].offset // 8
                packed = members[name].type.pack(field)
                data[start : start + len(packed)] = packed
            return bytes(data)
        if type.kind is Kind.ARRAY:
            if isinstance(value, (int, str)):
                raise LibbpfError(f"{value!r} is not an array")
            if not isinstance(value, bytes):
                value = b"".join(type.target.pack(element) for element in value)
            if len(value) > type.size:
                raise LibbpfError(f"{len(value)} bytes do not fit into {type.size} of {type!r}")
            return value.ljust(type.size, b"\0")
        try:
            return struct.pack("=" + type.integer_format(), value)
        except struct.error as error:
            raise LibbpfError(f"{value!r} does not fit into {type!r}: {error}") from None

    def unpack(self, data: bytes) -> Value:
        """The value that bytes of this type hold: the reverse of pack(), byte arrays as bytes."""
        type = self.resolve()
        if type.kind is Kind.STRUCT:
            return {
                member.name: member.type.unpack(
                    data[member.offset // 8 : member.offset // 8 + member.type.size]
                )
                for member in type.members
            }
        if type.kind is Kind.ARRAY:
            element, size = type.target, type.target.size
            if size == 1:
                return data[: type.size]
            return [element.unpack(data[i * size : (i + 1) * size]) for i in range(type.length)]
        number: int = struct.unpack("=" + type.integer_format(), data[: type.size])[0]
        return number


class Btf(Handle, Resource):
    """A set of types. A context manager where it was opened by itself; else it lives with its object."""

    def __init__(self, handle: int, owned: bool) -> None:
        super().__init__(handle)
        self._owned = owned

    @classmethod
    def of_kernel(cls) -> Btf:
        """The running kernel's types, from /sys/kernel/btf/vmlinux."""
        return cls(library().btf__load_vmlinux_btf(), owned=True)

    @classmethod
    def of_file(cls, path: str) -> Btf:
        """The types in an ELF file's .BTF section, or in a file of raw BTF."""
        return cls(library().btf__parse(os.fsencode(path), None), owned=True)

    def close(self) -> None:
        """Frees it, if it was opened by itself."""
        if self._owned and self._pointer:
            library().btf__free(self._pointer)
        self.forget()

    def __len__(self) -> int:
        """The number of types, `void` included; ids are 1 to len - 1."""
        return int(library().btf__type_cnt(self.handle))

    def __iter__(self) -> Iterator[Type]:
        return (Type(self, id) for id in range(1, len(self)))

    def string(self, offset: int) -> str:
        """The string at an offset of the string section."""
        text: bytes = library().btf__name_by_offset(self.handle, offset) or b""
        return text.decode(errors="replace")

    def find(self, name: str, kind: Kind) -> Type | None:
        """The type of this name and kind, or None."""
        try:
            id = library().btf__find_by_name_kind(self.handle, name.encode(), kind)
        except LibbpfError as error:
            if error.errno == errno.ENOENT:
                return None
            raise
        return Type(self, id)

    def enumerator(self, name: str) -> int | None:
        """The value of an enumerator, whichever enum it is of; None if there is none of this name.

        Enums are thousands: its name is looked for in the bytes, and the enum by where they are.
        """
        size = ctypes.c_uint32()
        start: int = library().btf__raw_data(self.handle, ctypes.byref(size))
        data = ctypes.string_at(start, size.value)
        header, types, types_size, strings = struct.unpack_from("=IIII", data, 4)  # struct btf_header
        string = data.find(b"\0%b\0" % name.encode(), header + strings)
        if string < 0:
            return None
        wanted = struct.pack("=I", string + 1 - header - strings)
        place, end = header + types, header + types + types_size
        while (place := data.find(wanted, place, end)) >= 0:
            if (place - header - types) % 4 == 0:
                type = self._at(start + place)
                if type.kind in (Kind.ENUM, Kind.ENUM64) and name in type.enumerators:
                    return type.enumerators[name]
            place += 1
        return None

    def _at(self, address: int) -> Type:
        """The type whose bytes are there: they lie one after another."""
        low, high = 1, len(self)
        while high - low > 1:
            middle = (low + high) // 2
            if library().btf__type_by_id(self.handle, middle) <= address:
                low = middle
            else:
                high = middle
        return Type(self, low)

    def declare(self, types: Iterable[Type]) -> str:
        """C that defines the types and, before them, whatever they hold by value."""
        lib = library()
        parts: list[str] = []

        def collect(_: int, text: int, arguments: int) -> None:
            parts.append(lib.format(text, arguments))

        callback = DumpCallback(collect)
        dump = lib.btf_dump__new(self.handle, callback, None, None)
        try:
            for type in types:
                lib.btf_dump__dump_type(dump, type.id)
        finally:
            lib.btf_dump__free(dump)
        return "".join(parts)
