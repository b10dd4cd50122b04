"""The command line: one subcommand a tool, each imported only when it runs."""

from __future__ import annotations

import argparse
import os
import sys

from tcpobs.errors import HostError, TcpobsError, UsageError
from tcpobs.libbpf.errors import LibbpfError, LibraryMissing

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType
    from typing import NoReturn

TOOLS = {
    "states": "every TCP state change, with the time spent in the old state",
    "life": "every TCP session that ends: owner, addresses, bytes, duration",
    "argdist": "what any function is called with, and what it returns",
    "doctor": "what this host can do, and what to do about the rest",
}

EXAMPLES = """\
examples:
  tcpobs life -w              sessions as they end
  tcpobs states -L 443        state changes of the local port 443
  tcpobs doctor               whether this host can run them, and why not
  tcpobs life --help          all about one tool"""


class _Parser(argparse.ArgumentParser):
    """A parser that puts an error on one line."""

    def error(self, message: str) -> NoReturn:
        message = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


class _Help(argparse.RawDescriptionHelpFormatter):
    """Help of one width: argparse asks for the terminal's at every argument, help or not."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=96)


class _Version(argparse.Action):
    """Prints what runs: tcpobs, libbpf, the kernel."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from tcpobs import __version__
        from tcpobs.libbpf.library import library

        libbpf = ".".join(map(str, library().version))
        kernel = os.uname()
        print(f"tcpobs {__version__}, libbpf {libbpf}, {kernel.sysname} {kernel.release} {kernel.machine}")
        parser.exit()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command line; returns the exit status: 0, 1 when the host says no, 2 for a wrong call."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        return _run(arguments)
    except BrokenPipeError:
        return 0
    except LibraryMissing as error:
        return _fail(f"{error}; install tcpobs again, or point TCPOBS_LIBBPF to another one")
    except HostError as error:
        return _fail(f"{error} (`tcpobs doctor` says more)")
    except UsageError as error:
        return _fail(str(error), 2)
    except (TcpobsError, LibbpfError) as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return 0


def _run(arguments: Sequence[str]) -> int:
    parser = _Parser(
        prog="tcpobs",
        description="Shows what TCP does on this host.",
        epilog=EXAMPLES,
        formatter_class=_Help,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show what runs and exit")
    commands = parser.add_subparsers(prog="tcpobs", title="tools", dest="tool", required=True, metavar="TOOL")
    for name, does in TOOLS.items():
        tool = commands.add_parser(
            name,
            help=does,
            description=f"Shows {does}.",
            formatter_class=_Help,
        )
        if name in arguments:
            module = _module(name)
            module.add_arguments(tool)
            tool.set_defaults(run=module.run)
    parsed = parser.parse_args(arguments)
    status: int = parsed.run(parsed) or 0
    return status


def _module(tool: str) -> ModuleType:
    from importlib import import_module

    return import_module(f"tcpobs.tools.{tool}")


def _fail(message: str, status: int = 1) -> int:
    print(f"tcpobs: {message}", file=sys.stderr)
    return status
