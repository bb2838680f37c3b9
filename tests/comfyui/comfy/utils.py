"""ComfyUI's bar."""

BARS: list[tuple[int, int]] = []
STOP: list[bool] = []


class Stopped(Exception):
    """Raised when the user has stopped the workflow."""


class ProgressBar:
    def __init__(self, total: int) -> None:
        BARS.append((0, total))

    def update_absolute(self, value: int, total: int) -> None:
        if STOP:
            raise Stopped
        BARS[-1] = (value, total)
