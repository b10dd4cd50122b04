"""The kernel's tracepoints, as their format files in tracefs have them (Documentation/trace/events.rst)."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from tcpobs import host
from tcpobs.errors import HostError, TcpobsError
from tcpobs.tools.argdist.names import did_you_mean

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

NUMBER, POINTER, ARRAY, DATA_LOC, REL_LOC = "number", "pointer", "array", "data_loc", "rel_loc"
"""The kinds of fields.

An array may be a struct, too: bytes in their place. Of `__data_loc` the place has, in 4 bytes, where the
data is: its length in the upper 16 bits, its offset from the event's beginning in the lower ones;
`__rel_loc` (Linux 5.17) counts the offset from behind those 4 bytes.
"""

_FIELD = re.compile(r"\s*field:(.*?);\s*offset:(\d+);\s*size:(\d+);\s*signed:([01]);")
_LOCATED = {"__data_loc": DATA_LOC, "__rel_loc": REL_LOC}


@dataclass(frozen=True)
class Field:
    """A field: `offset` and `size` in bytes. A system call's arguments take 8, whatever their type."""

    name: str
    type: str
    """As in C: `const char *`, `char[16]`; `char[]` where the length differs from event to event."""
    offset: int
    size: int
    signed: bool
    kind: str

    @property
    def is_located(self) -> bool:
        """Whether only the place of the data is here."""
        return self.kind in (DATA_LOC, REL_LOC)


@dataclass(frozen=True)
class Tracepoint:
    """A tracepoint; its fields begin with the `common_…` that all of them have."""

    category: str
    name: str
    fields: tuple[Field, ...]

    @property
    def size(self) -> int:
        """Bytes, without the data that `__data_loc` refers to."""
        return max((field.offset + field.size for field in self.fields), default=0)


def find(category: str, name: str) -> Tracepoint:
    """The tracepoint of that name.

    Raises HostError when tracefs is not there or closed to this user, and TcpobsError, with the nearest
    names, when there is no such tracepoint.
    """
    events = _events()
    for part in (category, name):
        if "/" in part or "\0" in part or part in ("", ".", ".."):
            raise TcpobsError(f"{part!r} is not the name of a tracepoint or a category of them")
    try:
        with open(os.path.join(events, category, name, "format"), errors="replace") as file:
            return parse(category, name, file.read())
    except (FileNotFoundError, NotADirectoryError):
        raise TcpobsError(_unknown(events, category, name)) from None
    except OSError as error:
        raise _closed(error) from None


def matching(pattern: str) -> Iterator[tuple[str, str]]:
    """Category and name of all tracepoints like `CATEGORY:NAME` (fnmatch's wildcards), in order.

    Without a name, all of the category. Raises HostError as `find`.
    """
    from fnmatch import fnmatchcase

    events = _events()
    of_category, _, of_name = pattern.partition(":")
    for category in _folders(events):
        # Ftrace's own records: formats, but nothing to attach to.
        if fnmatchcase(category, of_category) and category != "ftrace":
            for name in _folders(os.path.join(events, category)):
                if fnmatchcase(name, of_name or "*"):
                    yield category, name


def parse(category: str, name: str, text: str) -> Tracepoint:
    """A tracepoint, given its format file's text."""
    fields = []
    for line in text.splitlines():
        match = _FIELD.match(line)
        if match:
            declared, offset, size, signed = match.groups()
            fields.append(_field(declared, int(offset), int(size), signed == "1"))
    return Tracepoint(category, name, tuple(fields))


def _field(declared: str, offset: int, size: int, signed: bool) -> Field:
    first, _, rest = declared.partition(" ")
    # A function pointer has its name inside; else it is the last word, and an array's length comes behind.
    match = re.fullmatch(r"(.*\(\s*\*\s*)(\w+)(\s*\).*)", declared) or re.fullmatch(
        r"(.*?)(\w+)\s*((?:\[[^]]*\])*)", rest if first in _LOCATED else declared
    )
    before, name, after = match.groups() if match else (declared, "", "")
    type = before.strip() + after
    if first in _LOCATED:
        kind = _LOCATED[first]
    elif after.startswith("["):
        kind = ARRAY
    elif "*" in type:
        kind = POINTER
    elif size in (1, 2, 4, 8) and first not in ("struct", "union"):
        kind = NUMBER
    else:
        kind = ARRAY
    return Field(name, type, offset, size, signed, kind)


def _events() -> str:
    place = host.tracefs()
    if place is None:
        raise HostError(*host.NO_TRACEFS)
    return os.path.join(place, "events")


def _folders(path: str) -> list[str]:
    try:
        with os.scandir(path) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
    except OSError as error:
        raise _closed(error) from None


def _closed(error: OSError) -> HostError:
    remedy = "it takes root, or the capability CAP_DAC_READ_SEARCH"
    return HostError(f"{error.filename} cannot be read ({error.strerror})", remedy)


def _unknown(events: str, category: str, name: str) -> str:
    categories = _folders(events)
    if category not in categories:
        return f"there are no tracepoints of category {category!r}{did_you_mean(category, categories)}"
    names = _folders(os.path.join(events, category))
    elsewhere = [
        f"{other}:{name}" for other in categories if os.path.isdir(os.path.join(events, other, name))
    ]
    hint = f"; there is {' and '.join(elsewhere)}" if elsewhere else did_you_mean(name, names)
    return f"there is no tracepoint {category}:{name}{hint}"
