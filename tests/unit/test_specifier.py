"""The specifiers' grammar, and what is said of texts that are not in it."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tcpobs.tools.argdist.specifier import KINDS, Specifier, SpecifierError, parse, type_name

PIECES = st.sampled_from(
    [
        *(
            "p",
            "r",
            "t",
            "u",
            ":",
            "::",
            ",",
            "#",
            "?",
            "(",
            ")",
            "[",
            "]",
            "{",
            "}",
            "'",
            '"',
            "\\",
            "*",
            " ",
            "...",
        ),
        *(
            "int",
            "struct",
            "unsigned",
            "const",
            "char",
            "$retval",
            "$entry",
            "->",
            ".",
            "a",
            "f()",
            "é",
            "\n",
            "\0",
        ),
    ]
)
TEXTS = st.one_of(
    st.text(),
    st.lists(PIECES).map("".join),
    st.lists(PIECES).map(lambda pieces: "p::f(" + "".join(pieces)),
    st.lists(PIECES).map(lambda pieces: "r:c:f(int a):int:" + "".join(pieces)),
)


def parts(text: str) -> tuple[list[str], list[str], str | None]:
    """Types, expressions and filter, as text."""
    found = parse(text)
    return (
        [str(type) for type in found.types],
        [part.text for part in found.expressions],
        found.filter.text if found.filter else None,
    )


def test_all_parts() -> None:
    found = parse("p:c:write(int fd, const char *buf):int,char*:fd,buf:fd==1#what is written")
    assert (found.kind, found.library.text, found.function.text) == ("p", "c", "write")
    assert [(str(parameter.type), parameter.name) for parameter in found.parameters] == [
        ("int", "fd"),
        ("char *", "buf"),
    ]
    assert [str(type) for type in found.types] == ["int", "char *"]
    assert [(part.text, part.start) for part in found.expressions] == [("fd", 45), ("buf", 48)]
    assert found.filter
    assert (found.filter.text, found.filter.start) == ("fd==1", 52)
    assert found.label == "what is written"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("p::f()", ([], [], None)),
        ("p::f", ([], [], None)),
        ("p::f():", ([], [], None)),
        ("p::f()::", ([], [], None)),
        ("p::f():::a == 1", ([], [], "a == 1")),
        ("r::f():u32:$PID:$latency > 100000", (["u32"], ["$PID"], "$latency > 100000")),
        (" p : : f ( ) : int : a ", (["int"], ["a"], None)),
        ("p::f():int:a?b:c", (["int"], ["a?b:c"], None)),
        ("p::f():int:a?b?1:2:c:d?e:f", (["int"], ["a?b?1:2:c"], "d?e:f")),
        ("p::f():int,int:(a, b),c[d, e]", (["int", "int"], ["(a, b)", "c[d, e]"], None)),
        ('p::f():int:STRCMP("a:b,c#d", s):x', (["int"], ['STRCMP("a:b,c#d", s)'], "x")),
        ('p::f():int:STRCMP("\\"):", s):x', (["int"], ['STRCMP("\\"):", s)'], "x")),
        ("p::f():int,int:a==':',b==','", (["int", "int"], ["a==':'", "b==','"], None)),
        (
            "p::f():unsigned long long,struct sock*:a,b",
            (["unsigned long long", "struct sock *"], ["a", "b"], None),
        ),
        ("p::f():const char * const *:a", (["char **"], ["a"], None)),
    ],
)
def test_parts(text: str, expected: object) -> None:
    assert parts(text) == expected


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("p::f()", None),
        ("p::f()#", None),
        ("p::f()# calls ", "calls"),
        ("p::f()#it's (all) of #them: a, b", "it's (all) of #them: a, b"),
        ("p::f():int:a=='#'#hash", "hash"),
    ],
)
def test_labels(text: str, label: str | None) -> None:
    assert parse(text).label == label


@pytest.mark.parametrize(
    ("signature", "expected"),
    [
        ("", []),
        ("void", []),
        ("int fd", [("int", "fd")]),
        ("unsigned int fd, u64", [("unsigned int", "fd"), ("u64", "")]),
        ("struct sock *sk, struct msghdr *msg", [("struct sock *", "sk"), ("struct msghdr *", "msg")]),
        ("const struct timespec __user *restrict when", [("struct timespec *", "when")]),
        ("char **argv, char *envp[]", [("char **", "argv"), ("char **", "envp")]),
        ("int fds[2]", [("int *", "fds")]),
        ("void (*handler)(int, char), int signal", [("void *", "handler"), ("int", "signal")]),
        ("const char *format, ...", [("char *", "format")]),
        ("gfp_t flags", [("gfp_t", "flags")]),
        ("size_t", [("size_t", "")]),
        ("long unsigned", [("long unsigned", "")]),
    ],
)
def test_signatures(signature: str, expected: object) -> None:
    found = parse(f"p::f({signature})").parameters
    assert [(str(parameter.type), parameter.name) for parameter in found] == expected


@pytest.mark.parametrize(
    ("text", "library", "function"),
    [
        ("u:pthread:pthread_start()", "pthread", "pthread_start"),
        ("u:/usr/bin/python3:python.function__entry()", "/usr/bin/python3", "python.function__entry"),
        ("t:irq:irq_handler_entry", "irq", "irq_handler_entry"),
        ("p::tcp_*()", "", "tcp_*"),
        ("p:c:memcpy@GLIBC_2.14()", "c", "memcpy@GLIBC_2.14"),
    ],
)
def test_names(text: str, library: str, function: str) -> None:
    found = parse(text)
    assert (found.library.text, found.function.text) == (library, function)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "unknown probe type"),
        ("^x::f()", "unknown probe type 'x'"),
        ("p^", "a specifier is TYPE:LIBRARY:FUNCTION"),
        ("p:c^", "a specifier is TYPE:LIBRARY:FUNCTION"),
        ("p::^", "the function's name is missing"),
        ("p::^(int a)", "the function's name is missing"),
        ("p::f^ g()", "' ' cannot be in a function's name"),
        ('p::f^"()', "this quote is never closed"),
        ("p::f^(", "this '(' is never closed"),
        ("p::f([^)", "this ')' closes another kind"),
        ("p::f()^)", "nothing is open for this ')'"),
        ("p::f()^g", "a ':' is missing here"),
        ("p::f(int a ^b)", "a ',' is missing before this"),
        ("p::f(int a,^ )", "a parameter's type is missing"),
        ("p::f(int ^3)", "'3' cannot be in a parameter"),
        ("p::f(^int *************a)", "too many stars"),
        ("p::f():int^", "types need expressions"),
        ("p::f():int:^", "an expression is missing"),
        ("p::f():int,int:a,^", "an expression is missing"),
        ("p::f():^:a", "a type is missing"),
        ("p::f():int,^int:a", "2 types for 1 expression:"),
        ("p::f():^int:a,b", "1 type for 2 expressions"),
        ("p::f():int ^x:a", "'x' is more than a type"),
        ("p::f():int:a:b:^c", "too many parts"),
        ("p::f():int:^'a:b", "this quote is never closed"),
        ("t:^:f()", "the category, as t:block:block_rq_complete() is missing"),
        ("u:^:f()", "the library or path is missing"),
        ("t:irq:f(^int a)", "this kind of probe has no signature"),
    ],
)
def test_errors(text: str, said: str) -> None:
    place = max(text.find("^"), 0)
    text = text.replace("^", "")
    with pytest.raises(SpecifierError) as caught:
        parse(text)
    assert said in caught.value.message
    assert caught.value.position == place
    assert str(caught.value).splitlines()[1:] == [f"  {text}", f"  {' ' * place}^"]


def test_an_error_has_three_lines_whatever_the_text() -> None:
    with pytest.raises(SpecifierError) as caught:
        parse("p::f(\n\x1b[31m")
    assert str(caught.value).splitlines()[1:] == ["  p::f(??[31m", "         ^"]


@given(TEXTS)
@example("p::f():int:a?b")
@example("p::f():int:'\\")
def test_any_text_is_a_specifier_or_an_error_with_a_place(text: str) -> None:
    try:
        found = parse(text)
    except SpecifierError as error:
        position, lines = error.position, str(error).split("\n")
    else:
        position, lines = 0, []
        _check(found)
    assert 0 <= position <= len(text)
    assert len(lines) in (0, 3)


def _check(found: Specifier) -> None:
    """It has all that a specifier has, and says rightly where in the text."""
    text = found.text
    assert found.kind in KINDS
    assert len(found.types) == len(found.expressions)
    for part in (
        found.library,
        found.function,
        *found.expressions,
        *([found.filter] if found.filter else []),
    ):
        assert text[part.start : part.start + len(part.text)] == part.text


@given(TEXTS)
def test_any_text_is_a_type_or_none(text: str) -> None:
    found = type_name(text)
    assert found is None or found.words
