"""Which events are wanted: the filters' constants of bpf/filter.bpf.h."""

from __future__ import annotations

from tcpobs.errors import TcpobsError
from tcpobs.records import AF_INET, AF_INET6

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from tcpobs.libbpf.btf import Value


def constants(
    local_ports: Iterable[int] | None,
    remote_ports: Iterable[int] | None,
    ip: int | None,
    pid: int | None,
) -> dict[str, Value]:
    """The values of the programs' constants. None leaves everything through; `ip` is 4 or 6."""
    if ip not in (None, 4, 6):
        raise TcpobsError(f"ip is 4 or 6, not {ip}")
    if pid is not None and pid < 1:
        raise TcpobsError(f"a pid is 1 or more, not {pid}")
    return {
        "lports": _ports(local_ports),
        "rports": _ports(remote_ports),
        "only_family": {None: 0, 4: AF_INET, 6: AF_INET6}[ip],
        "only_pid": pid or 0,
    }


def _ports(ports: Iterable[int] | None) -> dict[str, Value]:
    if ports is None:
        return {"any": True}
    bits = bytearray(65536 // 8)
    for port in ports:
        if not 0 <= port <= 65535:
            raise TcpobsError(f"a port is 0 to 65535, not {port}")
        bits[port >> 3] |= 1 << (port & 7)
    return {"any": False, "bits": bytes(bits)}
