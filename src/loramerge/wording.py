"""Parts of what errors say."""

from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The sentence that names the nearest of the known names, after a space; empty where none is near."""
    import difflib

    lowered = {other.lower(): other for other in known}
    near = difflib.get_close_matches(name.lower(), lowered, n=1)
    return f" Did you mean {lowered[near[0]]!r}?" if near else ""


def an(noun: str) -> str:
    """The noun with its article: ``an oft``, ``a lora``."""
    return f"an {noun}" if noun[:1].lower() in "aeiou" else f"a {noun}"


def first_line(error: BaseException) -> str:
    """What an error of another library says, without the lines that follow."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def size(count: float) -> str:
    """Bytes as people read them."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
