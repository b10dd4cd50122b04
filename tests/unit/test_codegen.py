"""Whole programs, to the character; and that no text can be more in them than a name or a comment."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcpobs.tools.argdist import codegen, types
from tcpobs.tools.argdist.plan import HISTOGRAM, TRACEPOINT, USDT, USER
from tcpobs.tools.argdist.specifier import SpecifierError, parse
from tcpobs.tools.argdist.types import INTEGERS, Field, Record

from .by_hand import generated, target

HEAD = """\
// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause
#include "argdist.bpf.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

struct lost lost[1];

"""


def test_a_count_in_the_kernel() -> None:
    program = generated(target("p::f():int,char*:p->bits,s:n > 3#label"))
    assert program.source == HEAD + (
        """\
struct node {
	u32 bits : 5;
} CORE;

/* p::f():int,char*:p->bits,s:n > 3#label */
struct key_0 {
	s64 value_0; /* p->bits */
	char value_1[80]; /* s */
};

COUNTS(counts_0, struct key_0);

static __always_inline int probe_0(int n, struct node *p, char *s)
{
	struct key_0 key = {};

	if (!ours())
		return 0;
	if (!((n > 3)))
		return 0;
	key.value_0 = (s64)(int)((int)kernel_bits(p, bits));
	bpf_probe_read_either_str(key.value_1, 80, (const void *)(s));
	COUNT(counts_0, &key, &lost[0]);
	return 0;
}

SEC("fentry/f")
int probe_0_fentry(u64 *arguments)
{
	return probe_0((int)arguments[0], (struct node *)arguments[1], (char *)arguments[2]);
}

SEC("kprobe/f")
int probe_0_kprobe(struct pt_regs *registers)
{
	return probe_0((int)PT_REGS_PARM1(registers), (struct node *)PT_REGS_PARM2(registers), """
        """(char *)PT_REGS_PARM3(registers));
}
"""
    )
    assert program.plan.probes[0].ways == [["probe_0_fentry"], ["probe_0_kprobe"]]
    assert program.lines == [(11, program.source.count("\n"))]


def test_a_count_in_a_process() -> None:
    program = generated(target("p:lib:f():int:p->inner.second+p->halves[1]", USER, place="lib"))
    assert program.source == HEAD + (
        """\
struct inner {
	union {
		struct { char before_second[4]; u32 second; };
		char all[8];
	};
};

struct node {
	union {
		struct { char before_inner[64]; struct inner inner; } __attribute__((packed));
		struct { char before_halves[16]; u16 halves[4]; };
		char all[72];
	};
};

/* p:lib:f():int:p->inner.second+p->halves[1] */
struct key_0 {
	s64 value_0; /* p->inner.second+p->halves[1] */
};

COUNTS(counts_0, struct key_0);

static __always_inline int probe_0(struct node *p)
{
	struct key_0 key = {};

	if (!ours())
		return 0;
	key.value_0 = (s64)(int)((user(p, inner.second) + user(p, halves[1])));
	COUNT(counts_0, &key, &lost[0]);
	return 0;
}

SEC("uprobe")
int probe_0_uprobe(struct pt_regs *registers)
{
	return probe_0((struct node *)PT_REGS_PARM2(registers));
}
"""
    )


def test_a_histogram_at_the_return() -> None:
    question = replace(target("r:lib:f():long:$latency/$entry(n)", USER, place="lib"), report=HISTOGRAM)
    assert generated(question).source == HEAD + (
        """\
/* r:lib:f():long:$latency/$entry(n) */
SLOTS(slots_0, 65);

static __always_inline int probe_0(long retval, u64 latency, int entry_n)
{
	if (!ours())
		return 0;
	s64 value = (long)((latency / entry_n));

	SLOT(slots_0, power(value, value < 0));
	return 0;
}

struct call_0 {
	u64 began_ns;
	int entry_n;
};

CALLS(calls_0, struct call_0);

SEC("uretprobe")
int probe_0_uretprobe(struct pt_regs *registers)
{
	struct call call = { bpf_get_current_pid_tgid(), PT_REGS_SP(registers) - RETURN_TAKES };
	struct call_0 *found = bpf_map_lookup_elem(&calls_0, &call), entry;
	u64 latency;

	if (!found)
		return 0;
	entry = *found;
	bpf_map_delete_elem(&calls_0, &call);
	latency = bpf_ktime_get_ns() - entry.began_ns;

	return probe_0((long)PT_REGS_RC(registers), latency, entry.entry_n);
}

SEC("uprobe")
int probe_0_uprobe(struct pt_regs *registers)
{
	struct call_0 entry = { .began_ns = bpf_ktime_get_ns(), .entry_n = (int)PT_REGS_PARM1(registers), };

	if (ours())
		enter(&calls_0, PT_REGS_SP(registers), &entry, &lost[0]);

	return 0;
}
"""
    )


def test_calls_are_counted_in_a_slot() -> None:
    source = generated(target("p::f()")).source
    assert "SLOTS(slots_0, 1);" in source
    assert "SLOT(slots_0, 0);" in source


def test_a_tracepoint_reads_its_fields_directly() -> None:
    fields = [
        Field("common_type", INTEGERS["u16"], 0),
        Field("irq", types.INT, 64),
        Field("name", types.Pointer(types.CHAR), 96, located="data_loc"),
    ]
    question = target("t:irq:enter():int,char*:args->irq,args->name", TRACEPOINT, place="irq")
    question.target.record = Record("struct", "enter_event", 16, lambda: fields)
    program = generated(question)
    assert 'SEC("tracepoint/irq/enter")' in program.source
    assert "key.value_0 = (s64)(int)(args->irq);" in program.source
    assert (
        "bpf_probe_read_either_str(key.value_1, 80, "
        "(const void *)((char *)((const char *)args + 0 + (args->name & 0xffff))));"
    ) in program.source
    assert program.plan.probes[0].fields == {"irq": (8, 4), "name": (12, 4)}


def test_a_bool_is_the_lowest_byte_of_its_register() -> None:
    source = generated(target("p:lib:f():int:flag", USER, ("flag", INTEGERS["bool"]), place="lib")).source
    assert "probe_0((bool)(u8)PT_REGS_PARM1(registers))" in source


@pytest.mark.parametrize("name", ["key", "half", "u64", "at_", "bpf_probe_read_user", "LICENSE", "kernel"])
def test_a_parameters_name_is_none_of_the_programs_own(name: str) -> None:
    source = generated(target(f"p:lib:f():int:{name}", USER, (name, types.INT), place="lib")).source
    assert f"probe_0(int {name}_)" in source
    assert f"(s64)(int)({name}_)" in source


@pytest.mark.parametrize(
    ("text", "report", "said"),
    [
        ("p::f()", HISTOGRAM, "a histogram needs a value"),
        ("p::f():int,int:n,n", HISTOGRAM, "a histogram is of one expression"),
        ("p::f():char*:s", HISTOGRAM, "a histogram is of an integer, and char * is none"),
        ("p::f():struct node:p", "count", "struct node is no value"),
        ("p::f():double:n", "count", "BPF has no floating-point numbers"),
        ("p::f():char*,char*,char*,char*,char*:s,s,s,s,s", "count", "have 400 bytes, and 384 is the most"),
        ("p::f():nothing:n", "count", "unknown type 'nothing'"),
    ],
)
def test_errors(text: str, report: str, said: str) -> None:
    with pytest.raises(SpecifierError, match=re.escape(said)):
        generated(replace(target(text), report=report))


# ---- nothing gets out of a comment, a string or a name


def _bare(source: str) -> str:
    """C without comments and without what is in strings and character constants, as a compiler takes it."""
    found, position = [], 0
    for match in re.finditer(
        r"""/\*.*?\*/|//[^\n]*|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'""", source, re.DOTALL
    ):
        found.append(source[position : match.start()])
        found.append({"/": " ", '"': '""', "'": "''"}[match[0][0]])
        position = match.end()
    return "".join([*found, source[position:]])


ESCAPES = st.lists(
    st.one_of(
        st.sampled_from(
            [
                "*/",
                "/*",
                "*",
                "/",
                "//",
                '"',
                "'",
                "\\",
                "\n",
                "\r",
                "\u2028",
                "??/",
                "*\\\n/",
                "EVIL",
                "#",
                ")",
                "(",
            ]
        ),
        st.characters(),
    )
).map("".join)


@given(ESCAPES)
def test_a_label_stays_in_its_comment(label: str) -> None:
    plain = generated(target("p::f():int:n")).source
    assert _bare(generated(target(f"p::f():int:n#{label}")).source) == _bare(plain)


@given(ESCAPES, ESCAPES, st.sampled_from(["p", "r", "u", "t"]), st.booleans())
def test_a_name_stays_a_name(library: str, function: str, kind: str, wildcard: bool) -> None:
    text = f"{kind}:{library}:{function}()"
    try:
        parsed = parse(text)
    except SpecifierError:
        return
    where = {"t": TRACEPOINT, "u": USDT}.get(kind, USER if parsed.library.text else "kernel")
    if where == TRACEPOINT:
        return  # only those that are there: tracepoints.find
    question = target(text, where, place=parsed.library.text)
    question.target.wildcard = wildcard and where != USDT
    source = generated(question).source
    assert "EVIL" not in _bare(source)
    assert all(
        re.fullmatch(r"[\w./@*?$+:-]+", name) for name in re.findall(r'^SEC\("(.*)"\)$', source, re.MULTILINE)
    )
    assert source.count("SEC(") == len(re.findall(r'\bSEC\("[^"\\\n]*"\)', source))


@given(ESCAPES)
def test_an_expression_stays_one(text: str) -> None:
    try:
        source = generated(target(f"p::f():int:{text}:EVIL == 1")).source
    except (SpecifierError, IndexError):
        return
    assert "EVIL" not in _bare(source)


@given(ESCAPES)
def test_a_text_stays_a_text(text: str) -> None:
    try:
        source = generated(target(f'p::f():int:STRCMP("{text}", s)')).source
    except SpecifierError:
        return
    assert _bare(source) == _bare(generated(target('p::f():int:STRCMP("x", s)')).source)


@given(ESCAPES)
def test_a_macros_name_is_an_identifier(define: str) -> None:
    """-D only adds a name that expressions may use; the macro itself is the compiler's argument."""
    options = codegen.Options(defines=(f"{define}=1", "GOOD=2"))
    source = codegen.generate([target("p::f():int:GOOD")], lambda name: None, options).source
    assert "(GOOD)" in source
    assert "EVIL" not in _bare(source)
