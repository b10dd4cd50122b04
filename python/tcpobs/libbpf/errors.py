"""What can go wrong in libbpf or in the kernel behind it."""

from __future__ import annotations

import os


class LibbpfError(Exception):
    """A call that failed.

    `what` says what was tried, `errno` is the kernel's error number (0 if there is none), `log` holds
    libbpf's own messages about it, the verifier's log among them.
    """

    def __init__(self, what: str, errno: int = 0, log: str = "") -> None:
        super().__init__(f"{what}: {os.strerror(errno)}" if errno else what)
        self.what = what
        self.errno = errno
        self.log = log

    @property
    def verdict(self) -> list[str]:
        """What the verifier said, line by line, without its statistics; empty if it said nothing."""
        _, _, said = self.log.partition("-- BEGIN PROG LOAD LOG --\n")
        lines = said.partition("-- END PROG LOAD LOG --")[0].splitlines()
        return [line for line in lines if line.strip() and not line.startswith("processed ")]


class LibraryMissing(LibbpfError):
    """libbpf.so.1 cannot be loaded, or is older than this binding needs."""
