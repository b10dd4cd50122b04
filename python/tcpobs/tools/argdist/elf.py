"""An ELF file as the tracer sees it: its functions, its USDT probes, where its debug information is.

Read by hand, the tables it needs and no more: a library has thousands of symbols, and a probe waits for them.
"""

from __future__ import annotations

import os
import re
import struct
import zlib
from collections import namedtuple

from tcpobs.errors import TcpobsError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import BinaryIO, NamedTuple

    from typing_extensions import Self

    class Symbol(NamedTuple):
        """A function. `offset` is in the file, for a uprobe; `indirect`: an IFUNC, which returns it."""

        name: str
        address: int
        offset: int
        size: int
        indirect: bool

    class UsdtArgument(NamedTuple):
        """Its bytes and sign, and the note's own text, as `-4@%edi`."""

        size: int
        signed: bool
        text: str

    class UsdtProbe(NamedTuple):
        """One place of a probe; it may have several. `semaphore`: the program asks whether it is on."""

        provider: str
        name: str
        address: int
        semaphore: bool
        arguments: tuple[UsdtArgument, ...]

    class Section(NamedTuple):
        """A section header."""

        type: int
        flags: int
        address: int
        offset: int
        size: int
        link: int

    class Segment(NamedTuple):
        """What of a PT_LOAD says where an address is in the file."""

        address: int
        offset: int
        size: int

    class RawSymbol(NamedTuple):
        """As in the table: the version, if any, and whether it is the one that a new program links to."""

        name: str
        version: str
        default: bool
        address: int
        size: int
        indirect: bool

else:
    Symbol = namedtuple("Symbol", "name address offset size indirect")
    UsdtArgument = namedtuple("UsdtArgument", "size signed text")
    UsdtProbe = namedtuple("UsdtProbe", "provider name address semaphore arguments")
    Section = namedtuple("Section", "type flags address offset size link")
    Segment = namedtuple("Segment", "address offset size")
    RawSymbol = namedtuple("RawSymbol", "name version default address size indirect")

DEBUG_FOLDER = "/usr/lib/debug"

_MACHINES = {"x86_64": 62, "aarch64": 183}
_SYMTAB, _NOTE, _NOBITS, _DYNSYM = 2, 7, 8, 11
_VERDEF, _VERSYM = 0x6FFFFFFD, 0x6FFFFFFF
_FUNC, _IFUNC = 2, 10
_SYMBOL = struct.Struct("<IBBHQQ")
_COMPRESSED = 0x800
_MOST_COMPRESSED = 1100
"""To how many bytes zlib can inflate one: 1032, and a header."""


class Elf:
    """An open file of this machine. Raises TcpobsError when it is none, or damaged.

    `path` may go through a process (/proc/PID/root/…, /proc/PID/exe, /proc/PID/map_files/…): its debug file
    is then looked for in that process's root first.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._functions: dict[str, list[Symbol]] | None = None
        self._debug: Elf | None = None
        self._debug_sought = False
        try:
            self._file: BinaryIO = open(path, "rb")  # noqa: SIM115 (it stays open)
        except OSError as error:
            raise TcpobsError(
                f"cannot open {path} ({error.strerror}): give the path of a program or library"
            ) from error
        try:
            self._read_headers()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """The file, and its debug file."""
        self._file.close()
        if self._debug:
            self._debug.close()

    def functions(self) -> dict[str, list[Symbol]]:
        """Every defined function by name, one symbol for each address.

        A versioned one is there as `name@VERSION`; under `name` is its default version, or, where all are for
        old programs only, each of them.
        """
        if self._functions is None:
            self._functions = self._by_name(None)
        return self._functions

    def find(self, name: str) -> list[Symbol]:
        """`functions()[name]`, without making all of them; empty if there is none. `@@` is `@` here."""
        name = name.replace("@@", "@")
        found = self._by_name(name) if self._functions is None else self._functions
        return found.get(name, [])

    @property
    def build_id(self) -> str:
        """In hexadecimal; empty if there is none."""
        for owner, kind, description in self._notes():
            if owner == b"GNU" and kind == 3:  # NT_GNU_BUILD_ID
                return description.hex()
        return ""

    def debug_file(self) -> str | None:
        """The path of the separate file with debug information, found as a debugger finds it.

        By build-id, else by .gnu_debuglink with its checksum; in the process's root before this one's.
        """
        debug = self.debug()
        return debug.path if debug else None

    def debug(self) -> Elf | None:
        """That file, open; it is closed with this one. A damaged one is as good as none."""
        if not self._debug_sought:
            self._debug_sought = True
            self._debug = next(self._debug_files(), None)
        return self._debug

    def usdt(self) -> list[UsdtProbe]:
        """The probes in .note.stapsdt, in the file's order."""
        return [
            self._usdt_probe(description)
            for owner, kind, description in self._notes(".note.stapsdt")
            if owner == b"stapsdt" and kind == 3
        ]

    def has_section(self, name: str) -> bool:
        """Whether it is there with its contents: a debug file has but the headers of most."""
        section = self._sections.get(name)
        return section is not None and section.type != _NOBITS

    def section(self, name: str) -> bytes:
        """Its bytes, inflated if they were compressed; none if it is not there."""
        section = self._sections.get(name)
        if section is None or section.type == _NOBITS:
            return b""
        data = self._read(section.offset, section.size)
        return self._inflate(data) if section.flags & _COMPRESSED else data

    def damaged(self, what: object) -> TcpobsError:
        """The error for that."""
        return TcpobsError(f"{self.path} is damaged ({what}): install it again, or give another file")

    def folder(self) -> str:
        """Where the file itself is, whichever way it was opened."""
        if self._root and not self.path.startswith(f"{self._root}/"):
            return self._root + os.path.dirname(os.readlink(self.path))
        # Not resolved below another root: a link there would lead to this one.
        return os.path.dirname(self.path if self._root else os.path.realpath(self.path))

    @property
    def _root(self) -> str:
        """The root of the process through which it was opened; empty for this one's."""
        match = re.match(r"(/proc/\d+)/(root/|exe$|map_files/)", self.path)
        return f"{match.group(1)}/root" if match else ""

    def _read_headers(self) -> None:
        self._size = os.fstat(self._file.fileno()).st_size
        try:
            header = self._file.read(64)
        except OSError as error:
            raise TcpobsError(
                f"cannot read {self.path} ({error.strerror}): give a program or library"
            ) from error
        if header[:4] != b"\x7fELF":
            raise TcpobsError(f"{self.path} is no program and no library: an ELF file is needed")
        if len(header) < 64:
            raise self.damaged("it ends early")
        machine = os.uname().machine
        (number,) = struct.unpack_from("<H", header, 18)
        if header[4:6] != b"\x02\x01" or number != _MACHINES.get(machine):  # 64 bits, little-endian
            raise TcpobsError(f"{self.path} is for another machine: one for {machine} is needed")
        segments, sections = struct.unpack_from("<QQ", header, 32)
        count_segments, section_size, count_sections, names = struct.unpack_from("<HHHH", header, 56)
        self._segments = [
            Segment(address, offset, size)
            for type, _, offset, address, _, size, _, _ in struct.iter_unpack(
                "<IIQQQQQQ", self._read(segments, 56 * count_segments)
            )
            if type == 1  # PT_LOAD
        ]
        self._sections: dict[str, Section] = {}
        self._numbered: list[Section] = []
        if not sections:
            return
        if section_size != 64:
            raise self.damaged("its section headers have a strange size")
        if not count_sections:  # more than the header can say
            (count_sections,) = struct.unpack_from("<Q", self._read(sections, 64), 32)
        raw = list(struct.iter_unpack("<IIQQQQIIQQ", self._read(sections, 64 * count_sections)))
        self._numbered = [Section(*fields[1:7]) for fields in raw]
        if names == 0xFFFF:
            names = raw[0][6]
        text = self._linked(names)
        for fields, section in zip(raw, self._numbered):
            self._sections.setdefault(_string(text, fields[0]), section)

    def _read(self, offset: int, size: int) -> bytes:
        """These bytes, which must be there."""
        if offset + size > self._size:
            raise self.damaged("it ends early")
        try:
            data = os.pread(self._file.fileno(), size, offset)
        except OSError as error:
            raise TcpobsError(f"cannot read {self.path} ({error.strerror}): give another file") from error
        if len(data) < size:
            raise self.damaged("it ends early")
        return data

    def _linked(self, number: int) -> bytes:
        """The bytes of the section that another refers to."""
        if number >= len(self._numbered):
            raise self.damaged("a section refers to one that is not there")
        section = self._numbered[number]
        return b"" if section.type == _NOBITS else self._read(section.offset, section.size)

    def _inflate(self, data: bytes) -> bytes:
        if len(data) < 24:
            raise self.damaged("a compressed section has no header")
        kind, _, size, _ = struct.unpack_from("<IIQQ", data)
        if kind != 1:  # ELFCOMPRESS_ZLIB; zstd is in Python since 3.14 only
            raise TcpobsError(f"{self.path} has its debug information compressed by zstd: zlib is needed")
        if size > len(data) * _MOST_COMPRESSED:
            raise self.damaged("a compressed section is too large")
        try:
            # One byte is always allowed: 0 would be no limit.
            inflated = zlib.decompressobj().decompress(data[24:], size + 1)
        except zlib.error as error:
            raise self.damaged(error) from error
        if len(inflated) != size:
            raise self.damaged("a compressed section has not the size that it says")
        return inflated

    def _by_name(self, wanted: str | None) -> dict[str, list[Symbol]]:
        """All functions, or (much faster) at least those of this name, with or without version."""
        found: dict[str, dict[int, Symbol]] = {}
        hidden: dict[str, dict[int, Symbol]] = {}
        debug = self.debug()
        for elf in (self, debug) if debug else (self,):
            for raw in elf._raw_symbols(wanted):
                offset = self._offset(raw.address)
                if offset is None:
                    continue
                versioned = f"{raw.name}@{raw.version}" if raw.version else raw.name
                name = raw.name if raw.default else versioned
                symbol = Symbol(name, raw.address, offset, raw.size, raw.indirect)
                found.setdefault(name, {}).setdefault(raw.address, symbol)
                if name != versioned:
                    found.setdefault(versioned, {}).setdefault(raw.address, symbol)
                elif raw.version:
                    hidden.setdefault(raw.name, {}).setdefault(raw.address, symbol)
        for name, symbols in hidden.items():
            found.setdefault(name, symbols)
        return {name: list(symbols.values()) for name, symbols in found.items()}

    def _raw_symbols(self, wanted: str | None) -> Iterator[RawSymbol]:
        """The defined functions of both symbol tables."""
        for section in self._numbered:
            if section.type not in (_SYMTAB, _DYNSYM):
                continue
            text = self._linked(section.link)
            data = self._read(section.offset, section.size - section.size % _SYMBOL.size)
            symbols = enumerate(_SYMBOL.iter_unpack(data))
            if wanted is None:
                chosen = [entry for entry in symbols if entry[1][1] & 15 in (_FUNC, _IFUNC)]
            else:
                # Names may share their ends, so each place is looked for where this one ends.
                pattern = re.escape(os.fsencode(wanted.partition("@")[0])) + b"(?=[\0@])"
                places = {match.start() for match in re.finditer(pattern, text)}
                chosen = [e for e in symbols if e[1][0] in places and e[1][1] & 15 in (_FUNC, _IFUNC)]
            versions = self._versions() if section.type == _DYNSYM else []
            for index, (place, info, _, home, address, size) in chosen:
                if home == 0 or not address:
                    continue  # another file has it
                name, version, default = _string(text, place), "", True
                if index < len(versions):
                    version, default = versions[index]
                elif "@" in name:  # as linkers name them in .symtab: name@OLD, name@@DEFAULT
                    default = "@@" in name
                    name, version = name.replace("@@", "@").split("@", 1)
                yield RawSymbol(name, version, default, address, size, info & 15 == _IFUNC)

    def _versions(self) -> list[tuple[str, bool]]:
        """For each dynamic symbol its version, and whether that is the default one."""
        defined = next((section for section in self._numbered if section.type == _VERDEF), None)
        numbers = next((section for section in self._numbered if section.type == _VERSYM), None)
        if defined is None or numbers is None:
            return []
        names: dict[int, str] = {}
        data, text = self._read(defined.offset, defined.size), self._linked(defined.link)
        place = 0
        try:
            while True:
                _, flags, number, _, _, first, following = struct.unpack_from("<HHHHIII", data, place)
                (name,) = struct.unpack_from("<I", data, place + first)
                if not flags & 1:  # VER_FLG_BASE: the file's own name
                    names[number] = _string(text, name)
                if not following:
                    break
                place += following
        except struct.error as error:
            raise self.damaged("its symbol versions end early") from error
        raw = self._read(numbers.offset, numbers.size - numbers.size % 2)
        return [(names.get(n & 0x7FFF, ""), not n & 0x8000) for (n,) in struct.iter_unpack("<H", raw)]

    def _offset(self, address: int) -> int | None:
        """In the file; None for what is not in it."""
        for start, offset, size in self._segments:
            if start <= address < start + size:
                return address - start + offset
        return None

    def _notes(self, name: str = "") -> Iterator[tuple[bytes, int, bytes]]:
        """Owner, type and contents of the notes in this section, or in all."""
        for title, section in self._sections.items():
            if section.type != _NOTE or name not in ("", title):
                continue
            data = self._read(section.offset, section.size)
            place = 0
            while place + 12 <= len(data):
                owner_size, size, kind = struct.unpack_from("<III", data, place)
                place += 12
                contents = place + (owner_size + 3 & ~3)
                if contents + size > len(data):
                    break
                yield data[place : place + owner_size].rstrip(b"\0"), kind, data[contents : contents + size]
                place = contents + (size + 3 & ~3)

    def _usdt_probe(self, data: bytes) -> UsdtProbe:
        if len(data) < 24:
            raise self.damaged("a USDT probe's note ends early")
        address, base, semaphore = struct.unpack_from("<QQQ", data)
        home = self._sections.get(".stapsdt.base")
        if home:  # the notes are not changed when a file is prelinked; this section moves along
            address += home.address - base
        words = [word.decode(errors="replace") for word in data[24:].split(b"\0")]
        provider, name, arguments = (*words, "", "", "")[:3]
        return UsdtProbe(provider, name, address, bool(semaphore), tuple(_usdt_arguments(arguments)))

    def _debug_files(self) -> Iterator[Elf]:
        """The files that are there and belong to this one."""
        if self.has_section(".debug_info"):
            return
        roots = list(dict.fromkeys((self._root, "")))
        build_id = self.build_id
        for root in roots if build_id else ():
            yield from _opened(
                f"{root}{DEBUG_FOLDER}/.build-id/{build_id[:2]}/{build_id[2:]}.debug", build_id
            )
        link = self.section(".gnu_debuglink")
        if len(link) < 5 or b"\0" not in link:
            return
        name, (checksum,) = os.fsdecode(link[: link.index(b"\0")]), struct.unpack("<I", link[-4:])
        folder = self.folder()
        inside = folder[len(self._root) :]
        for path in (
            f"{folder}/{name}",
            f"{folder}/.debug/{name}",
            *(f"{root}{DEBUG_FOLDER}{inside}/{name}" for root in roots),
        ):
            if _checksum(path) == checksum:
                yield from _opened(path)


def _string(text: bytes, place: int) -> str:
    end = text.find(b"\0", place)
    return text[place : end if end >= 0 else None].decode(errors="replace")


def _usdt_arguments(text: str) -> Iterator[UsdtArgument]:
    # Split where the next size is: an operand of aarch64 may hold a space, as in 8@[sp, 16].
    for match in re.finditer(r"(-?)(\d+)f?@.*?(?=\s+-?\d+f?@|\s*$)", text):
        yield UsdtArgument(int(match.group(2)), bool(match.group(1)), match.group())


def _opened(path: str, build_id: str = "") -> Iterator[Elf]:
    """The file, if there is a sound one, and it is of this build."""
    try:
        elf = Elf(path)
    except TcpobsError:
        return
    try:
        if elf.build_id == build_id or not build_id:
            yield elf
            return
    except TcpobsError:
        pass
    elf.close()


def _checksum(path: str) -> int | None:
    try:
        with open(path, "rb") as file:
            value = 0
            while chunk := file.read(1 << 20):
                value = zlib.crc32(chunk, value)
            return value
    except OSError:
        return None
