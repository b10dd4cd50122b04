"""Whose sessions they are, against workloads that write it down (live.workloads).

All of them run under one trace for each way in which accept's return is seen; each test looks at the rows of
one workload. The best way of this kernel sees SESSIONS of each workload and family, others FEWER.
"""

from __future__ import annotations

import socket
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import pytest

import tcpobs
from live import unseen
from live.asking import LIMITS
from live.tcp import DEADLINE, LOOPBACK, WAYS
from live.workloads import SESSIONS, WORKLOADS, Owner, Ports, Score, Stage, Truth, pool, refused, run, score
from tcpobs import Session, StateChange, host
from tcpobs.events import Events

FEWER = 20
BEST = [way for way in WAYS if (way.hook, way.transport) == ("tp_btf", "ringbuf")]
ACCEPTS = {way.accept: way for way in (host.Way("tp_btf", "hash", "ringbuf", "none"), *reversed(BEST))}
"""How accept's return can be seen here, each with the best way that does: nothing is lost with that."""
MISSES_ACCEPTS = {"none", *(["kretprobe"] if "test_recursion" in LIMITS else [])}
"""Not all are seen: old kernels' kretprobes have room for one process per CPU that waits in accept."""

PREEMPTS = host.tracepoints_are_preempted()
"""Rows and owners may be missing, told, where more tasks stand still in programs than there are of them."""

Rows = dict[Ports, Owner]
Which = tuple[str, int]
"""A workload's name, and a family."""


class Trace(NamedTuple):
    """What was true, and what was seen."""

    truth: dict[Which, Truth]
    life: dict[Which, Rows]
    states: dict[Which, Rows]
    """As the last change shows it, where that was traced, too."""
    accept: str
    """How accept's return was seen."""

    def score(self, which: Which) -> Score:
        """How well the PIDs of sessions fit."""
        return score(self.truth[which], {ports: owner.pid for ports, owner in self.life[which].items()})


class Tool(NamedTuple):
    """One that traces, and what it says."""

    events: Events[Session] | Events[StateChange]
    batches: Iterator[Sequence[Session | StateChange]]
    rows: dict[Which, Rows]


def traced(accept: str | None) -> Trace:
    """All workloads under this accept's way, or the default; where that is the same, it is traced once."""
    found = _traced(accept)
    if isinstance(found, str):
        pytest.fail(found, pytrace=False)
    return found


@lru_cache(None)
def _traced(accept: str | None) -> Trace | str:
    """The same, or why not: nothing is gained by trying again for each test."""
    try:
        return _trace(accept)
    except Exception:
        return traceback.format_exc()


def _trace(accept: str | None) -> Trace:
    if accept is None:
        # Both tools at once; a state change is much more frequent than a session's end.
        with tcpobs.sessions() as life, tcpobs.states(owners=True, buffer_size=1 << 26) as states:
            return _run_all(SESSIONS, life, states)
    if accept == traced(None).accept:
        return traced(None)
    hook, storage, transport, _ = ACCEPTS[accept]
    with tcpobs.sessions(hook=hook, storage=storage, transport=transport, accept=accept) as life:
        return _run_all(FEWER, life)


def _run_all(sessions: int, life: Events[Session], states: Events[StateChange] | None = None) -> Trace:
    trace = Trace({}, {}, {}, life.way.accept)
    tools = [Tool(life, life.batches(), trace.life)]
    if states:
        tools.append(Tool(states, states.batches(), trace.states))
    with unseen.changes() as changes:
        for workload, family in product(WORKLOADS, LOOPBACK):
            which = workload.__name__, int(family)
            for _ in range(unseen.ATTEMPTS):  # again, when the kernel skipped a change and told, or hid it
                changes.forget()
                told = [tool.events.losses.recursion_misses for tool in tools]
                try:
                    truth = trace.truth[which] = run(workload, family, sessions)
                except BaseException as error:
                    raise AssertionError(f"the workload {which} failed") from error
                seen = [_follow(tool, which, truth, changes, before) for tool, before in zip(tools, told)]
                if all(seen):
                    break
            else:
                raise AssertionError(f"{which}: each time something was missing, all of it explained")
    # Linux 7 may skip a program, which is told as well; what counts here is whether an owner is missing.
    assert not life.losses.buffer_full, life.losses
    return trace


def _follow(tool: Tool, which: Which, truth: Truth, changes: unseen.Changes, told_before: int) -> bool:
    """Reads the rows of this workload: whether all are there, and no owner was missed with a change.

    A row that is missing is explained, or this fails.
    """
    rows = tool.rows[which] = _owners(tool.batches, truth)
    missing = truth.keys() - rows.keys()
    lost = missing - changes.by_pid_1() if missing else missing
    told = tool.events.losses.recursion_misses - told_before if PREEMPTS else 0
    unnamed = {ports for ports, owner in rows.items() if truth[ports].acted and not owner.pid}
    assert len(lost) <= told, (
        f"{which}: {len(lost)} have no row ({len(missing)} with PID 1's), {tool.events.losses}: {lost}"
    )
    return not missing and not (told and unnamed)


def _owners(batches: Iterator[Sequence[Session | StateChange]], truth: Truth) -> Rows:
    """The owners of ends that have come to CLOSE: until all have, or it takes too long."""
    rows: Rows = {}
    end = time.monotonic() + DEADLINE
    while len(rows) < len(truth) and time.monotonic() < end:
        for event in next(batches):
            ports = event.lport, event.rport
            if ports in truth and (isinstance(event, Session) or event.newstate == "CLOSE"):
                assert ports not in rows
                rows[ports] = Owner(event.owner.pid, event.identity.tid, event.identity.uid)
    return rows


@pytest.fixture(scope="module", autouse=True)
def report(record_testsuite_property: Callable[[str, object], None]) -> Iterator[None]:
    """Tells the report on all kernels how it went the default way."""
    yield
    trace = _traced(None)
    if isinstance(trace, Trace):
        total = Score()
        for which in trace.truth:
            total += trace.score(which)
        figures = f"{total.right:,} / {total.nobody:,} / {total.unknown:,} / {total.wrong:,}"
        record_testsuite_property("owners", figures)


@pytest.fixture(params=WORKLOADS, ids=lambda workload: workload.__name__)
def workload(request: pytest.FixtureRequest) -> Callable[[Stage], None]:
    found: Callable[[Stage], None] = request.param
    return found


@pytest.mark.parametrize("accept", [None, *ACCEPTS], ids=lambda accept: accept or "default")
def test_every_owner_is_right(workload: Callable[[Stage], None], family: int, accept: str | None) -> None:
    """Every end is its owner's, by PID, thread and user; without accept's return, nobody's at worst."""
    trace = traced(accept)
    which = workload.__name__, family
    truth, rows = trace.truth[which], trace.life[which]
    assert len(truth) >= FEWER * (1 if workload is refused else 2)
    for ports, owner in truth.items():
        seen = rows[ports]
        if seen.pid or owner.acted or accept not in MISSES_ACCEPTS:
            assert seen[:3] == owner[:3], ports
    score = trace.score(which)
    assert (score.wrong, score.lost) == (0, 0)
    # Without accept's return a process that only accepted may stay unknown. It need not: what comes while
    # it has the lock is done by it.
    unacted = sum(not owner.acted and owner.pid > 0 for owner in truth.values())
    assert score.unknown <= (unacted if accept in MISSES_ACCEPTS else 0)


def test_state_changes_have_the_same_owners(workload: Callable[[Stage], None], family: int) -> None:
    """At CLOSE they are those of the session."""
    trace = traced(None)
    which = workload.__name__, family
    assert trace.states[which] == trace.life[which]


def test_a_pool_is_many() -> None:
    """More than one of its processes accepted."""
    truth = traced(None).truth[pool.__name__, socket.AF_INET]
    assert len({owner.pid for owner in truth.values()}) > 2
