"""Which events are wanted: the filters' constants of bpf/filter.bpf.h and bpf/owner.bpf.h."""

from __future__ import annotations

import os

from tcpobs.errors import TcpobsError
from tcpobs.records import AF_INET, AF_INET6

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from ipaddress import IPv4Network, IPv6Network
    from typing import Union

    from tcpobs.libbpf.btf import Value

    Network = Union[str, IPv4Network, IPv6Network]

MAX_NETWORKS = 16
"""MAX_NETWORKS of bpf/filter.bpf.h; an IPv4 network takes two."""

COMM_SIZE = 15
"""Bytes of a task's name that the kernel keeps (TASK_COMM_LEN, without the end)."""


def constants(
    *,
    local_ports: Iterable[int] | None = None,
    remote_ports: Iterable[int] | None = None,
    ip: int | None = None,
    networks: Iterable[Network] | None = None,
    netns: int | None = None,
    pid: int | None = None,
    uid: int | None = None,
    comm: str | None = None,
    cgroup: str | None = None,
    container: str | None = None,
) -> dict[str, Value]:
    """The values of the programs' constants. None lets everything through. Raises TcpobsError.

    `ip` is 4 or 6. One of the `networks`, such as "10.0.0.0/8", holds either end. `netns` is a network
    namespace's inode number. The rest asks for the owner, and where nobody is known, nothing of it holds:
    `cgroup` is a path, with all below it; `container` the beginning of an id, or a systemd unit's name.
    """
    if ip not in (None, 4, 6):
        raise TcpobsError(f"ip is 4 or 6, not {ip}")
    wanted = _networks(networks)
    cgroup_id, level = _cgroup(cgroup, container)
    return {
        "lports": _ports(local_ports),
        "rports": _ports(remote_ports),
        "only_family": {None: 0, 4: AF_INET, 6: AF_INET6}[ip],
        "networks": wanted,
        "network_count": len(wanted),
        "only_netns": _checked("netns", netns, 1),
        "only_pid": _checked("pid", pid, 1),
        "only_uid": -1 if uid is None else _checked("uid", uid, 0),
        "only_comm": os.fsencode(comm or "")[:COMM_SIZE],
        "only_cgroup": cgroup_id,
        "only_cgroup_level": level,
    }


def _checked(name: str, number: int | None, least: int) -> int:
    """The number; 0 for None."""
    if number is not None and not least <= number < 1 << 32:
        raise TcpobsError(f"a {name} is {least} or more, not {number}")
    return number or 0


def _ports(ports: Iterable[int] | None) -> dict[str, Value]:
    if ports is None:
        return {"any": True}
    bits = bytearray(65536 // 8)
    for port in ports:
        if not 0 <= port <= 65535:
            raise TcpobsError(f"a port is 0 to 65535, not {port}")
        bits[port >> 3] |= 1 << (port & 7)
    return {"any": False, "bits": bytes(bits)}


def _networks(networks: Iterable[Network] | None) -> list[Value]:
    if networks is None:
        return []
    from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_network

    found: list[Value] = []
    for network in networks:
        try:
            parsed = ip_network(network, strict=False)
        except ValueError as error:
            raise TcpobsError(f"{error}: give an address or a network, like 10.0.0.0/8") from None
        found.append(_network(parsed))
        if isinstance(
            parsed, IPv4Network
        ):  # sockets for both families have these addresses as ::ffff:a.b.c.d
            mapped = int(IPv6Address("::ffff:0:0")) | int(parsed.network_address)
            found.append(_network(IPv6Network((mapped, 96 + parsed.prefixlen))))
    if len(found) > MAX_NETWORKS:
        raise TcpobsError(f"too many networks: {MAX_NETWORKS} at most, and an IPv4 network counts as two")
    return found


def _network(network: IPv4Network | IPv6Network) -> Value:
    return {
        "address": network.network_address.packed,
        "mask": network.netmask.packed,
        "family": AF_INET if network.version == 4 else AF_INET6,
    }


def _cgroup(path: str | None, container: str | None) -> tuple[int, int]:
    """The id of the cgroup that is asked for, and its depth below the root."""
    if path is not None and container is not None:
        raise TcpobsError("a cgroup and a container cannot both be asked for: a container is a cgroup")
    if path is None and container is None:
        return 0, 0
    from tcpobs.cgroups import Cgroups

    _, id, level = Cgroups().find(path) if path is not None else Cgroups().find_container(container or "")
    return id, level
