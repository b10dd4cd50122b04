"""What a user can meet."""


class TcpobsError(Exception):
    """Something that keeps tcpobs from running: one line, with the remedy."""
