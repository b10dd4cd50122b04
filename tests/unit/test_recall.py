"""The same question again: the same answer, as long as nothing that it was made from has changed."""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

import pytest

from tcpobs.tools.argdist.plan import COUNT, NUMBER, USER, Plan, ProbePlan, ValuePlan
from tcpobs.tools.argdist.recall import Recall

VALUE = ValuePlan("signal", NUMBER, 8, True, {2: "INT", -1: "none"})
PLAN = Plan(
    "x86_64",
    [
        ProbePlan(
            "p", None, COUNT, USER, "c", ["raise"], "", False, [["a"]], [VALUE], (0, 9, 3), {"x": (8, 4)}
        )
    ],
)


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Path(shutil.copy("/bin/true", tmp_path / "program"))


def asked(program: Path, **changed: object) -> Recall:
    given = {
        "asked": [(COUNT, f"p:{program}:main():int:$PID")],
        "string_size": 80,
        "linear": None,
        "define": [],
        "compile_only": None,
    }
    return Recall(argparse.Namespace(**{**given, "include": [], "btf": None, "pid": None, **changed}))


def test_nothing_is_there_at_first(program: Path) -> None:
    assert asked(program).read() is None


def test_object_and_plan_come_back(program: Path) -> None:
    asked(program).write(b"\x7fELF...", PLAN)
    assert asked(program).read() == (b"\x7fELF...", PLAN)


@pytest.mark.parametrize(
    "changed",
    [
        {"string_size": 81},
        {"linear": (0, 10, 1)},
        {"compile_only": "here.o"},  # it is made for other kernels, too
        {"define": ["A=1"]},
        {"btf": "/bin/true"},
        {"include": ["stdio.h"]},
        {"asked": [(COUNT, "p:c:raise():int:$PID")]},
        {"asked": [(COUNT, "p:no/such:main()")]},
        {"asked": [(COUNT, "p:c")]},
        {"asked": [(COUNT, "")]},
    ],
)
def test_another_question(program: Path, changed: dict[str, object]) -> None:
    asked(program).write(b"object", PLAN)
    assert asked(program, **changed).read() is None


@pytest.mark.parametrize("change", ["date", "size", "file", "compiler"])
def test_what_it_was_made_from_has_changed(
    program: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked(program).write(b"object", PLAN)
    if change == "date":
        os.utime(program)
    elif change == "size":
        with program.open("ab") as file:
            file.write(b"\0")
    elif change == "file":
        program.unlink()
        shutil.copy2("/bin/true", program)
    else:
        monkeypatch.setenv("TCPOBS_CLANG", "/bin/true")
    assert asked(program).read() is None


def test_damaged_entry(program: Path) -> None:
    asked(program).write(b"object", PLAN)
    (entry,) = (program.parent / "cache/tcpobs/argdist").iterdir()
    entry.write_bytes(entry.read_bytes()[:-1])
    assert asked(program).read() is None
