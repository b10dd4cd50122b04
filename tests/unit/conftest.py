"""What the unit tests share: the compiled objects, opened and never loaded, which takes no root."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

import tcpobs
from tcpobs import privileges
from tcpobs.libbpf import Object

if TYPE_CHECKING:
    from collections.abc import Iterator

settings.register_profile("unit", deadline=None)  # a busy machine is no failure
settings.load_profile("unit")

OBJECTS = Path(tcpobs.__file__).parent / "_objects"
"""Where the objects, by machine, and their source are."""


@pytest.fixture(autouse=True)
def keep_capabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command gives up those of its process, which here is that of all tests."""
    monkeypatch.setattr(privileges, "give_up", lambda: None)


def object_file(tool: str) -> Path:
    """A tool's object for this machine."""
    return OBJECTS / os.uname().machine / f"{tool}.bpf.o"


def _opened(tool: str) -> Iterator[Object]:
    with Object.of_file(str(object_file(tool)), tool) as object:
        yield object


@pytest.fixture(scope="module")
def states_object() -> Iterator[Object]:
    """The object of `tcpobs states`."""
    yield from _opened("states")


@pytest.fixture(scope="module")
def life_object() -> Iterator[Object]:
    """The object of `tcpobs life`."""
    yield from _opened("life")


@pytest.fixture
def fresh_object() -> Iterator[Object]:
    """The object of `tcpobs life`, for one test alone: it may be changed."""
    yield from _opened("life")
