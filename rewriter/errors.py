"""One tree of errors: what failed, the evidence, and one thing to do next.

Every error a user can cause is a `RewriteError`. The command line prints `str(error)` and exits with
`error.exit_code`; it never shows a traceback unless asked with `-v`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class RewriteError(Exception):
    """The request could not be carried out.

    `what` is one line with the user's own values, `evidence` is what was seen (closest names, shapes, lines of the
    program), `fix` is the one thing to do next.
    """

    exit_code = 1

    def __init__(self, what: str, *, evidence: Iterable[str] = (), fix: str = "") -> None:
        self.what = what
        self.evidence = tuple(evidence)
        self.fix = fix
        super().__init__(what)

    def __str__(self) -> str:
        lines = [self.what, *(f"  {line}" for line in self.evidence)]
        if self.fix:
            lines.append(self.fix)
        return "\n".join(lines)


class UsageError(RewriteError):
    """Options, targets or names that cannot be meant: exit code 2."""

    exit_code = 2


class UnsafeError(RewriteError):
    """Refused because carrying on could execute code from a file: exit code 3."""

    exit_code = 3


class LawError(RewriteError):
    """Numbers outside what was promised (a pass's law, non-finite values): exit code 4."""

    exit_code = 4


class RewriteWarning(UserWarning):
    """Something that works but is hardly meant, such as an adapter without effect."""


def closest(name: str, known: Sequence[str], count: int = 5) -> list[str]:
    """The known names that look most like `name`, best first; for the evidence of an error."""
    tails: dict[str, str] = {}
    for full in known:
        tails.setdefault(full.rsplit(".", 1)[-1], full)
    by_tail = [tails[tail] for tail in difflib.get_close_matches(name, list(tails), count, 0.6)]
    by_full = difflib.get_close_matches(name, list(known), count, 0.6)
    return list(dict.fromkeys([*by_tail, *by_full]))[:count]
