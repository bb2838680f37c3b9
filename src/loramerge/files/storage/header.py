"""Header metadata with one slow entry whose length is known in advance, filled in after writing."""

from collections.abc import Callable, Iterator, Mapping
from threading import Thread


class Awaited(Mapping[str, str]):
    """Strings for a header, one of which is computed in a thread, or when it is read.

    The writer reserves the header's place with the draft, and writes the true text at the end.

    The slow entry is a merge's recipe, which has the SHA-256 of every input.  Hashing two SDXL LoRAs of
    rank 8 and 32 (330 MB) takes 0.36 s of processor time, and their whole merge 2.9 s: one thread would
    take an eighth longer if it hashed first.

    Args:
        known: The other entries.
        key: The slow entry's key.
        draft: A text of the slow entry's length.
        find: Computes the slow entry.
    """

    def __init__(self, known: Mapping[str, str], key: str, draft: str, find: Callable[[], str]) -> None:
        self.known = known
        self.key = key
        self.draft = draft
        self._find = find
        self._thread: Thread | None = None
        self._found = ""
        self._error: BaseException | None = None

    def begin(self) -> Thread:
        """Start computing the slow entry, in a thread."""
        thread = self._thread
        if thread is None:
            thread = Thread(target=self._compute)
            thread.start()
            self._thread = thread
        return thread

    def _compute(self) -> None:
        try:
            self._found = self._find()
        except BaseException as error:  # it is raised where the entry is read
            self._error = error

    def __getitem__(self, key: str) -> str:
        if key != self.key:
            return self.known[key]
        self.begin().join()
        if self._error is not None:
            raise self._error
        return self._found

    def __iter__(self) -> Iterator[str]:
        yield from self.known
        yield self.key

    def __len__(self) -> int:
        return len(self.known) + 1


def draft(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata at its final length, without waiting for the slow entry."""
    if isinstance(metadata, Awaited):
        return {**metadata.known, metadata.key: metadata.draft}
    return dict(metadata)
