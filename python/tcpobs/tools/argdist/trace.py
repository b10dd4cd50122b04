"""Running a compiled object: attached where its plan says, and its counts taken from time to time."""

from __future__ import annotations

import errno
import os
import re
import struct

from tcpobs import host, privileges
from tcpobs.errors import HostError, TcpobsError
from tcpobs.libbpf.barrier import Barrier
from tcpobs.libbpf.errors import LibbpfError, LibraryMissing
from tcpobs.libbpf.object import Object
from tcpobs.libbpf.resource import Resource
from tcpobs.tools.argdist.plan import COUNT, KERNEL, TEXT, TRACEPOINT, USDT, USER

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Union

    from tcpobs.libbpf.program import Program
    from tcpobs.tools.argdist.elf import Elf
    from tcpobs.tools.argdist.plan import Plan, ProbePlan

    Values = tuple[Union[int, bytes, str], ...]
    Counts = dict[Values, int]

MAX_KEYS = 10240
"""Keys that a count holds in one interval, unless told otherwise."""

_REFUSALS = {
    errno.ENOENT: "this kernel has no such probe, or no kprobes at all (CONFIG_KPROBES)",
    errno.EPERM: "it takes root, or a kernel that allows this kind of program",
    errno.EADDRNOTAVAIL: "several functions have that name",
    errno.EINVAL: "the kernel does not take a probe there",
    errno.EILSEQ: "the kernel does not trace this function",
}


_HELPERS = {
    173: ("bpf_get_func_ip", "Linux 5.15"),
    174: ("bpf_get_attach_cookie", "Linux 5.15"),
    184: ("bpf_get_func_ret", "Linux 5.17"),
}
"""Those that not every kernel has, by their numbers: old kernels do not know the names either."""


class Trace(Resource):
    """A running object: `take` gives what was counted since the last time."""

    def __init__(
        self,
        object: bytes,
        plan: Plan,
        *,
        pid: int | None = None,
        tid: int | None = None,
        max_keys: int = MAX_KEYS,
        btf: str | None = None,
        hook: str | None = None,
    ) -> None:
        """Loads and attaches it, each specifier the first way that the kernel takes. Raises TcpobsError.

        `btf` is a file with the kernel's types, for a kernel that does not carry them itself. `hook` leaves
        kernel functions no way but those of this one.
        """
        if hook:
            plan = plan._replace(probes=[_hooked(probe, hook) for probe in plan.probes])
        if os.path.exists(host.KERNEL_BTF):
            btf = None  # it may be another kernel's, that the object was compiled for
        self._plan = plan
        self._pid = pid
        self._tid = tid
        self._max_keys = max_keys
        self._half = 0
        self._names: dict[int, dict[int, str]] = {}
        self.way = [0] * len(plan.probes)
        """Which of its ways each specifier is traced."""
        for probe in plan.probes:
            _check_fields(probe)
            _check_name(probe)
        while True:
            failed = self._start(object, btf)
            if failed is None:
                break
            number, error = failed
            self.way[number] += 1
            if self.way[number] == len(plan.probes[number].ways):
                raise _refusal(plan.probes[number], error)
        try:
            self._barrier = Barrier()
        except BaseException:
            self._object.close()
            raise

    def _start(self, data: bytes, btf: str | None) -> tuple[int, LibbpfError] | None:
        """Loads and attaches everything; or gives back which specifier could not be, and why."""
        object = Object(data, "argdist", btf)
        try:
            wanted = {
                program
                for number, probe in enumerate(self._plan.probes)
                for program in probe.ways[self.way[number]]
            }
            for name, program in object.programs.items():
                program.autoload = name in wanted
            object.variables["only_pid"] = self._pid or 0
            object.variables["only_tid"] = self._tid or 0
            for name, map in object.maps.items():
                if name.startswith("counts_"):
                    map.max_entries = self._max_keys
            self._object = object
            number = -1
            try:
                object.load()
                for number, probe in enumerate(self._plan.probes):
                    for loaded in probe.ways[self.way[number]]:
                        self._attach(number, probe, object.programs[loaded])
            except LibraryMissing:
                raise
            except LibbpfError as error:
                object.close()
                return (self._culprit(error) if number < 0 else number), error
        except BaseException:
            object.close()
            raise
        return None

    def _culprit(self, error: LibbpfError) -> int:
        """The specifier whose program was not loaded, or the first that has another way if none is named."""
        named = re.findall(r"prog 'probe_(\d+)_\w+'", error.log)
        if named:
            return int(named[-1])  # loading ends there
        left = (
            number for number, probe in enumerate(self._plan.probes) if self.way[number] + 1 < len(probe.ways)
        )
        return next(left, 0)

    # ---- attaching

    def _attach(self, number: int, probe: ProbePlan, program: Program) -> None:
        object = self._object
        if probe.target == USDT:
            path = _find_binary(probe.place, self._pid)
            (name,) = probe.functions
            object.keep(program.attach_usdt(path, probe.provider, name, pid=self._pid or -1))
        elif probe.target == USER:
            self._attach_user(number, probe, program)
        elif probe.wildcard:
            self._attach_many(number, probe, program)
        else:
            object.keep(program.attach())

    def _attach_user(self, number: int, probe: ProbePlan, program: Program) -> None:
        from tcpobs.tools.argdist.elf import Elf

        path, pid = _find_binary(probe.place, self._pid), self._pid or -1
        at_return = "uretprobe" in program.name
        with Elf(path) as elf:
            if not probe.wildcard:
                (name,) = probe.functions
                symbols = elf.find(name)
                if not symbols:
                    raise TcpobsError(f"{probe.place} has no function {name!r} on this host")
                self._object.keep(
                    program.attach_uprobe(path, symbols[0].offset, pid=pid, at_return=at_return)
                )
                return
            found = _matching_symbols(probe, elf)
        names, offsets = list(found.values()), list(found)
        self._names[number] = dict(enumerate(names))
        if program.name.endswith("_multi"):
            self._object.keep(program.attach_uprobes(path, offsets, pid=pid, at_return=at_return))
            return
        for cookie, offset in enumerate(offsets):
            self._object.keep(
                program.attach_uprobe(path, offset, pid=pid, cookie=cookie, at_return=at_return)
            )

    def _attach_many(self, number: int, probe: ProbePlan, program: Program) -> None:
        """To every kernel function that matches; those that cannot be probed are left out."""
        from tcpobs.tools.argdist.kernel import Symbols, matching

        at_return = "kretprobe" in program.name
        addresses = Symbols().addresses
        functions = [name for name in matching(_pattern(probe)) if len(addresses.get(name, ())) == 1]
        self._names[number] = {addresses[name][0]: name for name in functions}
        if program.name.endswith("_multi"):
            self._object.keep(program.attach_kprobes(functions, at_return=at_return))
            return
        attached, last = 0, None
        for name in functions:
            try:
                self._object.keep(program.attach_kprobe(name, at_return=at_return))
                attached += 1
            except LibbpfError as error:
                last = error
        if last and not attached:
            raise last

    # ---- counts

    def take(self) -> list[tuple[Counts, dict[str, int]]]:
        """Of each specifier, what was counted since the last time, and what was lost until now.

        Counts are by values; those of a histogram by (slot,), the one of calls by ().
        """
        before = self._half
        self._half = 1 - before
        self._object.variables["half"] = self._half
        self._barrier.wait()
        lost = self._object.variables["lost"]
        assert isinstance(lost, list)
        found = []
        for number, probe in enumerate(self._plan.probes):
            found.append((self._take(number, probe, "ab"[before]), self._lost(number, lost[number])))
        return found

    def _take(self, number: int, probe: ProbePlan, half: str) -> Counts:
        maps = self._object.maps
        slots = maps.get(f"slots_{number}_{half}")
        if slots is not None:
            value = slots.lookup(bytes(4)) or b""
            slots.update(bytes(4), bytes(len(value)))
            many, stride = probe.slots, (probe.slots * 8 + 7) // 8 * 8
            totals = [0] * many
            for start in range(0, len(value), stride):
                totals = [sum(pair) for pair in zip(totals, struct.unpack_from(f"={many}Q", value, start))]
            if probe.report == COUNT:
                return {(): totals[0]} if totals[0] else {}
            return {(slot,): count for slot, count in enumerate(totals) if count}
        read = self._reader(number, probe)
        counts: Counts = {}
        for key, value in maps[f"counts_{number}_{half}"].take():
            values = read(key)
            counts[values] = counts.get(values, 0) + sum(struct.unpack(f"={len(value) // 8}Q", value))
        return counts

    def _reader(self, number: int, probe: ProbePlan) -> Callable[[bytes], Values]:
        """What reads a key's values."""
        if probe.wildcard:
            names = self._names[number]
            known = sorted(names)

            def function(key: bytes) -> Values:
                import bisect

                (place,) = struct.unpack("=Q", key)
                # A kprobe is a byte or some behind the function's beginning.
                below = bisect.bisect_right(known, place) - 1
                return (names[known[below]] if below >= 0 else hex(place),)

            return function
        layout = struct.Struct(
            "=" + "".join(f"{v.size}s" if v.kind == TEXT else "q" if v.signed else "Q" for v in probe.values)
        )
        enums = [value.names for value in probe.values]
        plain = not any(enums)

        def values(key: bytes) -> Values:
            found = layout.unpack(key)
            if plain:
                return found
            return tuple(names.get(v, v) if names else v for names, v in zip(enums, found))

        return values

    def _lost(self, number: int, counters: dict[str, int]) -> dict[str, int]:
        probe = self._plan.probes[number]
        programs = [self._object.programs[name] for name in probe.ways[self.way[number]]]
        skipped = sum(program.recursion_misses for program in programs)
        return {**counters, "skipped": skipped}

    def close(self) -> None:
        """Detaches and frees everything."""
        self._object.close()
        self._barrier.close()


def _hooked(probe: ProbePlan, hook: str) -> ProbePlan:
    """The same without the other hooks' ways."""
    if probe.target != KERNEL:
        return probe
    kind = r"_(fentry|fexit)$" if hook == "fentry" else r"_(kprobe|kretprobe)(_multi)?$"
    ways = [way for way in probe.ways if all(re.search(kind, program) for program in way)]
    if not ways:
        raise TcpobsError(f"{probe.text} cannot be traced by {hook}")
    return probe._replace(ways=ways)


def _find_binary(place: str, pid: int | None) -> str:
    from tcpobs.tools.argdist.libraries import find_binary

    return find_binary(place, pid)


def _pattern(probe: ProbePlan) -> str:
    from tcpobs.tools.argdist import specifier

    return specifier.parse(probe.text).function.text


def _matching_symbols(probe: ProbePlan, elf: Elf) -> dict[int, str]:
    """The functions that match, by offset; of several names the one with fewest underscores."""
    import fnmatch

    pattern = _pattern(probe)
    found: dict[int, str] = {}
    for name, symbols in elf.functions().items():
        if "@" not in name and fnmatch.fnmatchcase(name, pattern):
            for symbol in symbols:
                known = found.get(symbol.offset)
                if not symbol.indirect and (known is None or _underscores(name) < _underscores(known)):
                    found[symbol.offset] = name
    return dict(sorted(found.items()))


def _underscores(name: str) -> int:
    return len(name) - len(name.lstrip("_"))


def _check_fields(probe: ProbePlan) -> None:
    """A tracepoint's fields have to be where they were when the program was compiled."""
    if probe.target != TRACEPOINT or not probe.fields:
        return
    from tcpobs.tools.argdist import tracepoints

    found = {f.name: (f.offset, f.size) for f in tracepoints.find(probe.place, probe.functions[0]).fields}
    moved = [name for name, place in probe.fields.items() if found.get(name, ())[:1] != place[:1]]
    if moved:
        raise TcpobsError(
            f"{probe.place}:{probe.functions[0]} has {moved[0]} elsewhere on this kernel: compile it here"
        )


def _check_name(probe: ProbePlan) -> None:
    """A kernel function's name has to be of one."""
    if probe.target != KERNEL or probe.wildcard:
        return
    from tcpobs.tools.argdist.kernel import Symbols, is_ambiguous

    if is_ambiguous(probe.functions[0]):
        raise TcpobsError(f"cannot attach {probe.text}: {Symbols().objection(probe.functions[0])}")


def _refusal(probe: ProbePlan, error: LibbpfError) -> TcpobsError:
    """The error to raise when no way worked."""
    if error.errno in (errno.EPERM, errno.EACCES) and not privileges.may_trace():
        return HostError(*host.unprivileged())
    if probe.target == TRACEPOINT and not host.tracefs():
        return HostError(*host.NO_TRACEFS)
    said = error.verdict
    if said:
        unknown = re.search(r"(?:invalid|unknown) func \S*#(\d+)", "\n".join(said))
        if unknown and int(unknown[1]) in _HELPERS:
            name, version = _HELPERS[int(unknown[1])]
            return TcpobsError(f"cannot attach {probe.text}: this kernel has no {name} ({version})")
        return TcpobsError(f"the kernel does not take the program for {probe.text}: {'; '.join(said[-3:])}")
    if probe.target == KERNEL and not os.path.exists(host.KPROBES):
        return HostError(
            f"{probe.text}: kernel functions cannot be probed here, with neither fentry nor kprobes",
            "take a kernel with CONFIG_KPROBES; tracepoints (t:...) work",
        )
    reason = _REFUSALS.get(error.errno or 0, str(error))
    if probe.target == KERNEL and not probe.wildcard:
        from tcpobs.tools.argdist.kernel import Symbols

        reason = Symbols().objection(probe.functions[0]) or reason
    return TcpobsError(f"cannot attach {probe.text}: {reason}")
