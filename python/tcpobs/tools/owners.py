"""The columns on a socket's owner, beyond its PID and name."""

from __future__ import annotations

from tcpobs.columns import Column
from tcpobs.records import printable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from tcpobs.columns import Bulk

SHORT = 12
"""Characters of a container's id in a table, as `docker ps` shows them."""


def known(value: object) -> object:
    """For JSON: null where a table has `-`."""
    return None if value == "-" else value


KNOWN: Bulk = ("%s", lambda numbers: [[number or "null" for number in numbers]])
"""For JSON: null where a table has 0 for what is not known."""


def columns() -> list[Column]:
    """TID, UID, network namespace, and where the owner runs: container and cgroup."""
    from tcpobs.cgroups import Cgroups, container

    cgroups = Cgroups()

    path = cgroups.path  # of a cgroup that is not known now, it may be later: the path is what is remembered

    def shown(path: str | None) -> str:
        return printable(path or "-")

    def part(name: str) -> Callable[[str | None], str | None]:
        return lambda path: getattr(container(shown(path)), name, None)

    full = part("id")
    return [
        Column("TID", "identity.tid", "%-7d"),
        Column("UID", "identity.user", "%-5s", json=known),
        Column("NETNS", "netns", "%-10d"),
        Column(
            "CONTAINER",
            "cgroup",
            f"%-{SHORT}s",
            convert=lambda path: (full(path) or "-")[:SHORT],
            json=full,
            key=path,
            free=True,
        ),
        Column("CGROUP", "cgroup", "%s", convert=shown, json=lambda p: known(shown(p)), key=path, free=True),
        Column("CGROUP_ID", "cgroup", None, csv=None),
        Column("RUNTIME", "cgroup", None, csv=None, convert=part("runtime"), key=path),
        Column("POD", "cgroup", None, csv=None, convert=part("pod"), key=path),
    ]
