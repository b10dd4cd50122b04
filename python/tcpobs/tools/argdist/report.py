"""What argdist prints: counts and histograms of one probe in one interval, as text or as JSON.

The text is that of the original, to the character. What comes from a traced process is shown escaped where
it is not printable, so that it cannot command the terminal.
"""

from __future__ import annotations

import json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from typing import Optional, Union

    Value = Union[int, bytes, str]
    """A number, or a text: bytes are a C string as it was read, up to its first NUL byte."""

    Row = tuple[Optional[int], Optional[int], int]
    """A row of a histogram: lowest and highest value (None where there is no limit), and the count."""

_NARROW = ("     %-19s : count     distribution\n", "%10s -> %-10s : %-8d |", 40)
_WIDE = ("               %-29s : count     distribution\n", "%20s -> %-20s : %-8d |", 20)
"""Header, the beginning of a row, and the width of a bar; the latter where the values need more room."""

_BAR, _PLAIN = "\x1b[36m", "\x1b[0m"


def event_text(names: Sequence[str], values: Sequence[Value]) -> str:
    """The event of a count: `name = value, …`; without an expression, all calls are one."""
    pairs = zip(names, values)
    return ", ".join(f"{_printable(name)} = {_text(value)}" for name, value in pairs) or "total calls"


def count_lines(title: str, rows: Iterable[tuple[str, int]], top: int | None = None) -> str:
    """A count: its events' texts, the least frequent first; `top` keeps only so many of the most frequent."""
    ordered = sorted(rows, key=lambda row: (row[1], row[0]))
    if top is not None:
        ordered = ordered[max(0, len(ordered) - top) :]
    lines = [f"\t{count!s:<10} {event}\n" for event, count in ordered]
    return "".join([f"{_printable(title)}\n\tCOUNT      EVENT\n", *lines])


def histogram_lines(
    title: str, name: str, buckets: Mapping[int, int], below: int = 0, colour: bool = False
) -> str:
    """A histogram in powers of two, as `log2_rows` has them; past 2^32 in the wider form."""
    wide = any(count for bucket, count in buckets.items() if bucket >= 32)
    return _lines(title, name, list(log2_rows(buckets, below)), wide, colour)


def linear_lines(
    title: str,
    name: str,
    low: int,
    high: int,
    step: int,
    counts: Sequence[int],
    below: int = 0,
    above: int = 0,
    colour: bool = False,
) -> str:
    """A histogram in equal steps, as `linear_rows` has them; in the wider form where the numbers need it."""
    rows = list(linear_rows(low, high, step, counts, below, above))
    wide = any(len(str(end)) > 10 for row in rows for end in row[:2])
    return _lines(title, name, rows, wide, colour)


def log2_rows(buckets: Mapping[int, int], below: int = 0) -> Iterator[Row]:
    """Counts by power of two (bucket 0: values 0 and 1, 1: 2 and 3, 2: 4 to 7, … 63), to the last not empty.

    `below` counts the values below 0.
    """
    if below:
        yield None, -1, below
    last = max((bucket for bucket, count in buckets.items() if count), default=-1)
    for bucket in range(last + 1):
        yield 1 << bucket if bucket else 0, (2 << bucket) - 1, buckets.get(bucket, 0)


def linear_rows(
    low: int, high: int, step: int, counts: Sequence[int], below: int = 0, above: int = 0
) -> Iterator[Row]:
    """Counts of `step` values each, from `low` to `high` inclusive, to the last not empty.

    `below` and `above` count the values outside.
    """
    if below:
        yield None, low - 1, below
    last = max((index for index, count in enumerate(counts) if count), default=-1)
    for index in range(len(counts) if above else last + 1):
        start = low + index * step
        yield start, min(start + step - 1, high), counts[index]
    if above:
        yield high + 1, None, above


def _lines(title: str, name: str, rows: Sequence[Row], wide: bool, colour: bool) -> str:
    header, row, width = _WIDE if wide else _NARROW
    lines = [f"{_printable(title)}\n", header % _printable(name)]
    most = max((count for _, _, count in rows), default=0) or 1
    for low, high, count in rows:
        bar = "*" * (width * count // most)
        space = " " * (width - len(bar))
        if colour and bar:
            bar = f"{_BAR}{bar}{_PLAIN}"
        start = row % ("..." if low is None else low, "..." if high is None else high, count)
        lines.append(f"{start}{bar}{space}|\n")
    return "".join(lines)


def count_json(
    time_s: float,
    probe: str,
    label: str | None,
    names: Sequence[str],
    counts: Iterable[tuple[Sequence[Value], int]],
    lost: Mapping[str, int] | None = None,
) -> str:
    """A count as a line of JSON; `counts` holds each event's values, in the order of `names`.

    `time_s` is in seconds since the epoch; what was `lost` is left out where it is nothing.
    """
    rows = [
        {"values": {name: _json_value(value) for name, value in zip(names, values)}, "count": count}
        for values, count in counts
    ]
    return _json_line(time_s, probe, label, "counts", rows, lost)


def histogram_json(
    time_s: float,
    probe: str,
    label: str | None,
    rows: Iterable[Row],
    lost: Mapping[str, int] | None = None,
) -> str:
    """A histogram as a line of JSON: `log2_rows` or `linear_rows`, null where there is no limit."""
    made = [{"low": low, "high": high, "count": count} for low, high, count in rows]
    return _json_line(time_s, probe, label, "histogram", made, lost)


def _json_line(
    time_s: float,
    probe: str,
    label: str | None,
    kind: str,
    rows: Sequence[Mapping[str, object]],
    lost: Mapping[str, int] | None,
) -> str:
    from datetime import datetime

    line: dict[str, object] = {
        "time": datetime.fromtimestamp(time_s).astimezone().isoformat(timespec="milliseconds"),
        "probe": probe,
        "label": label,
        kind: rows,
    }
    losses = {name: count for name, count in (lost or {}).items() if count}
    if losses:
        line["lost"] = losses
    return json.dumps(line) + "\n"


def _json_value(value: Value) -> int | str:
    return _decoded(value) if isinstance(value, bytes) else value


def _text(value: Value) -> str:
    return _printable(_decoded(value) if isinstance(value, bytes) else str(value))


def _decoded(string: bytes) -> str:
    return string.partition(b"\0")[0].decode(errors="backslashreplace")


def _printable(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
