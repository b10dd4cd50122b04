"""argdist's expressions against a C compiler: real uprobes see what gcc computes.

The program holds known records; random expressions in C are evaluated by itself, and by argdist when it
calls the probed function. What C leaves undefined is left out: the program notices (UBSan's calls are its own
functions). TCPOBS_SEED and TCPOBS_EXPRESSIONS ask for others, and more.
"""

from __future__ import annotations

import ctypes
import os
import random
import subprocess
from typing import TYPE_CHECKING

import pytest

from tcpobs.tools.argdist import codegen, specifier
from tcpobs.tools.argdist.compile import compile
from tcpobs.tools.argdist.kernel import KernelTypes
from tcpobs.tools.argdist.plan import COUNT
from tcpobs.tools.argdist.targets import Targets
from tcpobs.tools.argdist.trace import Trace

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tcpobs.tools.argdist.trace import Counts
    from tcpobs.tools.argdist.types import Type

    Taken = tuple[Counts, dict[str, int]]

pytestmark = pytest.mark.native

MANY = int(os.environ.get("TCPOBS_EXPRESSIONS", "800"))
SEED = int(os.environ.get("TCPOBS_SEED", "1"))
BATCH, BATCHES = 31, 10
"""Expressions of a specifier (more do not fit on the BPF stack), specifiers of an object."""
CALLS = 3

# `T{8}*` is a pointer to eight of them; a member without a name is an anonymous record.
RECORDS: dict[str, list[tuple[str, str]]] = {
    "struct small": [
        ("signed char", "letter"),
        ("unsigned short", "number"),
        ("int:5", "low"),
        ("unsigned int:11", "middle"),
        ("unsigned char:3", "high"),
        ("int", "whole"),
    ],
    "struct tight": [
        ("char", "first"),
        ("long", "second"),
        ("unsigned short", "third"),
        ("unsigned long long:35", "bits"),
        ("int:20", "signed_bits"),
        ("struct small", "small"),
    ],
    "union mixed": [
        ("unsigned long", "all"),
        ("int[2]", "halves"),
        ("unsigned char[8]", "bytes"),
        ("struct small", "small"),
    ],
    "struct .inner": [("short", "inner_short"), ("union .deep", ""), ("unsigned int:9", "inner_bits")],
    "union .deep": [("unsigned int", "deep_whole"), ("short[2]", "deep_halves")],
    "struct node": [
        ("struct node{1}*", "next"),
        ("long", "value"),
        ("char[8]", "name"),
        ("struct small{4}*", "smalls"),
    ],
    "struct root": [
        ("signed char", "s8"),
        ("unsigned char", "u8"),
        ("short", "s16"),
        ("unsigned short", "u16"),
        ("int", "s32"),
        ("unsigned int", "u32"),
        ("long", "s64"),
        ("unsigned long", "u64"),
        ("long long", "sll"),
        ("unsigned long long:40", "wide_bits"),
        ("long:33", "wide_signed_bits"),
        ("_Bool:1", "flag"),
        ("_Bool", "truth"),
        ("struct .inner", ""),
        ("enum tcp_state_like", "state"),
        ("enum negative", "negative"),
        ("struct small", "small"),
        ("struct tight", "tight"),
        ("struct tight[2]", "tights"),
        ("union mixed", "mixed"),
        ("struct small[4]", "smalls"),
        ("short[4]", "shorts"),
        ("int[2][4]", "table"),
        ("char[16]", "text"),
        ("struct node{1}*", "head"),
        ("struct small{4}*", "array"),
        ("struct small{4}*[2]", "arrays"),
        ("unsigned int{4}*", "numbers"),
        ("struct small{1}*{1}*", "indirect"),
        ("int{1}*{1}*{1}*", "far"),
        ("void{8}*", "unknown"),
        ("const unsigned short{4}*", "constant"),
        ("struct tight{2}*", "packed"),
    ],
}
BIT_FIELDS = [name for members in RECORDS.values() for type, name in members if ":" in type]
INTEGERS = (
    *("char", "signed char", "unsigned char", "short", "unsigned short", "int", "unsigned int", "long"),
    *("unsigned long", "long long", "unsigned long long", "_Bool", "unsigned", "size_t", "short int"),
    *(
        "unsigned long int",
        "long unsigned int",
        "u8",
        "u16",
        "u32",
        "u64",
        "s8",
        "s16",
        "s32",
        "s64",
        "int32_t",
    ),
)
ENUMERATORS = {"TCP_ESTABLISHED": 1, "TCP_LISTEN": 10, "TCP_NEW_SYN_RECV": 12, "BPF_PROG_TYPE_KPROBE": 2}
"""Also the kernel's, whose BTF argdist has them from."""

HEAD = f"""
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
typedef uint8_t u8; typedef uint16_t u16; typedef uint32_t u32; typedef uint64_t u64;
typedef int8_t s8; typedef int16_t s16; typedef int32_t s32; typedef int64_t s64;
enum tcp_state_like {{ {", ".join(f"{name} = {value}" for name, value in ENUMERATORS.items())} }};
enum negative {{ BELOW = -5, ABOVE = 5 }};
"""
MAIN = """
static int undefined;
static sigjmp_buf out;
#define HANDLE(name, ...) void __ubsan_handle_##name(__VA_ARGS__) { undefined = 1; }
HANDLE(add_overflow, void *d, void *a, void *b)
HANDLE(sub_overflow, void *d, void *a, void *b)
HANDLE(mul_overflow, void *d, void *a, void *b)
HANDLE(negate_overflow, void *d, void *a)
HANDLE(divrem_overflow, void *d, void *a, void *b)
HANDLE(shift_out_of_bounds, void *d, void *a, void *b)
static void divided(int signal) { undefined = 1; siglongjmp(out, 1); }

__attribute__((noinline)) void probed(struct root *r, long a, unsigned b, short c, unsigned char d)
{
	asm volatile("" : : "r"(r), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

static struct root roots[CALLS];
static struct small arrays[CALLS][3][4], *pointers[CALLS];
static struct node nodes[CALLS][3];
static unsigned numbers[CALLS][4];
static unsigned short constants[CALLS][4];
static struct tight packed[CALLS][2];
static int ints[CALLS], *int_pointers[CALLS], **int_pointers_2[CALLS];

static void fill(void *to, int size)
{
	static unsigned long state = SEED;
	static const unsigned char special[] = { 0, 0xff, 0x80, 0x7f, 1 };
	unsigned char *bytes = to;

	for (int i = 0; i < size; i++) {
		state = state * 6364136223846793005ul + 1442695040888963407ul;
		bytes[i] = state >> 60 < 5 ? special[(state >> 40) % 5] : state >> 60 < 9 ? 0 : state >> 33;
	}
}

static const long as[] = { 1234567890123, -7, 3 };
static const unsigned bs[] = { 5, 4000000000u, 77 };
static const short cs[] = { -300, 12, 32767 };

int main(void)
{
	fill(roots, sizeof(roots)), fill(arrays, sizeof(arrays)), fill(nodes, sizeof(nodes));
	fill(numbers, sizeof(numbers)), fill(constants, sizeof(constants)), fill(packed, sizeof(packed));
	fill(ints, sizeof(ints));
	for (int i = 0; i < CALLS; i++) {
		struct root *r = &roots[i];
		r->truth = i & 1, r->state = i ? TCP_LISTEN : TCP_NEW_SYN_RECV, r->negative = i ? BELOW : ABOVE;
		strcpy(r->text, "a text: \\"16\\"");
		for (int n = 0; n < 3; n++) {
			nodes[i][n].next = &nodes[i][(n + 1) % 3], nodes[i][n].smalls = arrays[i][n];
			strcpy(nodes[i][n].name, "node");
		}
		r->head = nodes[i], r->array = arrays[i][0], r->arrays[0] = arrays[i][1], r->arrays[1] = arrays[i][2];
		r->numbers = numbers[i], pointers[i] = &r->smalls[1], r->indirect = &pointers[i];
		int_pointers[i] = &ints[i], int_pointers_2[i] = &int_pointers[i], r->far = &int_pointers_2[i];
		r->unknown = numbers[i], r->constant = constants[i], r->packed = packed[i];
	}
	signal(SIGFPE, divided);
	for (volatile int i = 0; i < sizeof(expressions) / sizeof(*expressions); i++) {
		volatile long values[CALLS];
		undefined = 0;
		for (volatile int n = 0; n < CALLS; n++)
			if (!sigsetjmp(out, 1))
				values[n] = expressions[i](&roots[n], as[n], bs[n], cs[n], n);
		if (undefined)
			printf("undefined\\n");
		else
			printf("%ld %ld %ld\\n", values[0], values[1], values[2]);
	}
	fflush(stdout);
	while (getchar() == '\\n') {
		for (int n = 0; n < CALLS; n++)
			probed(&roots[n], as[n], bs[n], cs[n], n);
		printf("called\\n");
		fflush(stdout);
	}
}
"""


def _declaration(type: str, name: str) -> str:
    """In C: arrays are read from the right, `int[2][4]` is two times four."""
    stars, sizes = "", ""
    if ":" in type:
        type, _, bits = type.partition(":")
        return f"{type} {name} : {bits}"
    first = type.find("[")
    if first >= 0:
        type, sizes = type[:first], type[first:]
    while type.endswith("*"):
        type, stars = type[: type.rindex("{")], stars + "*"
    if "." in type:
        return f"{_record(type)} {stars}{name}{sizes}"
    return f"{type} {stars}{name}{sizes}"


def _record(type: str) -> str:
    keyword, _, name = type.partition(" ")
    members = "".join(f"\t{_declaration(*member)};\n" for member in RECORDS[type])
    tag = "" if "." in name else f"{name} "
    return f"{keyword} {tag}{{\n{members}}}{' __attribute__((packed))' if name == 'tight' else ''}"


def _program(expressions: list[str]) -> str:
    signature = "struct root *r, long a, unsigned b, short c, unsigned char d"
    records = "".join(f"{_record(type)};\n" for type in RECORDS if "." not in type)
    functions = "".join(
        f"static long e{number}({signature}) {{ return (long)({text}); }}\n"
        for number, text in enumerate(expressions)
    )
    table = ", ".join(f"e{number}" for number in range(len(expressions)))
    array = f"static long (*expressions[])({signature}) = {{ {table} }};\n"
    return f"#define CALLS {CALLS}\n#define SEED {SEED}\n{HEAD}{records}{functions}{array}{MAIN}"


class Writer:
    """Writes random expressions. They are C by their types; what their values are, it does not know."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def _one(self, *choices: str) -> str:
        return self._random.choice(choices)

    def _maybe(self, probability: float) -> bool:
        return self._random.random() < probability

    # ---- places

    def _index(self, length: int, depth: int) -> str:
        if depth > 0 and self._maybe(0.3):
            return f"({self.integer(depth - 1)}) & {length - 1}"
        digit = self._random.randrange(length)
        return self._one(str(digit), str(digit), hex(digit), f"{digit}u", f"0{digit:o}", f"{digit}L")

    def place(self, depth: int) -> tuple[str, str]:
        """A scalar's place: how it is reached, and its type."""
        text, type = "r", "struct root{1}*"
        while True:
            if type.endswith("]"):
                # `T[2][4]` is two `T[4]`.
                start = type.index("[")
                end = type.index("]")
                length, type = int(type[start + 1 : end]), type[:start] + type[end + 1 :]
                text = self._element(text, length, depth)
            elif type.endswith("*"):
                if type != "struct root{1}*" and self._maybe(0.1):
                    return text, type
                start = type.rindex("{")
                length, type = int(type[start + 1 : -2]), type[:start]
                if type == "void":
                    kind = self._one("int", "unsigned char", "short", "unsigned long")
                    return f"*({kind} *){text}", kind
                if type in RECORDS and self._maybe(0.1):
                    other = (
                        f"({self.integer(depth - 1)}) ? {text} : {text}" if depth > 0 else f"({type} *){text}"
                    )
                    text = f"({other})"
                if type in RECORDS and (length == 1 or self._maybe(0.4)):
                    member, type = self._member(type)
                    text = f"{text}->{member}" if self._maybe(0.9) else f"(*{text}).{member}"
                else:
                    text = self._element(text, length, depth)
                    if type in RECORDS:
                        member, type = self._member(type)
                        text = f"{text}.{member}" if self._maybe(0.8) else f"(&{text})->{member}"
            elif type in RECORDS:
                member, type = self._member(type)
                text = f"{text}.{member}"
            else:
                return self._twisted(text, type), type

    def _element(self, text: str, length: int, depth: int) -> str:
        index = self._index(length, depth)
        if self._maybe(0.8):
            return f"{text}[{index}]"
        return self._one(f"(*({text} + ({index})))", f"(*(({index}) + {text}))", f"(&{text}[{index}])[0]")

    def _member(self, record: str) -> tuple[str, str]:
        """A member's name, those of anonymous members included, and its type."""
        members = []
        for type, name in RECORDS[record]:
            if name:
                members.append((name, type))
            else:
                members.append(self._member(type))
        return self._random.choice(members)

    def _twisted(self, text: str, type: str) -> str:
        if ":" in type:
            # To gcc, a bit field that is wider than an int has a type of its own; to others it has not.
            return f"({type.partition(':')[0]}){text}" if int(type.partition(":")[2]) > 32 else text
        if self._maybe(0.85):
            return text
        return self._one(
            f"*&{text}",
            f"(&{text})[0]",
            f"*(unsigned char *)&{text}",
            f"((signed char *)&{text})[0]",
            f"*(0 + &{text})",
        )

    # ---- values

    def _constant(self) -> str:
        number = self._random.choice(
            [0, 1, 2, 3, 5, 7, 8, 10, 63, 255, 256, 65535, 2**31 - 1, 2**31, 2**32 - 1]
        )
        number = number if self._maybe(0.9) else self._random.randrange(2**63)
        suffix = self._one("", "", "", "u", "L", "ul", "LL", "ULL", "U", "lu")
        return self._one(f"{number}{suffix}", f"{number:#x}{suffix}", f"0{number:o}{suffix}")

    def _leaf(self, depth: int) -> str:
        kind = self._random.random()
        if kind < 0.55:
            text, type = self.place(depth)
            if type.endswith("*"):
                return self._one(f"!{text}", f"(long){text}", f"({text} != 0)", f"({text} == {text})")
            return text
        if kind < 0.7:
            return self._one("a", "b", "c", "d")
        if kind < 0.88:
            return self._constant()
        if kind < 0.92:
            return self._one(*ENUMERATORS)
        if kind < 0.96:
            return self._one(
                "'a'", "':'", "','", "'\"'", "'#'", "'('", "'\\n'", "'\\0'", "'\\x7f'", "'\\377'", "'?'"
            )
        return self._size()

    def _size(self) -> str:
        kind = self._random.random()
        if kind < 0.3:
            return f"sizeof({self._one(*INTEGERS, *(r for r in RECORDS if '.' not in r))})"
        if kind < 0.4:
            return f"sizeof({self._one('int', 'struct small', 'void', 'u8')} *)"
        if kind < 0.6:
            text = self.integer(1)
            bits = any(name in text for name in BIT_FIELDS)
            return f"sizeof(0 + ({text}))" if bits else f"sizeof({text})"
        return self._one(
            *(
                "sizeof(r->small)",
                "sizeof r->smalls",
                "sizeof *r->array",
                "sizeof(*r)",
                "sizeof r->mixed.bytes[1]",
            ),
            *("sizeof(r->table[1])", "sizeof r->arrays", "sizeof &r->s8", "sizeof r->text", "sizeof(int[3])"),
            *("sizeof 'a'", "sizeof(r->s8 + r->s8)", "sizeof(r->tights)", "sizeof(!r->s64)", "sizeof -c"),
        )

    def _operand(self, depth: int) -> str:
        text = self.integer(depth)
        return f"({text})" if self._maybe(0.6) else text

    def integer(self, depth: int) -> str:
        """An expression whose value is an integer."""
        if depth <= 0 or self._maybe(0.1):
            return self._leaf(depth)
        kind = self._random.random()
        left, right = self._operand(depth - 1), self._operand(depth - 1)
        if kind < 0.25:
            return f"{left} {self._one('+', '-', '*')} {right}"
        if kind < 0.38:
            return f"{left} {self._one('/', '%')} {self._divisor(right)}"
        if kind < 0.5:
            return f"{left} {self._one('&', '|', '^')} {right}"
        if kind < 0.6:
            # In parentheses: with a sum behind it, the count would be too large wherever it is.
            return f"({left} {self._one('<<', '>>', '>>')} (({right}) & {self._one('7', '15', '31')}))"
        if kind < 0.72:
            return f"{left} {self._one('<', '>', '<=', '>=', '==', '!=')} {right}"
        if kind < 0.78:
            return f"{left} {self._one('&&', '||')} {right}"
        if kind < 0.86:
            return f"{self._one('-', '~', '!', '+')} ({left})"
        if kind < 0.92:
            return f"{left} ? {right} : {self._operand(depth - 1)}"
        if kind < 0.97:
            return f"({self._one(*INTEGERS)})({left})"
        return self._pointers(depth)

    def _divisor(self, text: str) -> str:
        constant = self._constant()
        return self._one(f"({text} | 1)", f"({text})", constant if constant.strip("0xuUlL") else "3")

    def _pointers(self, depth: int) -> str:
        array = self._one("array", "smalls", "numbers", "packed", "shorts", "arrays[1]", "text")
        base = f"r->{array}"
        one, two = f"&{base}[{self._index(2, depth)}]", f"{base} + ({self._index(2, depth)})"
        text = self._one(
            f"({one}) {self._one('<', '==', '!=', '>=')} ({two})",
            f"({one}) - ({two})",
            f"({one}) - {base}",
            f"(long)({two})",
            f"({one}) && {base}",
            f"(unsigned long)&{base}[1] - (unsigned long)({two} - 1)",
            f"!({two})",
        )
        return f"({text})"


class NoHeaders:
    """Types of no header: nothing is included."""

    def find(self, spelling: str) -> Type | None:
        return None


@pytest.fixture(scope="module")
def kernel() -> Iterator[KernelTypes]:
    types = KernelTypes(None)
    yield types
    types.close()


def test_expressions_have_the_values_that_c_gives_them(tmp_path: Path, kernel: KernelTypes) -> None:
    writer = Writer(SEED)
    written = [writer.integer(number % 4 + 1) for number in range(MANY * 3 // 2)]
    path = tmp_path / "holder"
    checks = "-fsanitize=signed-integer-overflow,shift,integer-divide-by-zero"
    subprocess.run(
        ["gcc", checks, "-w", "-g", "-x", "c", "-", "-o", path],
        input=_program(written),
        text=True,
        check=True,
    )
    with subprocess.Popen([path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdin
        assert program.stdout
        try:
            lines = [program.stdout.readline() for _ in written]
            defined = [
                (text, tuple(map(int, line.split())))
                for text, line in zip(written, lines)
                if line != "undefined\n"
            ][:MANY]
            assert len(defined) > MANY * 3 // 4, "most have a value"

            wrong = []
            step = BATCH * BATCHES
            for start in range(0, len(defined), step):
                some = defined[start : start + step]
                found = _traced(str(path), program, [text for text, _ in some], kernel)
                wrong += [
                    f"{text}\n\tC {expected}, argdist {seen}"
                    for (text, expected), seen in zip(some, found)
                    if seen != expected
                ]
        finally:
            program.stdin.close()
    assert not wrong, f"{len(wrong)} of {len(defined)} with seed {SEED}:\n" + "\n".join(wrong[:40])


def _traced(
    path: str, program: subprocess.Popen[str], texts: list[str], kernel: KernelTypes
) -> list[tuple[int, ...]]:
    """The values of each expression in each of the calls, seen by uprobes."""
    specifiers = []
    for start in range(0, len(texts), BATCH):
        batch = ["d", *texts[start : start + BATCH]]
        specifiers.append(f"p:{path}:probed():{','.join(['long'] * len(batch))}:{','.join(batch)}")
    found: list[tuple[int, ...]] = []
    for counts, lost in _counted(specifiers, program, kernel):
        assert not any(lost.values())
        assert set(counts.values()) == {1}
        rows = sorted(counts)
        assert [row[0] for row in rows] == list(range(CALLS))
        found += [tuple(int(value) for value in values) for values in list(zip(*rows))[1:]]
    return found


GARBAGE = 0x7F00F0F0F0F0F080
NARROW = f"""
#include <stdio.h>
typedef signed char s8; typedef unsigned char u8; typedef short s16; typedef int s32;
#define RETURNS(type, set) __attribute__((noinline, naked)) type returns_##type(long x) \\
	{{ asm("movabs ${GARBAGE:#x}, %rax; cmp $3, %rdi; " set "ret"); }}
RETURNS(_Bool, "sete %al;") RETURNS(s8, "") RETURNS(u8, "") RETURNS(s16, "") RETURNS(s32, "")
__attribute__((noinline, naked)) void takes(_Bool a, s8 b, u8 c, s16 d, s32 e) {{ asm("ret"); }}

int main(void)
{{
	void (*raw)(long, long, long, long, long) = (void *)takes;

	while (getchar() == '\\n') {{
		returns__Bool(3), returns__Bool(4), returns_s8(3), returns_u8(3), returns_s16(3), returns_s32(3);
		raw({GARBAGE - 0x80:#x}, {GARBAGE:#x}, {GARBAGE:#x}, {GARBAGE:#x}, {GARBAGE:#x});
		printf("called\\n");
		fflush(stdout);
	}}
}}
"""


@pytest.mark.needs("x86_64")  # it is written in its assembly
def test_what_else_is_in_a_register_is_not_seen(tmp_path: Path, kernel: KernelTypes) -> None:
    path = tmp_path / "narrow"
    subprocess.run(["gcc", "-g", "-w", "-x", "c", "-", "-o", path], input=NARROW, text=True, check=True)
    s8, u8 = ctypes.c_int8(GARBAGE).value, GARBAGE & 0xFF
    s16, s32 = ctypes.c_int16(GARBAGE).value, ctypes.c_int32(GARBAGE).value
    expected = {
        f"r:{path}:returns__Bool()": {(0,): 1, (1,): 1},
        f"r:{path}:returns__Bool():int:$retval": {(0,): 1, (1,): 1},
        f"r:{path}:returns_s8():long:$retval": {(s8,): 1},
        f"r:{path}:returns_u8():long:$retval": {(u8,): 1},
        f"r:{path}:returns_s16():long:$retval": {(s16,): 1},
        f"r:{path}:returns_s32():long:$retval": {(s32,): 1},
        f"p:{path}:takes():int,int,int,int,int:a,b,c,d,e": {(0, s8, u8, s16, s32): 1},
        f"r:{path}:takes():int,int:$entry(a),$entry(d)": {(0, s16): 1},
    }
    with subprocess.Popen([path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as program:
        taken = _counted(list(expected), program, kernel)
        program.communicate()
    assert [counts for counts, _ in taken] == list(expected.values())


def _counted(texts: list[str], program: subprocess.Popen[str], kernel: KernelTypes) -> list[Taken]:
    """What the specifiers, of one object, count while the program does its work once."""
    assert program.stdin
    assert program.stdout
    with Targets(kernel, NoHeaders()) as targets:
        parsed = [specifier.parse(text) for text in texts]
        questions = [codegen.Question(one, targets.find(one), COUNT) for one in parsed]
        generated = codegen.generate(questions, kernel.constant, codegen.Options())
    with Trace(compile(generated.source), generated.plan, pid=program.pid) as trace:
        program.stdin.write("\n")
        program.stdin.flush()
        assert program.stdout.readline() == "called\n"
        return trace.take()
