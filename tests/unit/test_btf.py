"""Types, values and variables, read from the objects' BTF; damaged objects."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tcpobs.libbpf import Btf, Kind, LibbpfError, Object

from .conftest import OBJECTS, object_file

if TYPE_CHECKING:
    from collections.abc import Callable

    from tcpobs.libbpf import Type

C_TYPES: dict[str, Any] = {
    "__u8": ctypes.c_uint8,
    "__u16": ctypes.c_uint16,
    "__u32": ctypes.c_uint32,
    "__u64": ctypes.c_uint64,
    "char": ctypes.c_char,
}


def structs_of_header() -> dict[str, type[ctypes.Structure]]:
    """The structs of bpf/events.h, laid out by this machine's C rules."""
    text = re.sub(r"/\*.*?\*/", "", (OBJECTS / "source" / "events.h").read_text(), flags=re.DOTALL)
    found: dict[str, type[ctypes.Structure]] = {}
    for name, body in re.findall(r"struct (\w+) \{(.*?)\};", text, flags=re.DOTALL):
        fields = []
        for kind, field, length in re.findall(r"(?:struct )?(\w+) (\w+)(?:\[(\d+)\])?;", body):
            c_type = found.get(kind) or C_TYPES[kind]
            fields.append((field, c_type * int(length) if length else c_type))
        found[name] = type(name, (ctypes.Structure,), {"_fields_": fields})
    return found


HEADER = structs_of_header()


def struct_type(object: Object, name: str) -> Type:
    """A struct that must be there."""
    found = object.btf.find(name, Kind.STRUCT)
    assert found is not None
    return found


def number_type(object: Object, name: str) -> Type:
    """A C number type that must be there."""
    found = object.btf.find(name, Kind.INT)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("tool", "name"),
    [
        ("states", "state_change"),
        ("states", "endpoints"),
        ("states", "task"),
        ("states", "transition"),
        ("life", "session"),
        ("life", "endpoints"),
        ("life", "task"),
    ],
)
def test_layout_is_that_of_the_header(tool: str, name: str, request: pytest.FixtureRequest) -> None:
    layout, type = HEADER[name], struct_type(request.getfixturevalue(f"{tool}_object"), name)
    names = [field[0] for field in layout._fields_]
    assert [member.name for member in type.members] == names
    assert [member.offset for member in type.members] == [getattr(layout, n).offset * 8 for n in names]
    assert [member.type.size for member in type.members] == [getattr(layout, n).size for n in names]
    assert [member.bit_size for member in type.members] == [0] * len(names)
    assert type.size == ctypes.sizeof(layout)


def test_find(states_object: Object) -> None:
    found = struct_type(states_object, "state_change")
    assert (found.name, found.kind) == ("state_change", Kind.STRUCT)
    assert states_object.btf.find("state_change", Kind.UNION) is None
    assert states_object.btf.find("session", Kind.STRUCT) is None
    assert found.id in [type.id for type in states_object.btf]


def test_no_such_type(states_object: Object) -> None:
    with pytest.raises(LibbpfError, match="BTF has no type 1000000"):
        type(struct_type(states_object, "task"))(states_object.btf, 1_000_000)


def test_typedefs_and_arrays(states_object: Object) -> None:
    laddr, _, lport, *_ = struct_type(states_object, "endpoints").members
    assert (laddr.type.kind, laddr.type.length, laddr.type.target.name) == (Kind.ARRAY, 16, "__u8")
    assert (lport.type.kind, lport.type.name) == (Kind.TYPEDEF, "__u16")
    assert (lport.type.resolve().kind, lport.type.resolve().name) == (Kind.INT, "unsigned short")


NUMBERS = {
    "unsigned char": (0, 255),
    "short": (-(1 << 15), (1 << 15) - 1),
    "unsigned short": (0, 65535),
    "int": (-(1 << 31), (1 << 31) - 1),
    "unsigned int": (0, (1 << 32) - 1),
    "long long": (-(1 << 63), (1 << 63) - 1),
    "unsigned long long": (0, (1 << 64) - 1),
}


@pytest.mark.parametrize("name", NUMBERS)
@given(value=st.integers(-(1 << 65), 1 << 65) | st.integers(-70_000, 70_000))
@example(value=0)
@example(value=-1)
def test_a_number_fits_or_is_refused(name: str, value: int, states_object: Object) -> None:
    type = number_type(states_object, name)
    lowest, highest = NUMBERS[name]
    for fitting in (lowest, highest, max(lowest, min(highest, value))):
        data = type.pack(fitting)
        assert data == fitting.to_bytes(type.size, "little", signed=lowest < 0)
        assert type.unpack(data) == fitting
    for outside in (lowest - 1, highest + 1, *([] if lowest <= value <= highest else [value])):
        with pytest.raises(LibbpfError, match=f"^{outside} does not fit into <int {name} "):
            type.pack(outside)


@given(
    laddr=st.binary(max_size=16),
    raddr=st.lists(st.integers(0, 255), max_size=16),
    lport=st.integers(0, 65535),
    pid=st.integers(0, (1 << 32) - 1),
    skaddr=st.integers(0, (1 << 64) - 1),
)
def test_a_struct_is_packed_as_in_c(
    laddr: bytes, raddr: list[int], lport: int, pid: int, skaddr: int, states_object: Object
) -> None:
    type = struct_type(states_object, "state_change")
    packed = type.pack(
        {
            "skaddr": skaddr,
            "endpoints": {"laddr": laddr, "raddr": raddr, "lport": lport},
            "current": {"pid": pid},
        }
    )
    c = HEADER["state_change"].from_buffer_copy(packed)
    assert (c.skaddr, c.endpoints.lport, c.current.pid) == (skaddr, lport, pid)
    assert bytes(c.endpoints.laddr) == laddr.ljust(16, b"\0")
    assert bytes(c.endpoints.raddr) == bytes(raddr).ljust(16, b"\0")
    assert type.unpack(packed) == {
        "skaddr": skaddr,
        "time_ns": 0,
        "span_ns": 0,
        "endpoints": {
            "laddr": laddr.ljust(16, b"\0"),
            "raddr": bytes(raddr).ljust(16, b"\0"),
            "lport": lport,
            "rport": 0,
            "family": 0,
        },
        "current": {"pid": pid, "comm": bytes(16)},
        "transition": {"oldstate": 0, "newstate": 0},
        "netns": 0,
        "owner": {"pid": 0, "comm": bytes(16)},
        "identity": {"tid": 0, "uid": 0},
        "cgroup": 0,
    }


@given(data=st.binary(min_size=72, max_size=72))
def test_unpacked_and_packed_again(data: bytes, life_object: Object) -> None:
    type = struct_type(life_object, "endpoints")
    data = data[: type.size]
    assert type.pack(type.unpack(data)) == data


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"nothing": 1}, "struct endpoints .* has no field nothing"),
        ({"laddr": bytes(17)}, "17 bytes do not fit into 16"),
        ({"laddr": [0] * 17}, "17 bytes do not fit into 16"),
        ({"laddr": [256]}, "256 does not fit"),
        ({"lport": -1}, "-1 does not fit"),
        ({"lport": "80"}, "'80' does not fit"),
        ({"lport": {"any": True}}, "has no field any"),
        (1, "is not a number"),
    ],
    ids=repr,
)
def test_a_wrong_value_is_refused(value: object, says: str, states_object: Object) -> None:
    with pytest.raises(LibbpfError, match=says):
        struct_type(states_object, "endpoints").pack(value)  # type: ignore[arg-type]


def test_declared_as_in_the_header(states_object: Object) -> None:
    text = states_object.btf.declare([struct_type(states_object, "state_change")])
    for name in ("endpoints", "task", "transition", "state_change"):
        body = re.search(rf"struct {name} {{\n(.*?)\n}};", text, flags=re.DOTALL)
        assert body
        declared = re.findall(r"(\w+)(?:\[\d+\])?;", body[1])
        assert declared == [field[0] for field in HEADER[name]._fields_]
    assert "__u8 laddr[16];" in text
    assert text.index("struct endpoints {") < text.index("struct state_change {")


def test_variables_before_loading(fresh_object: Object) -> None:
    variables = fresh_object.variables
    assert {"lports", "rports", "only_family", "only_pid", "use_sk_storage", "lost"} <= set(variables)
    assert variables["use_sk_storage"] is True
    assert variables["lost"] == {"buffer_full": 0, "sockets_full": 0, "recovered": 0, "groups_full": 0}
    before = {name: variables[name] for name in variables if name != "only_pid"}
    variables["only_pid"] = 181
    assert variables["only_pid"] == 181
    assert {name: variables[name] for name in variables if name != "only_pid"} == before


def test_a_wrong_variable_is_refused_and_nothing_changed(fresh_object: Object) -> None:
    variables = fresh_object.variables
    with pytest.raises(LibbpfError, match="the object has no variable nothing"):
        variables["nothing"] = 1
    with pytest.raises(LibbpfError, match="the object has no variable nothing"):
        _ = variables["nothing"]
    with pytest.raises(LibbpfError, match="8193 bytes do not fit into 8192"):
        variables["lports"] = {"any": False, "bits": bytes(8193)}
    with pytest.raises(LibbpfError, match="does not fit"):
        variables["only_pid"] = 1 << 32
    assert variables["lports"] == {"any": True, "bits": bytes(8192)}
    assert variables["only_pid"] == 0


def test_what_an_object_holds(life_object: Object) -> None:
    assert set(life_object.programs) == {
        "life_tp_btf",
        "life_tp_btf_again",
        "life_tp_btf_preempted",
        "life_tracepoint",
        "life_kprobe",
        "life_kprobe_clone",
        "accept_fexit",
        "accept_kretprobe",
        "accept_syscall",
        "snapshot",
        "open_sk_storage",
        "open_hash",
    }
    assert life_object.programs["life_tp_btf"].section == "tp_btf/inet_sock_set_state"
    assert {"ring_buffer", "perf_buffers", "socket_storage", "socket_hash"} <= set(life_object.maps)
    assert life_object.maps["ring_buffer"].max_entries == 8 << 20
    life_object.maps["socket_hash"].max_entries = 5
    assert life_object.maps["socket_hash"].max_entries == 5


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "the ELF magic alone": lambda data: data[:4],
    "the ELF header alone": lambda data: data[:64],
    "half": lambda data: data[: len(data) // 2],
    "a byte short": lambda data: data[:-1],
    "no BTF": lambda data: data.replace(b".BTF\0", b".XTF\0"),
    "another machine's": lambda data: data[:18] + b"\x3e\0" + data[20:],
    "a program": lambda _: Path("/bin/true").read_bytes(),
    "text": lambda _: b"#!/bin/sh\n" * 100,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_object_is_refused(damage: str) -> None:
    data = object_file("life").read_bytes()
    with pytest.raises(LibbpfError, match=r"^bpf_object__open_mem: "):
        Object(DAMAGES[damage](data), "life")


@given(
    data=st.binary(max_size=4096), magic=st.sampled_from([b"", b"\x7fELF", b"\x7fELF\x02\x01\x01" + bytes(9)])
)
@settings(max_examples=50)
def test_random_bytes_are_refused(data: bytes, magic: bytes) -> None:
    with pytest.raises(LibbpfError):
        Object(magic + data, "random")


@given(cut=st.integers(1, 1 << 20))
@settings(max_examples=50)
def test_a_truncated_object_is_refused(cut: int) -> None:
    data = object_file("states").read_bytes()
    with pytest.raises(LibbpfError):
        Object(data[: -(cut % len(data)) or -1], "states")


@pytest.mark.parametrize("path", ["/bin/true", "/dev/null", "/nonexistent"])
def test_a_file_without_btf_is_refused(path: str) -> None:
    with pytest.raises(LibbpfError, match=r"^btf__parse: "):
        Btf.of_file(path)


def test_an_object_file_has_btf() -> None:
    with Btf.of_file(str(object_file("life"))) as btf:
        assert btf.find("session", Kind.STRUCT) is not None
        assert len(btf) == len(list(btf)) + 1
