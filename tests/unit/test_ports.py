"""Ports of the live tests' listeners: no two processes get the same."""

from __future__ import annotations

import os
from pathlib import Path

from live import ports

PROCESSES, EACH = 4, 2000


def test_no_port_is_given_twice(tmp_path: Path) -> None:
    """To processes that were forked, all at once."""
    marked, children = ports.mark(), []
    for number in range(PROCESSES):
        pid = os.fork()
        if not pid:
            try:
                given = [ports._next() for _ in range(EACH)]
                (tmp_path / str(number)).write_text(" ".join(map(str, given)))
            finally:
                os._exit(0)
        children.append(pid)
    for pid in children:
        os.waitpid(pid, 0)
    taken = [int(port) for path in tmp_path.iterdir() for port in path.read_text().split()]
    assert len(set(taken)) == len(taken) == PROCESSES * EACH
    assert set(taken) == ports.since(marked)
