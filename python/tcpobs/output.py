"""Standard output: each write goes out whole, at once."""

from __future__ import annotations

import os
import select
import sys

from tcpobs.errors import TcpobsError


class Output:
    """Standard output as it is when this is made. Raises TcpobsError when there is none."""

    def __init__(self) -> None:
        if sys.stdout is None:
            raise TcpobsError("standard output is closed")
        self.fd = sys.stdout.fileno()
        self.isatty = sys.stdout.isatty()
        self._encoding = sys.stdout.encoding

    def write(self, text: str) -> None:
        """Raises BrokenPipeError when the reader has gone, and TcpobsError when it cannot be written."""
        data = memoryview(text.encode(self._encoding, "backslashreplace"))
        while data:
            try:
                data = data[os.write(self.fd, data) :]
            except BlockingIOError:  # somebody who shares the pipe made it so
                select.select([], [self.fd], [])
            except BrokenPipeError:
                raise
            except OSError as error:
                raise TcpobsError(f"cannot write the output: {error.strerror}") from None
