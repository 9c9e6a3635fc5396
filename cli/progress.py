"""Progress on stderr: a spinner in a terminal, plain lines elsewhere, nothing when quiet."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    from p2bw.compiler.placement.stop import Stop


@contextmanager
def progress(quiet: bool) -> Iterator[Callable[[str], None]]:
    """Yields a function that says what is being done now."""
    if quiet:
        yield lambda message: None
        return
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield lambda message: console.print(message, markup=False, soft_wrap=True)
        return
    with console.status("") as status:
        yield lambda message: status.update(message)


def stopping(limit: float | None, say: Callable[[str], None]) -> "Stop":
    """Ends a search at the limit or on Ctrl-C, and keeps what it has found."""
    from p2bw.compiler.placement.stop import Stop
    from p2bw.contract.errors import UsageError

    if limit is not None and not 0 < limit < float("inf"):
        raise UsageError(f"--limit {limit:g}: give seconds, more than 0")
    return Stop(limit, lambda: say("stopping, the best plan so far is kept; Ctrl-C again aborts"))
