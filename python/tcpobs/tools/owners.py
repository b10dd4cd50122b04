"""The columns on a socket's owner, beyond its PID and name."""

from __future__ import annotations

from tcpobs.columns import Column
from tcpobs.records import printable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

SHORT = 12
"""Characters of a container's id in a table, as `docker ps` shows them."""


def known(value: object) -> object:
    """For JSON: null where a table has `-`."""
    return None if value == "-" else value


def columns() -> list[Column]:
    """TID, UID, network namespace, and where the owner runs: container and cgroup."""
    from tcpobs.cgroups import Cgroups, container

    cgroups = Cgroups()

    def path(cgroup: int) -> str:
        return printable(cgroups.path(cgroup) or "-")

    def part(name: str) -> Callable[[int], str | None]:
        return lambda cgroup: getattr(container(path(cgroup)), name, None)

    full = part("id")
    return [
        Column("TID", "identity.tid", "%-7d"),
        Column("UID", "identity.user", "%-5s", json=known),
        Column("NETNS", "netns", "%-10d"),
        Column(
            "CONTAINER",
            "cgroup",
            f"%-{SHORT}s",
            convert=lambda cgroup: (full(cgroup) or "-")[:SHORT],
            json=full,
            free=True,
        ),
        Column("CGROUP", "cgroup", "%s", convert=path, json=lambda cgroup: known(path(cgroup)), free=True),
        Column("CGROUP_ID", "cgroup", None, csv=None),
        Column("RUNTIME", "cgroup", None, csv=None, convert=part("runtime")),
        Column("POD", "cgroup", None, csv=None, convert=part("pod")),
    ]
