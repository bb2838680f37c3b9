"""Which files this process has open."""

import os
import sys
from pathlib import Path

import pytest

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


def still_open(folder: Path) -> list[str]:
    """The open files below a folder."""
    links = (Path("/proc/self/fd") / fd for fd in os.listdir("/proc/self/fd"))
    return [str(link.readlink()) for link in links if link.is_symlink() and link.readlink().is_relative_to(folder)]
