"""tcpobs argdist: with what values a function is called, and what it returns.

A small compiler: specifier → targets and types → codegen → compile → trace → report, a module each.
"""

from __future__ import annotations

import argparse

from tcpobs.errors import UsageError
from tcpobs.tools.listing import seconds, whole_number

EXAMPLES = """\
specifiers:
  {p,r,t,u}:{[library],category}:function(signature)[:type[,type...]:expr[,expr...][:filter]][#label]

  p entry, r return, t kernel tracepoint, u USDT probe. No library means the kernel; else it is a
  library (c is libc), a path, or a program on PATH. The signature may be left out where BTF or
  DWARF know the function. In r: $retval, $entry(param), $latency (ns). Everywhere: $PID, $TID, $COMM,
  STRCMP("text", expr): whether what is there begins with the text. Tracepoints: args->field. USDT:
  arg1, arg2, ...

examples:
  tcpobs argdist -C 'p::tcp_sendmsg():size_t:size'           sizes sent, and how often each
  tcpobs argdist -H 'r::tcp_sendmsg():u64:$latency'          how long it takes, in ns
  tcpobs argdist -H 't:block:block_rq_complete():u32:args->nr_sector'
  tcpobs argdist -p 181 -C 'p:c:write(int fd):int:fd' -T 5   the files that process 181 writes most
  tcpobs argdist -C 'p::tcp_*()'                             which functions are called, and how often
  tcpobs argdist -C 'p::f()' --compile-only f.o              for a host without a compiler...
  tcpobs argdist --object f.o                                ...and there
  tcpobs argdist --list 'p::tcp_send*'                       what can be probed"""


class _Question(argparse.Action):
    """Keeps -H and -C in the order they were given in."""

    def __call__(
        self,
        _parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        value: object,
        _option: str | None = None,
    ) -> None:
        asked = getattr(namespace, self.dest) or []
        setattr(namespace, self.dest, [*asked, (self.const, value)])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Its flags."""
    from tcpobs.tools.argdist.plan import COUNT, HISTOGRAM, HOOKS

    parser.epilog = EXAMPLES
    add = parser.add_argument
    for letter, name, what in (("-C", COUNT, "count"), ("-H", HISTOGRAM, "histogram")):
        add(
            letter,
            f"--{what}",
            dest="asked",
            action=_Question,
            const=name,
            metavar="SPECIFIER",
            help=f"a {what} of it; may be given several times",
        )
    add("-p", "--pid", type=_id, help="only this process")
    add("-t", "--tid", type=_id, help="only this thread")
    add(
        "-z",
        "--string-size",
        type=_string_size,
        default=80,
        metavar="BYTES",
        help="most bytes read from a char * (80)",
    )
    add("-i", "--interval", type=seconds, default=1.0, metavar="SECONDS", help="time between outputs (1)")
    add("-d", "--duration", type=seconds, metavar="SECONDS", help="end after this time")
    add("-n", "--number", type=_count, metavar="N", help="end after so many outputs")
    add(
        "-v",
        "--verbose",
        action="store_true",
        help="print the generated program first, and libbpf's messages",
    )
    add("-c", "--cumulative", action="store_true", help="do not clear between outputs")
    add("-T", "--top", type=_count, metavar="N", help="only the N most frequent (counts)")
    add(
        "-I",
        "--include",
        action="append",
        default=[],
        metavar="HEADER",
        help="a header for the program: a path, or a name on the search path",
    )
    add("-D", "--define", action="append", default=[], metavar="NAME=VALUE", help="a macro for the program")
    add("--linear", type=_linear, metavar="LOW,HIGH,STEP", help="histograms by equal steps")
    add("--max-keys", type=_count, metavar="N", help="most values that a count holds in one interval (10240)")
    add("--json", action="store_true", help="one JSON object a line for each probe and interval")
    add(
        "--list",
        metavar="PATTERN",
        help="show what can be probed: 'p::tcp_*', 'p:c:mem*', 't:sock:*', 'u:python3:*'",
    )
    add("--compile-only", metavar="FILE", help="write the object, with its specifiers, and end")
    add("--object", metavar="FILE", help="run an object made by --compile-only, here or on another host")
    add("--btf", metavar="FILE", help="the kernel's types, where it does not carry them itself")
    add("--ebpf", action="store_true", help=argparse.SUPPRESS)
    add("--hook", choices=HOOKS, help=argparse.SUPPRESS)


def run(arguments: argparse.Namespace) -> int | None:
    """Runs the command."""
    from tcpobs.tools.argdist import command

    modes = [bool(arguments.asked), bool(arguments.object), bool(arguments.list)]
    if sum(modes) != 1:
        raise UsageError("give specifiers with -C and -H, or --object FILE, or --list PATTERN (see --help)")
    if arguments.list:
        from tcpobs.tools.argdist import inventory

        inventory.run(arguments.list, arguments.pid, arguments.btf)
        return None
    return command.run(arguments)


def _number(text: str, low: int, high: int, what: str) -> int:
    number = whole_number(text, low, high)
    if number is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
    return number


def _id(text: str) -> int:
    return _number(text, 1, (1 << 22) - 1, "the ID of a process or thread")


def _count(text: str) -> int:
    return _number(text, 1, 1 << 24, f"a whole number from 1 to {1 << 24}")


def _string_size(text: str) -> int:
    return _number(text, 1, 384, "a number of bytes from 1 to 384")


def _linear(text: str) -> tuple[int, int, int]:
    try:
        low, high, step = (int(part, 0) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not LOW,HIGH,STEP, as 0,1000,100") from None
    if not -(1 << 62) < low < high < 1 << 62 or step < 1 or (high - low) // step > 1000:
        raise argparse.ArgumentTypeError(f"{text!r}: LOW is below HIGH, and there are at most 1000 steps")
    return low, high, step
