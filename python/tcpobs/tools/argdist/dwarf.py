"""Prototypes and types from DWARF, versions 2 to 5, of a program or library or its separate debug file.

Only what is asked for is decoded: an address leads to its compile unit, a name to the units that mention it.
"""

from __future__ import annotations

import os
import re
import struct
from bisect import bisect_right
from contextlib import contextmanager
from dataclasses import replace
from io import BytesIO

from tcpobs.errors import TcpobsError
from tcpobs.tools.argdist.elf import DEBUG_FOLDER, Elf
from tcpobs.tools.argdist.types import (
    INTEGERS,
    VOID,
    Array,
    Field,
    Float,
    Function,
    Integer,
    Pointer,
    Record,
    size_of,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any, Union

    from elftools.dwarf.compileunit import CompileUnit
    from elftools.dwarf.die import DIE
    from elftools.dwarf.typeunit import TypeUnit

    from tcpobs.tools.argdist.elf import Symbol
    from tcpobs.tools.argdist.types import Type

    Unit = Union[CompileUnit, TypeUnit]

_SECTIONS = (
    *("info", "aranges", "abbrev", "str", "loc", "ranges", "addr", "str_offsets", "line_str"),
    *("loclists", "rnglists", "types"),
)
_UNREAD = ("frame", "line", "pubtypes", "pubnames", "sup")
"""What pyelftools could use besides, and nothing here needs."""

_KEYWORDS = {
    "DW_TAG_structure_type": "struct",
    "DW_TAG_class_type": "struct",
    "DW_TAG_union_type": "union",
    "DW_TAG_enumeration_type": "enum",
}
_QUALIFIERS = {
    f"DW_TAG_{name}_type"
    for name in ("const", "volatile", "restrict", "atomic", "packed", "shared", "immutable")
}
_POINTERS = {f"DW_TAG_{name}_type" for name in ("pointer", "reference", "rvalue_reference")}
_OF_C = {0x01, 0x02, 0x0C, 0x1D, 0x2C}
"""DW_AT_language where a tag is no type name: C89 to C17."""

_BOOLEAN, _SIGNED, _SIGNED_CHAR, _UNSIGNED_CHAR = 2, 5, 6, 8
_FLOATS = {3, 4, 9, 15}  # complex, real, imaginary, decimal


class DwarfTypes:
    """What an ELF file's debug information says; `elf` must stay open.

    With dwz (Debian's -dbgsym), shared types are followed into the common file; where that is missing, such a
    type is void. Damaged information gives TcpobsError, also when a record's fields are asked for later.
    """

    def __init__(self, elf: Elf) -> None:
        self._elf = elf
        self._files: list[_File] | None = None
        self._indexes: dict[Unit, _Index] = {}
        self._types: dict[DIE, Type] = {}

    def prototype(self, symbol: Symbol) -> Function | None:
        """Of the function at the symbol's address; None where there is no debug information on it.

        Of an IFUNC, that of the functions that it chooses from, if its resolver is declared to return one.
        """
        with self._sound():
            for unit in self._units_of(symbol):
                die = self._index(unit).function(symbol.address)
                if die:
                    function = self._function(*_origins(die))
                    if not symbol.indirect:
                        return function
                    chosen = function.result
                    if isinstance(chosen, Pointer) and isinstance(chosen.target, Function):
                        return chosen.target
                    return None
            return None

    def find(self, spelling: str) -> Type | None:
        """`struct foo`, `union foo`, `enum foo`, or a typedef; None if nothing defines it.

        In the units read so far, those of the prototypes, before any other.
        """
        spelling = " ".join(spelling.split())
        with self._sound():
            known = list(self._indexes)
            for unit in known:
                if spelling in self._index(unit).types:
                    return self._type(self._index(unit).types[spelling])
            name = re.sub(r"^(struct|union|enum) ", "", spelling)
            for file in self._opened():
                for unit in file.mentioning(name.rpartition("::")[2], self._opened()):
                    found = self._index(unit).types.get(spelling)
                    if found:
                        return self._type(found)
            return None

    def constant(self, name: str) -> int | None:
        """An enumerator's value; None if nothing defines it."""
        with self._sound():
            for file in self._opened():
                for unit in file.mentioning(name, self._opened()):
                    found = self._index(unit).constant(name)
                    if found is not None:
                        return found
            return None

    @contextmanager
    def _sound(self) -> Iterator[None]:
        """Whatever a library raises over damaged information, as one line."""
        try:
            yield
        except TcpobsError:
            raise
        except Exception as error:
            cause = str(error).partition("\n")[0] or type(error).__name__
            raise self._elf.damaged(f"its debug information: {cause}") from error

    def _opened(self) -> list[_File]:
        """The file with the debug information, and dwz's common one; empty if there is none."""
        if self._files is None:
            self._files = []
            elf = self._elf if self._elf.has_section(".debug_info") else self._elf.debug()
            if elf and elf.has_section(".debug_info"):
                self._files.append(_File(elf))
                common = _common(elf)
                if common:
                    with common:
                        self._files.append(_File(common))
                    self._files[0].dwarf.supplementary_dwarfinfo = self._files[1].dwarf
        return self._files

    def _units_of(self, symbol: Symbol) -> Iterator[Unit]:
        """Where the function may be, likeliest first."""
        for file in self._opened()[:1]:
            start = file.unit_at(symbol.address)
            if start is not None:
                yield file.unit(start)
            # Compilers other than gcc leave the table of addresses out.
            units = list(file.mentioning(symbol.name.partition("@")[0], self._opened()))
            if not file.has_aranges:
                units += map(file.unit, file.starts)
            for unit in units:
                if _covers(unit, symbol.address):
                    yield unit

    def _index(self, unit: Unit) -> _Index:
        if unit not in self._indexes:
            self._indexes[unit] = _Index(unit)
        return self._indexes[unit]

    def _type(self, die: DIE) -> Type:
        """Records are the same object each time: they are compared by identity."""
        found = self._types.get(die)
        if found is None:
            found = self._types[die] = self._read(die)
        return found

    def _type_of(self, die: DIE) -> Type:
        """What its DW_AT_type refers to."""
        if "DW_AT_type" not in die.attributes:
            return VOID
        target = self._follow(die, "DW_AT_type")
        return VOID if target is None else self._type(target)

    def _follow(self, die: DIE, name: str) -> DIE | None:
        """None for what is in dwz's common file, when that is missing."""
        attribute = die.attributes[name]
        if (
            attribute.form == "DW_FORM_ref_sig8" and die.cu["version"] >= 5
        ):  # pyelftools looks in .debug_types
            for file in self._opened():
                if attribute.raw_value in file.signatures:
                    return file.die(file.signatures[attribute.raw_value])
        try:
            return die.get_DIE_from_attribute(name)
        except NotImplementedError:
            return None

    def _read(self, die: DIE) -> Type:
        tag = die.tag
        if tag in _QUALIFIERS:
            return self._type_of(die)
        if tag == "DW_TAG_typedef":
            target = self._type_of(die)
            if isinstance(target, Record) and not target.spelling:
                target.alias = _name(die)
            return target
        if tag in _POINTERS:
            return Pointer(self._type_of(die))
        if tag == "DW_TAG_base_type":
            return _base_type(die)
        if tag == "DW_TAG_enumeration_type":
            return self._enum(die)
        if tag == "DW_TAG_array_type":
            return self._array(die)
        if tag == "DW_TAG_subroutine_type":
            return self._function(die)
        if tag in _KEYWORDS:
            return self._record(die)
        return VOID

    def _function(self, *dies: DIE) -> Function:
        """From the first of these that says it: a definition may leave to its declaration what that said."""
        result: Type = VOID
        for die in dies:
            if "DW_AT_type" in die.attributes:
                result = self._type_of(die)
                break
        parameters: list[tuple[str, Type]] = []
        variadic = False
        for die in dies:
            for child in _children(die):
                if child.tag == "DW_TAG_formal_parameter":
                    parameters.append((_name(child), self._type_of(child)))
                elif child.tag == "DW_TAG_unspecified_parameters":
                    variadic = True
            if parameters or variadic:
                break
        return Function(result, tuple(parameters), variadic)

    def _enum(self, die: DIE) -> Type:
        names: dict[int, str] = {}
        for child in _children(die):
            if child.tag == "DW_TAG_enumerator" and isinstance(_value(child, "DW_AT_const_value"), int):
                names.setdefault(_value(child, "DW_AT_const_value"), _name(child))
        under = self._type_of(die)
        if not isinstance(under, Integer):
            under = _integer(_value(die, "DW_AT_byte_size", 4), any(value < 0 for value in names))
        return replace(under, names=names) if isinstance(under, Integer) else VOID

    def _array(self, die: DIE) -> Type:
        lengths = []
        for child in _children(die):
            if child.tag == "DW_TAG_subrange_type":
                length = _value(child, "DW_AT_count")
                last = _value(child, "DW_AT_upper_bound")
                if length is None and isinstance(last, int):
                    length = last + 1
                # An expression says that of a local array; -1, in whatever size, is how gcc says none.
                known = isinstance(length, int) and length not in (1 << 32, 1 << 64)
                lengths.append(length if known else 0)
        found = self._type_of(die)
        for length in reversed(lengths):
            found = Array(found, length)
        return found

    def _record(self, die: DIE) -> Record:
        if "DW_AT_signature" in die.attributes:  # it is in a unit of its own
            target = self._follow(die, "DW_AT_signature")
            if target is not None and target is not die:
                found = self._type(target)
                assert isinstance(found, Record)
                return found
        assert die.tag in _KEYWORDS
        keyword = _KEYWORDS[str(die.tag)]
        if "DW_AT_declaration" in die.attributes:
            for index in self._indexes.values():
                defined = index.types.get(f"{keyword} {_name(die)}")
                if defined:
                    found = self._type(defined)
                    assert isinstance(found, Record)
                    return found
        return Record(keyword, _name(die), _value(die, "DW_AT_byte_size", 0), lambda: self._fields(die))

    def _fields(self, die: DIE) -> list[Field]:
        """A base class is an anonymous member; what has no fixed place (static, virtual base) is left out."""
        with self._sound():
            fields = []
            for child in _children(die):
                if child.tag not in ("DW_TAG_member", "DW_TAG_inheritance"):
                    continue
                type = self._type_of(child)
                bits = _value(child, "DW_AT_bit_size", 0)
                offset = _offset(child, die.tag == "DW_TAG_union_type", type, bits)
                if offset is not None:
                    name = _name(child) if child.tag == "DW_TAG_member" else ""
                    fields.append(Field(name, type, offset, bits))
            return fields


class _File:
    """The debug sections of one file, in memory."""

    def __init__(self, elf: Elf) -> None:
        # 30 ms that a program without debug information does not need.
        from elftools.dwarf.dwarfinfo import DebugSectionDescriptor, DwarfConfig, DWARFInfo

        sections = {name: elf.section(f".debug_{name}") for name in _SECTIONS}
        self.info, self.strings = sections["info"], sections["str"]
        self._indirect_strings = bool(sections["str_offsets"])
        descriptors = {
            f"debug_{name}_sec": DebugSectionDescriptor(BytesIO(data), f".debug_{name}", None, len(data), 0)
            for name, data in sections.items()
            if data
        }
        absent = {f"debug_{name}_sec": None for name in (*_SECTIONS, *_UNREAD)}
        absent.update(eh_frame_sec=None, gnu_debugaltlink_sec=None)
        machine = {"x86_64": "x64", "aarch64": "AArch64"}.get(os.uname().machine, "")
        self.dwarf = DWARFInfo(config=DwarfConfig(True, machine, 8), **{**absent, **descriptors})
        self.starts: list[int] = []
        """Where the units begin."""
        self.signatures: dict[int, int] = {}
        """Where the types are that have units of their own (DWARF 5)."""
        self._type_units = list(_type_units(sections["types"]))
        self._read_starts()
        self.has_aranges = bool(sections["aranges"])
        self._ranges = sorted(_aranges(sections["aranges"]))

    def unit(self, start: int) -> Unit:
        """The one that begins there."""
        return self.dwarf.get_CU_at(start)

    def die(self, place: int) -> DIE:
        """The one there."""
        return self.unit(self._start(place)).get_DIE_from_refaddr(place)

    def unit_at(self, address: int) -> int | None:
        """Where the unit begins that has this code, by the table of addresses."""
        index = bisect_right(self._ranges, (address, 1 << 64, 0)) - 1
        if index < 0 or address >= self._ranges[index][1]:
            return None
        return self._ranges[index][2]

    def mentioning(self, name: str, files: list[_File]) -> Iterator[Unit]:
        """The units in which this name occurs, found in the bytes: decoding them all takes minutes."""
        text = os.fsencode(name) + b"\0"
        starts: set[int] = set()
        # In the unit itself, or as the place of the string; names may share their ends.
        patterns = [text]
        for file in files:
            patterns += [struct.pack("<I", place) for place in _places(file.strings, text) if place < 1 << 32]
        if self._indirect_strings and len(patterns) > 1:
            starts.update(self.starts)
        else:
            for pattern in patterns:
                starts.update(self._start(place) for place in _places(self.info, pattern))
        for start in sorted(starts):
            yield self.unit(start)
        for signature in self._type_units:
            yield self.dwarf.get_TU_by_sig8(signature)

    def _start(self, place: int) -> int:
        """Where the unit begins that this is in."""
        return self.starts[max(0, bisect_right(self.starts, place) - 1)]

    def _read_starts(self) -> None:
        place = 0
        while place + 24 <= len(self.info):
            size, version, kind = struct.unpack_from("<IHB", self.info, place)
            if size == 0xFFFFFFFF:  # DWARF of 64 bits; its type units are not looked for
                (size,) = struct.unpack_from("<Q", self.info, place + 4)
                size += 8
            elif version == 5 and kind == 2:  # DW_UT_type
                signature, type = struct.unpack_from("<QI", self.info, place + 12)
                self.signatures[signature] = place + type
            self.starts.append(place)
            place += size + 4


class _Index:
    """What a unit defines: types by spelling, functions by address."""

    def __init__(self, unit: Unit) -> None:
        self.types: dict[str, DIE] = {}
        self._functions: dict[int, DIE] = {}
        self._scattered: list[DIE] = []
        self._enums: list[DIE] = []
        top = unit.get_top_DIE()
        self._tags_are_types = _value(top, "DW_AT_language") not in _OF_C
        self._read(top, "")

    def function(self, address: int) -> DIE | None:
        """The one that begins there."""
        for die in self._scattered:
            for start, _ in _code(die):
                self._functions.setdefault(start, die)
        self._scattered = []
        return self._functions.get(address)

    def constant(self, name: str) -> int | None:
        """The value of the enumerator of this name."""
        for die in self._enums:
            for child in _children(die):
                value = _value(child, "DW_AT_const_value")
                if _name(child) == name and isinstance(value, int):
                    return value
        return None

    def _read(self, parent: DIE, path: str) -> None:
        for die in _children(parent):
            name = ""
            if die.tag == "DW_TAG_enumeration_type":
                self._enums.append(die)
            if die.tag == "DW_TAG_subprogram":
                if "DW_AT_low_pc" in die.attributes:
                    self._functions.setdefault(die.attributes["DW_AT_low_pc"].value, die)
                elif "DW_AT_ranges" in die.attributes:
                    self._scattered.append(die)
            elif die.tag == "DW_TAG_namespace":
                name = _name(die)
                self._read(die, f"{path}{name}::" if name else path)
            elif "DW_AT_declaration" not in die.attributes and "DW_AT_name" in die.attributes:
                self._read_type(die, path)

    def _read_type(self, die: DIE, path: str) -> None:
        name = _name(die)
        keyword = _KEYWORDS.get(str(die.tag))
        for spelling in dict.fromkeys((path + name, name)):
            if keyword:
                self.types.setdefault(f"{keyword} {spelling}", die)
            if die.tag == "DW_TAG_typedef" or (keyword and self._tags_are_types):
                self.types.setdefault(spelling, die)


def _base_type(die: DIE) -> Type:
    name, size = _name(die), _value(die, "DW_AT_byte_size", 0)
    encoding = _value(die, "DW_AT_encoding")
    if encoding in _FLOATS:
        return Float(name, size)
    if encoding == _BOOLEAN and size == 1:
        return INTEGERS["bool"]
    signed = encoding in (_SIGNED, _SIGNED_CHAR)
    if name == "char" and size == 1 and encoding in (_SIGNED_CHAR, _UNSIGNED_CHAR):
        return replace(INTEGERS["char"], signed=signed)
    return _integer(size, signed, "long long" in name)


def _integer(size: int, signed: bool, twice_long: bool = False) -> Type:
    """C's own of this size."""
    word = {1: "char", 2: "short", 4: "int", 8: "long long" if twice_long else "long", 16: "__int128"}.get(
        size
    )
    if word is None:
        return VOID
    spelling = word if signed and size > 1 else f"{'signed' if signed else 'unsigned'} {word}"
    return INTEGERS.get(spelling) or Integer(spelling, size, signed)


def _offset(die: DIE, in_union: bool, type: Type, bits: int) -> int | None:
    """A member's, in bits; None if it is not the same in every object."""
    if "DW_AT_data_bit_offset" in die.attributes:
        return int(_value(die, "DW_AT_data_bit_offset"))
    place = _value(die, "DW_AT_data_member_location", 0 if in_union else None)
    if isinstance(place, list):  # an expression, as old compilers wrote it: DW_OP_plus_uconst
        if not place or place[0] != 0x23:
            return None
        place = sum((byte & 0x7F) << 7 * index for index, byte in enumerate(place[1:]))
    if place is None or "DW_AT_external" in die.attributes:
        return None
    offset = int(place) * 8
    if "DW_AT_bit_offset" in die.attributes:  # from the top of what holds it
        holder = _value(die, "DW_AT_byte_size", 0) or size_of(type)
        offset += holder * 8 - int(_value(die, "DW_AT_bit_offset")) - bits
    return offset


def _origins(die: DIE) -> list[DIE]:
    """Where a function is described: what it is an instance of, and the declaration which that completes."""
    seen = 0
    while "DW_AT_abstract_origin" in die.attributes and seen < 8:
        die = die.get_DIE_from_attribute("DW_AT_abstract_origin")
        seen += 1
    if "DW_AT_specification" in die.attributes:
        return [die, die.get_DIE_from_attribute("DW_AT_specification")]
    return [die]


def _children(die: DIE) -> Iterator[DIE]:
    # Not by pyelftools, which follows a damaged DW_AT_sibling back for ever.
    if not die.has_children:
        return
    place = die.offset + die.size
    depth = 0
    while True:
        child = die.cu.get_DIE_from_refaddr(place)
        place += child.size
        if child.is_null():
            if not depth:
                return
            depth -= 1
            continue
        if not depth:
            yield child
        if child.has_children:
            sibling = child.attributes.get("DW_AT_sibling")
            following = sibling.value + die.cu.cu_offset if sibling and sibling.form == "DW_FORM_ref4" else 0
            if following > place:
                place = following
            else:
                depth += 1


def _code(die: DIE) -> Iterator[tuple[int, int]]:
    """The ranges of addresses of a unit or function."""
    from elftools.dwarf.ranges import BaseAddressEntry

    low = _value(die, "DW_AT_low_pc", 0)
    if "DW_AT_ranges" in die.attributes:
        lists = die.dwarfinfo.range_lists()
        unit: Any = die.cu  # a type unit has no code
        base = _value(unit.get_top_DIE(), "DW_AT_low_pc", 0)
        for entry in lists.get_range_list_at_offset(_value(die, "DW_AT_ranges"), unit) if lists else ():
            if isinstance(entry, BaseAddressEntry):
                base = entry.base_address
            else:
                start = 0 if entry.is_absolute else base
                yield start + entry.begin_offset, start + entry.end_offset
    elif "DW_AT_high_pc" in die.attributes:
        high = die.attributes["DW_AT_high_pc"]
        yield low, high.value if high.form.startswith("DW_FORM_addr") else low + high.value


def _covers(unit: Unit, address: int) -> bool:
    """Whether the unit may have this code."""
    top = unit.get_top_DIE()
    if "DW_AT_ranges" not in top.attributes and "DW_AT_high_pc" not in top.attributes:
        return top.tag == "DW_TAG_compile_unit"
    return any(start <= address < end for start, end in _code(top))


def _name(die: DIE) -> str:
    name = _value(die, "DW_AT_name", b"")
    return name.decode(errors="replace") if isinstance(name, bytes) else ""


def _value(die: DIE, name: str, default: Any = None) -> Any:
    attribute = die.attributes.get(name)
    return default if attribute is None else attribute.value


def _places(data: bytes, pattern: bytes) -> Iterator[int]:
    place = data.find(pattern)
    while place >= 0:
        yield place
        place = data.find(pattern, place + 1)


def _type_units(data: bytes) -> Iterator[int]:
    """The signatures in .debug_types, where DWARF 4 has the units of types."""
    place = 0
    while place + 23 <= len(data):
        (size,) = struct.unpack_from("<I", data, place)
        yield from struct.unpack_from("<Q", data, place + 11)
        place += size + 4


def _aranges(data: bytes) -> Iterator[tuple[int, int, int]]:
    """From, to, and where the unit begins, of .debug_aranges."""
    place = 0
    while place + 12 <= len(data):
        size, _, unit, address_size, _ = struct.unpack_from("<IHIBB", data, place)
        end = place + size + 4
        if size == 0xFFFFFFFF or address_size != 8 or end > len(data):
            return  # a kind that no compiler for these machines writes
        first = place + 16
        for address, length in struct.iter_unpack("<QQ", data[first : end - (end - first) % 16]):
            if length:
                yield address, address + length, unit
        place = end


def _common(elf: Elf) -> Elf | None:
    """The file to which dwz moved what several debug files share."""
    name, _, build_id = elf.section(".gnu_debugaltlink").partition(b"\0")
    if not name:
        return None
    identity = build_id.hex()
    for path in (
        os.path.join(elf.folder(), os.fsdecode(name)),
        f"{DEBUG_FOLDER}/.build-id/{identity[:2]}/{identity[2:]}.debug",
    ):
        try:
            common = Elf(path)
        except TcpobsError:
            continue
        if common.build_id == identity:
            return common
        common.close()
    return None
