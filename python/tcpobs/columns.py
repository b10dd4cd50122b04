"""A tool's columns, declared once: text, wide, CSV and JSON all come from the declaration.

A batch of records is turned into columns; each cell of the output is an iterator over one of them, made of
functions that are written in C; and one `%` formats the whole batch. Python code runs only for a value that
is seen for the first time: what repeats (addresses, names, states) is formatted once and remembered.
"""

from __future__ import annotations

import re
import struct
from copy import copy
from itertools import chain
from operator import attrgetter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from typing import Any

    from tcpobs.records import Record

    Values = Sequence[Any]
    """A column: one value for each record of a batch."""
    Bulk = tuple[str, Callable[[Values], Sequence[Iterable[object]]]]
    """How a column is formatted at once: printf conversions, and what they take, an iterable for each."""
    Cell = Callable[["Batch"], Sequence[Iterable[object]]]

TEXT, WIDE, CSV, JSON = "text", "wide", "csv", "json"
"""The modes of output."""


REMEMBERED = 4096
"""How many values of a column are remembered as they are shown."""


class Remembered(dict):  # type: ignore[type-arg]
    """What `make` gives for a key, made when it first comes."""

    __slots__ = ("_make",)

    def __init__(self, make: Callable[[Any], Any]) -> None:
        self._make = make

    def __missing__(self, key: Any) -> Any:
        if len(self) >= REMEMBERED:
            self.clear()
        made = self[key] = self._make(key)
        return made


class Column:
    """One column: its header, and where its value comes from.

    `source` is a field of the record, or an attribute of the record inside it: "span_ns",
    "endpoints.lport". `convert` makes the value out of it, and `json` what JSON has instead. `text`,
    `wide` and `csv` are its printf formats, None where it is not shown; `wide` is like `text` unless given.
    In JSON every column is shown, as `name`, but those without a header. `before` separates it from the
    column to its left in text; `joined`, nothing does in any mode. `free` marks text that somebody else
    chose: quoted in CSV where it needs to be.

    A number of the record itself may have `bulk` and `json_bulk`, which say the same as `convert` and `json`
    for all values of a batch at once. Where `key` is given, what it makes of a value is converted, and only
    that is remembered: so a value may come to mean something else, as the id of a cgroup may.
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
        bulk: Callable[[Values], Iterable[object]] | None = None,
        json_bulk: Bulk | None = None,
        key: Callable[[Any], object] | None = None,
        before: str = " ",
        joined: bool = False,
        free: bool = False,
        name: str | None = None,
    ) -> None:
        self.header = header
        self.field, _, self.attribute = source.partition(".")
        self.convert = convert
        self.json = json or convert
        self.bulk = bulk
        self.json_bulk = json_bulk
        self.key = key
        self.formats = {TEXT: text, WIDE: wide or text, CSV: csv, JSON: "%s" if header else None}
        self.before = {TEXT: before, WIDE: before, CSV: ",", JSON: ", "}
        if joined:
            self.before = dict.fromkeys(self.before, "")
        self.free = free
        self.name = name or header.lower().replace("-", "_")

    def leading(self) -> Column:
        """The same, where nothing is to its left."""
        column = copy(self)
        column.before = dict.fromkeys(self.before, "")
        return column


class Batch:
    """Records as columns."""

    def __init__(self, records: Sequence[Record]) -> None:
        self._fields: list[Values] = list(zip(*records))
        self._members: dict[int, list[Values]] = {}

    def field(self, index: int) -> Values:
        """A field of each record."""
        return self._fields[index]

    def member(self, index: int, layout: struct.Struct, member: int) -> Values:
        """A member of each record's struct that is this field."""
        if index not in self._members:
            self._members[index] = list(zip(*layout.iter_unpack(b"".join(self._fields[index]))))
        return self._members[index][member]


class Table:
    """The columns in one mode, ready to print records of one class.

    The class must have been fitted to an object's BTF (`records.decoder`).
    """

    def __init__(self, columns: Sequence[Column], mode: str, record: type[Record]) -> None:
        self._mode = mode
        first, *others = (column for column in columns if column.formats[mode] is not None)
        self._columns = [first.leading(), *others]
        self._cells: list[Cell] = []
        template = ""
        for group in _neighbours(self._columns, record):
            text, cell = _cell(group, mode, record)
            template += text
            self._cells.append(cell)
        self._template = f"{{{template}}}\n" if mode == JSON else f"{template}\n"

    def header(self) -> str:
        """The header line, ended; nothing in JSON."""
        if self._mode == JSON:
            return ""
        # A header is text in the width of its column: %-9.6f becomes %-9s.
        template = re.sub(r"(%-?\d*)(?:\.\d+)?[dxf]", r"\1s", _template(self._columns, self._mode))
        return template % tuple(column.header for column in self._columns) + "\n"

    def rows(self, records: Sequence[Record]) -> str:
        """A line for each record."""
        batch = Batch(records)
        values = chain.from_iterable([cell(batch) for cell in self._cells])
        return self._template * len(records) % tuple(chain.from_iterable(zip(*values)))


def _template(columns: Sequence[Column], mode: str) -> str:
    return "".join(_labelled(column, mode, column.formats[mode] or "") for column in columns)


def _labelled(column: Column, mode: str, conversion: str) -> str:
    name = f'"{column.name}": ' if mode == JSON else ""
    return f"{column.before[mode]}{name}{conversion}"


def _sources(column: Column, record: type[Record]) -> tuple[object, ...]:
    """What a column's text is made from. Neighbours that are made from the same are one cell."""
    inner = record.inner.get(column.field)
    if inner is None:
        return (column.field, column.key) if column.key else (column,)
    if not inner.spread:
        return (column.field,)
    return (column.field, *inner.made[column.attribute][1]) if column.attribute in inner.made else (column,)


def _neighbours(columns: Sequence[Column], record: type[Record]) -> list[list[Column]]:
    """The columns by cells. One whose sources its neighbour has, too, goes along with it."""
    groups: list[list[Column]] = []
    sources: set[object] = set()
    for column in columns:
        own = set(_sources(column, record))
        if groups and (own <= sources or sources <= own):
            groups[-1].append(column)
            sources |= own
        else:
            groups.append([column])
            sources = own
    return groups


def _cell(columns: list[Column], mode: str, record: type[Record]) -> tuple[str, Cell]:
    """The template of some neighbours, and how to get what it takes from a batch."""
    column = columns[0]
    index, inner = record.fields[column.field], record.inner.get(column.field)
    if inner is None:
        if column.key:
            return "%s", _keyed(columns, mode, index)
        return _number(column, mode, lambda batch: batch.field(index))
    if not inner.spread:
        text = Remembered(_inner_text(columns, mode, inner)).__getitem__
        return "%s", lambda batch: [map(text, batch.field(index))]
    layout = struct.Struct(inner.layout)
    if column.attribute in inner.made:
        return "%s", _made(columns, mode, index, inner, layout)
    member = inner.fields[column.attribute]
    return _number(column, mode, lambda batch: batch.member(index, layout, member))


def _number(column: Column, mode: str, values: Callable[[Batch], Values]) -> tuple[str, Cell]:
    """Of one column that is a number of the record."""
    if mode == JSON:
        if column.json_bulk:
            conversions, parts = column.json_bulk
            return _labelled(column, mode, conversions), lambda batch: parts(values(batch))
        if column.json is None:
            return _labelled(column, mode, "%d"), lambda batch: [values(batch)]
        from json import dumps

        make = column.json
        text = Remembered(lambda value: dumps(make(value))).__getitem__
        return _labelled(column, mode, "%s"), lambda batch: [map(text, values(batch))]
    template = _labelled(column, mode, column.formats[mode] or "")
    bulk, convert = column.bulk, column.convert
    if bulk:
        return template, lambda batch: [bulk(values(batch))]
    if convert:
        return template, lambda batch: [map(convert, values(batch))]
    return template, lambda batch: [values(batch)]


def _keyed(columns: Sequence[Column], mode: str, index: int) -> Cell:
    """Of columns that are made from what their key gives."""
    key = columns[0].key
    assert key
    template, shown = _template(columns, mode), _shown(columns, mode)
    text = Remembered(lambda value: template % tuple(show(value) for show in shown)).__getitem__
    return lambda batch: [map(text, map(key, batch.field(index)))]


def _made(
    columns: Sequence[Column], mode: str, index: int, inner: type[Record], layout: struct.Struct
) -> Cell:
    """Of columns that are each made from some members of a struct."""
    made = [inner.made[column.attribute] for column in columns]
    names = list(dict.fromkeys(name for _, of_column in made for name in of_column))
    members = [inner.fields[name] for name in names]
    takes = [(make, [names.index(name) for name in of_column]) for make, of_column in made]
    template, shown = _template(columns, mode), _shown(columns, mode)

    def format(values: tuple[object, ...]) -> str:
        texts = (show(make(*[values[i] for i in own])) for show, (make, own) in zip(shown, takes))
        return template % tuple(texts)

    text = Remembered(format).__getitem__
    return lambda batch: [map(text, zip(*[batch.member(index, layout, member) for member in members]))]


def _inner_text(columns: Sequence[Column], mode: str, inner: type[Record]) -> Callable[[Any], str]:
    """Formats a struct inside the record, given its bytes."""
    template, shown = _template(columns, mode), _shown(columns, mode)
    values = [attrgetter(column.attribute) for column in columns]

    def format(field: bytes) -> str:
        record = inner.decode(field)
        return template % tuple(show(value(record)) for show, value in zip(shown, values))

    return format


def _shown(columns: Sequence[Column], mode: str) -> list[Callable[[Any], object]]:
    """What each column makes of a value, to be put into the template."""
    if mode == JSON:
        from json import dumps

        return [_then(column.json, dumps) for column in columns]
    return [
        _then(column.convert, _csv_field if mode == CSV and column.free else _as_is) for column in columns
    ]


def _then(make: Callable[[Any], object] | None, escape: Callable[[Any], object]) -> Callable[[Any], object]:
    return (lambda value: escape(make(value))) if make else escape


def _as_is(value: object) -> object:
    return value


def _csv_field(value: object) -> object:
    """Quotes a text where RFC 4180 wants it."""
    if isinstance(value, str) and ("," in value or '"' in value):
        return '"' + value.replace('"', '""') + '"'
    return value
