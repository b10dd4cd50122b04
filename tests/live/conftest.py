"""What live tests need of the host. They need root and BPF, and fail where those are missing."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator

import pytest

TRACING = "/sys/kernel/tracing"


@pytest.fixture(params=[socket.AF_INET, socket.AF_INET6], ids=["IPv4", "IPv6"])
def family(request: pytest.FixtureRequest) -> int:
    """Each test that takes it runs with both families."""
    return int(request.param)


@pytest.fixture(scope="session", autouse=True)
def tracefs() -> Iterator[None]:
    """Classic tracepoints need tracefs: mounted for the tests if nobody has."""
    mounted = os.path.exists(f"{TRACING}/events")
    if not mounted:
        subprocess.run(["mount", "-t", "tracefs", "tracefs", TRACING], check=True)
    yield
    if not mounted:
        subprocess.run(["umount", TRACING], check=True)
