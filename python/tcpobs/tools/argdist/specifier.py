"""From a specifier's text to its parts, each with its place, so that an error can point at it.

{p,r,t,u}:{[library],category}:function(signature)[:type[,type...]:expr[,expr...][:filter]][#label]

Nothing here knows what the names mean; that a text is no C is found later, too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tcpobs.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

KINDS = {
    "p": "function entry",
    "r": "function return",
    "t": "kernel tracepoint",
    "u": "USDT probe",
}

MOST_STARS = 12
"""Of a type: as many as C promises."""

_OPENING, _CLOSING = "([{", ")]}"
_WORD = re.compile(r"[A-Za-z_]\w*|\*|\[[^\]]*\]|\.\.\.|\(|\)|,|\S")
_QUALIFIERS = {"const", "volatile", "restrict", "register", "__user", "__kernel", "__restrict"}
_INTEGER_WORDS = {
    "char",
    "short",
    "int",
    "long",
    "signed",
    "unsigned",
    "float",
    "double",
    "void",
    "bool",
    "_Bool",
}


class SpecifierError(UsageError):
    """A specifier that is wrong: what is wrong, the text, and a caret under the place."""

    def __init__(self, message: str, text: str, position: int) -> None:
        shown = "".join(c if c.isprintable() else "?" for c in text)
        super().__init__(f"{message}\n  {shown}\n  {' ' * min(position, len(text))}^")
        self.message = message
        self.position = position


@dataclass(frozen=True)
class Part:
    """A piece of a specifier, without the blanks around it, and where it starts."""

    text: str
    start: int

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class TypeName:
    """A type as written: `struct sock *` has the words struct and sock, and one star."""

    words: tuple[str, ...]
    stars: int
    start: int

    def __str__(self) -> str:
        return " ".join(self.words) + (" " + "*" * self.stars if self.stars else "")


@dataclass(frozen=True)
class Parameter:
    """A parameter of the signature; its name may be empty."""

    type: TypeName
    name: str


@dataclass(frozen=True)
class Specifier:
    """A specifier's parts.

    `library` is empty for the kernel; for a tracepoint it is the category. `parameters` are those that the
    user wrote, from the first one on.
    """

    text: str
    kind: str
    library: Part
    function: Part
    parameters: tuple[Parameter, ...]
    types: tuple[TypeName, ...]
    expressions: tuple[Part, ...]
    filter: Part | None
    label: str | None

    def error(self, message: str, position: int) -> SpecifierError:
        """An error at a place in it."""
        return SpecifierError(message, self.text, position)


def parse(text: str) -> Specifier:
    """The parts of a specifier. Raises SpecifierError."""
    body = text
    for position, character, depth in _outside_strings(text):
        if character == "#":
            body = text[:position]
            break
        if depth < 0:
            raise SpecifierError(f"nothing is open for this '{character}'", text, position)
    label = text[len(body) + 1 :].strip() or None if len(body) < len(text) else None

    head = body.split(":", 2)
    kind = head[0].strip()
    if kind not in KINDS:
        known = ", ".join(f"{kind} ({what})" for kind, what in KINDS.items())
        raise SpecifierError(f"unknown probe type {kind!r}: {known}", text, 0)
    if len(head) < 3:
        raise SpecifierError(
            "a specifier is TYPE:LIBRARY:FUNCTION, as p::tcp_sendmsg() or p:c:malloc()", text, len(body)
        )
    start = len(head[0]) + len(head[1]) + 2
    library = _part(text, len(head[0]) + 1, start - 1)
    pieces = _split(text, start, len(body), ":")
    function, signature = _function(text, pieces[0])
    if kind in "tu" and signature and signature.text:
        raise SpecifierError(
            "this kind of probe has no signature: leave the parentheses empty", text, signature.start
        )
    if kind in "tu" and not library.text:
        what = "category, as t:block:block_rq_complete()" if kind == "t" else "library or path"
        raise SpecifierError(f"the {what} is missing", text, start - 1)
    if len(pieces) > 4:
        raise SpecifierError("too many parts: nothing may follow the filter", text, pieces[4].start)
    if len(pieces) == 2 and pieces[1].text:
        raise SpecifierError("types need expressions after them, as :int:fd", text, len(body))
    types: tuple[TypeName, ...] = ()
    expressions: tuple[Part, ...] = ()
    if len(pieces) > 2 and (pieces[1].text or pieces[2].text):
        types = tuple(_type(text, part) for part in _split(text, *_range(pieces[1]), ","))
        expressions = tuple(_split(text, *_range(pieces[2]), ","))
        for part in expressions:
            if not part.text:
                raise SpecifierError("an expression is missing", text, part.start)
        if len(types) != len(expressions):
            many = f"{len(types)} type{'s' * (len(types) != 1)}"
            wanted = f"{len(expressions)} expression{'s' * (len(expressions) != 1)}"
            place = types[min(len(types) - 1, len(expressions))].start
            raise SpecifierError(f"{many} for {wanted}: give one for each", text, place)
    return Specifier(
        text,
        kind,
        library,
        function,
        _parameters(text, signature),
        types,
        expressions,
        pieces[3] if len(pieces) > 3 and pieces[3].text else None,
        label,
    )


def _outside_strings(text: str, start: int = 0, end: int | None = None) -> Iterator[tuple[int, str, int]]:
    """Each character that is not in a string or character constant, and how many brackets are open there."""
    depth, quote = 0, ""
    position = start
    end = len(text) if end is None else end
    opened = []
    while position < end:
        character = text[position]
        if quote:
            if character == "\\":
                position += 1
            elif character == quote:
                quote = ""
        elif character in "\"'":
            quote, quoted = character, position
        else:
            if character in _OPENING:
                opened.append(position)
            if character in _CLOSING:
                if not opened:
                    depth = -1
                elif _OPENING.index(text[opened.pop()]) != _CLOSING.index(character):
                    raise SpecifierError(f"this '{character}' closes another kind of bracket", text, position)
            if depth >= 0:
                depth = len(opened)
            yield position, character, depth
        position += 1
    if quote:
        raise SpecifierError("this quote is never closed", text, quoted)
    if opened:
        raise SpecifierError(f"this '{text[opened[-1]]}' is never closed", text, opened[-1])


def _part(text: str, start: int, end: int) -> Part:
    piece = text[start:end]
    stripped = piece.strip()
    return Part(stripped, start + (len(piece) - len(piece.lstrip()) if stripped else 0))


def _range(part: Part) -> tuple[int, int]:
    return part.start, part.start + len(part.text)


def _split(text: str, start: int, end: int, separator: str) -> list[Part]:
    """The pieces between separators that are in no bracket or string; a `?` keeps its `:`."""
    pieces, begin, questions = [], start, 0
    for position, character, depth in _outside_strings(text, start, end):
        if depth:
            continue
        if character == "?" and separator == ":":
            questions += 1
        elif character == ":" and questions:
            questions -= 1
        elif character == separator:
            pieces.append(_part(text, begin, position))
            begin = position + 1
    return [*pieces, _part(text, begin, end)]


def _function(text: str, part: Part) -> tuple[Part, Part | None]:
    """A function's name, and what is in the parentheses behind it, if there are any."""
    name, parenthesis, _ = part.text.partition("(")
    if not name.strip():
        raise SpecifierError("the function's name is missing", text, part.start)
    bad = re.search(r"[^\w.@*?$\-+:]", name.rstrip())
    if bad:
        raise SpecifierError(f"{bad[0]!r} cannot be in a function's name", text, part.start + bad.start())
    function = Part(name.strip(), part.start)
    if not parenthesis:
        return function, None
    if not part.text.endswith(")"):
        after = part.text.rindex(")") + 1
        raise SpecifierError("a ':' is missing here", text, part.start + after)
    return function, _part(text, part.start + len(name) + 1, part.start + len(part.text) - 1)


def _parameters(text: str, signature: Part | None) -> tuple[Parameter, ...]:
    if signature is None or signature.text in ("", "void"):
        return ()
    pieces = _split(text, *_range(signature), ",")
    return tuple(_parameter(text, piece) for piece in pieces if piece.text != "...")


def _parameter(text: str, part: Part) -> Parameter:
    """`const char *name`, `int fds[2]`, `void (*handler)(int)`, or a type alone."""
    pointer_to_function = re.fullmatch(r"[^(]*\(\s*\*\s*(\w*)\s*\)\s*\(.*\)", part.text, re.DOTALL)
    if pointer_to_function:
        return Parameter(TypeName(("void",), 1, part.start), pointer_to_function[1])
    words: list[str] = []
    stars, name = 0, ""
    for match in _WORD.finditer(part.text):
        word = match[0]
        if word == "*" or word.startswith("["):
            stars += 1
        elif word in _QUALIFIERS:
            continue
        elif re.match(r"[A-Za-z_]", word):
            if name:
                raise SpecifierError("a ',' is missing before this", text, part.start + match.start())
            if stars or (words and not _continues(words, word)):
                name = word
            else:
                words.append(word)
        else:
            raise SpecifierError(f"{word!r} cannot be in a parameter", text, part.start + match.start())
    if not words:
        raise SpecifierError("a parameter's type is missing", text, part.start)
    if stars > MOST_STARS:
        raise SpecifierError("this has too many stars", text, part.start)
    return Parameter(TypeName(tuple(words), stars, part.start), name)


def _continues(words: list[str], token: str) -> bool:
    """Whether a word still belongs to a type's name that has begun."""
    if words[-1] in ("struct", "union", "enum"):
        return True
    return token in _INTEGER_WORDS and all(word in _INTEGER_WORDS for word in words)


def type_name(text: str) -> TypeName | None:
    """The type that a text is, as `const char *`; None if it is more, or less, than one."""
    try:
        return _type(text, _part(text, 0, len(text)))
    except SpecifierError:
        return None


def _type(text: str, part: Part) -> TypeName:
    if not part.text:
        raise SpecifierError("a type is missing", text, part.start)
    parameter = _parameter(text, part)
    if parameter.name:
        place = part.start + part.text.rindex(parameter.name)
        raise SpecifierError(f"{parameter.name!r} is more than a type: give only the type here", text, place)
    return parameter.type
