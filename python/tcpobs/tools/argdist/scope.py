"""What the names in a specifier's expressions mean."""

from __future__ import annotations

from tcpobs.tools.argdist import types
from tcpobs.tools.argdist.expressions import Value
from tcpobs.tools.argdist.names import did_you_mean
from tcpobs.tools.argdist.types import Array, Pointer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from typing import Protocol

    from tcpobs.tools.argdist.expressions import Place
    from tcpobs.tools.argdist.specifier import Specifier, SpecifierError, TypeName
    from tcpobs.tools.argdist.types import Type

    class TypeSource(Protocol):
        """Where types come from: the kernel's BTF, DWARF, a table."""

        def find(self, spelling: str) -> Type | None:
            """The type of this name, as `struct sock` or `gfp_t`; or None."""


class TypeNames:
    """Type names, looked up in one source after another."""

    def __init__(self, specifier: Specifier, sources: Collection[TypeSource]) -> None:
        self._specifier = specifier
        self._sources = sources

    def find(self, words: tuple[str, ...]) -> Type | None:
        """The type without its stars, or None. `unsigned long int` is `unsigned long`, and so on."""
        if words == ("void",):
            return types.VOID
        plain = _integer(words)
        if plain:
            return plain
        for source in self._sources:
            found = source.find(" ".join(words))
            if found is not None:
                return found
        return None

    def resolve(self, name: TypeName) -> Type:
        """The type, stars and all. Raises SpecifierError when nobody knows it."""
        return self.pointed(name.words, name.stars, name.start)

    def pointed(self, words: tuple[str, ...], stars: int, start: int) -> Type:
        """The type of these words, with so many stars."""
        found = self.find(words)
        if found is None:
            name = " ".join(words)
            close = did_you_mean(name, list(types.INTEGERS))
            hint = close or "; a struct is known by `struct NAME`, and -I HEADER brings more"
            raise self._specifier.error(f"unknown type {name!r}{hint}", start)
        for _ in range(stars):
            found = Pointer(found)
        return found


def _integer(words: tuple[str, ...]) -> types.Integer | types.Float | None:
    """C allows its integers' words in any order, and leaves some out."""
    if len(words) == 1 and words[0] in types.INTEGERS:
        return types.INTEGERS[words[0]]
    if words[-1] in ("float", "double"):
        return types.Float(" ".join(words), 8)
    if not set(words) <= {"unsigned", "signed", "long", "short", "int", "char"}:
        return None
    kept = [word for word in words if word not in ("int", "signed")]
    if "char" in kept and "signed" in words:
        return types.INTEGERS["signed char"]
    sign = ["unsigned"] if "unsigned" in kept else []
    rest = [word for word in kept if word != "unsigned"] or ["int"]
    return types.INTEGERS.get(" ".join([*sign, *rest]))


class Scope:
    """Of one specifier: its parameters or fields, the `$` names, constants, types."""

    def __init__(
        self,
        specifier: Specifier,
        names: dict[str, Value | Place],
        type_names: TypeNames,
        memory: str,
        constant: Callable[[str], int | None],
        defines: Collection[str],
        headers: bool,
        parameters: dict[str, Type],
    ) -> None:
        """`memory` is whose memory pointers point into; `parameters` are for `$entry`."""
        self.specifier = specifier
        self.memory = memory
        self.names = names
        self.entries: dict[str, Value] = {}
        """What `$entry` was asked for."""
        self.used: set[str] = set()
        """Which of the names were."""
        self._types = type_names
        self._constant = constant
        self._defines = defines
        self._headers = headers
        self._parameters = parameters
        names.setdefault(
            "$PID", Value("(u32)(bpf_get_current_pid_tgid() >> 32)", types.INTEGERS["u32"], memory)
        )
        names.setdefault("$TID", Value("(u32)bpf_get_current_pid_tgid()", types.INTEGERS["u32"], memory))

    def name(self, name: str) -> Value | Place | None:
        """What a name stands for, or None."""
        found = self.names.get(name)
        if found is not None:
            self.used.add(name)
        return found

    def constant(self, name: str) -> Value | None:
        """An enumerator, or a macro that the user gave."""
        if name in self._defines:
            return Value(name, types.LONG, self.memory)
        if name.startswith("$"):
            return None
        value = self._constant(name)
        if value is not None:
            wide = not -(1 << 31) <= value < 1 << 32
            type = types.INTEGERS["long" if wide else "unsigned int" if value >= 1 << 31 else "int"]
            return Value(f"{value}{'l' if wide else 'u' if value >= 1 << 31 else ''}", type, self.memory)
        return Value(name, types.LONG, self.memory) if self._headers else None

    def unknown(self, name: str) -> str:
        """Why a name means nothing here."""
        if name in self._parameters:
            return f"at the return, {name!r} is not what it was: use $entry({name})"
        if name == "$latency":
            return "$latency is known at the return only: use r:..."
        if name == "$retval":
            return "$retval is known at the return only: use r:..."
        if name.startswith("$"):
            return f"unknown {name}{did_you_mean(name, list(self.names))}"
        known = [*self.names, *self._parameters]
        close = did_you_mean(name, known)
        return (
            f"unknown name {name!r}{close or '; a macro is given with -D NAME=VALUE, or its header with -I'}"
        )

    def entry(self, name: str, error: Callable[[str], Exception]) -> Value:
        """What `$entry(name)` stands for."""
        if self.specifier.kind != "r":
            raise error("$entry is for returns (r:...): here it is the parameter itself")
        if name not in self._parameters:
            raise error(f"there is no parameter {name!r}{did_you_mean(name, list(self._parameters))}")
        type = self._parameters[name]
        memory = "user" if isinstance(type, Pointer) and type.user else self.memory
        return self.entries.setdefault(name, Value(f"entry_{name}", type, memory))

    def is_type(self, name: str) -> bool:
        """Whether the name is a typedef's."""
        return name not in self.names and self._types.find((name,)) is not None

    def type(self, words: tuple[str, ...], stars: int, position: int) -> Type:
        """A type by its name. Raises SpecifierError."""
        return self._types.pointed(words, stars, position)

    def error(self, message: str, position: int) -> SpecifierError:
        """An error at a place in the specifier."""
        return self.specifier.error(message, position)


COMM = Array(types.CHAR, 16)
"""The type of $COMM: TASK_COMM_LEN of include/linux/sched.h."""
