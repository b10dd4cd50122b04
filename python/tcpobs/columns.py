"""A tool's columns, declared once: text, wide, CSV and JSON all come from the declaration.

Adjacent columns that come from the same field of the record are formatted together, and field after
field rather than row by row, so that the loops run inside the interpreter. What repeats (addresses,
names, states) is formatted once and remembered.
"""

from __future__ import annotations

import re
from functools import lru_cache
from itertools import groupby
from operator import attrgetter, itemgetter

from tcpobs.records import REMEMBERED

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from tcpobs.records import Record

TEXT, WIDE, CSV, JSON = "text", "wide", "csv", "json"
"""The modes of output."""


class Column:
    """One column: its header, and where its value comes from.

    `source` is a field of the record, or an attribute of the record inside it: "span_ns",
    "endpoints.lport". `convert` makes the value out of it, and `json` what JSON has instead. `text`,
    `wide` and `csv` are its printf formats, None where it is not shown; `wide` is like `text` unless given.
    In JSON every column is shown, as `name`, but those without a header. `before` separates it from the
    column to its left in text; `joined`, nothing does in any mode. `free` marks text that somebody else
    chose: quoted in CSV where it needs to be.
    """

    def __init__(
        self,
        header: str,
        source: str,
        text: str | None,
        wide: str | None = None,
        csv: str | None = "%s",
        *,
        convert: Callable[[Any], object] | None = None,
        json: Callable[[Any], object] | None = None,
        before: str = " ",
        joined: bool = False,
        free: bool = False,
        name: str | None = None,
    ) -> None:
        self.header = header
        self.field, _, self.attribute = source.partition(".")
        self.convert = convert
        self.json = json or convert
        self.formats = {TEXT: text, WIDE: wide or text, CSV: csv, JSON: "%s" if header else None}
        self.before = {TEXT: before, WIDE: before, CSV: ",", JSON: ", "}
        if joined:
            self.before = dict.fromkeys(self.before, "")
        self.free = free
        self.name = name or header.lower().replace("-", "_")


class Table:
    """The columns in one mode, ready to print records of one class.

    The class must have been fitted to an object's BTF (`records.decoder`).
    """

    def __init__(self, columns: Sequence[Column], mode: str, record: type[Record]) -> None:
        self._mode = mode
        self._columns = [column for column in columns if column.formats[mode] is not None]
        cells = [(field, list(group)) for field, group in groupby(self._columns, attrgetter("field"))]
        self._cells: list[tuple[itemgetter[Any], Callable[[Any], str]]] = []
        for number, (field, group) in enumerate(cells):
            template = _template(group, mode)
            if number == 0:
                template = ("{" if mode == JSON else "") + template[len(group[0].before[mode]) :]
            if number == len(cells) - 1:
                template += "}\n" if mode == JSON else "\n"
            inner = record.inner.get(field)
            formatter = _inner(template, group, mode, inner) if inner else _plain(template, group, mode)
            self._cells.append((itemgetter(record.fields[field]), formatter))

    def header(self) -> str:
        """The header line, ended; nothing in JSON."""
        if self._mode == JSON:
            return ""
        # A header is text in the width of its column: %-9.6f becomes %-9s.
        template = re.sub(r"(%-?\d*)(?:\.\d+)?[dxf]", r"\1s", _template(self._columns, self._mode))
        line = template % tuple(column.header for column in self._columns)
        return line[len(self._columns[0].before[self._mode]) :] + "\n"

    def rows(self, records: Sequence[Record]) -> str:
        """A line for each record."""
        cells = [map(formatter, map(field, records)) for field, formatter in self._cells]
        return "".join(map("".join, zip(*cells)))


def _template(columns: Sequence[Column], mode: str) -> str:
    names = [f'"{column.name}": ' if mode == JSON else "" for column in columns]
    return "".join(f"{c.before[mode]}{name}{c.formats[mode]}" for c, name in zip(columns, names))


def _inner(template: str, columns: Sequence[Column], mode: str, inner: type[Record]) -> Callable[[Any], str]:
    """Formats a struct inside the record, given its bytes."""
    decode = inner.decode
    # The first attribute twice, for attrgetter gives no tuple for one name alone.
    values = attrgetter(columns[0].attribute, *[column.attribute for column in columns])
    makes = [(column.json if mode == JSON else column.convert) or _as_is for column in columns]
    if mode == JSON:
        from json import dumps

        escape: Callable[[object], object] = dumps
    elif mode == CSV and any(column.free for column in columns):
        escape = _csv_field
    elif all(make is _as_is for make in makes):
        return lru_cache(REMEMBERED)(lambda field: template % values(decode(field))[1:])
    else:
        escape = _as_is

    def format(field: Any) -> str:
        made = [make(value) for make, value in zip(makes, values(decode(field))[1:])]
        return template % tuple(map(escape, made))

    return lru_cache(REMEMBERED)(format)


def _plain(template: str, columns: Sequence[Column], mode: str) -> Callable[[Any], str]:
    """Formats a number of the record."""
    if mode == JSON:
        from json import dumps

        made = [column.json or _as_is for column in columns]
        return lambda field: template % tuple([dumps(make(field)) for make in made])
    free = mode == CSV and any(column.free for column in columns)
    if len(columns) > 1 or free:
        converts = [column.convert or _as_is for column in columns]
        escape = _csv_field if free else _as_is
        return lambda field: template % tuple([escape(convert(field)) for convert in converts])
    convert = columns[0].convert
    if convert is None:
        return template.__mod__
    formatted = lru_cache(REMEMBERED)(template.__mod__)
    return lambda field: formatted(convert(field))


def _as_is(value: object) -> object:
    return value


def _csv_field(value: object) -> object:
    """Quotes a text where RFC 4180 wants it."""
    if isinstance(value, str) and ("," in value or '"' in value):
        return '"' + value.replace('"', '""') + '"'
    return value
