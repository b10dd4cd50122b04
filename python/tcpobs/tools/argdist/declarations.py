"""The types that a generated program needs, in C: of each record, the fields that it reads and no others.

A kernel's record is one for CO-RE: names and kinds count, places are found when it is loaded. A process's
record has its fields where the process has them.
"""

from __future__ import annotations

from tcpobs.tools.argdist.types import Array, Float, Function, Integer, Pointer, Record, Void, size_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from tcpobs.tools.argdist.types import Field, Type


class Declarations:
    """Collects records and fields as they are used; `text` declares them."""

    def __init__(self, beside_headers: bool = False, portable: bool = False) -> None:
        """`beside_headers`: the program includes a user's header, which may define the same names.

        `portable`: it is for other kernels, too, where fields may have another size.
        """
        self._beside_headers = beside_headers
        self.portable = portable
        self._used: dict[Record, dict[str, Field]] = {}
        self._names: dict[Record, str] = {}
        self._taken: set[str] = set()
        self._enums: dict[str, Integer] = {}
        self._unnamed = 0

    def use(self, record: Record, field: Field) -> None:
        """Has the record declared with this field; `field.offset` is from the record's start."""
        self.name(record)
        self._used[record][field.name] = field
        if isinstance(field.type, (Record, Array)):
            self._use_inner(field.type)

    def _use_inner(self, type: Type) -> None:
        """A record that is held by value is declared before."""
        while isinstance(type, Array):
            type = type.element
        if isinstance(type, Record):
            self.name(type)

    def name(self, record: Record) -> str:
        """The record's name in the program, empty for one that is part of another; has it declared."""
        if record not in self._names:
            plain = record.alias or record.name
            unique, number = plain, 2
            if plain and self._beside_headers:
                # libbpf takes no notice of what follows ___
                unique = f"{plain}___{'kernel' if record.kernel else 'user'}"
            while unique and unique in self._taken:
                # What is after ___ means nothing to libbpf: a kernel's record may be renamed that way.
                unique, number = f"{plain}{'___' if record.kernel else '_'}{number}", number + 1
            self._taken.add(unique)
            self._names[record] = unique
            self._used[record] = {}
        name = self._names[record]
        return name if record.alias or not name else f"{record.keyword} {name}"

    def cast(self, type: Type) -> str:
        """The type's name, for a cast."""
        return self.declare(type, "").rstrip()

    def declare(self, type: Type, name: str) -> str:
        """A variable, parameter or field of this type."""
        if isinstance(type, Pointer):
            target = type.target
            if isinstance(target, Array):
                return self.declare(target.element, f"(*{name})[{target.length}]")
            if isinstance(target, (Void, Function, Float)) or (
                isinstance(target, Record) and not self.name(target)
            ):
                return f"void *{name}"
            return self.declare(target, f"*{name}")
        if isinstance(type, Array):
            return self.declare(type.element, f"{name}[{type.length}]")
        if isinstance(type, Record):
            return f"{self.name(type) or self._body(type)} {name}"
        if isinstance(type, Integer):
            return f"{_plain(type)} {name}"
        return f"void {name}"

    def fields(self, record: Record) -> list[Field]:
        """The fields of a record that were used."""
        return list(self._used.get(record, {}).values())

    def text(self) -> str:
        """The declarations."""
        done: dict[Record, str] = {}
        for record in list(self._used):
            self._define(record, done)
        enums = [f"{self._enum(type)};\n" for type in self._enums.values()]
        return "\n".join([*enums, *(text for text in done.values() if text)])

    def _define(self, record: Record, done: dict[Record, str]) -> None:
        """Defines a record, after those that it holds."""
        if record in done or record not in self._used:
            return
        for field in self._used[record].values():
            type = field.type
            while isinstance(type, Array):
                type = type.element
            if isinstance(type, Record):
                self._define(type, done)
        name = self.name(record)
        if not name:
            done[record] = ""  # where it is used
        elif record.alias:
            done[record] = f"typedef {self._body(record)} {name};\n"
        else:
            done[record] = f"{self._body(record)};\n"

    def _body(self, record: Record) -> str:
        """`struct name { ... }`."""
        name = "" if record.alias or not self._names[record] else f"{self._names[record]} "
        fields = self._used[record].values()
        if record.kernel:
            lines = [f"\t{self._field(field)};\n" for field in fields]
            return f"{record.keyword} {name}{{\n{''.join(lines)}}} CORE"
        lines = []
        for field in fields:
            if not field.bit_size:
                declared = f"{_before(record, field)}{self.declare(field.type, field.name)};"
                lines.append(f"\t\tstruct {{ {declared} }}{_packed(field)};\n")
        lines.append(f"\t\tchar {_free(record, 'all')}[{record.size}];\n")
        return f"{record.keyword} {name}{{\n\tunion {{\n{''.join(lines)}\t}};\n}}"

    def _field(self, field: Field) -> str:
        """A field of a kernel's record: its kind has to be the kernel's."""
        if field.bit_size:
            return f"{self._kind(field.type, field.name)} : {field.bit_size}"
        return self._kind(field.type, field.name)

    def _kind(self, type: Type, name: str) -> str:
        if isinstance(type, Integer) and type.names:
            return f"{self._enum_name(type)} {name}"
        if isinstance(type, Array) and isinstance(type.element, Integer):
            return self._kind(type.element, f"{name}[{type.length}]")
        return self.declare(type, name)

    def _enum_name(self, type: Integer) -> str:
        if not type.spelling:
            return self._enum(type)
        self._enums.setdefault(type.spelling, type)
        return type.spelling

    def _enum(self, type: Integer) -> str:
        """An enum of the same name, size and sign; its one enumerator is not used."""
        name = type.spelling[len("enum ") :]
        self._unnamed += not name
        enumerator = f"{name or f'enum_{self._unnamed}'}_"
        packed = " __attribute__((packed))" if type.size < 4 else ""
        return f"enum {name} {{ {enumerator} = {-1 if type.signed else 0} }}{packed}"


def _plain(type: Integer) -> str:
    """An enum is an integer like another, outside of a kernel's records."""
    if type.spelling and not type.spelling.startswith("enum"):
        return type.spelling
    return f"{'s' if type.signed else 'u'}{type.size * 8}"


def _before(record: Record, field: Field) -> str:
    name = _free(record, f"before_{field.name}")
    return f"char {name}[{field.offset // 8}]; " if field.offset else ""


def _free(record: Record, name: str) -> str:
    """A name that no field has."""
    names = set(record.names())
    while name in names:
        name += "_"
    return name


def _packed(field: Field) -> str:
    """Only where its place wants it: packed fields are read byte by byte."""
    type = field.type
    while isinstance(type, Array):
        type = type.element
    aligned = not isinstance(type, Record) and field.offset // 8 % (size_of(type) or 1) == 0
    return "" if aligned else " __attribute__((packed))"
