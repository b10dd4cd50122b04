"""What a specifier's probe is at: a function of the kernel or of a file, a tracepoint, a USDT probe."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass, field

from tcpobs.errors import TcpobsError
from tcpobs.libbpf.resource import Resource
from tcpobs.tools.argdist import tracepoints, types
from tcpobs.tools.argdist.kernel import KernelTypes, Symbols, matching
from tcpobs.tools.argdist.libraries import PARTS_OF_LIBC, find_binary
from tcpobs.tools.argdist.names import did_you_mean
from tcpobs.tools.argdist.plan import KERNEL, TRACEPOINT, USDT, USER
from tcpobs.tools.argdist.scope import TypeNames
from tcpobs.tools.argdist.types import Array, Field, Float, Function, Integer, Pointer, Record, size_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from tcpobs.tools.argdist.dwarf import DwarfTypes
    from tcpobs.tools.argdist.elf import Elf
    from tcpobs.tools.argdist.scope import TypeSource
    from tcpobs.tools.argdist.specifier import Parameter, Specifier
    from tcpobs.tools.argdist.tracepoints import Field as EventField
    from tcpobs.tools.argdist.types import Type


@dataclass(frozen=True)
class Argument:
    """A parameter of a probe: its name, its type, and the register or slot it is in, from 0 on.

    `slot` is -1 for what is in none: a float, or a big struct.
    """

    name: str
    type: Type
    slot: int


@dataclass
class Target:
    """What to attach to.

    `place` is USER's and USDT's library as the user wrote it, and a tracepoint's category. `functions` are
    the names: many where a wildcard matched. `known` says that the kernel's BTF has the function.
    """

    kind: str
    place: str
    functions: list[str]
    type_names: TypeNames
    arguments: list[Argument] = field(default_factory=list)
    result: Type = types.LONG
    known: bool = False
    wildcard: bool = False
    provider: str = ""
    record: Record | None = None
    """A tracepoint's fields."""
    constant: Callable[[str], int | None] = lambda _: None
    """The value of an enumerator of the program's."""

    @property
    def function(self) -> str:
        """The name, where there is one."""
        return self.functions[0]


class Targets(Resource):
    """Finds targets. Files stay open until it is closed: their types are read when they are asked for."""

    def __init__(self, kernel: KernelTypes, headers: TypeSource, pid: int | None = None) -> None:
        self.kernel = kernel
        self._headers = headers
        self.symbols = Symbols()
        self._pid = pid
        self._files: dict[str, tuple[Elf, DwarfTypes]] = {}

    def close(self) -> None:
        """Closes the files."""
        for elf, _ in self._files.values():
            elf.close()
        self._files.clear()

    def find(self, specifier: Specifier) -> Target:
        """A specifier's target. Raises SpecifierError, with the nearest names, when it is not there."""
        if specifier.kind == "t":
            return self._tracepoint(specifier)
        if specifier.kind == "u":
            return self._usdt(specifier)
        return self._user(specifier) if specifier.library.text else self._kernel(specifier)

    # ---- functions

    def _kernel(self, specifier: Specifier) -> Target:
        name = specifier.function.text
        names = TypeNames(specifier, [self.kernel, self._headers])
        if is_wildcard(name):
            found = matching(name)
            if not found:
                raise specifier.error("no kernel function matches this", specifier.function.start)
            return Target(KERNEL, "", found, names, wildcard=True)
        prototype = self.kernel.prototype(name)
        if prototype is None:
            self._check_kernel_function(specifier, name)
        arguments = _arguments(specifier.parameters, prototype, names)
        result = prototype.result if prototype else types.LONG
        return Target(KERNEL, "", [name], names, arguments, result, known=prototype is not None)

    def _check_kernel_function(self, specifier: Specifier, name: str) -> None:
        """A function that the BTF does not have may still be one for a kprobe."""
        objection = self.symbols.objection(name)
        if objection:
            raise specifier.error(objection, specifier.function.start)

    def _user(self, specifier: Specifier) -> Target:
        name, place = specifier.function.text, specifier.library.text
        elf, dwarf = self._open(specifier, place)
        if is_wildcard(name):
            found = sorted(
                function
                for function, symbols in elf.functions().items()
                if fnmatch.fnmatchcase(function, name) and not all(symbol.indirect for symbol in symbols)
            )
            if not found:
                message = f"no function of {place} matches this, or only ones chosen at the start (IFUNC)"
                raise specifier.error(message, specifier.function.start)
            return Target(USER, place, found, TypeNames(specifier, []), wildcard=True)
        symbols = elf.find(name)
        if not symbols and place in PARTS_OF_LIBC:
            place = "c"
            elf, dwarf = self._open(specifier, place)
            symbols = elf.find(name)
        if not symbols:
            message = f"{place} has no function {name!r}{did_you_mean(name, elf.functions())}"
            raise specifier.error(message, specifier.function.start)
        if len(symbols) > 1:
            message = f"{place} has {len(symbols)} functions {name!r}: a wildcard counts them all"
            raise specifier.error(message, specifier.function.start)
        if symbols[0].indirect:
            chosen = did_you_mean(name, [n for n in elf.functions() if name in n and n != name])
            message = f"{name!r} is chosen when the program starts (IFUNC), and cannot be probed{chosen}"
            raise specifier.error(message, specifier.function.start)
        names = TypeNames(specifier, [dwarf, self._headers, _libc(), self.kernel])
        prototype = dwarf.prototype(symbols[0])
        arguments = _arguments(specifier.parameters, prototype, names)
        result = prototype.result if prototype else types.LONG
        return Target(USER, place, [name], names, arguments, result, constant=dwarf.constant)

    def _open(self, specifier: Specifier, place: str) -> tuple[Elf, DwarfTypes]:
        """A library or program, and its types."""
        from tcpobs.tools.argdist.dwarf import DwarfTypes
        from tcpobs.tools.argdist.elf import Elf

        if place not in self._files:
            try:
                elf = Elf(find_binary(place, self._pid))
            except TcpobsError as error:
                raise specifier.error(str(error), specifier.library.start) from None
            self._files[place] = elf, DwarfTypes(elf)
        return self._files[place]

    # ---- events

    def _tracepoint(self, specifier: Specifier) -> Target:
        category, event = specifier.library.text, specifier.function.text
        names = TypeNames(specifier, [self.kernel, self._headers])
        try:
            found = tracepoints.find(category, event)
        except TcpobsError as error:
            if type(error) is not TcpobsError:
                raise
            raise specifier.error(str(error), specifier.library.start) from None
        fields = [
            Field(f.name, _tracepoint_type(f, names), f.offset * 8, located=f.kind if f.is_located else "")
            for f in found.fields
        ]
        record = Record("struct", f"{event}_event", found.size, lambda: fields)
        return Target(TRACEPOINT, category, [event], names, record=record)

    def _usdt(self, specifier: Specifier) -> Target:
        provider, _, name = specifier.function.text.rpartition(".")
        place = specifier.library.text
        elf, dwarf = self._open(specifier, place)
        probes = elf.usdt()
        if not probes and place in PARTS_OF_LIBC:
            place = "c"
            elf, dwarf = self._open(specifier, place)
            probes = elf.usdt()
        names = TypeNames(specifier, [dwarf, self._headers, _libc(), self.kernel])
        found = [p for p in probes if p.name == name and provider in ("", p.provider)]
        if not found:
            known = sorted({f"{p.provider}.{p.name}" for p in probes})
            close = did_you_mean(name, {p.name for p in probes})
            hint = close or (f": it has {', '.join(known[:5])}" if known else ": it has none at all")
            message = f"{place} has no USDT probe {specifier.function.text!r}{hint}"
            raise specifier.error(message, specifier.function.start)
        providers = sorted({p.provider for p in found})
        if len(providers) > 1:
            message = f"several providers have it: write {' or '.join(f'{p}.{name}' for p in providers)}"
            raise specifier.error(message, specifier.function.start)
        arguments = []
        for number, argument in enumerate(found[0].arguments):
            sign = "s" if argument.signed else "u"
            type = types.INTEGERS.get(f"{sign}{argument.size * 8}", types.LONG)
            arguments.append(Argument(f"arg{number + 1}", type, number))
        return Target(USDT, place, [name], names, arguments, provider=providers[0], constant=dwarf.constant)


def is_wildcard(name: str) -> bool:
    """Whether a function's name is a pattern."""
    return any(c in name for c in "*?")


def _libc() -> TypeSource:
    from tcpobs.tools.argdist import libc

    return libc


def _arguments(
    written: tuple[Parameter, ...], prototype: Function | None, names: TypeNames
) -> list[Argument]:
    """A function's parameters: by the names and types that the user wrote, and by those that are known."""
    known = prototype.parameters if prototype else ()
    found, slot = [], 0
    for number in range(max(len(written), len(known))):
        type = known[number][1] if number < len(known) else None
        if type == types.VOID:  # one that could not be followed
            type = None
        name = known[number][0] if number < len(known) else ""
        passed = type or types.LONG
        if number < len(written):
            declared = names.resolve(written[number].type)
            passed = type or declared
            # `void *file` for a struct file * says less than what is known.
            vague = isinstance(declared, Pointer) and declared.target == types.VOID
            if type is None or not (vague and isinstance(type, Pointer)):
                type = declared
            if written[number].name and written[number].name != name:
                if name and name not in [p.name for p in written]:
                    found.append(Argument(name, passed, _slot(passed, slot)))
                name = written[number].name
        assert type is not None
        found.append(Argument(name, type, _slot(passed, slot)))
        slot += _slots(passed)
    return found


def _slots(type: Type) -> int:
    """How many registers it takes (System V AMD64 ABI, 3.2.3; AAPCS64)."""
    if isinstance(type, Float):
        return 0
    if isinstance(type, Record):
        return (type.size + 7) // 8 if type.size <= 16 else 0
    return 1


def _slot(type: Type, slot: int) -> int:
    return -1 if isinstance(type, (Float, Record)) else slot


def _tracepoint_type(field: EventField, names: TypeNames) -> Type:
    """The type of a tracepoint's field, from the words of its format and its size."""
    from tcpobs.tools.argdist.specifier import type_name

    words = type_name(field.type)
    target = names.find(words.words) if words else None
    sign = "s" if field.signed else "u"
    integer = types.INTEGERS.get(f"{sign}{field.size * 8}", types.LONG)
    if field.kind == tracepoints.ARRAY:
        element = target if target is not None and size_of(target) else types.INTEGERS["u8"]
        return Array(element, field.size // size_of(element))
    if field.is_located:
        return Pointer(target if target is not None and size_of(target) else types.CHAR)
    if field.kind == tracepoints.POINTER:
        stars = words.stars if words else 1
        pointed: Type = target if target is not None else types.VOID
        for _ in range(max(stars, 1)):
            pointed = Pointer(pointed)
        return pointed
    if isinstance(target, Integer) and target.size == field.size:
        return target
    return integer
