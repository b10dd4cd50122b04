"""Types from the headers that a user names with -I."""

from __future__ import annotations

import os

from tcpobs.tools.argdist.compile import CompileError, compile
from tcpobs.tools.argdist.kernel import KernelTypes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from tcpobs.tools.argdist.types import Type


class HeaderTypes:
    """The compiler reads the headers, and puts a type that is asked for into an object's BTF."""

    def __init__(self, headers: Sequence[str], defines: Sequence[str]) -> None:
        self._headers = headers
        self._defines = defines

    def find(self, spelling: str) -> Type | None:
        """The type of this name, or None if the headers do not define it."""
        if not self._headers:
            return None
        try:
            object = compile(f"{spelling} wanted;\n", self._headers, self._defines)
        except CompileError:
            return None
        fd = os.memfd_create("header-types")
        try:
            os.write(fd, object)
            types = KernelTypes(f"/proc/self/fd/{fd}", core=False)
            found = types.find(spelling)
            # The BTF is read here and now: it goes when this returns.
            _read_fields(found, set())
            types.close()
            return found
        finally:
            os.close(fd)


def _read_fields(type: Type | None, seen: set[int]) -> None:
    from tcpobs.tools.argdist.types import Array, Pointer, Record

    if isinstance(type, Pointer):
        _read_fields(type.target, seen)
    elif isinstance(type, Array):
        _read_fields(type.element, seen)
    elif isinstance(type, Record) and id(type) not in seen:
        seen.add(id(type))
        for field in type.fields:
            _read_fields(field.type, seen)
