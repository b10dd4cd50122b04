"""What a user can meet."""


class TcpobsError(Exception):
    """Something that keeps tcpobs from running: one line, with the remedy."""


class HostError(TcpobsError):
    """The host does not allow what is needed; `tcpobs doctor` says more of it."""

    def __init__(self, cause: str, remedy: str) -> None:
        super().__init__(f"{cause}: {remedy}")
        self.cause = cause
        self.remedy = remedy


class UsageError(TcpobsError):
    """A wrong call: exit status 2."""
