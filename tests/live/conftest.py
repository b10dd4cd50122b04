"""What live tests need of the host. They need root and BPF, and fail where those are missing."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest
from _pytest.runner import runtestprotocol

from live import asking, unseen
from live.tcp import ALL_WAYS, WAYS, limit
from live.unseen import ATTEMPTS, TRACING

if TYPE_CHECKING:
    from tcpobs.events import Options

_CHANGES = pytest.StashKey[unseen.Changes]()


@pytest.fixture(params=[socket.AF_INET, socket.AF_INET6], ids=["IPv4", "IPv6"])
def family(request: pytest.FixtureRequest) -> int:
    """Each test that takes it runs with both families."""
    return int(request.param)


@pytest.fixture(params=WAYS, ids="-".join)
def way(request: pytest.FixtureRequest) -> Options:
    """Each test that takes it runs every way that this kernel has; these are the options that force it."""
    options: Options = request.param._asdict()
    return options


@pytest.fixture(scope="session", autouse=True)
def limits(record_testsuite_property: Callable[[str, object], None]) -> None:
    """The limits of this kernel, for the report on all of them."""
    for way in ALL_WAYS:
        if limit(way):
            record_testsuite_property(f"limit {'-'.join(way)}", limit(way))
    for name, cause in asking.LIMITS.items():
        record_testsuite_property(f"limit {name}", cause)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out the tests that this kernel is named to be too limited for."""
    limited = [item for item in items if {item.path.stem, item.name.partition("[")[0]} & asking.LIMITS.keys()]
    if limited:
        config.hook.pytest_deselected(items=limited)
        items[:] = [item for item in items if item not in limited]


@pytest.fixture(scope="session", autouse=True)
def tracefs() -> Iterator[None]:
    """Classic tracepoints need tracefs: mounted for the tests if nobody has."""
    mounted = os.path.exists(f"{TRACING}/events")
    if not mounted:
        subprocess.run(["mount", "-t", "tracefs", "tracefs", TRACING], check=True)
    yield
    if not mounted:
        subprocess.run(["umount", TRACING], check=True)


@pytest.fixture(scope="session", autouse=True)
def changes(tracefs: None, request: pytest.FixtureRequest) -> Iterator[None]:
    """What pytest_runtest_protocol looks at."""
    with unseen.changes() as changes:
        request.config.stash[_CHANGES] = changes
        yield
        del request.config.stash[_CHANGES]


def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool:
    """Runs a test again that failed while a change was shown to no BPF program, and says so."""
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for _ in range(ATTEMPTS):
        if _CHANGES in item.config.stash:  # not before the session's fixtures are there, and after
            item.config.stash[_CHANGES].forget()
        reports = runtestprotocol(item, log=False, nextitem=nextitem)
        changes = item.config.stash.get(_CHANGES, None)
        failed = any(report.failed for report in reports)
        by_pid_1 = changes.by_pid_1() if failed and changes else None
        if not by_pid_1:
            break
        item.warn(pytest.PytestWarning(f"failed; PID 1 changed the sockets with the ports {by_pid_1}"))
    for report in reports:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True
