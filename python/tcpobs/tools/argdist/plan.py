"""What a compiled object is for: which programs to attach where, and how to read its maps.

It travels with the object, as JSON: so an object runs where there is no compiler, and no specifier to parse.
"""

from __future__ import annotations

import json
from collections import namedtuple

from tcpobs.errors import TcpobsError

VERSION = 1
COUNT, HISTOGRAM = "count", "histogram"
NUMBER, TEXT, POINTER = "number", "text", "pointer"
KERNEL, USER, TRACEPOINT, USDT = "kernel", "user", "tracepoint", "usdt"
"""What is probed."""
HOOKS = ("fentry", "kprobe")
"""What a kernel function's programs are of, the better one first; each has its kind for returns."""


TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NamedTuple

    class ValuePlan(NamedTuple):
        """One value of a key: its name as the user wrote the expression; `size` bytes in the key."""

        name: str
        kind: str
        size: int
        signed: bool = False
        names: dict[int, str] = {}  # noqa: RUF012, nobody changes it
        """An enum's."""

    class _Probe(NamedTuple):
        text: str
        label: str | None
        report: str
        target: str
        place: str
        functions: list[str]
        provider: str
        wildcard: bool
        ways: list[list[str]]
        values: list[ValuePlan]
        linear: tuple[int, int, int] | None = None
        fields: dict[str, tuple[int, int]] = {}  # noqa: RUF012

    class _Plan(NamedTuple):
        machine: str
        probes: list[ProbePlan]

else:  # dataclasses take 10 ms to import: a tenth of a start from the cache
    ValuePlan = namedtuple("ValuePlan", "name kind size signed names", defaults=(False, {}))
    _Probe = namedtuple(
        "_Probe",
        "text label report target place functions provider wildcard ways values linear fields",
        defaults=(None, {}),
    )
    _Plan = namedtuple("_Plan", "machine probes")


class ProbePlan(_Probe):
    """One specifier's.

    `ways` are lists of programs, the best first: those of one way are attached together. `fields` are those
    that the program reads of a tracepoint, with their offsets and sizes in bytes: they must be the same where
    it runs.
    """

    __slots__ = ()

    @property
    def title(self) -> str:
        """What stands above its output."""
        return self.label or self.text

    @property
    def slots(self) -> int:
        """How many counters it has, where it counts in slots."""
        return 1 if self.report == COUNT else histogram_slots(self.linear)


def histogram_slots(linear: tuple[int, int, int] | None) -> int:
    """How many slots it has: the powers of two and one for below 0, or the steps and one at each end."""
    if linear is None:
        return 65
    low, high, step = linear
    return (high - low) // step + 3


class Plan(_Plan):
    """An object's: its specifiers, in their order."""

    __slots__ = ()

    def to_json(self) -> str:
        """As text on one line."""
        probes = [{**p._asdict(), "values": [v._asdict() for v in p.values]} for p in self.probes]
        plan = {"version": VERSION, "machine": self.machine, "probes": probes}
        return json.dumps(plan, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The reverse. Raises TcpobsError for anything else."""
        try:
            read: dict[str, Any] = json.loads(text)
            if read.pop("version") != VERSION:
                raise TcpobsError("it was made by another version of tcpobs: make it again")
            probes = []
            for probe in read["probes"]:
                values = [
                    ValuePlan(**{**v, "names": {int(n): t for n, t in v["names"].items()}})
                    for v in probe["values"]
                ]
                linear = probe["linear"] and tuple(probe["linear"])
                fields = {name: (place[0], place[1]) for name, place in probe["fields"].items()}
                probes.append(ProbePlan(**{**probe, "values": values, "linear": linear, "fields": fields}))
            return cls(read["machine"], probes)
        except (ValueError, TypeError, KeyError, AttributeError, IndexError):
            raise TcpobsError("what it says of its specifiers is damaged") from None
