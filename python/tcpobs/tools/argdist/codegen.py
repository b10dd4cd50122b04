"""From specifiers to the C of one BPF object, and the plan of how to run it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from tcpobs.tools.argdist import types
from tcpobs.tools.argdist.declarations import Declarations
from tcpobs.tools.argdist.expressions import HERE, KERNEL, USER, Place, Rewriter, Value
from tcpobs.tools.argdist.plan import (
    COUNT,
    HISTOGRAM,
    NUMBER,
    POINTER,
    TEXT,
    TRACEPOINT,
    USDT,
    Plan,
    ProbePlan,
    ValuePlan,
    histogram_slots,
)
from tcpobs.tools.argdist.plan import KERNEL as KERNEL_FUNCTION
from tcpobs.tools.argdist.scope import COMM, Scope
from tcpobs.tools.argdist.specifier import Part, TypeName
from tcpobs.tools.argdist.types import Array, Float, Integer, Pointer, Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tcpobs.tools.argdist.specifier import Specifier
    from tcpobs.tools.argdist.targets import Argument, Target
    from tcpobs.tools.argdist.types import Type

REGISTERS = {"x86_64": 6, "aarch64": 8}
"""How many parameters of a function are in registers."""

MAX_KEY = 384
"""Bytes of a key: it is on the BPF stack, which has 512."""

_RESERVED = {
    "half", "lost", "key", "call", "calls", "task", "task_", "args", "arguments", "registers", "context",
    "latency", "retval", "value", "ours", "power", "linear", "divide", "modulo", "equal", "enter",
    "highest_bit", "count_in", "slot_in", "only_pid", "only_tid", "inline", "begins_with", "kernel", "user",
    "element", "address", "LICENSE", "CORE", "INLINE", "SEC", "COUNT", "SLOT", "ADD", "RETURN_TAKES",
    "true", "false", *types.INTEGERS,
}  # fmt: skip


@dataclass
class Options:
    """What holds for all specifiers."""

    string_size: int = 80
    """Bytes of a text, its end included."""
    linear: tuple[int, int, int] | None = None
    defines: tuple[str, ...] = ()
    headers: tuple[str, ...] = ()
    machine: str = os.uname().machine
    portable: bool = False
    """It will run on other kernels."""


@dataclass
class Question:
    """One specifier, its target, and how it is answered: COUNT or HISTOGRAM."""

    specifier: Specifier
    target: Target
    report: str


@dataclass
class Generated:
    """C, the plan that goes with it, and which lines are whose: (first, last) of each specifier."""

    source: str
    plan: Plan
    lines: list[tuple[int, int]]


def generate(
    questions: Sequence[Question], constant: Callable[[str], int | None], options: Options
) -> Generated:
    """The program that answers the questions. Raises SpecifierError."""
    declarations = Declarations(bool(options.headers), options.portable)
    programs = [
        _Program(number, question, constant, options, declarations)
        for number, question in enumerate(questions)
    ]
    plan = Plan(options.machine, [program.plan() for program in programs])
    head = ["// SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause\n", '#include "argdist.bpf.h"\n']
    if any(question.target.kind == USDT for question in questions):
        head.append("#include <bpf/usdt.bpf.h>\n")
    head.append('\nchar LICENSE[] SEC("license") = "Dual BSD/GPL";\n')
    head.append(f"\nstruct lost lost[{len(programs)}];\n")
    declared = declarations.text()
    if declared:
        head.append(f"\n{declared}")
    source, lines = "".join(head), []
    for program in programs:
        first = source.count("\n") + 1
        source += program.text
        lines.append((first, source.count("\n")))
    return Generated(source, plan, lines)


class _Program:
    """One specifier's part: its maps, what it does, and the programs that do it."""

    def __init__(
        self,
        number: int,
        question: Question,
        constant: Callable[[str], int | None],
        options: Options,
        declarations: Declarations,
    ) -> None:
        self._number = number
        self._specifier = question.specifier
        self._target = question.target
        self._report = question.report
        self._options = options
        self._declarations = declarations
        self._kernel_constant = constant
        self._ways: list[list[str]] = []
        self._values: list[ValuePlan] = []
        memory = KERNEL if self._target.kind in (KERNEL_FUNCTION, TRACEPOINT) else USER
        if self._target.kind == TRACEPOINT and self._target.place == "syscalls":
            memory = USER
        names = self._visible(memory)
        parameters = (
            {a.name: a.type for a in self._target.arguments if a.name} if self._specifier.kind == "r" else {}
        )
        self._scope = Scope(
            self._specifier,
            names,
            self._target.type_names,
            memory,
            self._constant,
            {define.partition("=")[0] for define in options.defines},
            bool(options.headers),
            parameters,
        )
        self.text = self._generate()

    def plan(self) -> ProbePlan:
        """How it is run."""
        target = self._target
        fields = {}
        if target.record:
            used = self._declarations.fields(target.record)
            fields = {f.name: (f.offset // 8, types.size_of(f.type)) for f in used}
        return ProbePlan(
            self._specifier.text,
            self._specifier.label,
            self._report,
            target.kind,
            target.place,
            [] if target.wildcard else target.functions,
            target.provider,
            target.wildcard,
            self._ways,
            self._values,
            self._options.linear if self._report == HISTOGRAM else None,
            fields,
        )

    # ---- names

    def _constant(self, name: str) -> int | None:
        own = self._target.constant(name)
        return self._kernel_constant(name) if own is None else own

    def _visible(self, memory: str) -> dict[str, Value | Place]:
        """The names that expressions may use."""
        names: dict[str, Value | Place] = {"$COMM": Place("task", "comm", COMM, HERE)}
        if self._specifier.kind == "r":
            pointer = self._target.result
            user = USER if isinstance(pointer, Pointer) and pointer.user else memory
            result = self._target.result
            if not isinstance(result, (Integer, Pointer)):
                result = types.LONG
            names["$retval"] = Value("retval", result, user)
            names["$latency"] = Value("latency", types.INTEGERS["u64"], memory)
            return names
        if self._target.record:
            names["args"] = Value("args", Pointer(self._target.record), HERE)
            return names
        for argument in self._target.arguments:
            if argument.name:
                user = USER if isinstance(argument.type, Pointer) and argument.type.user else memory
                names[argument.name] = Value(_safe(argument.name), argument.type, user)
        return names

    # ---- the text

    def _generate(self) -> str:
        if self._target.wildcard:
            return self._count_functions()
        filter_code = self._filter()
        body = self._histogram() if self._report == HISTOGRAM else self._count()
        maps, statements = body
        signature, programs = self._programs()
        lines = [f"static __always_inline int probe_{self._number}({signature})\n{{\n"]
        lines += [f"\t{line}\n" if line else "\n" for line in self._locals()]
        lines.append("\tif (!ours())\n\t\treturn 0;\n")
        if "$COMM" in self._scope.used:
            lines.append("\tbpf_get_current_comm(task->comm, sizeof(task->comm));\n")
        if filter_code:
            lines.append(f"\tif (!({filter_code}))\n\t\treturn 0;\n")
        lines += [f"\t{line}\n" if line else "\n" for line in statements]
        lines.append("\treturn 0;\n}\n")
        return f"\n/* {_comment(self._specifier.text)} */\n{maps}\n{''.join(lines)}\n{programs}"

    def _locals(self) -> list[str]:
        found = []
        if "$COMM" in self._scope.used:
            found.append("struct { char comm[16]; } task_ = {}, *task = &task_;")
        if self._report == COUNT and self._values:
            found.append(f"struct key_{self._number} key = {{}};")
        return [*found, ""] if found else []

    def _filter(self) -> str:
        if self._specifier.filter is None:
            return ""
        return self._rewriter(self._specifier.filter).as_number().code

    def _rewriter(self, part: Part) -> Rewriter:
        return Rewriter(part, self._scope, self._declarations)

    def _questions(self) -> list[tuple[Part, TypeName | None]]:
        """The expressions with their types: those of the specifier, or what stands for none."""
        specifier = self._specifier
        if specifier.expressions:
            return list(zip(specifier.expressions, specifier.types))
        return [(Part("$retval", 0), None)] if specifier.kind == "r" else []

    def _shown(self, part: Part) -> str:
        """An expression's name in the output."""
        return part.text if self._specifier.expressions else part.text.lstrip("$")

    # ---- a histogram

    def _histogram(self) -> tuple[str, list[str]]:
        questions = self._questions()
        specifier = self._specifier
        if not questions:
            raise specifier.error("a histogram needs a value, as in :int:fd", len(specifier.text))
        if len(questions) > 1:
            raise specifier.error("a histogram is of one expression", questions[1][0].start)
        part, name = questions[0]
        value = self._rewriter(part).as_number()
        type = self._target.type_names.resolve(name) if name else value.type
        if not isinstance(type, (Integer, Pointer)) or (isinstance(type, Pointer) and name):
            place = name.start if name else part.start
            raise specifier.error(f"a histogram is of an integer, and {name} is none", place)
        signed = isinstance(type, Integer) and type.signed
        wide = "s64" if signed else "u64"
        self._values = [ValuePlan(self._shown(part), NUMBER, 8, signed)]
        converted = f"{wide} value = ({self._declarations.cast(type)})({value.code});"
        if self._options.linear:
            low, high, step = self._options.linear
            slot = f"linear(value, {low}ll, {high}ll, {step})"
        else:
            slot = f"power(value, {'value < 0' if signed else 'false'})"
        return (
            f"SLOTS(slots_{self._number}, {histogram_slots(self._options.linear)});\n",
            [converted, "", f"SLOT(slots_{self._number}, {slot});"],
        )

    # ---- counts

    def _count(self) -> tuple[str, list[str]]:
        questions = self._questions()
        if not questions:
            return f"SLOTS(slots_{self._number}, 1);\n", [f"SLOT(slots_{self._number}, 0);"]
        members, statements, size = [], [], 0
        for index, (part, name) in enumerate(questions):
            member = f"value_{index}"
            value, code, declared = self._key_value(part, name, member)
            self._values.append(value)
            members.append(f"\t{declared}; /* {_comment(part.text)} */\n")
            statements.append(code)
            size += value.size
        if size > MAX_KEY:
            raise self._specifier.error(
                f"the values of one key have {size} bytes, and {MAX_KEY} is the most: lower -z",
                questions[0][0].start,
            )
        key = f"struct key_{self._number}"
        maps = f"{key} {{\n{''.join(members)}}};\n\nCOUNTS(counts_{self._number}, {key});\n"
        return maps, [*statements, f"COUNT(counts_{self._number}, &key, &lost[{self._number}]);"]

    def _key_value(self, part: Part, name: TypeName | None, member: str) -> tuple[ValuePlan, str, str]:
        """One value of the key: how it is read, the statement that sets it, its declaration."""
        rewriter = self._rewriter(part)
        type: Type | None = self._target.type_names.resolve(name) if name else None
        if isinstance(type, (Record, Array)) or type == types.VOID:
            raise self._specifier.error(f"{name} is no value: count a field of it", name.start if name else 0)
        if isinstance(type, Float):
            raise self._specifier.error("BPF has no floating-point numbers", name.start if name else 0)
        if isinstance(type, Pointer) and isinstance(type.target, Integer) and type.target.is_char:
            size = self._options.string_size
            pointer, read = rewriter.as_text()
            code = f"{read}_str(key.{member}, {size}, (const void *)({pointer}));"
            padded = (size + 7) // 8 * 8
            return ValuePlan(self._shown(part), TEXT, padded), code, f"char {member}[{padded}]"
        value = rewriter.as_number()
        type = type or value.type
        cast = self._declarations.cast(type)
        if isinstance(type, Pointer):
            return (
                ValuePlan(self._shown(part), POINTER, 8),
                f"key.{member} = (u64)({cast})({value.code});",
                f"u64 {member}",
            )
        assert isinstance(type, Integer)
        wide = "s64" if type.signed else "u64"
        plan = ValuePlan(self._shown(part), NUMBER, 8, type.signed, dict(type.names))
        return plan, f"key.{member} = ({wide})({cast})({value.code});", f"{wide} {member}"

    def _count_functions(self) -> str:
        """Calls of many functions, by function: a key is where the function is, or which one it is."""
        specifier = self._specifier
        if self._report == HISTOGRAM or specifier.expressions or specifier.filter:
            raise specifier.error(
                "a wildcard counts calls (-C), without an expression", specifier.function.start
            )
        number, back = self._number, specifier.kind == "r"
        maps = f"COUNTS(counts_{number}, u64);\n"
        body = (
            f"static __always_inline int probe_{number}(u64 function)\n{{\n"
            f"\tif (ours())\n\t\tCOUNT(counts_{number}, &function, &lost[{number}]);\n\treturn 0;\n}}\n"
        )
        self._values = [ValuePlan("function", NUMBER, 8)]
        programs = []
        if self._target.kind == KERNEL_FUNCTION:
            what = "kretprobe" if back else "kprobe"
            # Where there is no kprobe.multi: one by one, and the address is a register's at the entry.
            ways = [(f"{what}.multi", "bpf_get_func_ip(registers)")]
            ways.append((what, "bpf_get_func_ip(registers)" if back else "PT_REGS_IP(registers)"))
        else:
            what = "uretprobe" if back else "uprobe"
            ways = [
                (f"{what}.multi", "bpf_get_attach_cookie(registers)"),
                (what, "bpf_get_attach_cookie(registers)"),
            ]
        for section, function in ways:
            name = f"probe_{number}_{section.replace('.', '_')}"
            programs.append(_entry(section, name, f"probe_{number}({function})"))
            self._ways.append([name])
        return f"\n/* {_comment(specifier.text)} */\n{maps}\n{body}\n{''.join(programs)}"

    # ---- the programs, thin entries to the body

    def _programs(self) -> tuple[str, str]:
        """The parameters of the body, and the programs that call it."""
        if self._target.kind == TRACEPOINT:
            return self._of_tracepoint()
        if self._specifier.kind == "r":
            return self._of_return()
        return self._of_entry()

    def _of_tracepoint(self) -> tuple[str, str]:
        assert self._target.record
        parameter = self._declarations.declare(Pointer(self._target.record), "args")
        name = f"probe_{self._number}_tracepoint"
        self._ways = [[name]]
        section = f"tracepoint/{self._target.place}/{self._target.function}"
        call = f"probe_{self._number}(args)"
        return parameter, f'SEC("{section}")\nint {name}({parameter})\n{{\n\treturn {call};\n}}\n'

    def _used_arguments(self) -> list[Argument]:
        used = self._scope.entries if self._specifier.kind == "r" else self._scope.used
        found = {a.name: a for a in self._target.arguments if a.name in used}
        for argument in found.values():
            if argument.slot < 0:
                text, start = self._specifier.text, self._specifier.function.start
                match = re.compile(rf"\b{re.escape(argument.name)}\b").search(text, start)
                message = (
                    f"{argument.name!r} is not passed in a register: it is a float, or a struct by value"
                )
                raise self._specifier.error(message, match.start() if match else start)
        return list(found.values())

    def _of_entry(self) -> tuple[str, str]:
        arguments = self._used_arguments()
        signature = ", ".join(self._declarations.declare(a.type, _safe(a.name)) for a in arguments) or "void"
        number, target = self._number, self._target
        body = f"probe_{number}({{}})"
        if target.kind == USDT:
            name = f"probe_{number}_usdt"
            self._ways = [[name]]
            reads = "".join(
                f"\tlong {a.name} = 0;\n\n\tbpf_usdt_arg(registers, {a.slot}, &{a.name});\n"
                for a in arguments
            )
            passed = ", ".join(f"({self._declarations.cast(a.type)}){a.name}" for a in arguments)
            return signature, _entry("usdt", name, body.format(passed), reads)
        programs = []
        if target.kind == KERNEL_FUNCTION and target.known:
            name = f"probe_{number}_fentry"
            self._ways.append([name])
            passed = ", ".join(self._cast(a, f"arguments[{a.slot}]") for a in arguments)
            programs.append(_typed(f"fentry/{target.function}", name, body.format(passed)))
        if self._in_registers(arguments):
            section = f"kprobe/{target.function}" if target.kind == KERNEL_FUNCTION else "uprobe"
            name = f"probe_{number}_{section.partition('/')[0]}"
            self._ways.append([name])
            passed = ", ".join(self._cast(a, f"PT_REGS_PARM{a.slot + 1}(registers)") for a in arguments)
            programs.append(_entry(section, name, body.format(passed)))
        self._check_ways(arguments)
        return signature, "\n".join(programs)

    def _in_registers(self, arguments: list[Argument]) -> bool:
        return all(a.slot < REGISTERS[self._options.machine] for a in arguments)

    def _check_ways(self, arguments: list[Argument]) -> None:
        if not self._ways:
            most = REGISTERS[self._options.machine]
            late = next(a for a in arguments if a.slot >= most)
            message = (
                f"{late.name!r} is passed on the stack: only the first {most} parameters can be read here"
            )
            raise self._specifier.error(message, self._specifier.function.start)

    def _cast(self, argument: Argument, code: str) -> str:
        return f"{self._from_register(argument.type)}{code}"

    def _from_register(self, type: Type) -> str:
        """The cast of what a register holds: of a bool, its lowest byte, and anything in the others."""
        byte = "(u8)" if isinstance(type, Integer) and type.spelling == "bool" else ""
        return f"({self._declarations.cast(type)}){byte}"

    def _of_return(self) -> tuple[str, str]:
        """$latency and, but for fexit, $entry need a program at the entry that remembers them."""
        arguments = self._used_arguments()
        number, target = self._number, self._target
        latency = "$latency" in self._scope.used
        result = self._scope.names["$retval"].type
        parameters = [self._declarations.declare(result, "retval")]
        if latency:
            parameters.append("u64 latency")
        parameters += [self._declarations.declare(a.type, f"entry_{a.name}") for a in arguments]
        signature = ", ".join(parameters)
        kept = ["\tu64 began_ns;\n"] * latency
        kept += [f"\t{self._declarations.declare(a.type, 'entry_' + a.name)};\n" for a in arguments]
        programs = []
        if kept:
            programs.append(
                f"struct call_{number} {{\n{''.join(kept)}}};\n\n"
                f"CALLS(calls_{number}, struct call_{number});\n"
            )
        retval = self._from_register(result)
        if target.kind == KERNEL_FUNCTION and target.known:
            direct = [self._cast(a, f"arguments[{a.slot}]") for a in arguments]
            programs += self._typed_return(retval, latency, direct)
        if self._in_registers(arguments):
            programs += self._register_return(retval, latency, arguments)
        self._check_ways(arguments)
        return signature, "\n".join(programs)

    def _typed_return(self, retval: str, latency: bool, direct: list[str]) -> list[str]:
        """Fexit sees the arguments, too; for the time there is an fentry, which has the same frame."""
        number, function = self._number, self._target.function
        programs, way = [], []
        reads = "\tu64 returned = 0;\n\n\tbpf_get_func_ret(arguments, &returned);\n"
        passed = [f"{retval}returned", *(["latency"] * latency), *direct]
        if latency:
            remember = (
                f"\tstruct call_{number} entry = {{ .began_ns = bpf_ktime_get_ns() }};\n\n"
                f"\tif (ours())\n\t\tenter(&calls_{number}, (u64)arguments, &entry, &lost[{number}]);\n"
            )
            reads = self._returning("(u64)arguments", True) + reads.replace("\tu64 returned = 0;\n\n", "", 1)
            reads = "\tu64 returned = 0;\n" + reads
            way.append(f"probe_{number}_fentry")
        fexit = f"probe_{number}_fexit"
        programs.append(_typed(f"fexit/{function}", fexit, f"probe_{number}({', '.join(passed)})", reads))
        if latency:
            programs.append(_typed(f"fentry/{function}", way[0], "0", remember))
        self._ways.append([fexit, *way])
        return programs

    def _register_return(self, retval: str, latency: bool, arguments: list[Argument]) -> list[str]:
        number, target = self._number, self._target
        kernel = target.kind == KERNEL_FUNCTION
        suffix = f"/{target.function}" if kernel else ""
        back, there = ("kretprobe", "kprobe") if kernel else ("uretprobe", "uprobe")
        way = [f"probe_{number}_{back}"]
        passed = [f"{retval}PT_REGS_RC(registers)"]
        reads = ""
        programs = []
        if latency or arguments:
            reads = self._returning("PT_REGS_SP(registers) - RETURN_TAKES", latency)
            passed += ["latency"] * latency + [f"entry.entry_{a.name}" for a in arguments]
            kept = [".began_ns = bpf_ktime_get_ns(),"] * latency
            kept += [
                f".entry_{a.name} = {self._cast(a, f'PT_REGS_PARM{a.slot + 1}(registers)')},"
                for a in arguments
            ]
            remember = (
                f"\tstruct call_{number} entry = {{ {' '.join(kept)} }};\n\n"
                f"\tif (ours())\n"
                f"\t\tenter(&calls_{number}, PT_REGS_SP(registers), &entry, &lost[{number}]);\n"
            )
            way.append(f"probe_{number}_{there}")
        programs.append(_entry(f"{back}{suffix}", way[0], f"probe_{number}({', '.join(passed)})", reads))
        if len(way) > 1:
            programs.append(_entry(f"{there}{suffix}", way[1], "0", remember))
        self._ways.append(way)
        return programs

    def _returning(self, frame: str, latency: bool) -> str:
        """What was remembered of the call that returns; nothing, and there is nothing to do."""
        number = self._number
        return (
            f"\tstruct call call = {{ bpf_get_current_pid_tgid(), {frame} }};\n"
            f"\tstruct call_{number} *found = bpf_map_lookup_elem(&calls_{number}, &call), entry;\n"
            + "\tu64 latency;\n"
            * latency
            + "\n\tif (!found)\n\t\treturn 0;\n"
            "\tentry = *found;\n"
            f"\tbpf_map_delete_elem(&calls_{number}, &call);\n"
            + "\tlatency = bpf_ktime_get_ns() - entry.began_ns;\n"
            * latency
        )


def _entry(section: str, name: str, call: str, before: str = "") -> str:
    gap = "\n" if before else ""
    return f'SEC("{section}")\nint {name}(struct pt_regs *registers)\n{{\n{before}{gap}\treturn {call};\n}}\n'


def _typed(section: str, name: str, call: str, before: str = "") -> str:
    gap = "\n" if before else ""
    return f'SEC("{section}")\nint {name}(u64 *arguments)\n{{\n{before}{gap}\treturn {call};\n}}\n'


def _safe(name: str) -> str:
    """A parameter's name that is none of the program's own."""
    own = name in _RESERVED or name.startswith("bpf_") or name.endswith("_")
    return f"{name}_" if own else name


def _comment(text: str) -> str:
    """Text that does not end the comment it is in."""
    return "".join(c if c.isprintable() and c != "\\" else "?" for c in text).replace("*/", "* /")
