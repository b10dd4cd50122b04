"""A small scope of types made by hand, for tests of what argdist makes of expressions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tcpobs.tools.argdist import codegen, specifier, types
from tcpobs.tools.argdist.declarations import Declarations
from tcpobs.tools.argdist.expressions import Rewriter, Value
from tcpobs.tools.argdist.plan import COUNT, KERNEL
from tcpobs.tools.argdist.scope import Scope, TypeNames
from tcpobs.tools.argdist.targets import Argument, Target
from tcpobs.tools.argdist.types import Array, Field, Float, Pointer, Record

if TYPE_CHECKING:
    from tcpobs.tools.argdist.codegen import Generated
    from tcpobs.tools.argdist.types import Type

U16, U32 = types.INTEGERS["u16"], types.INTEGERS["u32"]
CONSTANTS = {"AF_INET": 2, "LARGE": 1 << 40, "NEGATIVE": -1}


def node(kernel: bool) -> Record:
    """`struct node`, of the kernel or of a process."""
    either = Record(
        "union",
        "",
        8,
        lambda: [Field("whole", types.LONG, 0), Field("halves", Array(U16, 4), 0)],
        kernel=kernel,
    )

    def fields() -> list[Field]:
        return [
            Field("next", Pointer(record), 0),
            Field("number", types.INT, 64),
            Field("bits", U32, 96 + 3, 5),
            Field("", either, 128),
            Field("text", Array(types.CHAR, 16), 192),
            Field("real", Float("double", 8), 320),
            Field("name", Pointer(types.CHAR), 384),
            Field("theirs", Pointer(types.INT, user=True), 448),
            Field("inner", inner, 512),
        ]

    inner = Record(
        "struct", "inner", 8, lambda: [Field("first", U32, 0), Field("second", U32, 32)], kernel=kernel
    )
    record = Record("struct", "node", 72, fields, kernel=kernel)
    return record


class Known:
    """Types by name."""

    def __init__(self, kernel: bool) -> None:
        self.node = node(kernel)

    def find(self, spelling: str) -> Type | None:
        found: dict[str, Type] = {"struct node": self.node, "node_t": self.node, "gfp_t": U32}
        return found.get(spelling)


def target(text: str, kind: str = KERNEL, *parameters: tuple[str, Type], place: str = "") -> codegen.Question:
    """A question about the function `text` asks for, whatever its name, with these parameters."""
    parsed = specifier.parse(text)
    known = Known(kind == KERNEL)
    pointer = Pointer(known.node)
    slots = parameters or (
        ("n", types.INT),
        ("p", pointer),
        ("s", Pointer(types.CHAR)),
        ("v", Pointer(types.VOID)),
    )
    arguments = [Argument(name, type, slot) for slot, (name, type) in enumerate(slots)]
    found = Target(
        kind,
        place,
        [parsed.function.text],
        TypeNames(parsed, [known]),
        arguments,
        known=kind == KERNEL,
    )
    return codegen.Question(parsed, found, COUNT)


def generated(*questions: codegen.Question, machine: str = "x86_64") -> Generated:
    """What codegen makes of them."""
    return codegen.generate(questions, CONSTANTS.get, codegen.Options(machine=machine))


def rewriter(expression: str, memory: str = "user", kind: str = "p") -> tuple[Rewriter, Declarations]:
    """The rewriter of an expression over n, p, s, v, q and `args`."""
    parsed = specifier.parse(f"{kind}::f():int:{expression}")
    known = Known(memory == "kernel")
    pointer = Pointer(known.node)
    names: dict[str, Type] = {
        "n": types.INT,
        "p": pointer,
        "q": Pointer(pointer),
        "s": Pointer(types.CHAR),
        "v": Pointer(types.VOID),
        "$retval": types.LONG,
    }
    scope = Scope(
        parsed,
        {name: Value(name, type, memory) for name, type in names.items()},
        TypeNames(parsed, [known]),
        memory,
        CONSTANTS.get,
        ["MACRO"],
        False,
        {"size": types.LONG},
    )
    declarations = Declarations()
    return Rewriter(parsed.expressions[0], scope, declarations), declarations


def value(expression: str, memory: str = "user", kind: str = "p") -> Value:
    """The expression, rewritten."""
    return rewriter(expression, memory, kind)[0].as_number()
