"""The filters' constants, as the programs get them."""

from __future__ import annotations

from socket import AF_INET, AF_INET6
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcpobs import filters
from tcpobs.errors import TcpobsError

if TYPE_CHECKING:
    from tcpobs.libbpf import Object

PORTS = st.integers(0, 65535)
EVERY_PORT = {"any": True, "bits": bytes(8192)}


def set_in(object: Object, *arguments: object) -> list[object]:
    """What the object's constants hold afterwards."""
    names = ("lports", "rports", "only_family", "only_pid")
    constants = filters.constants(*arguments)  # type: ignore[arg-type]
    assert set(constants) == set(names)
    for name, value in constants.items():
        object.variables[name] = value
    return [object.variables[name] for name in names]


def test_nothing_is_filtered_unless_asked(life_object: Object) -> None:
    assert set_in(life_object, None, None, None, None) == [EVERY_PORT, EVERY_PORT, 0, 0]


@pytest.mark.parametrize(("ip", "family"), [(4, AF_INET), (6, AF_INET6)])
def test_family(ip: int, family: int, life_object: Object) -> None:
    assert set_in(life_object, None, None, ip, None)[2] == family


def test_pid(life_object: Object) -> None:
    assert set_in(life_object, None, None, None, 181)[3] == 181


@given(local=st.sets(PORTS), remote=st.sets(PORTS))
def test_a_bit_for_each_port(local: set[int], remote: set[int], life_object: Object) -> None:
    found = set_in(life_object, local, iter(remote), None, None)
    for ports, held in zip((local, remote), found):
        assert isinstance(held, dict)
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
        filters.constants([80, port], None, None, None)
    with pytest.raises(TcpobsError, match=f"not {port}"):
        filters.constants(None, [port], None, None)


@pytest.mark.parametrize("ip", [0, 5])
def test_no_family(ip: int) -> None:
    with pytest.raises(TcpobsError, match=f"^ip is 4 or 6, not {ip}$"):
        filters.constants(None, None, ip, None)
