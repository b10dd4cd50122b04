"""Every tracepoint of the running kernel."""

from __future__ import annotations

import os

import pytest

from live.unseen import TRACING
from tcpobs.tools.argdist import tracepoints

pytestmark = [pytest.mark.essential, pytest.mark.subject("argdist: every tracepoint's format")]


def test_every_format_is_understood() -> None:
    """Fields follow each other without overlap, and each has a name, a type and a size that go together."""
    found = list(tracepoints.matching("*:*"))
    assert len(found) > 500
    kinds = set()
    for category, name in found:
        with open(f"{TRACING}/events/{category}/{name}/format") as file:
            text = file.read()
        fields = tracepoints.find(category, name).fields
        assert len(fields) == text.count("\tfield:")
        assert [field.name for field in fields[:4]] == [
            "common_type",
            "common_flags",
            "common_preempt_count",
            "common_pid",
        ]
        end = 0
        for field in fields:
            assert field.name.isidentifier(), (category, name, field)
            assert field.type.strip(), (category, name, field)
            assert field.offset >= end, (category, name, field)
            end = field.offset + field.size
            kinds.add(field.kind)
            if field.kind == tracepoints.NUMBER:
                assert field.size in (1, 2, 4, 8)
            elif field.kind == tracepoints.POINTER:
                assert field.size == 8, (category, name, field)
            elif field.kind in (tracepoints.DATA_LOC, tracepoints.REL_LOC):
                assert field.size == 4
    assert {tracepoints.NUMBER, tracepoints.POINTER, tracepoints.ARRAY, tracepoints.DATA_LOC} <= kinds


def test_the_listing_is_complete() -> None:
    there = {
        tuple(folder.split("/")[-2:])
        for folder, _, files in os.walk(f"{TRACING}/events")
        if "format" in files and "/ftrace/" not in folder
    }
    assert set(tracepoints.matching("*:*")) == there
