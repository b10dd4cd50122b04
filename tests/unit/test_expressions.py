"""Expressions, and the C with safe reads that they become. (Their values: tests/live/test_rewriter.py.)"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcpobs.tools.argdist import types
from tcpobs.tools.argdist.specifier import SpecifierError
from tcpobs.tools.argdist.types import Integer, Pointer

from .by_hand import rewriter, value


@pytest.mark.parametrize(
    ("expression", "kernel", "user"),
    [
        ("p->number", "kernel(p, number)", "user(p, number)"),
        ("p->next->number", "kernel(kernel(p, next), number)", "user(user(p, next), number)"),
        ("(*p).number", "kernel(p, number)", "user(p, number)"),
        ("p->inner.second", "kernel(p, inner.second)", "user(p, inner.second)"),
        ("&p->inner.second", "address(p, inner.second)", "&p->inner.second"),
        ("p->whole", "kernel(p, whole)", "user(p, whole)"),
        ("p->halves[2]", "kernel(p, halves[2])", "user(p, halves[2])"),
        ("p->halves[n]", "kernel_value((address(p, halves[0]) + n))", "user_value((&p->halves[0] + n))"),
        ("p->halves[010]", "kernel(p, halves[010])", "user(p, halves[010])"),
        ("p->bits", "(int)kernel_bits(p, bits)", "(int)user_bits(p, 12, 1, 3, 5, u64)"),
        ("p[2].number", "kernel(element(p, 2), number)", "user((p + 2), number)"),
        ("(p - n)->number", "kernel(element(p, -n), number)", "user((p + -n), number)"),
        ("*q", "kernel_value(q)", "user_value(q)"),
        ("(*q)->number", "kernel(kernel_value(q), number)", "user(user_value(q), number)"),
        ("*p->theirs", "user_value(kernel(p, theirs))", "user_value(user(p, theirs))"),
        (
            "((struct node *)v)->number",
            "kernel(((struct node *)v), number)",
            "user(((struct node *)v), number)",
        ),
        (
            "((const node_t *)v)->number",
            "kernel(((struct node *)v), number)",
            "user(((struct node *)v), number)",
        ),
        ("*(u16 *)v", "kernel_value(((u16 *)v))", "user_value(((u16 *)v))"),
        ("sizeof(struct node)", "bpf_core_type_size(struct node)", "72ul"),
        ("sizeof p->inner", "bpf_core_type_size(struct inner)", "8ul"),
        (
            "p->next - p",
            "divide((s64)kernel(p, next) - (s64)p, bpf_core_type_size(struct node))",
            "divide((s64)user(p, next) - (s64)p, 72)",
        ),
        (
            'STRCMP("a:b", s)',
            'begins_with(bpf_probe_read_either, s, "a:b")',
            'begins_with(bpf_probe_read_user, s, "a:b")',
        ),
        (
            'STRCMP("a", p->name)',
            'begins_with(bpf_probe_read_either, kernel(p, name), "a")',
            'begins_with(bpf_probe_read_user, user(p, name), "a")',
        ),
        (
            'STRCMP("a", p->text)',
            'begins_with(bpf_probe_read_kernel, address(p, text[0]), "a")',
            'begins_with(bpf_probe_read_user, &p->text[0], "a")',
        ),
    ],
)
def test_reads(expression: str, kernel: str, user: str) -> None:
    assert value(expression, "kernel").code == kernel
    assert value(expression, "user").code == user


@pytest.mark.parametrize(
    ("expression", "code", "type"),
    [
        ("n + 1", "(n + 1)", "int"),
        ("n / 3", "(int)divide(n, 3)", "int"),
        ("n % 3l", "(long)modulo(n, 3l)", "long"),
        ("(u32)n / 3", "((u32)n / 3)", "unsigned int"),
        ("n / sizeof(int[3])", "(n / 12ul)", "unsigned long"),
        ("sizeof(char) + sizeof(unsigned short)", "(1ul + 2ul)", "unsigned long"),
        ("sizeof(int *[3])", "24ul", "unsigned long"),
        ("sizeof(int (*)[3])", "8ul", "unsigned long"),
        ("-n << 3", "(-n << 3)", "int"),
        ("- -n", "-(-n)", "int"),
        ("n ? p->number : 0l", "(n ? user(p, number) : 0l)", "long"),
        ("n == AF_INET && !p", "((n == 2) && !p)", "int"),
        ("LARGE - NEGATIVE", "(1099511627776l - -1)", "long"),
        ("MACRO * 2", "(MACRO * 2)", "long"),
        ("'a' + 0x1fu + 017", "(('a' + 0x1fu) + 017)", "unsigned int"),
        ("p->bits - 10", "((int)user_bits(p, 12, 1, 3, 5, u64) - 10)", "int"),
        ("(u8)p->number", "(u8)user(p, number)", "u8"),
    ],
)
def test_numbers(expression: str, code: str, type: str) -> None:
    found = value(expression)
    assert isinstance(found.type, Integer)
    assert (found.code, found.type.spelling) == (code, type)


@pytest.mark.parametrize(
    ("constant", "type"),
    [
        ("2147483647", "int"),
        ("2147483648", "long"),
        ("0x80000000", "unsigned int"),
        ("037777777777", "unsigned int"),
        ("4294967295u", "unsigned int"),
        ("1ul", "unsigned long"),
        ("1LL", "long"),
        ("9223372036854775807", "long"),
        ("0xffffffffffffffff", "unsigned long"),
        ("'\\377'", "int"),
    ],
)
def test_constants_have_the_types_of_c(constant: str, type: str) -> None:
    found = value(constant).type
    assert isinstance(found, Integer)
    assert found.spelling == type


def test_only_what_is_read_is_declared() -> None:
    for memory, expected in (
        ("kernel", "struct node {\n\tstruct node *next;\n\tint number;\n} CORE;\n"),
        (
            "user",
            "struct node {\n\tunion {\n"
            "\t\tstruct { struct node *next; };\n"
            "\t\tstruct { char before_number[8]; int number; };\n"
            "\t\tchar all[72];\n\t};\n};\n",
        ),
    ):
        found, declarations = rewriter("p->next->number", memory)
        found.as_number()
        assert declarations.text() == expected


def test_what_fills_a_record_has_no_fields_name() -> None:
    record = types.Record(
        "struct",
        "odd",
        12,
        lambda: [
            types.Field("all", types.INT, 0),
            types.Field("before_last", types.INT, 32),
            types.Field("last", types.INT, 64),
        ],
    )
    from tcpobs.tools.argdist.declarations import Declarations

    declarations = Declarations()
    for field in record.fields:
        declarations.use(record, field)
    assert "char all_[12];" in declarations.text()
    assert "char before_last_[8]; int last;" in declarations.text()


@pytest.mark.parametrize(
    ("expression", "said"),
    [
        ("p->^numbr", "struct node has no field 'numbr'"),
        ("n->^number", "this is no pointer, but a number"),
        ("p.^number", "this is no struct: use ->"),
        ("p->inner->^first", "this is no pointer: use ."),
        ("v->^number", "this points to no struct: cast it"),
        ("p->number.^x", "this is no struct"),
        ("*^v", "what this points to has no size"),
        ("*^n", "this is no pointer, and no array"),
        ("^unknown", "unknown name 'unknown'"),
        ("n + ^unknown", "unknown name 'unknown'"),
        ("^$foo", "unknown $foo"),
        ("^$latency", "$latency is known at the return only"),
        ("$entry(^size)", "$entry is for returns"),
        ("^f(n)", "there is no function 'f' here"),
        ('^"text"', "text is compared by STRCMP"),
        ('^STRCMP("a")', "STRCMP takes a text and an expression"),
        ('STRCMP(^"", s)', "there is nothing to compare with"),
        ("^1.5", "BPF has no floating-point numbers"),
        ("^p->real", "BPF has no floating-point numbers"),
        ("^(double)n", "BPF has no floating-point numbers"),
        ("^089", "this is no expression in C"),
        ("^0x10000000000000000", "this number has more than 64 bits"),
        ("-^p", "a number is needed here, and this is a pointer"),
        ("^p->inner + 1", "a number is needed here, and this is a struct"),
        ("^p * 2", "* is not for pointers"),
        ("&^n", "this has no address"),
        ("&^p->bits", "this has no address"),
        ("sizeof ^p->bits", "a bit field has no size"),
        ("n / ^0x0", "this divides by 0"),
        ("n << ^32", "this shifts a number of 32 bits by 32"),
        ("^n = 1", "this cannot be in an expression"),
        ("^n++", "++ would change something"),
        ("^n /* 1 */", "a comment cannot be in an expression"),
        ("^n +", "this is no expression in C"),
        ("n ^n", "this is no expression in C"),
        ("n ? 1^", "this is no expression in C"),
        ("(struct ^nothing *)v", "unknown type 'struct nothing'"),
        ("(int^[n])n", "an array's length must be a number"),
    ],
)
def test_errors(expression: str, said: str) -> None:
    start, place = len("p::f():int:"), expression.find("^")
    with pytest.raises(SpecifierError) as caught:
        rewriter(expression.replace("^", ""))[0].as_number()
    assert said in caught.value.message
    assert caught.value.position - start == place


@pytest.mark.parametrize(
    "expression",
    ["+".join(["1"] * 5000), "(" * 3000 + "1" + ")" * 3000, "p" + "->next" * 3000, "- " * 3000 + "1"],
    ids=["sum", "parentheses", "pointers", "signs"],
)
def test_what_is_nested_too_deeply_is_an_error(expression: str) -> None:
    with pytest.raises(SpecifierError, match="this is nested too deeply"):
        value(expression)


def test_a_pointer_to_memory_of_either_kind() -> None:
    found = value("n ? p->theirs : (int *)v", "kernel")
    assert found.memory == "either"
    assert found.type == Pointer(types.INT, user=True) or found.type == Pointer(types.INT)


WORDS = st.sampled_from(
    [
        *(
            "(",
            ")",
            "[",
            "]",
            "->",
            ".",
            "*",
            "&",
            "-",
            "~",
            "!",
            "/",
            "%",
            "<<",
            "==",
            "&&",
            "?",
            ":",
            " ",
            ",",
            ";",
        ),
        *(
            "1",
            "07",
            "08",
            "0x1u",
            "9l",
            "1e5",
            "'a'",
            "'\\n'",
            "L'a'",
            '"x"',
            "n",
            "p",
            "q",
            "s",
            "v",
            "MACRO",
        ),
        *(
            "$retval",
            "$PID",
            "$COMM",
            "$entry(size)",
            "AF_INET",
            "NEGATIVE",
            "next",
            "number",
            "bits",
            "halves",
        ),
        *(
            "text",
            "real",
            "inner",
            "sizeof",
            "(int)",
            "(struct node *)",
            "(char *)",
            "(node_t *)",
            "(void *)",
        ),
        *("(int[3])", "struct", "unsigned", "=", "++", "{", "}", "_Generic", "return", "\\", "\n", "é"),
    ]
)


def _combined(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    fields = st.sampled_from(["next", "number", "bits", "halves", "text", "real", "inner", "theirs", "x"])
    operators = st.sampled_from(["+", "-", "*", "/", "%", "<<", "==", "&&", "|", "<"])
    casts = st.sampled_from(
        ["(int)", "(struct node *)", "(char *)", "(u64)", "(void *)", "(int (*)[2])", "(bool)"]
    )
    return st.one_of(
        st.builds("{}->{}".format, inner, fields),
        st.builds("({}).{}".format, inner, fields),
        st.builds("{}[{}]".format, inner, inner),
        st.builds("{}({})".format, st.sampled_from([*"*&-~!", "sizeof"]), inner),
        st.builds("({} {} {})".format, inner, operators, inner),
        st.builds("({} ? {} : {})".format, inner, inner, inner),
        st.builds("{}{}".format, casts, inner),
        st.builds('STRCMP("a", {})'.format, inner),
    )


EXPRESSIONS = st.one_of(
    st.text(),
    st.lists(WORDS).map("".join),
    st.recursive(
        st.sampled_from(["n", "p", "q", "s", "v", "1", "'a'", "$COMM", "NEGATIVE"]), _combined, max_leaves=8
    ),
)


@given(EXPRESSIONS, st.sampled_from(["kernel", "user"]), st.sampled_from("pr"))
def test_any_text_is_an_expression_or_an_error_with_a_place(text: str, memory: str, kind: str) -> None:
    for way in ("as_text", "as_number"):
        try:
            found, declarations = rewriter(text, memory, kind)
        except (SpecifierError, IndexError):
            return  # not one expression: the parser's business
        position = 0
        try:
            getattr(found, way)()
        except SpecifierError as error:
            position = error.position
        assert 0 <= position <= len("p::f():int:") + len(text)
        declarations.text()
