"""Prototypes and types from debug information, against what the compiler itself says of them."""

from __future__ import annotations

import re
import struct
import subprocess
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tcpobs import compiler
from tcpobs.errors import TcpobsError
from tcpobs.tools.argdist import elf as elf_module
from tcpobs.tools.argdist import libc
from tcpobs.tools.argdist.dwarf import DwarfTypes
from tcpobs.tools.argdist.elf import Elf
from tcpobs.tools.argdist.types import (
    CHAR,
    INT,
    INTEGERS,
    LONG,
    UNSIGNED_LONG,
    VOID,
    Array,
    Float,
    Function,
    Integer,
    Pointer,
    Record,
    size_of,
)

from .built import build, run

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tcpobs.tools.argdist.types import Type

TYPES = """
#define bool _Bool
#define offsetof __builtin_offsetof
typedef __SIZE_TYPE__ size_t;
int printf(const char *, ...);
int getchar(void);
void *memset(void *, int, size_t);
enum colour { RED, GREEN = 5, BLUE };
enum sign { NEGATIVE = -3, POSITIVE = 4 };
enum large { LARGE = 0x80000000u };
typedef int (*callback)(const char *name, ...);
struct undefined;
typedef struct { short x; char y; } point;
union either { int number; double real; unsigned char bytes[9]; };
struct bits {
    unsigned char head;
    unsigned a : 3; unsigned b : 13; int c : 5; unsigned d : 20;
    unsigned long long e : 40; unsigned : 3; bool f : 1; unsigned char g : 7; short h : 9;
};
struct node {
    struct node *next;
    const volatile char *const name;
    char text[12];
    int grid[3][4];
    enum colour colour;
    enum sign sign;
    callback call;
    point at;
    union either value;
    struct { int inner; union { long deep; char deeper[3]; }; };
    struct undefined *opaque;
    bool flag;
    float small;
    long double large;
    _Complex double complex;
    unsigned long long wide;
    signed char tiny;
    __int128 huge;
    size_t size;
    struct bits bits;
    int tail[];
} __attribute__((aligned(32)));
"""
CODE = """
__attribute__((noinline, noipa, used)) long use(
    struct node *node, const point *at, enum colour colour, callback call, unsigned char byte, ...)
{ return node->wide + at->x + colour + byte; }
static __attribute__((noinline)) void nothing(void) { getchar(); }
static inline __attribute__((always_inline)) int inlined(int first, struct bits *second)
{ return first + second->a; }
int (*kept)(int, struct bits *) = inlined;
"""
PLAIN = (
    *("next", "name", "text", "grid", "colour", "sign", "call", "at", "value", "inner", "deep", "deeper"),
    *("opaque", "flag", "small", "large", "complex", "wide", "tiny", "huge", "size", "bits"),
)
BITS = ("a", "b", "c", "d", "e", "f", "g", "h")
MAIN = f"""
int main(int argc, char **argv) {{
    struct node node;
    point at = {{1}};
    {
    "".join(
        f'printf("{name} %zu %zu;", offsetof(struct node, {name}) * 8, sizeof node.{name});' for name in PLAIN
    )
}
    {
    "".join(
        f'''{{
        struct {{ struct bits bits; unsigned char more[16]; }} all;
        memset(&all, 0, sizeof all); all.bits.{name} = -1;
        int first = -1, count = 0;
        for (int bit = 0; bit < 8 * (int)sizeof all; bit++)
            if (((unsigned char *)&all)[bit / 8] >> bit % 8 & 1) {{ if (first < 0) first = bit; count++; }}
        printf("{name} %d %d;", first, count);
    }}'''
        for name in BITS
    )
}
    printf("whole %zu %zu", sizeof node, sizeof(struct bits));
    if (argc > 5) {{ nothing(); use(&node, &at, RED, 0, 3); }}
    return 0;
}}
"""

FLAGS = {
    "5": ("-gdwarf-5",),
    "4": ("-gdwarf-4",),
    "2": ("-gdwarf-2", "-gstrict-dwarf"),
    "compressed": ("-g", "-gz=zlib"),
    "type units 5": ("-gdwarf-5", "-fdebug-types-section"),
    "type units 4": ("-gdwarf-4", "-fdebug-types-section"),
    "lto": ("-g", "-flto"),
    "optimized": ("-g", "-O2"),
}


@pytest.fixture(scope="module", params=[*FLAGS, "separate", "clang"])
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The same types from every kind of debug information."""
    folder = tmp_path_factory.mktemp("program")
    source = TYPES + CODE + MAIN
    if request.param == "clang":
        found = compiler.find()
        if not found:
            pytest.skip("no clang")
        subprocess.run(
            [
                *found,
                "-x",
                "c",
                "-w",
                "-gdwarf-5",
                "-O1",
                "-fPIC",
                "-c",
                "-o",
                str(folder / "program.o"),
                "-",
            ],
            input=source,
            text=True,
            check=True,
        )
        yield build(folder / "program", "", str(folder / "program.o"))
    elif request.param == "separate":
        path = build(folder / "program", source, "-g")
        with Elf(path) as elf, pytest.MonkeyPatch.context() as patch:
            patch.setattr(elf_module, "DEBUG_FOLDER", str(folder))
            debug = folder / ".build-id" / elf.build_id[:2] / f"{elf.build_id[2:]}.debug"
            debug.parent.mkdir(parents=True)
            run("objcopy", "--only-keep-debug", path, str(debug))
            run("strip", path)
            yield path
    else:
        yield build(folder / "program", source, *FLAGS[request.param])


@pytest.fixture
def types(program: str) -> Iterator[DwarfTypes]:
    with Elf(program) as elf:
        yield DwarfTypes(elf)


def prototype(path: str, name: str) -> Function:
    """Of the function of this name."""
    with Elf(path) as elf:
        (symbol,) = elf.find(name)
        found = DwarfTypes(elf).prototype(symbol)
        assert found is not None
        return found


def record(type: Type | None) -> Record:
    """It must be one."""
    assert isinstance(type, Record)
    return type


def member(holder: Record, name: str) -> tuple[Type, int, int]:
    """A field's type, its place in bits and its bits, however deep it is in anonymous ones."""
    way = holder.find(name)
    assert way, name
    return way[-1].type, sum(field.offset for field in way), way[-1].bit_size


def test_layout_is_the_compiler_s(program: str, types: DwarfTypes) -> None:
    said = re.findall(r"(\w+) (-?\d+) (\d+)", run(program))
    values = {name: (int(first), int(second)) for name, first, second in said}
    node, bits = record(types.find("struct node")), record(types.find("struct bits"))
    assert (node.size, bits.size) == values["whole"]
    for name in PLAIN:
        type, offset, bit_size = member(node, name)
        assert (offset, size_of(type), bit_size) == (*values[name], 0), name
    for name in BITS:
        _, offset, bit_size = member(bits, name)
        assert (offset, bit_size) == values[name], name


def test_types_of_fields(types: DwarfTypes) -> None:
    node = record(types.find("struct  node"))
    found = {name: member(node, name)[0] for name in node.names()}
    assert [*found] == [*PLAIN, "tail"]
    assert isinstance(found["next"], Pointer)
    assert found["next"].target is node
    assert found["name"] == Pointer(CHAR)
    assert found["text"] == Array(CHAR, 12)
    assert found["grid"] == Array(Array(INT, 4), 3)
    assert found["tail"] == Array(INT, 0)
    assert found["call"] == Pointer(Function(INT, (("", Pointer(CHAR)),), variadic=True))
    assert found["flag"] == INTEGERS["bool"]
    assert found["small"] == Float("float", 4)
    assert isinstance(found["large"], Float)
    assert isinstance(found["complex"], Float)
    assert found["wide"] == INTEGERS["unsigned long long"]
    assert found["tiny"] == INTEGERS["signed char"]
    assert found["huge"] == Integer("__int128", 16, True)
    assert found["size"] == UNSIGNED_LONG
    assert found["deeper"] == Array(CHAR, 3)
    at, value, opaque = record(found["at"]), record(found["value"]), found["opaque"]
    assert (at.name, at.alias, at.spelling) == ("", "point", "point")
    assert (value.keyword, value.spelling) == ("union", "union either")
    assert isinstance(opaque, Pointer)
    assert (record(opaque.target).spelling, record(opaque.target).size) == ("struct undefined", 0)
    assert record(opaque.target).fields == []
    assert isinstance(found["colour"], Integer)
    assert (found["colour"].spelling, found["colour"].names) == (
        "unsigned int",
        {0: "RED", 5: "GREEN", 6: "BLUE"},
    )
    assert isinstance(found["sign"], Integer)
    assert (found["sign"].spelling, found["sign"].names) == ("int", {-3: "NEGATIVE", 4: "POSITIVE"})


def test_find(types: DwarfTypes) -> None:
    assert record(types.find("union either")).spelling == "union either"
    assert record(types.find("point")).spelling == "point"
    assert types.find("point") is types.find("point")
    assert types.find("callback") == Pointer(Function(INT, (("", Pointer(CHAR)),), variadic=True))
    assert types.find("size_t") == UNSIGNED_LONG
    colour = types.find("enum colour")
    assert isinstance(colour, Integer)
    assert 5 in colour.names
    for absent in (
        "struct point",
        "node",
        "struct undefined",
        "struct either",
        "nowhere",
        "struct nowhere",
        "",
        "int",
    ):
        assert types.find(absent) is None, absent


def test_prototypes(program: str, types: DwarfTypes) -> None:
    use = prototype(program, "use")
    assert use.result == LONG
    assert use.variadic
    assert [name for name, _ in use.parameters] == ["node", "at", "colour", "call", "byte"]
    node, at, colour, call, byte = (type for _, type in use.parameters)
    assert isinstance(node, Pointer)
    assert record(node.target).spelling == "struct node"
    assert isinstance(at, Pointer)
    assert record(at.target).spelling == "point"
    assert isinstance(colour, Integer)
    assert colour.names[6] == "BLUE"
    assert isinstance(call, Pointer)
    assert isinstance(call.target, Function)
    assert byte == INTEGERS["unsigned char"]
    assert prototype(program, "nothing") == Function(VOID, ())
    with Elf(program) as elf:
        if elf.find("inlined"):  # the linker may have left it out
            inlined = prototype(program, "inlined")
            assert inlined.result == INT
            assert [name for name, _ in inlined.parameters] == ["first", "second"]
        assert DwarfTypes(elf).prototype(elf.find("_start")[0]) is None


def test_the_function_s_own_unit_wins(tmp_path: Path) -> None:
    unit = "typedef struct { %s } thing; struct same { %s }; int %s(thing *a, struct same *b) { return !a; }"
    (tmp_path / "other.c").write_text(unit % ("char a;", "int b;", "other"))
    path = build(
        tmp_path / "library.so", unit % ("long c;", "long d;", "one"), "-g", "-shared", "-fPIC", "other.c"
    )
    for function, field in (("one", "d"), ("other", "b")):
        with Elf(path) as elf:
            types = DwarfTypes(elf)
            types.prototype(elf.find(function)[0])
            assert [*record(types.find("struct same")).names()] == [field]


def test_a_declared_struct_is_found_where_it_is_defined(tmp_path: Path) -> None:
    (tmp_path / "other.c").write_text(
        "struct far { int deep; }; int other(struct far *it) { return it->deep; }"
    )
    source = "struct far; int one(struct far *it) { return !it; }"
    path = build(tmp_path / "library.so", source, "-g", "-shared", "-fPIC", "other.c")
    with Elf(path) as elf:
        types = DwarfTypes(elf)
        assert [*record(types.find("struct far")).names()] == ["deep"]
        found = types.prototype(elf.find("one")[0])
        assert found
        pointer = found.parameters[0][1]
        assert isinstance(pointer, Pointer)
        assert pointer.target is types.find("struct far")


def test_indirect_function(tmp_path: Path) -> None:
    source = """
    static int one(int x, char *y) { return x + 1; }
    static int (*resolve(void))(int, char *) { return one; }
    static void *untyped(void) { return one; }
    int chosen(int, char *) __attribute__((ifunc("resolve")));
    int unknown(int, char *) __attribute__((ifunc("untyped")));
    """
    path = build(tmp_path / "library.so", source, "-g", "-shared", "-fPIC")
    assert prototype(path, "chosen") == Function(INT, (("", INT), ("", Pointer(CHAR))))
    with Elf(path) as elf:
        assert DwarfTypes(elf).prototype(elf.find("unknown")[0]) is None


def test_aliases_and_a_function_in_two_parts(tmp_path: Path) -> None:
    source = """
    #include <stdlib.h>
    __attribute__((noinline)) int parts(int x, long y) { if (__builtin_expect(x > y, 0)) abort(); return x; }
    int second(int, long) __attribute__((alias("parts")));
    int main(int argc, char **argv) { return parts(argc, 100); }
    """
    path = build(tmp_path / "program", source, "-g", "-O2", "-freorder-blocks-and-partition")
    expected = Function(INT, (("x", INT), ("y", LONG)))
    assert prototype(path, "parts") == expected
    assert prototype(path, "second") == expected


def test_cpp(tmp_path: Path) -> None:
    source = """
    namespace shop {
    struct Base { int id; virtual ~Base() {} };
    enum class Kind : unsigned char { small = 1, big = 200 };
    class Item : public Base {
    public:
        static int count;
        Kind kind; const char *name; int &reference;
        int price(long factor, const Item &other, Item &&moved) const;
    };
    int Item::price(long factor, const Item &other, Item &&moved) const { return id * factor; }
    }
    """
    # Else a class with a virtual function is described where its table is.
    flags = ("-g", "-femit-class-debug-always", "-shared", "-fPIC")
    path = build(tmp_path / "library.so", source, *flags, compiler="g++")
    with Elf(path) as elf:
        types = DwarfTypes(elf)
        (name,) = (name for name in elf.functions() if "price" in name)
        found = types.prototype(elf.find(name)[0])
        item = record(types.find("shop::Item"))
        assert types.find("struct Item") is types.find("Item") is item
        assert item.keyword == "struct"
        assert found
        assert found.parameters == (
            ("this", Pointer(item)),
            ("factor", LONG),
            ("other", Pointer(item)),
            ("moved", Pointer(item)),
        )
        assert member(item, "id")[:2] == (INT, 64)
        kind, offset, _ = member(item, "kind")
        assert offset == 96
        assert isinstance(kind, Integer)
        assert (kind.size, kind.signed, kind.names) == (1, False, {1: "small", 200: "big"})
        assert member(item, "reference")[0] == Pointer(INT)
        assert not item.find("count")


def test_without_debug_information(tmp_path: Path) -> None:
    path = build(tmp_path / "program", "int main(void) { return 0; }", "-g0")
    with Elf(path) as elf:
        types = DwarfTypes(elf)
        assert types.prototype(elf.find("main")[0]) is None
        assert types.find("struct node") is None


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, range]:
    """A library with debug information, and where that is in the file."""
    path = tmp_path_factory.mktemp("sound") / "library.so"
    build(path, TYPES + CODE, "-g", "-shared", "-fPIC")
    sections = re.findall(r"\.debug_\w+ +PROGBITS +\w+ (\w+) (\w+)", run("readelf", "-SW", str(path)))
    places = [(int(offset, 16), int(size, 16)) for offset, size in sections]
    return path.read_bytes(), range(places[0][0], places[-1][0] + places[-1][1])


@settings(max_examples=100)
@given(data=st.data())
def test_damaged(
    tmp_path_factory: pytest.TempPathFactory, sound: tuple[bytes, range], data: st.DataObject
) -> None:
    whole, places = sound
    changed = bytearray(whole)
    where = st.integers(places.start, places.stop - 1)
    for place, value in data.draw(st.lists(st.tuples(where, st.binary(min_size=1, max_size=8)), max_size=8)):
        changed[place : place + len(value)] = value
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(changed)
    try:
        with Elf(str(path)) as elf:
            types = DwarfTypes(elf)
            for name in ("use", "inlined"):
                types.prototype(elf.find(name)[0])
            for spelling in ("struct node", "point", "union either"):
                found = types.find(spelling)
                if isinstance(found, Record):
                    for field in found.fields:
                        if isinstance(field.type, Record):
                            _ = field.type.fields
    except TcpobsError as error:
        assert "\n" not in str(error)  # noqa: PT017 (there need be none)


def test_references_in_circles(tmp_path: Path) -> None:
    """A pointer to itself, and a sibling that is the parent."""
    path = tmp_path / "library.so"
    build(path, "typedef int **deep; deep f(deep x) { return x; }", "-g", "-shared", "-fPIC")
    with Elf(str(path)) as elf:
        assert DwarfTypes(elf).find("deep") == Pointer(Pointer(INT))
        places = re.findall(r"<\w+><(\w+)>: .*DW_TAG_pointer.*\n.*\n.*<0x(\w+)>", dump(path))
        info = elf.section(".debug_info")
    inner = next((int(at, 16), int(to, 16)) for at, to in places)
    data = path.read_bytes()
    where = data.index(info) + inner[0]
    old = struct.pack("<I", inner[1])
    changed = (
        data[:where] + data[where : where + 8].replace(old, struct.pack("<I", inner[0])) + data[where + 8 :]
    )
    assert changed != data
    path.write_bytes(changed)
    with Elf(str(path)) as elf, pytest.raises(TcpobsError, match="is damaged"):
        DwarfTypes(elf).find("deep")


def dump(path: Path) -> str:
    """What readelf makes of it."""
    return run("readelf", "--debug-dump=info", str(path))


def test_libc_structs(tmp_path: Path) -> None:
    structs = {
        name: record(libc.find(f"struct {name}")) for name in (*STRUCTS, "sockaddr_in6", "sockaddr_un")
    }
    lines = "".join(
        f'printf("{name}.{field.name} %zu %zu\\n", offsetof(struct {name}, {field.name}) * 8,'
        f"sizeof ((struct {name} *)0)->{field.name});"
        for name, found in structs.items()
        for field in found.fields
        if not field.name.startswith("__")
    ) + "".join(f'printf("{name} 0 %zu\\n", sizeof(struct {name}));' for name in structs)
    headers = (
        "stddef",
        "stdio",
        "sys/stat",
        "sys/socket",
        "sys/time",
        "sys/uio",
        "netinet/in",
        "sys/un",
        "poll",
    )
    includes = "".join(f"#include <{name}.h>\n" for name in headers)
    output = run(build(tmp_path / "program", f"{includes}int main(void) {{ {lines} return 0; }}"))
    assert len(output.splitlines()) > 40
    for line in output.splitlines():
        path, offset, size = line.split()
        name, _, field = path.partition(".")
        if field:
            type, place, _ = member(structs[name], field)
            assert (place, size_of(type)) == (int(offset), int(size)), line
        else:
            assert structs[name].size == int(size), line


STRUCTS = ("timespec", "timeval", "iovec", "sockaddr", "stat", "msghdr", "sockaddr_in", "pollfd")


def test_libc_has_no_more() -> None:
    assert libc.find("struct nowhere") is None
    assert libc.find("timespec") is None
    timespec = record(libc.find(" struct   timespec "))
    assert [*timespec.names()] == ["tv_sec", "tv_nsec"]
    control = record(libc.find("struct msghdr")).find("msg_iov")[0].type
    assert isinstance(control, Pointer)
    assert control.target is libc.find("struct iovec")
