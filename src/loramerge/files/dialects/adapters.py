"""Files with several PEFT adapters, whose names are in the keys: ``….lora_A.person.weight``."""

from collections.abc import Iterable, Mapping

from ...errors import NotALoRAError, OptionError
from ...tensors import Tensor
from .suffixes import adapter


def names(keys: Iterable[str]) -> list[str]:
    """List the adapters that the keys name, in order."""
    return list(dict.fromkeys(name for key in keys if (name := adapter(key))))


def one(tensors: Mapping[str, Tensor], name: str | None) -> Mapping[str, Tensor]:
    """Return the tensors of one adapter, and those that belong to no adapter.

    Args:
        tensors: The file's tensors by key.
        name: The adapter, if there are several.

    Raises:
        NotALoRAError: There are several, and `name` is None.
        OptionError: There is no such adapter.
    """
    adapters = names(tensors)
    if name is None and len(adapters) < 2:
        return tensors
    if name is None:
        raise NotALoRAError(
            f"it holds {len(adapters)} adapters, {' and '.join(adapters)}. Ways out: name one in Python "
            f"(adapter={adapters[0]!r}), or write it to a file of its own: loramerge convert … --adapter {adapters[0]} "
            f"-o {adapters[0]} --to peft"
        )
    if name not in adapters:
        raise OptionError(f"it holds no adapter {name!r}. Available: {', '.join(adapters) or 'one without a name'}.")
    return {key: tensor for key, tensor in tensors.items() if adapter(key) in (name, None)}
