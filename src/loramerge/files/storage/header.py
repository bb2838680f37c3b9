"""Metadata with one entry that takes a while to find out, though its length is known."""

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from concurrent.futures import Future


class Awaited(Mapping[str, str]):
    """Strings for a header, of which one is found out in the background, or when it is asked for.

    A writer that can't wait writes the draft first, and the true text in its place at the end.

    Args:
        known: The other entries.
        key: The late entry's key.
        draft: A text of the late entry's length.
        find: Gives the late entry.
    """

    def __init__(self, known: Mapping[str, str], key: str, draft: str, find: Callable[[], str]) -> None:
        self.known = known
        self.key = key
        self.draft = draft
        self._find = find
        self._found: Future[str] | None = None

    def begin(self) -> "Future[str]":
        """Start finding out, in a thread."""
        if self._found is None:
            from concurrent.futures import ThreadPoolExecutor

            pool = ThreadPoolExecutor(1)
            self._found = pool.submit(self._find)
            pool.shutdown(wait=False)
        return self._found

    def __getitem__(self, key: str) -> str:
        return self.begin().result() if key == self.key else self.known[key]

    def __iter__(self) -> Iterator[str]:
        yield from self.known
        yield self.key

    def __len__(self) -> int:
        return len(self.known) + 1


def draft(metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata at its final length, without waiting for anything."""
    if isinstance(metadata, Awaited):
        return {**metadata.known, metadata.key: metadata.draft}
    return dict(metadata)
