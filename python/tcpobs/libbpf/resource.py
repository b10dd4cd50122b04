"""What holds something of the kernel's: closed on every way out."""

from __future__ import annotations

from tcpobs.libbpf.errors import LibbpfError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self


class Handle:
    """A pointer of libbpf's, which ends with what it belongs to: using it later is an error, no crash."""

    def __init__(self, handle: int) -> None:
        self._pointer = handle

    @property
    def handle(self) -> int:
        """The pointer. Raises LibbpfError once it is forgotten."""
        if not self._pointer:
            raise LibbpfError("the object is closed")
        return self._pointer

    def forget(self) -> None:
        """What it points to is no more."""
        self._pointer = 0


class Resource:
    """A context manager that closes itself. Closing twice is no error."""

    def close(self) -> None:
        """Gives it back."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
