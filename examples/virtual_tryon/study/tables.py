"""The report's tables."""

from collections.abc import Callable, Iterable, Sequence

from loramerge.scoring import FEWEST

from .caveats import named
from .content import Table
from .orderings import Comparison, Decision
from .published import published
from .results import Group
from .scores import SECOND_TRUTH, TRUTH
from .sets import NOTHING


def best(rows: Sequence[str], value: Callable[[str], float]) -> str:
    """Return the name with the highest value."""
    return max(rows, key=value)


def scores(group: Group, names: Sequence[str], view: str, *, beside: bool) -> Table:
    """Make the table of scores against each concept, the best setting in bold; ``beside`` adds published scores."""
    found = group.views[view]
    references = [r for r in group.references if r in found.references]
    settings = [name for name in names if not name.startswith(":")]
    top = {r: best(settings, lambda name, r=r: found.mean(name, r).mean) for r in references}  # type: ignore[misc]
    theirs = [r for r in references if beside and any(published(name, r) is not None for name in names)]
    rows = []
    for name in names:
        cells = [_strong(f"{found.mean(name, r):.3f}", name == top[r]) for r in references]
        rows.append((group.label(name), *cells, *(_published(name, r) for r in theirs)))
    head = ("Setting", *references, *(f"published: {r}" for r in theirs))
    return Table(head, tuple(rows), _note(group, names))


def _published(setting: str, reference: str) -> str:
    value = published(setting, reference)
    return "" if value is None else f"{value:.4f}"


def _strong(text: str, yes: bool) -> str:
    return f"**{text}**" if yes else text


def _note(group: Group, names: Sequence[str]) -> str:
    """Explain the numbers, and say over how many seeds they are."""
    protocol = group.job.protocol
    true = f", {protocol.data.truths} of true pictures" if any(name.startswith(":") for name in names) else ""
    told = f"Seeds: {protocol.drawing.seeds} of a setting{true}."
    return f"Mean cosine [95 % interval over seeds, where there are {FEWEST} or more]. {told}"


def columns(group: Group, view: str) -> Table:
    """Show what each concept adds to each column, on true pictures that differ only in it."""
    found = group.views[view]
    rows = []
    for concept in group.references:
        added = [found.difference(f":{concept}", f":{NOTHING}", r) for r in group.references]
        rows.append((f"{concept} added", *(f"{difference:+.4f}" for difference in added)))
    note = "True pictures with one concept, less the same pictures without it. Only the diagonal should be above zero."
    return Table(("", *group.references), tuple(rows), note)


def orderings(group: Group, found: Sequence[Decision]) -> Table:
    """Make the table of claims, with the verdicts of both tables."""
    rows = []
    for decision in found:
        comparison, difference = decision.weakest
        rows.append(
            (
                decision.claim.text,
                f"**{decision.verdict}**",
                f"{difference:+.4f}{_which(group, comparison) if len(decision.differences) > 1 else ''}",
                decision.published or "",
                {True: "yes", False: "**no**", None: "open"}[decision.agrees],
            )
        )
    head = ("The order", "Here", "Difference (of several, the one that decides)", "In the study's table", "The same?")
    note = (
        "Holds: the 95 % interval of every difference, paired by prompt and seed, lies above zero. Does not hold: one lies "
        "below. Otherwise it is not decided within the interval. The study's table has no intervals: its differences count "
        "as they stand. Of twenty differences that are none, one interval leaves out zero."
    )
    return Table(head, tuple(rows), note)


def _which(group: Group, comparison: Comparison) -> str:
    return f" ({group.label(comparison.higher)} − {group.label(comparison.lower)})"


def truth(group: Group, names: Iterable[str], *, against: str | None = None) -> Table:
    """Make the table of correct attributes, ranked by all concepts together, with the similarity to true pictures.

    Args:
        group: Results with findings.
        names: Settings; true pictures come first, as the upper bound.
        against: A setting to subtract from the first column.
    """
    found, like, other = group.findings, group.views[TRUTH], group.views.get(SECOND_TRUTH)
    assert found is not None
    order = sorted(names, key=lambda name: (not name.startswith(":"), -found.share(name, found.concepts).mean))
    head = ["Setting", "all concepts", *found.concepts, "scene", "cosine with the truth"]
    if against:
        head.insert(2, f"minus {group.label(against)}")
    if other:
        head.append(f"by {second_name(group)}")
    head += ["drift"] * bool(group.drift)
    costs = {setting.name: setting.passes for setting in group.settings}
    costly = any(costs.get(name, 1) > 1 for name in order)
    head += ["passes per step"] * costly
    rows = []
    for name in order:
        cells = [f"{found.share(name, found.concepts):.3f}"]
        if against:
            same = name.startswith(":") or name == against
            cells.append("" if same else f"{found.difference(name, against, found.concepts):+.4f}")
        cells += [f"{found.share(name, [concept]).mean:.3f}" for concept in found.concepts]
        cells += [f"{found.share(name, ['scene']).mean:.3f}", f"{like.mean(name, TRUTH):.3f}"]
        cells += [f"{other.mean(name, SECOND_TRUTH):.3f}"] if other else []
        cells += [f"{group.drift[name].mean:.3f}" if name in group.drift else ""] * bool(group.drift)
        cells += [str(costs.get(name, ""))] * costly
        rows.append((group.label(name), *cells))
    note = (
        "Share of the concepts' attributes that the judge finds as they are in the true pictures; each concept counts "
        "alike. The true pictures' own row is what the judge's errors leave to be reached. Cosine: with the mean embedding "
        "of the true pictures of the same prompt."
        f"{' Drift: 1 − cosine with the picture of the base alone, for prompts that name no concept.' * bool(group.drift)}"
        f"{' A picture costs as much as its passes of the denoiser.' * costly}"
    )
    return Table(tuple(head), tuple(rows), note)


def second_name(group: Group) -> str:
    """Return the short name of the second encoder."""
    second = group.job.protocol.second
    return named(second.model) if second else ""


def attributes(group: Group, names: Sequence[str]) -> Table:
    """Make the table of each attribute's share of correct pictures."""
    found = group.findings
    assert found is not None
    rows = [
        (group.label(name), *(f"{found.share(name, [concept], a).mean:.2f}" for concept, a in found.attributes))
        for name in names
    ]
    return Table(("Setting", *(a if a == c else f"{c}: {a}" for c, a in found.attributes)), tuple(rows))
