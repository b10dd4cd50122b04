"""Whose sessions they are, against workloads that write it down (live.workloads).

All of them run under one trace for each way in which accept's return is seen; each test looks at the rows of
one workload. Each way sees FEW sessions of each workload and family; the default way also sees MANY.
"""

from __future__ import annotations

import socket
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import NamedTuple

import pytest

import tcpobs
from live import unseen
from live.features import MISSING
from live.tcp import DEADLINE, LOOPBACK, WAYS
from live.workloads import (
    SESSIONS,
    WORKERS,
    WORKLOADS,
    Owner,
    Ports,
    Score,
    Stage,
    Truth,
    pool,
    refused,
    run,
    score,
)
from tcpobs import Session, StateChange, host
from tcpobs.events import Events

pytestmark = pytest.mark.subject("owners, beside workloads that write down the true ones")

FEW, MANY = 20, SESSIONS
"""Sessions of each workload and family."""
BEST = [way for way in WAYS if (way.hook, way.transport) == ("tp_btf", "ringbuf")]
ACCEPTS = {way.accept: way for way in (host.Way("tp_btf", "hash", "ringbuf", "none"), *reversed(BEST))}
"""How accept's return can be seen here, each with the best way that does: nothing is lost with that."""
MISSES_ACCEPTS = {"none", *(["kretprobe"] if "returns of several at once" in MISSING else [])}
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


def traced(accept: str | None, sessions: int) -> Trace:
    """So many sessions of all workloads under this accept's way, or the default."""
    found = _traced(accept, sessions)
    if isinstance(found, str):
        pytest.fail(found, pytrace=False)
    return found


_TRACES: dict[tuple[str | None, int], Trace | str] = {}
"""What was traced so far, or why it failed: nothing is gained by trying again for each test."""


def _traced(accept: str | None, sessions: int) -> Trace | str:
    if (accept, sessions) not in _TRACES:
        try:
            _TRACES[accept, sessions] = _trace(accept, sessions)
        except Exception:
            _TRACES[accept, sessions] = traceback.format_exc()
    return _TRACES[accept, sessions]


def _trace(accept: str | None, sessions: int) -> Trace:
    if accept is None:
        # Both tools at once; a state change is much more frequent than a session's end.
        with tcpobs.sessions() as life, tcpobs.states(owners=True, buffer_size=1 << 26) as states:
            return _run_all(sessions, life, states)
    if accept == traced(None, sessions).accept:
        return traced(None, sessions)
    hook, storage, transport, _ = ACCEPTS[accept]
    with tcpobs.sessions(hook=hook, storage=storage, transport=transport, accept=accept) as life:
        return _run_all(sessions, life)


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
    lost = missing - changes.by_pid_1({port for ports in missing for port in ports})
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
    """Tells the report on all kernels how it went the default way, with as many sessions as were made."""
    yield
    trace = _TRACES.get((None, MANY)) or _TRACES.get((None, FEW))
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


MUCH = pytest.param(MANY, id="many", marks=pytest.mark.many)
LITTLE = pytest.param(FEW, id="few", marks=pytest.mark.essential)


@pytest.mark.parametrize("sessions", [MUCH, LITTLE])
def test_every_owner_is_right(workload: Callable[[Stage], None], family: int, sessions: int) -> None:
    """Every end is its owner's, by PID, thread and user."""
    check(workload, family, None, sessions)


@pytest.mark.ways
@pytest.mark.parametrize("accept", ACCEPTS)
def test_no_owner_is_wrong(workload: Callable[[Stage], None], family: int, accept: str) -> None:
    """However accept is seen; without accept's return a server's end is nobody's at worst."""
    check(workload, family, accept, FEW)


def check(workload: Callable[[Stage], None], family: int, accept: str | None, sessions: int) -> None:
    trace = traced(accept, sessions)
    which = workload.__name__, family
    truth, rows = trace.truth[which], trace.life[which]
    assert len(truth) >= sessions * (1 if workload is refused else 2)
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


@pytest.mark.parametrize("sessions", [MUCH, LITTLE])
def test_state_changes_have_the_same_owners(
    workload: Callable[[Stage], None], family: int, sessions: int
) -> None:
    """At CLOSE they are those of the session."""
    trace = traced(None, sessions)
    which = workload.__name__, family
    assert trace.states[which] == trace.life[which]


def test_a_pool_is_many() -> None:
    """Each of its processes accepted, and one connected."""
    truth = traced(None, FEW).truth[pool.__name__, socket.AF_INET]
    assert len({owner.pid for owner in truth.values()}) == WORKERS + 1
