"""argdist's output, character by character, against what the original printed."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcpobs.tools.argdist import report

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


def test_count() -> None:
    rows = [("size = 16", 12), ("size = 1", 3), ("size = 8", 3), ("size = 4096", 12345678901)]
    assert report.count_lines("p:c:malloc(size_t size):size_t:size", rows) == (
        "p:c:malloc(size_t size):size_t:size\n"
        "\tCOUNT      EVENT\n"
        "\t3          size = 1\n"
        "\t3          size = 8\n"
        "\t12         size = 16\n"
        "\t12345678901 size = 4096\n"
    )


def test_count_of_nothing() -> None:
    assert report.count_lines("calls", []) == "calls\n\tCOUNT      EVENT\n"


@pytest.mark.parametrize(
    ("top", "left"), [(0, ""), (1, "c"), (2, "bc"), (3, "abc"), (9, "abc"), (None, "abc")]
)
def test_top(top: int | None, left: str) -> None:
    text = report.count_lines("it", [("c", 3), ("a", 1), ("b", 2)], top)
    assert [line[-1] for line in text.splitlines()[2:]] == list(left)


def test_ties_have_an_order() -> None:
    assert report.count_lines("it", [("b", 1), ("a", 1)]) == report.count_lines("it", [("a", 1), ("b", 1)])


def test_events() -> None:
    assert report.event_text(["fd", "buf"], [1, b"hello\0rest"]) == "fd = 1, buf = hello"
    assert report.event_text(["$latency > 5 ? 1 : 0"], ["-1"]) == "$latency > 5 ? 1 : 0 = -1"
    assert report.event_text([], []) == "total calls"


@pytest.mark.parametrize(
    ("string", "shown"),
    [
        (b"", ""),
        ("naïve Grüße 日本".encode(), "naïve Grüße 日本"),
        (b"two\nlines\r\t", "two\\nlines\\r\\t"),
        (b"\x1b]0;title\x07\x1b[2J", "\\x1b]0;title\\x07\\x1b[2J"),
        (b"\x7f\xc2\x9b31m", "\\x7f\\x9b31m"),
        ("\u202egnp.exe\u2028".encode(), "\\u202egnp.exe\\u2028"),
        (b"\xff\xfecut \xc3", "\\xff\\xfecut \\xc3"),
        (b"a\\b", "a\\b"),
    ],
)
def test_strings(string: bytes, shown: str) -> None:
    assert report.event_text(["s"], [string]) == f"s = {shown}"


def test_title_and_name_are_escaped() -> None:
    """They come with an object made elsewhere."""
    assert report.count_lines("a\nb\x1b", []).startswith("a\\nb\\x1b\n\t")
    assert "\x1b" not in report.histogram_lines("a\x1b", "b\x1b", {0: 1})


@given(st.binary(max_size=80))
def test_a_string_never_commands_the_terminal(string: bytes) -> None:
    assert report.event_text(["s"], [string]).isprintable()


def test_histogram() -> None:
    assert report.histogram_lines("p::__kmalloc(u64 size):u64:size", "size", {0: 1, 3: 20, 4: 9, 7: 0}) == (
        "p::__kmalloc(u64 size):u64:size\n"
        "     size                : count     distribution\n"
        "         0 -> 1          : 1        |**                                      |\n"
        "         2 -> 3          : 0        |                                        |\n"
        "         4 -> 7          : 0        |                                        |\n"
        "         8 -> 15         : 20       |****************************************|\n"
        "        16 -> 31         : 9        |******************                      |\n"
    )


def test_the_last_narrow_row() -> None:
    last = report.histogram_lines("t", "n", {31: 3}).splitlines()[-1]
    assert last == "2147483648 -> 4294967295 : 3        |****************************************|"


def test_wide_histogram() -> None:
    lines = report.histogram_lines("t", "$latency", {0: 39, 31: 3, 32: 79, 33: 80}).splitlines()
    assert lines[1] == "               $latency                      : count     distribution"
    assert lines[2] == "                   0 -> 1                    : 39       |*********           |"
    assert lines[-2] == "          4294967296 -> 8589934591           : 79       |******************* |"
    assert lines[-1] == "          8589934592 -> 17179869183          : 80       |********************|"


def test_the_last_bucket() -> None:
    last = report.histogram_lines("t", "n", {63: 1}).splitlines()[-1]
    assert last == " 9223372036854775808 -> 18446744073709551615 : 1        |********************|"


def test_empty_histogram() -> None:
    empty = "t\n     n                   : count     distribution\n"
    assert report.histogram_lines("t", "n", {}) == empty
    assert report.histogram_lines("t", "n", {5: 0}) == empty
    assert report.linear_lines("t", "n", 0, 9, 5, [0, 0]) == empty


def test_negative_values() -> None:
    assert report.histogram_lines("t", "$retval", {0: 5}, below=10).splitlines()[2:] == [
        "       ... -> -1         : 10       |****************************************|",
        "         0 -> 1          : 5        |********************                    |",
    ]
    assert report.histogram_lines("t", "n", {}, below=1).count("\n") == 3
    assert report.histogram_lines("t", "n", {40: 1}, below=1).splitlines()[2] == (
        "                 ... -> -1                   : 1        |********************|"
    )


def test_linear() -> None:
    text = report.linear_lines("t", "len", -5, 12, 5, [4, 0, 0, 1], below=2, above=1)
    assert text == (
        "t\n"
        "     len                 : count     distribution\n"
        "       ... -> -6         : 2        |********************                    |\n"
        "        -5 -> -1         : 4        |****************************************|\n"
        "         0 -> 4          : 0        |                                        |\n"
        "         5 -> 9          : 0        |                                        |\n"
        "        10 -> 12         : 1        |**********                              |\n"
        "        13 -> ...        : 1        |**********                              |\n"
    )


def test_linear_ends_with_the_last_that_counts() -> None:
    assert report.linear_lines("t", "n", 0, 99, 10, [0, 1, *[0] * 8]).splitlines()[2:] == [
        "         0 -> 9          : 0        |                                        |",
        "        10 -> 19         : 1        |****************************************|",
    ]
    assert len(report.linear_lines("t", "n", 0, 99, 10, [0] * 10, above=1).splitlines()) == 2 + 10 + 1


@pytest.mark.parametrize(
    ("low", "wide"), [(4294967290, False), (9999999999, True), (-999999999, False), (-(1 << 31), True)]
)
def test_linear_widens_where_it_must(low: int, wide: bool) -> None:
    lines = report.linear_lines("t", "n", low, low + 4, 5, [1]).splitlines()
    assert lines[1].startswith(" " * 15) == wide
    assert len(lines[2]) == (20 + 4 + 20 + 3 + 8 + 2 + 20 + 1 if wide else 10 + 4 + 10 + 3 + 8 + 2 + 40 + 1)


def test_colour_is_on_the_bar_alone() -> None:
    plain, coloured = (report.histogram_lines("t", "n", {0: 1, 1: 0, 2: 2}, colour=c) for c in (False, True))
    assert "\x1b" not in plain
    assert re.findall(r"\|\x1b\[36m\*+\x1b\[0m *\|", coloured)
    assert coloured.count("\x1b") == 4
    assert re.sub(r"\x1b\[\d+m", "", coloured) == plain


BUCKETS = st.dictionaries(st.integers(0, 63), st.integers(0, 99_999_999))


@given(BUCKETS, st.integers(0, 99_999_999))
def test_histogram_tells_all(buckets: dict[int, int], below: int) -> None:
    rows = list(_printed(report.histogram_lines("t", "n", buckets, below)))
    assert sum(count for _, _, count, _ in rows) == sum(buckets.values()) + below
    assert {len(line) for line in report.histogram_lines("t", "n", buckets, below).splitlines()[2:]} <= {78}
    width = 20 if any(count for bucket, count in buckets.items() if bucket > 31) else 40
    most = max((count for _, _, count, _ in rows), default=0)
    assert all(len(bar) == width for _, _, _, bar in rows)
    assert all(bar.count("*") == width * count // most for _, _, count, bar in rows)
    ends = [end for low, high, _, _ in rows for end in (low, high)]
    assert ends == (["...", "-1"] if below else []) + [
        end for low in _powers(buckets) for end in (str(low & ~1), str(max(low * 2 - 1, 1)))
    ]


@given(
    st.integers(-(1 << 63), 1 << 63),
    st.integers(1, 1 << 20),
    st.lists(st.integers(0, 99_999_999), min_size=1, max_size=50),
    st.integers(0, 1),
    st.integers(0, 1),
    st.data(),
)
def test_linear_tells_all(
    low: int, step: int, counts: Sequence[int], below: int, above: int, data: st.DataObject
) -> None:
    high = low + len(counts) * step - 1 - data.draw(st.integers(0, step - 1))
    text = report.linear_lines("t", "n", low, high, step, counts, below, above)
    rows = list(_printed(text))
    assert sum(count for _, _, count, _ in rows) == sum(counts) + below + above
    assert {len(line) for line in text.splitlines()[2:]} <= {78}
    for (_, one_ends, _, _), (next_starts, _, _, _) in zip(rows, rows[1:]):
        assert int(one_ends) + 1 == int(next_starts)
    if above:
        assert rows[-1][:2] == (str(high + 1), "...")


@given(st.lists(st.tuples(st.text(min_size=1), st.integers(1, 1 << 63))), st.integers(0, 10))
def test_top_counts_are_the_most_frequent(rows: list[tuple[str, int]], top: int) -> None:
    printed = [
        int(line.split()[0]) for line in report.count_lines("t", rows, top).split("\n\t")[2:] if line.strip()
    ]
    assert printed == sorted(count for _, count in rows)[-top:] if top else printed == []


def _printed(text: str) -> Iterator[tuple[str, str, int, str]]:
    """Low, high, count and bar of each row."""
    for line in text.splitlines()[2:]:
        ends, count, bar = re.fullmatch(r"(.*) : (\d+) *\|([* ]*)\|", line).groups()  # type: ignore[union-attr]
        low, high = ends.split(" -> ")
        yield low.strip(), high.strip(), int(count), bar


def _powers(buckets: dict[int, int]) -> list[int]:
    last = max((bucket for bucket, count in buckets.items() if count), default=-1)
    return [1 << bucket for bucket in range(last + 1)]


def _json(line: str) -> Any:
    assert line.endswith("\n")
    assert line.count("\n") == 1
    return json.loads(line)


TIME = r"2026-11-21T\d\d:\d\d:00\.125[+-]\d\d:\d\d"
WHEN = 1795253400.125


def test_count_json() -> None:
    made = _json(
        report.count_json(
            WHEN,
            "p:c:write(int fd, char *buf):int,char*:fd,buf",
            None,
            ["fd", "buf"],
            [([1, b"a\x1b\n\xff\0no"], 3), ([-1, "Grüße"], 1 << 60)],
        )
    )
    assert re.fullmatch(TIME, made.pop("time"))
    assert made == {
        "probe": "p:c:write(int fd, char *buf):int,char*:fd,buf",
        "label": None,
        "counts": [
            {"values": {"fd": 1, "buf": "a\x1b\n\\xff"}, "count": 3},
            {"values": {"fd": -1, "buf": "Grüße"}, "count": 1 << 60},
        ],
    }


def test_json_of_calls_and_losses() -> None:
    made = _json(report.count_json(WHEN, "p:c:fork()", "forks", [], [([], 7)], {"full": 2, "missed": 0}))
    assert made["label"] == "forks"
    assert made["counts"] == [{"values": {}, "count": 7}]
    assert made["lost"] == {"full": 2}


def test_histogram_json() -> None:
    made = _json(report.histogram_json(WHEN, "t", None, report.log2_rows({1: 4}, below=2), {"missed": 0}))
    assert made["histogram"] == [
        {"low": None, "high": -1, "count": 2},
        {"low": 0, "high": 1, "count": 0},
        {"low": 2, "high": 3, "count": 4},
    ]
    assert "lost" not in made
    linear = _json(report.histogram_json(WHEN, "t", None, report.linear_rows(0, 9, 10, [1], above=1)))
    assert linear["histogram"] == [{"low": 0, "high": 9, "count": 1}, {"low": 10, "high": None, "count": 1}]


def test_time_has_the_offset(monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    monkeypatch.setenv("TZ", "Asia/Kolkata")
    time.tzset()
    try:
        assert _json(report.count_json(WHEN, "t", None, [], []))["time"] == "2026-11-21T15:00:00.125+05:30"
    finally:
        monkeypatch.undo()
        time.tzset()
