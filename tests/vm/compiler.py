"""Compiles for a VM: its `clang` (tests/vm/clang) sends a program here, and gets the object."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import threading
from base64 import b64encode
from contextlib import suppress
from pathlib import Path

from vm.packages import ROOT

CLANG = ROOT / "tests/vm/clang"
"""What TCPOBS_CLANG is in a VM."""

_OBJECTS = ROOT / "python/tcpobs/_objects"


class Compiler:
    """Answers one VM, at a UNIX socket that qemu connects to."""

    def __init__(self, path: Path) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._thread = threading.Thread(target=self._answer, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends it, once qemu has gone."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()

    def _answer(self) -> None:
        with (
            suppress(OSError),  # closed, or qemu was killed
            self._listener.accept()[0] as connection,
            connection.makefile("rwb") as port,
        ):
            for line in port:
                port.write(_compiled(json.loads(line)))
                port.flush()


def _compiled(request: dict[str, str | list[str]]) -> bytes:
    # Where tcpobs is installed in the VM, it has these headers, too.
    arguments = [re.sub("^-I.*/tcpobs/_objects/", f"-I{_OBJECTS}/", part) for part in request["arguments"]]
    done = subprocess.run(
        [sys.executable, "-m", "ziglang", "clang", *arguments],
        input=str(request["source"]).encode(),
        capture_output=True,
        cwd=_OBJECTS,
    )
    answer = {
        "status": done.returncode,
        "out": b64encode(done.stdout).decode(),
        "err": done.stderr.decode(errors="replace"),
    }
    return json.dumps(answer).encode() + b"\n"
