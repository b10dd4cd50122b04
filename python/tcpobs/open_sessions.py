"""The sessions that are open now: walks over the sockets that a trace of `life` remembers.

There is one walk for each storage. Both see every session that is remembered during the whole walk, once.
"""

from __future__ import annotations

import sys
from itertools import islice

from tcpobs.libbpf.iterator import BpfIterator
from tcpobs.libbpf.resource import Resource

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from tcpobs.libbpf.object import Object


BATCH = 256
"""Sessions in a piece, at most."""


class OpenSessions(Resource):
    """Lists what is open. `describe` is the BPF program that describes one session."""

    def __init__(self, object: Object, describe: str, storage: str) -> None:
        self._variables = object.variables
        self._program = object.programs[describe]
        self._storage = object.maps[storage]
        self._listing = 0

    def read(self) -> Iterator[bytes]:
        """One listing: pieces of whole `struct session`."""
        self._listing += 1
        self._variables["listing"] = self._listing
        return self._walk()

    def _walk(self) -> Iterator[bytes]:
        raise NotImplementedError


class StorageWalk(OpenSessions):
    """The kernel walks through sk_storage, by `iter/bpf_sk_storage_map`."""

    def __init__(self, object: Object, describe: str, storage: str) -> None:
        """Raises LibbpfError where the kernel refuses the iterator."""
        super().__init__(object, describe, storage)
        self._size = len(object.variables.read("open_session"))
        self._iterator = BpfIterator(self._program, self._storage)

    def _walk(self) -> Iterator[bytes]:
        again = True
        while again:  # a walk that comes in several pieces may have missed some: the next has those
            again, rest = False, b""
            for number, piece in enumerate(self._iterator.read()):
                again = number > 0
                data = rest + piece
                whole = len(data) - len(data) % self._size
                rest = data[whole:]
                yield data[:whole]

    def close(self) -> None:
        """Detaches the iterator."""
        self._iterator.close()


class HashWalk(OpenSessions):
    """This process walks through the hash by lookups, and runs the program for each socket that it finds."""

    def __init__(self, object: Object, describe: str, storage: str) -> None:
        super().__init__(object, describe, storage)
        self._described = object.variables.mapped("open_session")

    def _walk(self) -> Iterator[bytes]:
        sockets = (int.from_bytes(key, sys.byteorder) for key, _ in self._storage.items())
        found = (self._described.read() for socket in sockets if self._program.run(socket))
        while piece := b"".join(islice(found, BATCH)):
            yield piece

    def close(self) -> None:
        """Unmaps what the program writes to."""
        self._described.close()
