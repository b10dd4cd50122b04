"""What TCP does on this Linux host.

with tcpobs.states(local_ports=[443]) as events:
    for event in events:
        print(event.raddr, event.oldstate, event.newstate)

`states`, `sessions` and `summary` trace from the moment they return; see their docstrings, Events for what
they return, and StateChange, Session and Group for what comes out of it. Tracing needs root (or CAP_BPF and
CAP_PERFMON), and raises TcpobsError when the host does not allow it.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from tcpobs.errors import TcpobsError
    from tcpobs.events import Events, Losses
    from tcpobs.records import Session, StateChange
    from tcpobs.tools.life import sessions
    from tcpobs.tools.states import states
    from tcpobs.tools.summary import Group, Summary, summary

__version__ = "0.4.0"

__all__ = [
    "Events",
    "Group",
    "Losses",
    "Session",
    "StateChange",
    "Summary",
    "TcpobsError",
    "sessions",
    "states",
    "summary",
]

_HOMES = {
    "Events": "tcpobs.events",
    "Group": "tcpobs.tools.summary",
    "Losses": "tcpobs.events",
    "Session": "tcpobs.records",
    "StateChange": "tcpobs.records",
    "Summary": "tcpobs.tools.summary",
    "TcpobsError": "tcpobs.errors",
    "sessions": "tcpobs.tools.life",
    "states": "tcpobs.tools.states",
    "summary": "tcpobs.tools.summary",
}


def __getattr__(name: str) -> object:
    """Imports a public name at its first use, so that the command line starts with what it needs."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    found: object = getattr(import_module(_HOMES[name]), name)
    globals()[name] = found
    return found
