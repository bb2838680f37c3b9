"""The names that the Hugging Face Hub has for licences; it refuses a card with any other."""

from ..errors import OptionError, did_you_mean

NAMES = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m openrail++
afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0
cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0
cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0
epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 lgpl-lr isc h-research
intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0 openmdw-1.1 osl-3.0 postgresql ofl-1.1 ncsa
unlicense zlib pddl deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4
grok2-community gemma unknown other
"""
LICENCES = frozenset(NAMES.split())
"""The Hub's names.

Source: https://huggingface.co/docs/hub/repositories-licenses
"""


def check_licence(typed: str) -> None:
    """Refuse what looks like one of the Hub's names and isn't one; a name in words of its own goes in as ``other``.

    Raises:
        OptionError: It isn't.
    """
    if typed in LICENCES or any(letter.isupper() or letter.isspace() for letter in typed):
        return
    raise OptionError(
        f"The Hub has no licence {typed!r}.{did_you_mean(typed, LICENCES)} Its names: "
        "https://huggingface.co/docs/hub/repositories-licenses. Way out: other, or the licence's name with a capital or a space, "
        "such as 'My Licence 1.0', which goes in as other."
    )
