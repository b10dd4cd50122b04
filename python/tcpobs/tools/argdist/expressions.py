"""From an expression in C to C whose every load through a pointer is a safe read.

`a->b.c->d` becomes `kernel(kernel(a, b.c), d)`, or `user(...)` where the memory is the process's. Arithmetic
is left to the compiler; types are followed as far as reads, text and signs need them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cache

from pycparser import c_ast, c_parser

from tcpobs.tools.argdist import types
from tcpobs.tools.argdist.names import did_you_mean
from tcpobs.tools.argdist.tracepoints import REL_LOC
from tcpobs.tools.argdist.types import Array, Float, Function, Integer, Pointer, Record, Void, size_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    from tcpobs.tools.argdist.declarations import Declarations
    from tcpobs.tools.argdist.scope import Scope
    from tcpobs.tools.argdist.specifier import Part
    from tcpobs.tools.argdist.types import Field, Type

    _T = TypeVar("_T")

KERNEL, USER, EITHER, HERE = "kernel", "user", "either", "here"
"""Whose memory: the kernel's; the process's; one of the two; or the program's own, to be read as it is."""

_PREFIX = "int expression(void) { return ("
# Not a call's parentheses: to look for a type in DWARF may take seconds.
_CASTED = re.compile(r"(?<![\w$])\(\s*(?:(?:const|volatile)\s+)*([A-Za-z_]\w*)[\s*]*\)")
_MEASURED = re.compile(r"\bsizeof\s*\(?\s*(?:(?:const|volatile)\s+)*([A-Za-z_]\w*)")
_KEYWORDS = {"char", "short", "int", "long", "signed", "unsigned", "float", "double", "void", "_Bool"}
_NUMBER = re.compile(r"(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)[uUlL]*")
_COMPARISONS = {"==", "!=", "<", ">", "<=", ">="}


@dataclass(frozen=True)
class Value:
    """A value in C. `memory` is whose memory it points into, if it is a pointer."""

    code: str
    type: Type
    memory: str


@dataclass(frozen=True)
class Place:
    """A place in memory, not read yet: what `pointer` points to, or a field of it by the way `path`.

    For a bit field, `bits` is the field, and `offset` says where it is in what the pointer points to (bits).
    """

    pointer: str
    path: str
    type: Type
    memory: str
    bits: Field | None = None
    offset: int = 0

    @property
    def code(self) -> str:
        """As in C."""
        return f"{self.pointer}->{self.path}" if self.path else f"*{self.pointer}"


@cache
def _parser() -> c_parser.CParser:
    """One for all expressions: before version 3, making one takes longer than parsing."""
    return c_parser.CParser()


class Rewriter:
    """Of one expression. Raises SpecifierError, with the place in the specifier."""

    def __init__(self, part: Part, scope: Scope, declarations: Declarations) -> None:
        self._part = part
        self._scope = scope
        self._declarations = declarations

    # ---- syntax

    def _parse(self) -> c_ast.Node:
        text = self._part.text
        if "/*" in text or "//" in text:
            raise self._scope.error("a comment cannot be in an expression", self._part.start)
        named = {*_CASTED.findall(text), *_MEASURED.findall(text)} - _KEYWORDS
        typedefs = {name for name in named if self._scope.is_type(name)}
        prelude = "".join(f"typedef int {name};" for name in sorted(typedefs))
        flat = re.sub(r"\s", " ", text)
        try:
            tree = _parser().parse(f"{prelude}\n{_PREFIX}\n{flat}\n); }}", "")
        except c_parser.ParseError as error:
            raise self._syntax_error(str(error)) from None
        except RecursionError:
            raise self._too_deep() from None
        body = tree.ext[-1].body.block_items if isinstance(tree.ext[-1], c_ast.FuncDef) else []
        if len(tree.ext) != len(typedefs) + 1 or len(body) != 1 or not isinstance(body[0], c_ast.Return):
            raise self._scope.error("this is more than an expression", self._part.start)
        return body[0].expr

    def _unless_too_deep(self, visit: Callable[[c_ast.Node], _T], node: c_ast.Node) -> _T:
        try:
            return visit(node)
        except RecursionError:
            raise self._too_deep() from None

    def _too_deep(self) -> Exception:
        return self._scope.error("this is nested too deeply", self._part.start)

    def _syntax_error(self, said: str) -> Exception:
        """Pycparser says FILE:LINE:COLUMN: what; the expression is the third line."""
        match = re.match(r"[^:]*:(\d+):(\d+): (.*)", said)
        end = self._part.start + len(self._part.text)
        if not match:
            return self._scope.error("this is no expression in C", self._part.start)
        position = self._part.start + int(match[2]) - 1 if match[1] == "3" else end
        return self._scope.error("this is no expression in C", min(position, end))

    def _error(self, node: c_ast.Node, message: str) -> Exception:
        column = node.coord.column if node.coord and node.coord.column else 1
        position = self._part.start + column - 1 if node.coord and node.coord.line == 3 else self._part.start
        return self._scope.error(message, position)

    # ---- the kinds of nodes

    def _visit(self, node: c_ast.Node) -> Value | Place:
        method = getattr(self, f"_visit_{type(node).__name__.lower()}", None)
        if method is None:
            raise self._error(node, "this cannot be in an expression: it may only read")
        result: Value | Place = method(node)
        return result

    def _visit_constant(self, node: c_ast.Constant) -> Value:
        if node.type == "string":
            raise self._error(node, 'text is compared by STRCMP("text", expression)')
        if node.type == "char":
            return Value(node.value, types.INT, self._scope.memory)
        match = _NUMBER.fullmatch(node.value)
        if not match:
            raise self._error(node, "BPF has no floating-point numbers")
        digits = match[1]
        number = _integer(digits)
        if number >= 1 << 64:
            raise self._error(node, "this number has more than 64 bits")
        suffix = node.value[len(digits) :].lower()
        unsigned, wide = "u" in suffix, "l" in suffix
        hexadecimal = _is_octal(digits) or not digits.isdigit()
        if number < 1 << 31 or (number < 1 << 32 and (unsigned or hexadecimal)):
            size, unsigned = (8 if wide else 4), unsigned or (not wide and number >= 1 << 31)
        else:
            size, unsigned = 8, unsigned or number >= 1 << 63
        name = f"{'unsigned ' * unsigned}{'int' if size == 4 else 'long'}"
        return Value(node.value, types.INTEGERS[name], self._scope.memory)

    def _visit_id(self, node: c_ast.ID) -> Value | Place:
        known = self._scope.name(node.name)
        if known is not None:
            return known
        constant = self._scope.constant(node.name)
        if constant is not None:
            return constant
        raise self._error(node, self._scope.unknown(node.name))

    def _visit_structref(self, node: c_ast.StructRef) -> Value | Place:
        base = self._visit(node.name)
        if node.type == ".":
            if not isinstance(base, Place) or not isinstance(base.type, Record):
                hint = ": use ->" if isinstance(base.type, Pointer) else ""
                raise self._error(node.field, f"this is no struct{hint}")
            return self._field(base, base.type, node.field)
        pointer = self._load(base)
        if not isinstance(pointer.type, Pointer):
            hint = (
                ": use ."
                if isinstance(pointer.type, Record)
                else ", but a number: cast it to a pointer first"
            )
            raise self._error(node.field, f"this is no pointer{hint}")
        target = pointer.type.target
        if not isinstance(target, Record):
            raise self._error(
                node.field, "this points to no struct: cast it, as in ((struct sock *)p)->sk_family"
            )
        return self._field(Place(_operand(pointer.code), "", target, pointer.memory), target, node.field)

    def _field(self, place: Place, record: Record, node: c_ast.ID) -> Value | Place:
        way = record.find(node.name)
        if not way:
            name = record.spelling or f"this {record.keyword}"
            if not record.size:
                raise self._error(node, f"{name} is not defined in what is known here")
            raise self._error(
                node, f"{name} has no field {node.name!r}{did_you_mean(node.name, list(record.names()))}"
            )
        field = way[-1]
        offset = sum(step.offset for step in way)
        if field.located:  # the lower half is an offset: from the event's start, or from behind the field
            self._declarations.use(record, replace(field, type=types.INTEGERS["u32"], offset=offset))
            start = offset // 8 + 4 if field.located == REL_LOC else 0
            code = f"((const char *){place.pointer} + {start} + ({place.pointer}->{field.name} & 0xffff))"
            return Value(f"({self._declarations.cast(field.type)}){code}", field.type, KERNEL)
        self._declarations.use(record, replace(field, offset=offset))
        path = f"{place.path}.{field.name}" if place.path else field.name
        bits = field if field.bit_size else None
        return Place(place.pointer, path, field.type, place.memory, bits, place.offset + offset)

    def _visit_arrayref(self, node: c_ast.ArrayRef) -> Place:
        base, index = self._visit(node.name), self._number(node.subscript)
        if isinstance(base, Place) and isinstance(base.type, Array):
            literal = isinstance(node.subscript, c_ast.Constant) and node.subscript.type != "char"
            if literal or base.memory == HERE:
                # Its place is known when it is loaded; a negative one, or one past the end, is C's as well.
                element = base.type.element
                size = size_of(element) * 8 * _integer(_NUMBER.match(index.code)[1]) if literal else 0  # type: ignore[index]
                if base.path:
                    return Place(
                        base.pointer,
                        f"{base.path}[{index.code}]",
                        element,
                        base.memory,
                        None,
                        base.offset + size,
                    )
        return self._element(node, self._load(base), index.code)

    def _element(self, node: c_ast.Node, pointer: Value, index: str) -> Place:
        if not isinstance(pointer.type, Pointer):
            raise self._error(node, "this is no pointer, and no array")
        self._complete(node, pointer.type.target)
        return Place(self._moved(pointer, index), "", pointer.type.target, pointer.memory)

    def _moved(self, pointer: Value, index: str) -> str:
        """A pointer some elements on. A kernel's struct has the size that it has on the kernel it runs on."""
        assert isinstance(pointer.type, Pointer)
        target = pointer.type.target
        if isinstance(target, Record):
            self._declarations.name(target)
            if target.kernel and index != "0":
                return f"element({pointer.code}, {index})"
        return f"({pointer.code} + {index})" if index != "0" else _operand(pointer.code)

    def _complete(self, node: c_ast.Node, target: Type) -> None:
        if isinstance(target, (Void, Function)) or not size_of(target):
            raise self._error(node, "what this points to has no size: cast it first, as in *(int *)p")

    def _visit_unaryop(self, node: c_ast.UnaryOp) -> Value | Place:
        if node.op == "sizeof":
            return self._size(node.expr)
        if node.op == "*":
            return self._element(node, self._load(self._visit(node.expr)), "0")
        if node.op == "&":
            return self._address(node, self._visit(node.expr))
        operand = self._number(node.expr) if node.op in "+-~" else self._scalar(node.expr)
        if node.op == "!":
            return Value(f"!{_operand(operand.code)}", types.INT, operand.memory)
        if node.op in "+-~":
            return Value(f"{node.op}{_operand(operand.code)}", _promoted(operand.type), operand.memory)
        raise self._error(node, f"{node.op.strip('p')} would change something: an expression may only read")

    def _size(self, node: c_ast.Node) -> Value:
        measured = self._typename(node) if isinstance(node, c_ast.Typename) else self._visit(node)
        if isinstance(measured, Place) and measured.bits:
            raise self._error(node, "a bit field has no size")
        type = measured.type if isinstance(measured, (Value, Place)) else measured
        code = self._size_code(type)
        if code == "0":
            raise self._error(node, "this has no size")
        return Value(f"{code}ul" if code.isdigit() else code, types.UNSIGNED_LONG, self._scope.memory)

    def _address(self, node: c_ast.Node, place: Value | Place) -> Value:
        if isinstance(place, Value) or place.bits:
            raise self._error(node, "this has no address")
        target = Pointer(place.type)
        if not place.path:
            return Value(place.pointer, target, place.memory)
        return Value(self._address_code(place), target, place.memory)

    def _address_code(self, place: Place, index: str = "") -> str:
        """A pointer to a place, or to an element of the array that is there."""
        if place.memory == KERNEL:
            return f"address({place.pointer}, {place.path}{index})"
        return f"&{place.code}{index}"

    def _visit_cast(self, node: c_ast.Cast) -> Value:
        type = self._typename(node.to_type)
        value = self._load(self._visit(node.expr))
        if isinstance(type, (Record, Array, Function, Void)):
            raise self._error(node, "a cast is to a number or to a pointer")
        if isinstance(type, Float):
            raise self._error(node, "BPF has no floating-point numbers")
        return Value(f"({self._declarations.cast(type)}){_operand(value.code)}", type, value.memory)

    def _typename(self, node: c_ast.Typename) -> Type:
        return self._declared(node, node.type)

    def _declared(self, node: c_ast.Typename, inner: c_ast.Node) -> Type:
        if isinstance(inner, c_ast.PtrDecl):
            return Pointer(self._declared(node, inner.type))
        if isinstance(inner, c_ast.ArrayDecl):
            match = _NUMBER.fullmatch(getattr(inner.dim, "value", ""))
            if not match:
                raise self._error(node, "an array's length must be a number here")
            return Array(self._declared(node, inner.type), _integer(match[1]))
        if isinstance(inner, c_ast.FuncDecl):
            return Function(types.VOID, ())
        named = inner.type
        if isinstance(named, (c_ast.Struct, c_ast.Union, c_ast.Enum)):
            if not named.name or getattr(named, "decls", None) or getattr(named, "values", None):
                raise self._error(node, "a type cannot be defined here")
            words: tuple[str, ...] = (type(named).__name__.lower(), named.name)
        else:
            words = tuple(named.names)
        column = (named.coord or node.coord).column or 1
        return self._scope.type(words, 0, self._part.start + column - 1)

    def _visit_binaryop(self, node: c_ast.BinaryOp) -> Value:
        left, right = self._scalar(node.left), self._scalar(node.right)
        memory = left.memory if isinstance(left.type, Pointer) else right.memory
        if node.op in ("&&", "||") or node.op in _COMPARISONS:
            return Value(f"({left.code} {node.op} {right.code})", types.INT, self._scope.memory)
        pointers = isinstance(left.type, Pointer), isinstance(right.type, Pointer)
        if any(pointers):
            return self._pointer_arithmetic(node, left, right, memory)
        literal = _literal(node.right)
        if node.op in "/%" and literal == 0:
            raise self._error(node.right, "this divides by 0")
        if node.op in ("<<", ">>"):
            type = _promoted(left.type)
            if literal is not None and literal >= type.size * 8:
                raise self._error(node.right, f"this shifts a number of {type.size * 8} bits by {literal}")
            return Value(f"({left.code} {node.op} {right.code})", type, memory)
        type = _common(_promoted(left.type), _promoted(right.type))
        if node.op in "/%" and type.signed:
            name = "divide" if node.op == "/" else "modulo"
            return Value(f"({type.spelling}){name}({left.code}, {right.code})", type, memory)
        return Value(f"({left.code} {node.op} {right.code})", type, memory)

    def _pointer_arithmetic(self, node: c_ast.BinaryOp, left: Value, right: Value, memory: str) -> Value:
        pointer, other = (left, right) if isinstance(left.type, Pointer) else (right, left)
        assert isinstance(pointer.type, Pointer)
        if not isinstance(pointer.type.target, Void):
            self._complete(node, pointer.type.target)
        if node.op in "+-" and isinstance(other.type, Integer) and (node.op == "+" or pointer is left):
            sign = "-" if node.op == "-" else ""
            return Value(self._moved(pointer, f"{sign}{_operand(other.code)}"), pointer.type, memory)
        if node.op == "-" and isinstance(other.type, Pointer):
            target = pointer.type.target
            size = "1" if isinstance(target, Void) else self._size_code(target)
            return Value(
                f"divide((s64){_operand(left.code)} - (s64){_operand(right.code)}, {size})",
                types.LONG,
                memory,
            )
        raise self._error(node, f"{node.op} is not for pointers: cast them to u64 first")

    def _size_code(self, type: Type) -> str:
        """A number; of a kernel's struct what it comes to on the kernel it runs on."""
        name = self._declarations.name(type) if isinstance(type, Record) and type.kernel else ""
        return f"bpf_core_type_size({name})" if name else str(size_of(type))

    def _visit_ternaryop(self, node: c_ast.TernaryOp) -> Value:
        condition = self._scalar(node.cond)
        yes, no = self._scalar(node.iftrue), self._scalar(node.iffalse)
        type: Type
        if isinstance(yes.type, Integer) and isinstance(no.type, Integer):
            type = _common(_promoted(yes.type), _promoted(no.type))
            yes_code, no_code = yes.code, no.code
        else:
            type = yes.type if isinstance(yes.type, Pointer) else no.type
            cast = self._declarations.cast(type)
            yes_code, no_code = f"({cast}){_operand(yes.code)}", f"({cast}){_operand(no.code)}"
        memory = yes.memory if yes.memory == no.memory else EITHER
        return Value(f"({condition.code} ? {yes_code} : {no_code})", type, memory)

    def _visit_funccall(self, node: c_ast.FuncCall) -> Value:
        arguments = node.args.exprs if node.args else []
        name = node.name.name if isinstance(node.name, c_ast.ID) else ""
        if name == "STRCMP":
            return self._compare(node, arguments)
        if name == "$entry":
            if len(arguments) != 1 or not isinstance(arguments[0], c_ast.ID):
                raise self._error(node, "$entry takes the name of a parameter, as $entry(size)")
            return self._scope.entry(arguments[0].name, lambda message: self._error(arguments[0], message))
        raise self._error(
            node, f'there is no function {name!r} here: only STRCMP("text", expression) and $entry(name)'
        )

    def _compare(self, node: c_ast.FuncCall, arguments: list[c_ast.Node]) -> Value:
        texts = [a for a in arguments if isinstance(a, c_ast.Constant) and a.type == "string"]
        others = [a for a in arguments if a not in texts]
        if len(texts) != 1 or len(others) != 1:
            raise self._error(node, 'STRCMP takes a text and an expression, as STRCMP("text", name)')
        if len(texts[0].value) > 82:
            raise self._error(texts[0], "a text to compare with is at most 80 characters")
        if texts[0].value == '""':
            raise self._error(texts[0], "there is nothing to compare with in an empty text")
        pointer, read = self.text_pointer(self._visit(others[0]), others[0])
        code = f"begins_with({read}, {pointer}, {texts[0].value})"
        return Value(code, types.INT, self._scope.memory)

    # ---- loading

    def _load(self, value: Value | Place) -> Value:
        """A value as it is; what is in a place read, an array as a pointer to its first element."""
        if isinstance(value, Value):
            return value
        memory = _pointed(value)
        if isinstance(value.type, Record):
            return Value(value.code, value.type, value.memory)  # whoever wants a number of it will object
        if isinstance(value.type, Array):
            pointer = Pointer(value.type.element)
            if not value.path:
                return Value(f"({self._declarations.cast(pointer)}){value.pointer}", pointer, value.memory)
            return Value(self._address_code(value, "[0]"), pointer, value.memory)
        if isinstance(value.type, Float):
            raise self._scope.error("BPF has no floating-point numbers", self._part.start)
        if value.bits:
            type = _promoted(value.type, value.bits.bit_size)
            return Value(f"({type.spelling}){self._bits(value, value.bits)}", type, memory)
        if value.memory == HERE:
            return Value(value.code, value.type, memory)
        whose = KERNEL if value.memory == KERNEL else USER
        field = value.path and not value.path.endswith("]") and isinstance(value.type, Integer)
        if self._declarations.portable and whose == KERNEL and field:
            # On another kernel it may be wider, or a bit field.
            cast = self._declarations.cast(value.type)
            return Value(f"({cast})kernel_bits({value.pointer}, {value.path})", value.type, memory)
        code = f"{whose}({value.pointer}, {value.path})" if value.path else f"{whose}_value({value.pointer})"
        return Value(code, value.type, memory)

    def _bits(self, place: Place, field: Field) -> str:
        if place.memory == KERNEL:
            return f"kernel_bits({place.pointer}, {place.path})"
        first = place.offset // 8
        size = (place.offset % 8 + field.bit_size + 7) // 8
        wide = "s64" if isinstance(field.type, Integer) and field.type.signed else "u64"
        return f"user_bits({place.pointer}, {first}, {size}, {place.offset % 8}, {field.bit_size}, {wide})"

    def text_pointer(self, value: Value | Place, node: c_ast.Node | None = None) -> tuple[str, str]:
        """A pointer to text, and the helper that reads it."""
        loaded = self._load(value)
        if isinstance(loaded.type, Record):
            raise self._at(node, "this is a struct, not text: name a field of it")
        memory = loaded.memory
        if isinstance(value, Place) and isinstance(value.type, Array):
            memory = KERNEL if value.memory == HERE else value.memory
        elif isinstance(loaded.type, Integer) and loaded.type.size < 8:
            raise self._at(node, "this is a number, not text")
        read = {KERNEL: "bpf_probe_read_kernel", USER: "bpf_probe_read_user"}.get(
            memory, "bpf_probe_read_either"
        )
        # Text that a kernel function is given may be the process's.
        if memory == KERNEL and not (isinstance(value, Place) and isinstance(value.type, Array)):
            read = "bpf_probe_read_either"
        return loaded.code, read

    def _at(self, node: c_ast.Node | None, message: str) -> Exception:
        return self._error(node, message) if node else self._scope.error(message, self._part.start)

    def _scalar(self, node: c_ast.Node) -> Value:
        value = self._load(self._visit(node))
        if not isinstance(value.type, (Integer, Pointer)):
            raise self._error(node, "a number is needed here, and this is a struct: name a field of it")
        return value

    def _number(self, node: c_ast.Node) -> Value:
        value = self._scalar(node)
        if isinstance(value.type, Pointer):
            raise self._error(node, "a number is needed here, and this is a pointer")
        return value

    # ---- what becomes of it

    def as_text(self) -> tuple[str, str]:
        """As text: a pointer to it, and the helper that reads it."""
        return self.text_pointer(self._unless_too_deep(self._visit, self._parse()))

    def as_number(self) -> Value:
        """As a number: an integer or a pointer."""
        return self._unless_too_deep(self._scalar, self._parse())


def _is_octal(digits: str) -> bool:
    return digits.isdigit() and len(digits) > 1 and digits[0] == "0"


def _integer(digits: str) -> int:
    """A number as C writes it."""
    return int(digits, 8 if _is_octal(digits) else 0)


def _literal(node: c_ast.Node) -> int | None:
    """The number that an expression is, if it is nothing else."""
    match = _NUMBER.fullmatch(node.value) if isinstance(node, c_ast.Constant) else None
    return _integer(match[1]) if match else None


def _pointed(place: Place) -> str:
    """Whose memory a pointer that is in this place points into."""
    if isinstance(place.type, Pointer) and place.type.user:
        return USER
    return place.memory


def _operand(code: str) -> str:
    """In parentheses, unless it needs none."""
    if re.fullmatch(r"[\w$]+", code) or (code[0] == "(" and _closing(code, 0) == len(code) - 1):
        return code
    name = re.match(r"\w+\(", code)
    if name and _closing(code, name.end() - 1) == len(code) - 1:
        return code
    return f"({code})"


def _closing(code: str, opening: int) -> int:
    """Where the parenthesis that opens there is closed."""
    depth = 0
    for position in range(opening, len(code)):
        depth += {"(": 1, ")": -1}.get(code[position], 0)
        if not depth:
            return position
    return -1


def _promoted(type: Type, bits: int = 0) -> Integer:
    """Integer promotion (C11 6.3.1.1), which goes by the size of a bit field."""
    assert isinstance(type, Integer)
    if type.size < 4 or 0 < bits < 32:
        return types.INT
    if bits == 32:
        return types.INTEGERS["int" if type.signed else "unsigned int"]
    return types.INTEGERS[f"{'' if type.signed else 'unsigned '}{'int' if type.size == 4 else 'long'}"]


def _common(left: Integer, right: Integer) -> Integer:
    """The usual arithmetic conversions (C11 6.3.1.8) of promoted types."""
    if left.size != right.size:
        return left if left.size > right.size else right
    return right if left.signed else left
