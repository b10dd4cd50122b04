"""--list: what can be probed, as specifiers to copy."""

from __future__ import annotations

import fnmatch

from tcpobs.errors import TcpobsError, UsageError
from tcpobs.output import Output
from tcpobs.tools.argdist import specifier
from tcpobs.tools.argdist.declarations import Declarations
from tcpobs.tools.argdist.kernel import KernelTypes, matching
from tcpobs.tools.argdist.types import VOID

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from tcpobs.tools.argdist.types import Function

MOST_SIGNATURES = 200
"""Library functions that are looked up in DWARF: each takes some milliseconds."""


def run(pattern: str, pid: int | None, btf: str | None) -> None:
    """Prints what matches TYPE:LIBRARY:PATTERN. Raises TcpobsError when nothing does."""
    kind, _, rest = pattern.partition(":")
    place, colon, name = rest.partition(":")
    if kind not in specifier.KINDS or not colon:
        raise UsageError(f"{pattern!r} is no pattern: give one like p::tcp_*, p:c:mem*, t:sock:*")
    name = name.partition("(")[0] or "*"
    if kind == "t":
        lines = _tracepoints(place or "*", name)
    elif kind == "u":
        lines = _usdt(place, name, pid)
    elif place:
        lines = _library(kind, place, name, pid)
    else:
        lines = _kernel(kind, name, btf)
    output, found = Output(), False
    for line in lines:
        found = True
        output.write(f"{line}\n")
    if not found:
        raise TcpobsError(f"nothing matches {pattern!r}")


def _kernel(kind: str, name: str, btf: str | None) -> Iterator[str]:
    kernel = KernelTypes(btf)
    try:
        for function in matching(name):
            yield f"{kind}::{_signature(function, kernel.prototype(function))}"
    finally:
        kernel.close()


def _library(kind: str, place: str, name: str, pid: int | None) -> Iterator[str]:
    from tcpobs.tools.argdist.dwarf import DwarfTypes
    from tcpobs.tools.argdist.elf import Elf
    from tcpobs.tools.argdist.libraries import find_binary

    with Elf(find_binary(place, pid)) as elf:
        dwarf, functions = DwarfTypes(elf), elf.functions()
        for number, function in enumerate(sorted(f for f in functions if fnmatch.fnmatchcase(f, name))):
            symbol = functions[function][0]
            if "@" in function or symbol.indirect:
                continue
            prototype = dwarf.prototype(symbol) if number < MOST_SIGNATURES else None
            yield f"{kind}:{place}:{_signature(function, prototype)}"


def _tracepoints(category: str, name: str) -> Iterator[str]:
    from tcpobs.tools.argdist import tracepoints

    for found in tracepoints.matching(f"{category}:{name}"):
        yield f"t:{':'.join(found)}()"
        for field in tracepoints.find(*found).fields:
            if not field.name.startswith("common_"):
                yield f"    args->{field.name:<20} {field.type}"


def _usdt(place: str, name: str, pid: int | None) -> Iterator[str]:
    from tcpobs.tools.argdist.elf import Elf
    from tcpobs.tools.argdist.libraries import find_binary

    with Elf(find_binary(place, pid)) as elf:
        shown = set()
        for probe in elf.usdt():
            full = f"{probe.provider}.{probe.name}"
            matches = fnmatch.fnmatchcase(probe.name, name) or fnmatch.fnmatchcase(full, name)
            if full in shown or not matches:
                continue
            shown.add(full)
            yield f"u:{place}:{full}()"
            for number, argument in enumerate(probe.arguments, 1):
                yield f"    arg{number:<17} {'s' if argument.signed else 'u'}{argument.size * 8}"


def _signature(function: str, prototype: Function | None) -> str:
    """`name(type name, ...)`, and what it returns; empty parentheses where nobody knows."""
    if prototype is None:
        return f"{function}()"
    declarations = Declarations()
    parameters = [declarations.declare(type, name).strip() for name, type in prototype.parameters]
    parameters += ["..."] * prototype.variadic
    returns = "" if prototype.result == VOID else f"    returns {declarations.cast(prototype.result)}"
    return f"{function}({', '.join(parameters)}){returns}"
