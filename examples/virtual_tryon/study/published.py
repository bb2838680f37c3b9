"""Published scores: "Exploring LoRA Merging Techniques in Virtual Try-On", Figure 6.

Cosine of DINOv2 embeddings of 5 pictures per setting with the mean embedding of each set.
"""

SETS = ("profile", "barca")
"""The two reference sets, in the order of the table's columns."""
TABLE: dict[str, tuple[float, float]] = {
    "none": (0.5334, 0.6445),
    "profile": (0.6823, 0.6293),
    "barca": (0.4036, 0.7599),
    "weighted": (0.5703, 0.7168),
    "l2": (0.5986, 0.6840),
    "mixed_weighted": (0.6053, 0.7087),
    "mixed_l2": (0.6154, 0.7179),
}
"""Score against each set, by setting; the names are those of the presets."""


def published(setting: str, reference: str) -> float | None:
    """Look up a cell of the table; None if the study has none."""
    if setting not in TABLE or reference not in SETS:
        return None
    return TABLE[setting][SETS.index(reference)]
