"""The stage ``report``: figures, tables and statements from the results."""

from collections.abc import Iterable, Sequence
from itertools import cycle
from typing import Any

from loramerge.files import write_text
from loramerge.scoring import Interval, images_in

from . import caveats, page, scores, tables
from .content import Figure, Part, Report, Section, Sheet, Table, section
from .figures import COLOURS, Point, Series, bars, heat, plane
from .job import Job
from .orderings import Decision, decisions
from .protocol import STUDY, Setting, Training
from .published import SETS, TABLE, published
from .results import Group, groups
from .sets import TRUE

RELIABLE = 0.7
"""Share of attributes that a reliable judge finds in true pictures."""


def make(job: Job) -> bool:
    """Write ``report.html``, ``report.md``, ``scores.csv`` and ``pictures.csv``."""
    found = groups(job)
    report = build(job, found)
    write_text(job.out / "report.html", page.html(report))
    write_text(job.out / "report.md", page.markdown(report))
    write_text(job.out / "scores.csv", page.csv_text(_score_lines(found)))
    write_text(job.out / "pictures.csv", page.csv_text(_picture_lines(found)))
    return True


def build(job: Job, found: Sequence[Group]) -> Report:
    """Build the report of a run."""
    study = next(group for group in found if group.name == STUDY)
    decided = decisions(study.whole) if _repeats(study) else []
    sections = [
        _summary(job, decided),
        _scores(study),
        *([_orderings(study, decided)] if decided else []),
        _pictures(study),
        _charts(study),
        *_truth(study),
        *_methods(study),
        *(_many(group) for group in found if group is not study),
        *_sensitivity(study),
        _other_views(study),
        _protocol(job),
    ]
    return Report(job.protocol.title, tuple(sections))


# ---- what it comes to


def _summary(job: Job, decided: Sequence[Decision]) -> Section:
    drawing = job.protocol.drawing
    count = len(job.protocol.of([STUDY]))
    shown = f"{count} settings × {len(job.protocol.prompts[STUDY])} prompts × {drawing.seeds} seeds."
    notes = [f"- {note}" for note in (*caveats.caveats(job, repeats=bool(decided)), *job.protocol.notes)]
    if not decided:
        return section("What it is", shown, notes)
    against = [decision for decision in decided if decision.agrees is False]
    open_ = [decision for decision in decided if decision.verdict == "not decided"]
    same = sum(decision.agrees is True for decision in decided)
    told = [
        f"{shown} Of {len(decided)} orders that were looked for, **{same} come out as in the study's table**, "
        f"{len(against)} otherwise, and {len(open_)} are not decided by these intervals.",
        *([f"**Here it disagrees with the study's table:** {_list(against)}"] if against else []),
        *([f"Not decided: {_list(open_)}"] if open_ else []),
    ]
    return section("What it comes to", told, notes)


def _list(decided: Sequence[Decision]) -> str:
    return "; ".join(f"“{decision.claim.text}”" for decision in decided) + "."


# ---- the study's own figures


def _names(settings: Iterable[Setting]) -> list[str]:
    return [setting.name for setting in settings]


def _repeats(study: Group) -> bool:
    """Return whether the settings are those that the study published."""
    return set(TABLE) <= set(_names(study.family(STUDY)))


def _scores(study: Group) -> Section:
    names = [*_names(study.family(STUDY)), *study.true]
    told = f"Scores of whole pictures. {caveats.sizes(study.job)}"
    beside = _repeats(study)
    true = (
        "The rows of true pictures were drawn, not generated: what a perfect merge would score. Does each column speak of its "
        "own concept?"
    )
    return section(
        "Scores (the study's Figure 6)" if beside else "Scores",
        told if beside else "Scores of whole pictures.",
        tables.scores(study, names, scores.WHOLE, beside=beside),
        [true, tables.columns(study, scores.WHOLE)] if study.true else None,
    )


def _orderings(study: Group, decided: Sequence[Decision]) -> Section:
    return section("The study's orders", tables.orderings(study, decided))


def _pictures(study: Group) -> Section:
    title = "Pictures (Figure 8)" if _repeats(study) else "Pictures"
    return section(title, _sheet(study, [*_names(study.family(STUDY)), *study.true[:1]]))


def _sheet(group: Group, names: Sequence[str]) -> Sheet:
    rows = tuple((group.label(name), tuple(shot.path for shot in group.first_shots(name))) for name in names)
    columns = tuple(_short(prompt, i) for i, prompt in enumerate(group.prompts, 1))
    return Sheet(columns, rows, "Each prompt's picture of seed 0; nothing selected.")


def _short(prompt: str, number: int) -> str:
    """Shorten a prompt to its number and its end, which differs between prompts."""
    return f"{number}: … {' '.join(prompt.rstrip('.').split()[-5:])}"


def _charts(study: Group) -> Section:
    names, repeats = _names(study.family(STUDY)), _repeats(study)
    labels = [study.label(name) for name in names]
    parts: list[Part] = []
    for figure, reference in zip(("7", "9"), SETS, strict=True):
        if reference in study.references:
            parts += _against(study, names, reference, f"Figure {figure}" if repeats else "")
    parts += [_by_prompt(study, names, reference, "Figure 10. " if repeats else "") for reference in study.references]
    both = [
        Series(f"against {r}", tuple(study.whole.mean(name, r) for name in names), COLOURS[1 + i])
        for i, r in enumerate(study.references)
    ]
    told = "By model, split by set."
    parts.append(Figure(bars(labels, both), "Scores by model", f"Figure 11. {told}" if repeats else told))
    return section("Figures 7, 9, 10 and 11" if repeats else "Charts", parts)


def _against(study: Group, names: Sequence[str], reference: str, figure: str) -> list[Part]:
    """Draw one set's bars, and below them the study's if ``figure`` names the one it published."""

    def chart(values: Sequence[tuple[str, Interval]], title: str, caption: str) -> Figure:
        labels = [study.label(name) for name, _ in values]
        svg = bars(labels, [Series(title, tuple(v for _, v in values), COLOURS[0])], colours=COLOURS)
        return Figure(svg, title, caption)

    ours = [(name, study.whole.mean(name, reference)) for name in names]
    whiskers = ", 95 % intervals" if any(value.low is not None for _, value in ours) else ""
    told = f"Scores against the {reference} set{whiskers}."
    parts: list[Part] = [chart(ours, f"Scores against {reference}", f"{figure}, here. {told}" if figure else told)]
    if figure:
        known = [(name, published(name, reference)) for name in names]
        theirs = [(name, Interval(value, None, None, 1, 5)) for name, value in known if value is not None]
        parts.append(chart(theirs, f"Published scores against {reference}", f"{figure}, as published."))
    return parts


def _by_prompt(study: Group, names: Sequence[str], reference: str, figure: str) -> Figure:
    series = [
        Series(study.label(name), tuple(study.whole.mean(name, reference, prompt=p) for p in study.prompts), colour)
        for name, colour in zip(names, cycle(COLOURS), strict=False)
    ]
    groups = [f"Prompt {i}" for i in range(1, len(study.prompts) + 1)]
    title = f"Scores against {reference} by prompt"
    return Figure(bars(groups, series), title, f"{figure}By prompt, against the {reference} set.")


# ---- beyond the study


def _truth(study: Group) -> list[Section]:
    if study.findings is None:
        return []
    names = [*_names(study.family(STUDY)), *study.true]
    told = (
        "The world is drawn, so the true picture of this person in this jersey is known under every prompt. A judge that was "
        "trained to tell attributes of drawings looks at each picture: is the hair right, are the stripes?"
    )
    reached = study.findings.share(f":{TRUE}", study.findings.concepts).mean
    doubt = (
        f"**The judge finds only {100 * reached:.0f} % of the concepts' attributes in true pictures: it is too weak for this "
        "table to say much.**"
    )
    parts: list[Part] = [told, *([doubt] if reached < RELIABLE else []), tables.truth(study, names)]
    parts += ["Attribute by attribute:", tables.attributes(study, names)]
    return [section("Against the truth", parts)]


def _methods(study: Group) -> list[Section]:
    more = (*study.family("methods"), *study.family("composed"))
    if not more:
        return []
    names = _names(setting for setting in (*study.family(STUDY), *more) if len(setting.loras) != 1)
    alone = _names(setting for setting in (*study.family(STUDY), *more) if len(setting.loras) == 1)
    against = "weighted" if "weighted" in names else None
    parts: list[Part] = []
    if study.findings is not None:
        ranked = [*names, *alone, *study.true[:1]]
        parts += ["Ranked against the truth:", tables.truth(study, ranked, against=against)]
        parts += _kept_and_changed(study, names)
    parts += ["Scores:", tables.scores(study, [*names, *alone], scores.WHOLE, beside=False)]
    parts.append(_sheet(study, _names(more)))
    return [section("Other ways to hold two", parts)]


def _kept_and_changed(group: Group, names: Sequence[str]) -> list[Part]:
    """Draw what merges show of their concepts against what they change elsewhere, if drift was measured."""
    found = group.findings
    shown = [name for name in names if name in group.drift]
    if found is None or not shown:
        return []
    order = sorted(shown, key=lambda name: -found.share(name, found.concepts).mean)
    points = [Point(group.label(n), group.drift[n], found.share(n, found.concepts)) for n in order]
    told = (
        "What each merge shows of both concepts, and what it changes where neither is asked for. Blue: no other merge is "
        "better in both."
    )
    drawn = plane(points, across="drift (less is better)", up="attributes right (more is better)")
    return [Figure(drawn, "Kept against drift", told)]


def _many(group: Group) -> Section:
    names, count = _names(group.settings), len(group.concepts)
    more = f", and {len(group.prompts) - 1} more prompts" if len(group.prompts) > 1 else ""
    told = f"{', '.join(group.references)} in one picture: “{group.prompts[0]}”{more}."
    parts: list[Part] = [told]
    if group.findings is not None:
        parts.append(tables.truth(group, [*names, *group.true[:1]]))
        parts += _kept_and_changed(group, names)
    parts += [tables.scores(group, names, scores.WHOLE, beside=False), _sheet(group, [*names, *group.true[:1]])]
    return section(f"{count} LoRAs", parts)


def _sensitivity(study: Group) -> list[Section]:
    points = study.family("weights")
    if not points:
        return []
    down, across = points[0].loras
    weights = [setting.weights for setting in points if isinstance(setting.weights, tuple)]
    first, second = (sorted({pair[i] for pair in weights}) for i in (0, 1))
    by_weights = dict(zip(weights, _names(points), strict=True))

    def figure(value: Any, what: str) -> Figure:
        values = [[value(by_weights[a, b]) for b in second] for a in first]
        grid = heat(
            [f"{a:g}" for a in first],
            [f"{b:g}" for b in second],
            values,
            down=f"weight of {down}",
            across=f"weight of {across}",
        )
        rows = [(f"{a:g}", *(f"{one:.3f}" for one in row)) for a, row in zip(first, values, strict=True)]
        table = Table((f"{down} ↓, {across} →", *(f"{b:g}" for b in second)), tuple(rows), what)
        return Figure(grid, what, what, table)

    count = len(study.job.seeds(points[0]))
    parts: list[Part] = [f"Weighted sums, {count} seed{'s' * (count > 1)} of each prompt; means without intervals."]
    found = study.findings
    if found is not None:
        parts.append(figure(lambda name: found.share(name, found.concepts).mean, "Share of attributes right."))
    parts += [
        figure(lambda name, r=r: study.whole.mean(name, r).mean, f"Score against the {r} set.")
        for r in study.references
    ]
    return [section("How much the weights matter", parts)]


def _other_views(study: Group) -> Section:
    names = [*_names(study.family(STUDY)), *study.true]
    parts: list[Part] = []
    if scores.CROPPED in study.views:
        parts += [
            "The parts of the pictures where each concept is to be seen, cut out by a fixed box; no box suits every scene:",
            tables.scores(study, names, scores.CROPPED, beside=False),
        ]
    if scores.SECOND_WHOLE in study.views:
        parts += [
            f"Another encoder, {tables.second_name(study)}:",
            tables.scores(study, names, scores.SECOND_WHOLE, beside=False),
        ]
    parts += [
        "The pixels themselves, 32 × 32 small, as a baseline: where an encoder says no more than this, its score is about "
        "colours and places.",
        tables.scores(study, names, scores.PIXELS, beside=False),
    ]
    return section("Other views", parts)


def _protocol(job: Job) -> Section:
    protocol, drawing, training = job.protocol, job.protocol.drawing, job.protocol.training
    guidance = "the pipeline's own" if drawing.guidance is None else f"{drawing.guidance:g}"
    side = "the base's own size" if training.resolution is None else f"{training.resolution} pixels"
    rows = (
        ("Base", caveats.named(protocol.base.model)),
        ("Encoder", caveats.named(protocol.scorer.model)),
        (
            "Training",
            f"rank {training.rank}, {training.steps} steps, batch {training.batch_size}, learning rate "
            f"{training.learning_rate:g}, layers: {training.targets}, {side}, {'flips' if training.flip else 'no flips'}, {_seeds(training)}",
        ),
        ("LoRAs", ", ".join(_origin(job, name) for name in job.loras)),
        ("Drawing", f"{drawing.scheduler or 'the base’s scheduler'}, {drawing.steps} steps, guidance {guidance}"),
        *((f"Prompt {i}", prompt) for i, prompt in enumerate(protocol.prompts[STUDY], 1)),
    )
    return section("The protocol", Table(("", ""), rows), *_sets(job))


def _seeds(training: Training) -> str:
    if training.repeats == 1:
        return f"seed {training.seed}"
    return f"{training.repeats} times from seed {training.seed} on; pictures take the LoRAs in turn"


def _origin(job: Job, name: str) -> str:
    """Return a LoRA's name, and its file if the protocol names one."""
    given = job.given(name)
    if given is None:
        return name
    return caveats.named(given) if given == name else f"{name} ({caveats.named(given)})"


def _sets(job: Job) -> list[Part]:
    """Show the first pictures of each set."""
    shown = [concept.name for group in job.groups for concept in job.protocol.shown(group)]
    names = dict.fromkeys([*job.sets, *shown])
    rows = [(name, tuple(images_in(job.set_folder(name))[:6])) for name in names]
    count = min(len(files) for _, files in rows)
    cut = tuple((name, files[:count]) for name, files in rows)
    return [Sheet(("",) * count, cut, "The first pictures of each set.")]


# ---- tables for spreadsheets


def _score_lines(found: Sequence[Group]) -> list[dict[str, Any]]:
    lines = []
    for group in found:
        for view, table in group.views.items():
            for name in table.settings:
                for reference in table.references:
                    cosine, pairwise = (table.mean(name, reference, metric) for metric in ("cosine", "pairwise"))
                    lines.append(
                        {
                            **_who(group, name),
                            "measure": view,
                            "of": reference,
                            **_interval("score", cosine),
                            **_interval("pairwise", pairwise),
                            "published": published(name, reference) if view == scores.WHOLE else None,
                        }
                    )
        lines += _share_lines(group)
    return lines


def _share_lines(group: Group) -> list[dict[str, Any]]:
    judged = group.findings
    if judged is None:
        return []
    return [
        {
            **_who(group, name),
            "measure": "attributes right",
            "of": of,
            **_interval("score", judged.share(name, concepts)),
        }
        for name in [*_names(group.settings), *group.true]
        for of, concepts in (("all", judged.concepts), *((c, (c,)) for c in (*judged.concepts, "scene")))
    ]


def _who(group: Group, name: str) -> dict[str, Any]:
    return {"prompts": group.name, "setting": name.replace(":", "true: "), "label": group.label(name)}


def _interval(name: str, value: Interval) -> dict[str, Any]:
    return {name: value.mean, f"{name}_low": value.low, f"{name}_high": value.high, f"{name}_pictures": value.values}


def _picture_lines(found: Sequence[Group]) -> list[dict[str, Any]]:
    return [
        {
            **_who(group, row.shot.setting),
            "prompt": row.shot.prompt,
            "seed": row.shot.seed,
            "measure": view,
            "of": row.reference,
            "score": row.cosine,
            "pairwise": row.pairwise,
        }
        for group in found
        for view, table in group.views.items()
        for row in table.rows
    ]
