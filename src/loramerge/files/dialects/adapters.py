"""Files with several adapters of PEFT's, which stand in the keys: ``….lora_A.person.weight``."""

from collections.abc import Iterable, Mapping

from ...errors import NotALoRAError, OptionError
from ...tensors import Tensor
from .suffixes import adapter


def names(keys: Iterable[str]) -> list[str]:
    """The adapters that the keys name, in order."""
    return list(dict.fromkeys(name for key in keys if (name := adapter(key))))


def one(tensors: Mapping[str, Tensor], name: str | None) -> Mapping[str, Tensor]:
    """The tensors of one adapter, and those of none.

    Args:
        tensors: The file's tensors by key.
        name: The adapter, where there are several.

    Raises:
        NotALoRAError: There are several, and none is named.
        OptionError: There is no such adapter.
    """
    found = names(tensors)
    if name is None and len(found) < 2:
        return tensors
    if name is None:
        raise NotALoRAError(
            f"it holds {len(found)} adapters, {' and '.join(found)}. Ways out: name one in Python (adapter={found[0]!r}), "
            f"or write it to a file of its own: loramerge convert … --adapter {found[0]} -o {found[0]} --to peft"
        )
    if name not in found:
        raise OptionError(f"it holds no adapter {name!r}. Available: {', '.join(found) or 'one without a name'}.")
    return {key: tensor for key, tensor in tensors.items() if adapter(key) in (name, None)}
