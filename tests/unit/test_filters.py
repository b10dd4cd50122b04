"""The filters' constants, as the programs get them."""

from __future__ import annotations

from socket import AF_INET, AF_INET6
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcpobs import filters
from tcpobs.errors import TcpobsError

if TYPE_CHECKING:
    from tcpobs.libbpf import Object

PORTS = st.integers(0, 65535)
EVERY_PORT = {"any": True, "bits": bytes(8192)}


def set_in(object: Object, **asked: Any) -> dict[str, Any]:
    """What the object's constants hold afterwards."""
    constants = filters.constants(**asked)
    for name, value in constants.items():
        object.variables[name] = value
    return {name: object.variables[name] for name in constants}


def test_nothing_is_filtered_unless_asked(life_object: Object) -> None:
    nothing = {name: life_object.variables[name] for name in filters.constants()}
    assert set_in(life_object) == nothing
    assert (nothing["lports"], nothing["rports"]) == (EVERY_PORT, EVERY_PORT)


@pytest.mark.parametrize(("ip", "family"), [(4, AF_INET), (6, AF_INET6)])
def test_family(ip: int, family: int, life_object: Object) -> None:
    assert set_in(life_object, ip=ip)["only_family"] == family


def test_pid(life_object: Object) -> None:
    assert set_in(life_object, pid=181)["only_pid"] == 181


@given(local=st.sets(PORTS), remote=st.sets(PORTS))
def test_a_bit_for_each_port(local: set[int], remote: set[int], life_object: Object) -> None:
    found = set_in(life_object, local_ports=local, remote_ports=iter(remote))
    for ports, held in ((local, found["lports"]), (remote, found["rports"])):
        assert held["any"] is False
        assert isinstance(held["bits"], bytes)
        # HOLDS() of bpf/filter.bpf.h: bits[port >> 3] & 1 << (port & 7)
        bits = enumerate(held["bits"])
        assert {
            place << 3 | bit for place, byte in bits if byte for bit in range(8) if byte & 1 << bit
        } == ports


@pytest.mark.parametrize("port", [-1, 65536])
def test_no_port(port: int) -> None:
    with pytest.raises(TcpobsError, match=f"^a port is 0 to 65535, not {port}$"):
        filters.constants(local_ports=[80, port])
    with pytest.raises(TcpobsError, match=f"not {port}"):
        filters.constants(remote_ports=[port])


@pytest.mark.parametrize("ip", [0, 5])
def test_no_family(ip: int) -> None:
    with pytest.raises(TcpobsError, match=f"^ip is 4 or 6, not {ip}$"):
        filters.constants(ip=ip)


def test_networks(life_object: Object) -> None:
    """IPv4's twice: of sockets for IPv4, and for both families."""
    held = set_in(life_object, networks=["10.1.2.3/8", "fe80::/10"])
    assert held["network_count"] == 3
    first, mapped, sixth = (
        b"".join(part.to_bytes(4, "little") for part in n["mask"]) for n in held["networks"][:3]
    )
    assert first == b"\xff" + bytes(15)
    assert mapped == b"\xff" * 13 + bytes(3)
    assert sixth == b"\xff\xc0" + bytes(14)
    assert [network["family"] for network in held["networks"][:4]] == [AF_INET, AF_INET6, AF_INET6, 0]


@pytest.mark.parametrize("network", ["10.0.0.0/33", "localhost", "", "1.2.3"])
def test_no_network(network: str) -> None:
    with pytest.raises(TcpobsError, match="give an address or a network"):
        filters.constants(networks=[network])


def test_too_many_networks() -> None:
    with pytest.raises(TcpobsError, match="too many networks"):
        filters.constants(networks=[f"10.{i}.0.0/16" for i in range(9)])


def test_root_is_a_user(life_object: Object) -> None:
    assert set_in(life_object, uid=0)["only_uid"] == 0
    assert set_in(life_object)["only_uid"] == -1


def test_a_name_is_cut_as_the_kernel_cuts_it(life_object: Object) -> None:
    assert bytes(set_in(life_object, comm="a-name-of-more-than-15")["only_comm"]) == b"a-name-of-more-\0"
