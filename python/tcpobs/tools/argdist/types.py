"""C types, wherever they were read: from the kernel's BTF, from DWARF, or from C text.

Sizes and offsets are those of LP64 (x86_64, aarch64): a `long` and a pointer have 8 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Union

    Type = Union["Void", "Integer", "Float", "Pointer", "Array", "Record", "Function"]


@dataclass(frozen=True)
class Void:
    """No value; what a `void *` points to."""

    @property
    def spelling(self) -> str:
        """As in C."""
        return "void"


@dataclass(frozen=True)
class Integer:
    """An integer, a bool, a char, or an enum (which has `names`)."""

    spelling: str
    size: int
    """Bytes: 1, 2, 4, 8 (or 16, which nothing here can hold)."""
    signed: bool
    names: dict[int, str] = field(default_factory=dict, compare=False)
    is_char: bool = False
    """`char` itself, whatever its sign: a pointer to it is text."""


@dataclass(frozen=True)
class Float:
    """A floating-point number: BPF has none."""

    spelling: str
    size: int


@dataclass(frozen=True)
class Pointer:
    """To what; in a kernel function, `user` says that it points to the process's memory (`__user`)."""

    target: Type
    user: bool = False


@dataclass(frozen=True)
class Array:
    """`length` is 0 where it is not known: a flexible array."""

    element: Type
    length: int


@dataclass(frozen=True)
class Function:
    """Its prototype. `result` and parameters with their names; an empty name where there is none."""

    result: Type
    parameters: tuple[tuple[str, Type], ...]
    variadic: bool = False


@dataclass(frozen=True)
class Field:
    """A member of a record: its `offset` in bits; `bit_size` is 0 unless it is a bit field.

    `located`: the member is a tracepoint's `data_loc` or `rel_loc`, which says where the data are.
    """

    name: str
    type: Type
    offset: int
    bit_size: int = 0
    located: str = ""


@dataclass(eq=False)
class Record:
    """A struct or a union, its fields read when they are asked for: types refer to each other in circles.

    `name` is the tag, empty for an anonymous one; `alias` the typedef by which an anonymous one is known.
    """

    keyword: str
    """`struct` or `union`."""
    name: str
    size: int
    read_fields: Callable[[], list[Field]] = field(repr=False)
    alias: str = ""
    kernel: bool = False
    """From the kernel's BTF, so that its fields are found anew on each kernel (CO-RE)."""
    _fields: list[Field] | None = field(default=None, init=False, repr=False)

    @property
    def spelling(self) -> str:
        """As in C; empty for one without tag and typedef."""
        return self.alias or (f"{self.keyword} {self.name}" if self.name else "")

    @property
    def fields(self) -> list[Field]:
        """In order; members of anonymous members are not spread out."""
        if self._fields is None:
            self._fields = self.read_fields()
        return self._fields

    def find(self, name: str) -> tuple[Field, ...]:
        """The way to a field: the anonymous members it is in, and itself; empty if there is none."""
        for member in self.fields:
            if member.name == name:
                return (member,)
            if not member.name and isinstance(member.type, Record):
                inner = member.type.find(name)
                if inner:
                    return (member, *inner)
        return ()

    def names(self) -> Iterator[str]:
        """The names of all fields, those of anonymous members included."""
        for member in self.fields:
            if member.name:
                yield member.name
            elif isinstance(member.type, Record):
                yield from member.type.names()


def size_of(type: Type) -> int:
    """Bytes; 0 where there is no size."""
    if isinstance(type, Pointer):
        return 8
    if isinstance(type, Array):
        return size_of(type.element) * type.length
    if isinstance(type, (Void, Function)):
        return 0
    return type.size


VOID = Void()
CHAR = Integer("char", 1, True, is_char=True)
INT = Integer("int", 4, True)
LONG = Integer("long", 8, True)
UNSIGNED_LONG = Integer("unsigned long", 8, False)

_UNSIGNED = {"u8": 1, "u16": 2, "u32": 4, "u64": 8}
INTEGERS: dict[str, Integer] = {
    "char": CHAR,
    "signed char": Integer("signed char", 1, True),
    "unsigned char": Integer("unsigned char", 1, False),
    "short": Integer("short", 2, True),
    "unsigned short": Integer("unsigned short", 2, False),
    "int": INT,
    "unsigned int": Integer("unsigned int", 4, False),
    "long": LONG,
    "unsigned long": UNSIGNED_LONG,
    "long long": Integer("long long", 8, True),
    "unsigned long long": Integer("unsigned long long", 8, False),
    "bool": Integer("bool", 1, False),
    "_Bool": Integer("bool", 1, False),
    **{name: Integer(name, size, False) for name, size in _UNSIGNED.items()},
    **{f"__{name}": Integer(name, size, False) for name, size in _UNSIGNED.items()},
    **{f"s{name[1:]}": Integer(f"s{name[1:]}", size, True) for name, size in _UNSIGNED.items()},
    **{f"__s{name[1:]}": Integer(f"s{name[1:]}", size, True) for name, size in _UNSIGNED.items()},
    **{f"uint{name[1:]}_t": Integer(name, size, False) for name, size in _UNSIGNED.items()},
    **{f"int{name[1:]}_t": Integer(f"s{name[1:]}", size, True) for name, size in _UNSIGNED.items()},
    "size_t": Integer("u64", 8, False),
    "ssize_t": Integer("s64", 8, True),
    "uintptr_t": Integer("u64", 8, False),
    "intptr_t": Integer("s64", 8, True),
    "off_t": Integer("s64", 8, True),
    "pid_t": Integer("s32", 4, True),
    "uid_t": Integer("u32", 4, False),
    "gid_t": Integer("u32", 4, False),
    "mode_t": Integer("u32", 4, False),
    "time_t": Integer("s64", 8, True),
    "socklen_t": Integer("u32", 4, False),
}
"""The integers that need no other source, by the words that C allows in their usual order."""
