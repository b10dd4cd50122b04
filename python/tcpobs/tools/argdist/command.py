"""The command: from its arguments to its output."""

from __future__ import annotations

import os
import re
import signal
import sys
import time

from tcpobs import privileges
from tcpobs.errors import TcpobsError, UsageError
from tcpobs.output import Output
from tcpobs.privileges import Capability
from tcpobs.tools.argdist import report
from tcpobs.tools.argdist.plan import COUNT, POINTER

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

    from tcpobs.tools.argdist.codegen import Generated
    from tcpobs.tools.argdist.plan import Plan, ProbePlan
    from tcpobs.tools.argdist.trace import Counts

_STOPS = (signal.SIGINT, signal.SIGTERM)
_HEADERS = ("/usr/include", f"/usr/include/{os.uname().machine}-linux-gnu")

_LOSSES = {
    "keys": "no room for another value (raise --max-keys)",
    "calls": "no room to remember another call until it returns",
    "returns": "calls never returned",
    "skipped": "the kernel skipped the program",
}


def run(arguments: argparse.Namespace) -> int | None:
    """Runs it: compiled here, or an object that was compiled elsewhere."""
    if arguments.object:
        from tcpobs.tools.argdist import objects

        object, plan = objects.read(arguments.object)
    else:
        arguments.include = _found_headers(arguments.include)
        if arguments.ebpf:
            Output().write(_generate(arguments).source)
            return None
        object, plan = _made(arguments)
        if arguments.compile_only:
            from tcpobs.tools.argdist import objects

            objects.write(arguments.compile_only, object, plan)
            return None
    if arguments.verbose:
        from tcpobs.libbpf.library import show_messages

        show_messages()
    _trace(arguments, object, plan)
    return None


def _made(arguments: argparse.Namespace) -> tuple[bytes, Plan]:
    """The object and its plan: as they were made before, or anew."""
    from tcpobs.tools.argdist.recall import Recall

    recall = Recall(arguments)
    known = None if arguments.verbose else recall.read()
    if known:
        return known
    generated = _generate(arguments)
    if arguments.verbose:
        Output().write(generated.source)
    object = _compile(generated, arguments)
    recall.write(object, generated.plan)
    return object, generated.plan


def _generate(arguments: argparse.Namespace) -> Generated:
    from tcpobs.tools.argdist import codegen, specifier
    from tcpobs.tools.argdist.headers import HeaderTypes
    from tcpobs.tools.argdist.kernel import KernelTypes
    from tcpobs.tools.argdist.targets import Targets

    kernel = KernelTypes(arguments.btf)
    try:
        options = codegen.Options(
            string_size=arguments.string_size,
            linear=arguments.linear,
            defines=tuple(arguments.define),
            headers=tuple(arguments.include),
            portable=bool(arguments.compile_only),
        )
        headers = HeaderTypes(arguments.include, arguments.define)
        with Targets(kernel, headers, arguments.pid) as targets:
            questions = []
            for kind, text in arguments.asked:
                parsed = specifier.parse(text)
                questions.append(codegen.Question(parsed, targets.find(parsed), kind))
            return codegen.generate(questions, kernel.constant, options)
    finally:
        kernel.close()


def _found_headers(names: list[str]) -> list[str]:
    """Those that are on this host: a kernel's own headers mostly are not, and its types are in the BTF."""
    found = []
    for name in names:
        if os.path.exists(name) or any(os.path.exists(os.path.join(folder, name)) for folder in _HEADERS):
            found.append(os.path.abspath(name) if os.path.exists(name) else name)
        else:
            print(
                f"tcpobs argdist: {name} is not on this host; going on with the kernel's BTF", file=sys.stderr
            )
    return found


def _compile(generated: Generated, arguments: argparse.Namespace) -> bytes:
    from tcpobs.tools.argdist.compile import CompileError, compile

    try:
        return compile(generated.source, arguments.include, arguments.define)
    except CompileError as error:
        if arguments.verbose:
            print(error.diagnostics, file=sys.stderr)
        raise UsageError(_blamed(error.diagnostics, generated)) from None


def _blamed(diagnostics: str, generated: Generated) -> str:
    """The compiler's first error, with the specifier whose code it is about."""
    match = re.search(r"<stdin>:(\d+):\d+: (?:fatal )?error: (.*)", diagnostics)
    if not match:
        first = next((line for line in diagnostics.splitlines() if "error" in line), "it does not say why")
        return f"the compiler refuses it: {first} (-v shows all)"
    line = int(match[1])
    for probe, (first_line, last_line) in zip(generated.plan.probes, generated.lines):
        if first_line <= line <= last_line:
            said = f"the compiler refuses it: {match[2]} (-v shows all)"
            if "stack limit" in match[2]:
                said = "its values do not fit on the stack that BPF has: ask for fewer at once"
            return f"{said}\n  {probe.text}"
    return f"the compiler refuses it: {match[2]} (-v shows all)"


# ---- running


def _trace(arguments: argparse.Namespace, object: bytes, plan: Plan) -> None:
    from tcpobs.tools.argdist.trace import MAX_KEYS, Trace

    for kind, number in (("process", arguments.pid), ("thread", arguments.tid)):
        if number and not os.path.exists(f"/proc/{number}"):
            raise TcpobsError(f"there is no {kind} {number}")
    output = Output()
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
    with Trace(
        object,
        plan,
        pid=arguments.pid,
        tid=arguments.tid,
        max_keys=arguments.max_keys or MAX_KEYS,
        btf=arguments.btf,
        hook=arguments.hook,
    ) as trace:
        # From here on it reads maps, by the bpf system call, and that is all.
        bpf = Capability.CAP_BPF if privileges.has(Capability.CAP_BPF) else Capability.CAP_SYS_ADMIN
        privileges.give_up(bpf)
        if sys.stderr and sys.stderr.isatty():
            print("tracing; Ctrl-C ends it", file=sys.stderr)
        printer = _Printer(arguments, plan, output)
        start = time.monotonic()
        end = start + arguments.duration if arguments.duration else float("inf")
        outputs, stopped = 0, False
        while not stopped:
            due = min(start + (outputs + 1) * arguments.interval, end)
            stopped = _wait_until(due) or due >= end
            outputs += 1
            stopped = stopped or outputs == arguments.number
            printer.show(trace.take())


def _wait_until(due: float) -> bool:
    """Waits; whether it was told to stop. A second signal ends the process at once."""
    left = due - time.monotonic()
    while left > 0:
        if signal.sigtimedwait(_STOPS, min(left, 3600.0)):
            for number in _STOPS:
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)
            return True
        left = due - time.monotonic()
    return False


class _Printer:
    """Prints what each interval brought."""

    def __init__(self, arguments: argparse.Namespace, plan: Plan, output: Output) -> None:
        self._plan = plan
        self._output = output
        self._json = arguments.json
        self._top = arguments.top
        self._colour = output.isatty and not arguments.json
        self._sums: list[Counts] | None = [{} for _ in plan.probes] if arguments.cumulative else None
        self._told: dict[str, int] = {}

    def show(self, taken: list[tuple[Counts, dict[str, int]]]) -> None:
        """One interval's output, in one write."""
        now = time.time()
        parts = [] if self._json else [time.strftime("[%H:%M:%S]\n", time.localtime(now))]
        lost: dict[str, int] = {}
        for number, (counts, losses) in enumerate(taken):
            if self._sums is not None:
                sums = self._sums[number]
                for values, count in counts.items():
                    sums[values] = sums.get(values, 0) + count
                counts = sums
            probe = self._plan.probes[number]
            parts.append(
                self._as_json(now, probe, counts, losses) if self._json else self._as_text(probe, counts)
            )
            for cause, count in losses.items():
                lost[cause] = lost.get(cause, 0) + count
        self._output.write("".join(parts))
        if lost != self._told and any(lost.values()) and sys.stderr:
            said = ", ".join(f"{count}: {_LOSSES[cause]}" for cause, count in lost.items() if count)
            print(f"tcpobs: lost so far: {said}", file=sys.stderr, flush=True)
        self._told = lost

    def _as_text(self, probe: ProbePlan, counts: Counts) -> str:
        if probe.report == COUNT:
            names = [value.name for value in probe.values]
            if probe.wildcard:
                rows = [(str(values[0]), count) for values, count in counts.items()]
            else:
                rows = [
                    (report.event_text(names, _shown(probe, values)), count)
                    for values, count in counts.items()
                ]
            return report.count_lines(probe.title, rows, self._top)
        name = probe.label or probe.values[0].name
        slots = {int(values[0]): count for values, count in counts.items()}
        if probe.linear:
            low, high, step = probe.linear
            inner = [slots.get(slot, 0) for slot in range(1, probe.slots - 1)]
            ends = slots.get(0, 0), slots.get(probe.slots - 1, 0)
            return report.linear_lines(probe.title, name, low, high, step, inner, *ends, colour=self._colour)
        below = slots.pop(64, 0)
        return report.histogram_lines(probe.title, name, slots, below, self._colour)

    def _as_json(self, now: float, probe: ProbePlan, counts: Counts, lost: dict[str, int]) -> str:
        if probe.report == COUNT:
            rows = sorted(counts.items(), key=lambda row: row[1])[-self._top if self._top else None :]
            names = [value.name for value in probe.values]
            shown = [(_shown(probe, values), count) for values, count in rows]
            return report.count_json(now, probe.text, probe.label, names, shown, lost)
        slots = {int(values[0]): count for values, count in counts.items()}
        if probe.linear:
            low, high, step = probe.linear
            inner = [slots.get(slot, 0) for slot in range(1, probe.slots - 1)]
            ends = slots.get(0, 0), slots.get(probe.slots - 1, 0)
            made = list(report.linear_rows(low, high, step, inner, *ends))
        else:
            below = slots.pop(64, 0)
            made = list(report.log2_rows(slots, below))
        return report.histogram_json(now, probe.text, probe.label, made, lost)


def _shown(probe: ProbePlan, values: tuple[int | bytes | str, ...]) -> tuple[int | bytes | str, ...]:
    """Pointers as hexadecimal numbers."""
    if not any(value.kind == POINTER for value in probe.values):
        return values
    return tuple(
        hex(value) if plan.kind == POINTER and isinstance(value, int) else value
        for plan, value in zip(probe.values, values)
    )
