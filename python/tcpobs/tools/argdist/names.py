"""Names that are not known, and those that may have been meant."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection


def nearest(name: str, names: Collection[str]) -> list[str]:
    """Up to three: those that begin with it, as a kernel's functions get suffixes, then those like it."""
    import difflib

    longer = sorted((other for other in names if other.startswith(name)), key=len)[:3] if name else []
    # Comparing is slow, and there may be 100,000: first those of nearly its length that share its letters.
    letters = set(name)
    spread = max(3, len(name) // 3)
    alike = [
        other
        for other in names
        if abs(len(other) - len(name)) <= spread
        and len(letters.symmetric_difference(other)) <= spread + 1
        and other not in longer
    ]
    return [*longer, *difflib.get_close_matches(name, alike, 3)][:3]


def did_you_mean(name: str, names: Collection[str]) -> str:
    """What to add to an error about a name that is not known: `; did you mean a, b?`, or nothing."""
    close = nearest(name, names)
    return f"; did you mean {', '.join(close)}?" if close else ""
