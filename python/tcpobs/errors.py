"""What a user can meet."""


class TcpobsError(Exception):
    """Something that keeps tcpobs from running: one line, with the remedy."""


class HostError(TcpobsError):
    """The host does not allow what is needed; `tcpobs doctor` says more of it."""
