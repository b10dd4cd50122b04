"""What live tests need of the host. They need root and BPF, and fail where those are missing."""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest
from _pytest.runner import runtestprotocol

from live import ports, unseen
from live.features import MISSING
from live.tcp import ALL_WAYS, WAYS, limit
from live.unseen import ATTEMPTS, TRACING
from tcpobs import host

if TYPE_CHECKING:
    from tcpobs.events import Options

_CHANGES = pytest.StashKey[unseen.Changes]()
_LIMITS = pytest.StashKey[dict[str, str]]()
"""Why a subject of the report was not tested here."""


@pytest.fixture(params=[socket.AF_INET, socket.AF_INET6], ids=["IPv4", "IPv6"])
def family(request: pytest.FixtureRequest) -> int:
    """Each test that takes it runs with both families."""
    return int(request.param)


@pytest.fixture(
    params=[
        pytest.param(way, id="-".join(way), marks=pytest.mark.subject(host.describe(way))) for way in WAYS
    ]
)
def way(request: pytest.FixtureRequest) -> Options:
    """Each test that takes it runs every way that this kernel has; these are the options that force it."""
    options: Options = request.param._asdict()
    return options


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what this kernel lacks a feature for, and has each result name its subjects."""
    limits = config.stash[_LIMITS] = {host.describe(way): limit(way) for way in ALL_WAYS if limit(way)}
    limited = []
    for item in items:
        subjects = [marker.args[0] for marker in item.iter_markers("subject")]
        item.user_properties += [("subject", subject) for subject in subjects]
        needed = {marker.args[0] for marker in item.iter_markers("needs")}
        for feature in needed & MISSING.keys():
            limited.append(item)
            limits.update(dict.fromkeys(subjects, MISSING[feature]))
    if limited:
        config.hook.pytest_deselected(items=limited)
        items[:] = [item for item in items if item not in limited]


@pytest.fixture(scope="session", autouse=True)
def limits(record_testsuite_property: Callable[[str, object], None], request: pytest.FixtureRequest) -> None:
    """The limits of this kernel, for the report on all of them."""
    for subject, cause in request.config.stash[_LIMITS].items():
        record_testsuite_property(f"limit {subject}", cause)


@pytest.fixture(scope="session", autouse=True)
def impatient() -> Iterator[None]:
    """Traces in this process look at their buffers more often: tests would wait for them most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tcpobs.events.POLL_SECONDS", 0.005)
        yield


@pytest.fixture(scope="session", autouse=True)
def tracefs() -> None:
    """Classic tracepoints need tracefs: where nobody has mounted it, it is mounted for this process alone."""
    if not os.path.exists(f"{TRACING}/events"):
        new_mounts = 0x00020000  # CLONE_NEWNS of linux/sched.h
        if ctypes.CDLL(None, use_errno=True).unshare(new_mounts):
            raise OSError(ctypes.get_errno(), "unshare")
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        subprocess.run(["mount", "-t", "tracefs", "tracefs", TRACING], check=True)


@pytest.fixture(scope="session", autouse=True)
def changes(tracefs: None, request: pytest.FixtureRequest) -> Iterator[None]:
    """What pytest_runtest_protocol looks at."""
    with unseen.changes() as changes:
        request.config.stash[_CHANGES] = changes
        yield
        del request.config.stash[_CHANGES]


def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool:
    """Runs a failed test again when the kernel hid a change of one of its sockets from BPF, and says so.

    The proof is in ftrace, which sees what BPF does not: a thread of PID 1 made a change of a socket with a
    port that this test, and no other, was given.
    """
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for _ in range(ATTEMPTS):
        if _CHANGES in item.config.stash:  # not before the session's fixtures are there, and after
            item.config.stash[_CHANGES].forget()
        marked = ports.mark()
        reports = runtestprotocol(item, log=False, nextitem=nextitem)
        changes = item.config.stash.get(_CHANGES, None)
        failed = any(report.failed for report in reports)
        by_pid_1 = changes.by_pid_1(ports.since(marked)) if failed and changes else None
        if not by_pid_1:
            break
        item.warn(pytest.PytestWarning(f"failed; PID 1 changed the sockets with the ports {by_pid_1}"))
    for report in reports:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True
