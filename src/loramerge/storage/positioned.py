"""Reading and writing at a place in a file, from several threads at once."""

import os
import threading

_lock = threading.Lock()


def read_there(fd: int, size: int, offset: int) -> bytes:
    """``os.pread`` where the system lacks it (Windows)."""
    with _lock:
        os.lseek(fd, offset, os.SEEK_SET)
        return os.read(fd, size)


def write_there(fd: int, data: bytes | memoryview, offset: int) -> int:
    """``os.pwrite`` where the system lacks it (Windows)."""
    with _lock:
        os.lseek(fd, offset, os.SEEK_SET)
        return os.write(fd, data)


pread = getattr(os, "pread", read_there)
pwrite = getattr(os, "pwrite", write_there)
