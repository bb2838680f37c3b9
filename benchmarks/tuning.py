"""Try to predict from the LoRAs alone which recipe merges a pair best, where the truth is known.

    PYTHONPATH=. python benchmarks/tuning.py --out build/tuning [--processes 2] [--markdown FILE]

The leaderboard's eight pairs (two trainings each) are merged by every recipe, and each merge's noise error on true
pictures of both concepts is measured (*joint*).  A ridge regression on features of the factors alone (norms, cosine,
overlaps, effective ranks, method, weights) learns the error relative to that of the sum over √2, and chooses a recipe for
pairs that it has not seen: it leaves out one pair, or all pairs with one garment.  The choice is compared with the sum over
√2, with the recipe that is best on average over the other pairs, and with the best of all recipes.
"""

import argparse
import csv
import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from examples.virtual_tryon.study import bases, leaderboard, loras, stages
from examples.virtual_tryon.study.job import Job
from examples.virtual_tryon.study.noise import FIT, JOINT, Errors
from examples.virtual_tryon.study.page import csv_text
from examples.virtual_tryon.study.pool import one_thread
from examples.virtual_tryon.study.reading import preset, read
from examples.virtual_tryon.study.sets import REFERENCE
from scipy.stats import spearmanr

import loramerge as lm
from loramerge.files import make_folder, write_text
from loramerge.scoring import interval

STRENGTHS = (0.5, 0.6, 0.71, 0.85, 1.0, 1.2)
PLAIN = ("linear", 0.71, 0.71)
"""The sum over √2, which a tuner must beat."""
SHAPED = ("slerp", "karcher", "ties", "magmax", "knots", "tsv", "iso_c", "np_lora", "wudi")
"""Methods that are tried at every strength: their merge is scaled."""
MEANS = ("slerp", "karcher", "wudi")
"""Those whose merge is a mean of the LoRAs; that of the others is as strong as their sum."""
STRONGER = (1.45, 1.7)
"""Strengths of means beside the others."""
RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)

Recipe = tuple[str, float, float]
"""A method and both weights; for methods besides the sum the second repeats the first."""
Key = tuple[str, int]
"""A pair, and the number of the training."""


def recipes() -> list[Recipe]:
    """List what is tried: sums at all pairs of weights, other methods at all strengths."""
    sums = [("linear", a, b) for a, b in product(STRENGTHS, repeat=2)]
    return sums + [(method, s, s) for method in SHAPED for s in STRENGTHS + STRONGER * (method in MEANS)]


@dataclass(frozen=True)
class Measured:
    """The measurements of one pair with one training."""

    features: Mapping[str, float]
    errors: Mapping[Recipe, Mapping[str, float]]


def main() -> None:
    given = _arguments()
    job = _job(given.out)
    stages.run(job, only=("data", "train"), processes=given.processes, say=print)
    keys = [(pair, repeat) for repeat in job.repeats for pair in leaderboard.PAIRS]
    with multiprocessing.get_context("spawn").Pool(given.processes) as pool:
        for key in pool.imap_unordered(_work, [(job, key) for key in keys]):
            print(*key, flush=True)
    known = {key: _read(_file(job, key)) for key in keys}
    text = report(known)
    print(text)
    if given.markdown:
        given.markdown.write_text(text)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Try to predict which recipe merges a pair best.")
    parser.add_argument("--out", type=Path, default=Path("build/tuning"), help="folder of LoRAs and measurements")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--markdown", type=Path, help="file for the table")
    return parser.parse_args()


def _job(out: Path) -> Job:
    entries = [entry for entry in leaderboard.ENTRIES if entry.name == leaderboard.AGAINST]
    made = leaderboard.protocol(read(preset("mini")), entries, repeats=2, seeds=1)
    return Job(protocol=replace(made, drift=None), out=out, families=(leaderboard.FAMILY,))


# ---- measuring


def _work(piece: tuple[Job, Key]) -> Key:
    """Measure by a pair what isn't measured yet."""
    job, key = piece
    with one_thread():
        _measure(job, key)
    return key


def _measure(job: Job, key: Key) -> None:
    pair, repeat = key
    names, file = leaderboard.PAIRS[pair], _file(job, key)
    alone = [loras.load(job, name, repeat) for name in names]
    folders = [job.truth_folder(pair, REFERENCE), *map(job.set_folder, names)]
    known = _read(file) if file.exists() else Measured(features(alone), {})
    missing = [recipe for recipe in recipes() if recipe not in known.errors]
    if not missing:
        return
    errors = Errors(bases.denoiser(job.protocol.base, job.device), folders, alone, seed=job.protocol.data.seed)
    rows: list[tuple[str, Mapping[str, float]]] = [("features", known.features)]
    rows += [(_text(recipe), values) for recipe, values in known.errors.items()]
    rows += [(_text(recipe), errors.of(merged)) for recipe, merged in _merges(alone, missing)]
    lines = [{"recipe": text, "name": name, "value": found[name]} for text, found in rows for name in found]
    make_folder(file.parent)
    write_text(file, csv_text(lines))


def _text(recipe: Recipe) -> str:
    return " ".join(map(str, recipe))


def _merges(alone: Sequence[lm.LoRA], wanted: Sequence[Recipe]) -> Iterator[tuple[Recipe, lm.LoRA]]:
    shaped = {
        method: lm.merge(alone, method=method, weights=None if method in MEANS else "sum")
        for method in {method for method, *_ in wanted} - {"linear"}
    }
    for recipe in wanted:
        method, *weights = recipe
        if method == "linear":
            yield recipe, lm.merge(alone, weights=weights)
        else:
            yield recipe, lm.merge([shaped[method]], weights=weights[:1])


def features(alone: Sequence[lm.LoRA]) -> dict[str, float]:
    """Return what the factors of two LoRAs say: norms, cosine, overlaps, ranks, and where they act."""
    compared = lm.compare(alone)
    total, pair = compared.total, compared.total.pairs[0, 1]
    found = {
        name: float(getattr(pair, name)) for name in ("cosine", "input_overlap", "output_overlap", "conflict", "clash")
    }
    for i, each in enumerate(total.alone):
        found[f"log_norm_{i}"] = float(np.log(each.norm))
        found[f"effective_rank_{i}"] = each.effective_rank
    for part in compared.grouped(lambda row: "words" if ".attn2." in row.name else "other"):
        for i, each in enumerate(part.alone):
            found[f"share_{part.name}_{i}"] = each.square / total.alone[i].square
    return found


def _file(job: Job, key: Key) -> Path:
    return job.out / "measured" / f"{key[0]}@{key[1]}.csv"


def _read(file: Path) -> Measured:
    found: dict[str, dict[str, float]] = {}
    with file.open(newline="") as rows:
        for row in csv.DictReader(rows):
            found.setdefault(row["recipe"], {})[row["name"]] = float(row["value"])
    known = found.pop("features")
    return Measured(known, {_recipe(text): values for text, values in found.items()})


def _recipe(text: str) -> Recipe:
    method, a, b = text.split()
    return method, float(a), float(b)


# ---- predicting


def design(known: Measured, tried: Sequence[Recipe]) -> np.ndarray:
    """Return one row of features per recipe: of the recipe, and their products with those of the pair."""
    pair = np.array(list(known.features.values()))
    methods = ("linear", *SHAPED)
    rows = []
    for method, a, b in tried:
        kind = np.array([method == other for other in methods], dtype=float)
        s, t = (a + b) / 2, (a - b) / 2
        shape = np.array([s, s * s, t, t * t])
        rows.append(np.concatenate([kind, shape, np.outer(kind, shape[:2]).ravel(), np.outer(pair, shape).ravel()]))
    return np.array(rows)


def predicted(seen: Sequence[Measured], unseen: Measured, tried: Sequence[Recipe], ridge: float) -> np.ndarray:
    """Fit a ridge regression to the pairs that were seen, and predict each recipe's error on another."""
    x = np.concatenate([design(known, tried) for known in seen])
    y = np.concatenate([gains(known, tried) for known in seen])
    mean, spread = x.mean(0), x.std(0) + 1e-9
    x, new = (x - mean) / spread, (design(unseen, tried) - mean) / spread
    fitted = np.linalg.solve(x.T @ x + ridge * len(x) * np.eye(x.shape[1]), x.T @ (y - y.mean()))
    return new @ fitted + y.mean()


def gains(known: Measured, tried: Sequence[Recipe], what: str = JOINT) -> np.ndarray:
    """Return each recipe's error minus that of the sum over √2."""
    return np.array([known.errors[recipe][what] - known.errors[PLAIN][what] for recipe in tried])


def chosen_ridge(seen: Mapping[Key, Measured], apart: Any, tried: Sequence[Recipe]) -> float:
    """Choose the ridge by the regret on pairs left out among those that were seen."""

    def regret(ridge: float) -> float:
        total = 0.0
        for key, known in seen.items():
            rest = [other for k, other in seen.items() if not apart(key, k)]
            true = gains(known, tried)
            total += true[predicted(rest, known, tried, ridge).argmin()] - true.min()
        return total

    return min(RIDGES, key=regret)


APART = {
    "the pair": lambda a, b: a[0] == b[0],
    "all pairs of its garment": lambda a, b: a[0].split("-")[1] == b[0].split("-")[1],
}
"""The pairs left out with a pair: returns True if the second is unseen when the first is asked about."""


def report(known: Mapping[Key, Measured]) -> str:
    """Return the table of what a tuner would gain, with intervals over pairs."""
    tried = recipes()
    lines = [
        "# Can a recipe be chosen from the factors alone?",
        "",
        f"{len(leaderboard.PAIRS)} pairs, two trainings each, {len(tried)} recipes. *joint* minus that of the sum over √2; "
        "[95 % interval over pairs]; less is better. Made by `PYTHONPATH=. python benchmarks/tuning.py --out build/tuning`.",
        "",
        "| left out | tuner | best on the other pairs | best of all, known afterwards | that − best on the others | tuner's regret "
        "| rank correlation | of the mean over other pairs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, apart in APART.items():
        rows = []
        for key, one in known.items():
            seen = {k: other for k, other in known.items() if not apart(key, k)}
            ridge = chosen_ridge(seen, apart, tried)
            true, guess = gains(one, tried), predicted(list(seen.values()), one, tried, ridge)
            mean = np.mean([gains(other, tried) for other in seen.values()], axis=0)
            best = true.min()
            tuned, constant = true[guess.argmin()], true[mean.argmin()]
            rows.append(
                (
                    tuned,
                    constant,
                    best,
                    best - constant,
                    tuned - best,
                    spearmanr(guess, true)[0],
                    spearmanr(mean, true)[0],
                )
            )
        pairs = [pair for pair, _ in known]
        cells = [f"{interval([float(row[i]) for row in rows], pairs):.4f}" for i in range(len(rows[0]))]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    means = {what: np.mean([gains(one, tried, what) for one in known.values()], axis=0) for what in (JOINT, FIT)}
    order = means[JOINT].argsort()[:12]
    lines += ["", "The recipes with the least joint error on average:", "", "| recipe | joint | fit |", "|---|---|---|"]
    for i in (*order, tried.index(PLAIN)):
        method, a, b = tried[i]
        lines.append(f"| {method} {a:g}, {b:g} | {means[JOINT][i]:+.4f} | {means[FIT][i]:+.3f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
