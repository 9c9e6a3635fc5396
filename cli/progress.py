"""Progress on stderr: a spinner in a terminal, plain lines elsewhere, nothing when quiet."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console


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
