"""Comparisons of results: the table of teachers and students, and the leaderboard of many runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from richkd.config.settings import shown_weights
from richkd.core.progress import Report, duration, percent
from richkd.core.teacher_names import FULL_NAMES
from richkd.training.run_folder import configuration

# Settings of what a student learns from; the others describe how it is trained.
TEACHING = (
    *("method", "options", "target", "alpha", "weights", "balance", "scale", "prompts"),
    *("clip_head", "added"),
)
# How the best epoch is described, by the images that it was chosen on.
CHOSEN_ON = {
    "test": "the same test images, which flatters it",
    "held-out test": "test images that were held out",
    "validation": "validation images",
}


def results_table(report: Report, title: str, summaries: Sequence[Mapping[str, Any]]) -> None:
    """Print the test accuracies of the teachers and then of the students, in percent."""
    rows: list[tuple[str, ...]] = [
        (FULL_NAMES[kind], percent(value), "", "", "", "")
        for kind, value in summaries[0]["teacher"].items()
        if value is not None
    ]
    rows += [row for summary in summaries for row in _own_target(summary)]
    for summary in summaries:
        rate = summary["images_per_second"]
        rows.append(
            (
                f"{summary['student']} by {summary['method']}",
                percent(summary["top1_last"]),
                f"{percent(summary['top1_best'])} @{summary['epoch_best']}",
                percent(summary["top5_last"]),
                f"{rate:,.0f}" if rate else "–",
                duration(summary["seconds"]),
            )
        )
    header = ("test accuracy, %", "top-1 last", "best @epoch", "top-5", "images/s", "time")
    report.table(title, header, rows)
    report.log(about_best(summaries))


def about_best(summaries: Iterable[Mapping[str, Any]]) -> str:
    """Return a note on which images the best epochs were chosen on.

    Earlier versions chose them on the test images and did not record this.
    """
    kinds = {summary.get("best_chosen_on", "test") for summary in summaries}
    images = ", or on ".join(text for kind, text in CHOSEN_ON.items() if kind in kinds)
    return f"“Best” is the best epoch on {images}."


def shown(value: Any) -> str:
    """Return a setting as the command line takes it, if it is the weights of teachers."""
    numbers = isinstance(value, Mapping) and all(isinstance(each, float) for each in value.values())
    return shown_weights(value) if numbers else str(value)


def _own_target(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return a row for target logits that the cache does not hold: another blend or CLIP head."""
    target = summary.get("target")
    if target is None or target["top1"] in summary["teacher"].values():
        return []
    blend = [f"{key} {target[key]:.3g}" for key in ("alpha", "scale") if key in target]
    if "weights" in target:
        blend = [shown_weights(target["weights"])]
    head = ["probe"] if target.get("head") == "probe" else []
    return [(", ".join([target["kind"], *head, *blend]), percent(target["top1"]), "", "", "", "")]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A difference of accuracies over pairs, with its 95 % interval (Student's t)."""

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True, kw_only=True)
class Standing:
    """A configuration on the leaderboard: runs that differ in their seed only."""

    student: str
    method: str
    settings: Mapping[str, Any]  # in which configurations of the same student and method differ
    runs: Mapping[int, Mapping[str, Any]]  # summaries by seed
    last: tuple[float, float]  # mean and standard deviation (NaN for one run) of top-1 in 0..1
    best: tuple[float, float]
    minus_kd: Difference | None  # of top-1 last, to KD of the same student, training and images
    holdout: float  # share of the test images that the runs were not tested on

    @property
    def configuration(self) -> str:
        """The method, and the settings in which configurations of its student differ."""
        return ", ".join(
            [self.method, *(f"{name} {shown(value)}" for name, value in self.settings.items())]
        )

    @property
    def label(self) -> str:
        """The student and configuration."""
        return f"{self.student} by {self.configuration}"

    @property
    def images(self) -> str:
        """Which test images the runs were tested on; only equal ones compare."""
        share = self.holdout
        return f"without the {percent(share)} % held out" if share else "all test images"


def leaderboard(runs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> list[Standing]:
    """Group runs into configurations and sort them by mean top-1 after the last epoch.

    Configurations that were tested on the same images, whose accuracies compare, are adjacent.

    Args:
        runs: the resolved settings of each run (as in its recipe.toml), and its summary.
    """
    groups: dict[str, tuple[dict[str, Any], dict[int, Mapping[str, Any]]]] = {}
    for settings, summary in runs:
        own = configuration(settings)
        if summary.get("added"):  # the added teachers that it read
            own["added"] = ", ".join(f"{n} {sha[:8]}" for n, sha in summary["added"].items())
        if "tested" not in summary:  # an earlier version, which trained some methods differently
            own["version"] = "an earlier one"
        group = groups.setdefault(repr(sorted(own.items())), (own, {}))
        group[1][summary["seed"]] = summary
    rivals = [own for own, _ in groups.values()]
    standings = []
    for own, by_seed in groups.values():
        peers = [r for r in rivals if all(r[k] == own[k] for k in ("student", "method"))]
        differing = {
            name
            for peer in peers
            for name in peer.keys() | own.keys()
            if peer.get(name) != own.get(name)
        }
        standings.append(
            Standing(
                student=own["student"],
                method=own["method"],
                settings={name: own[name] for name in sorted(differing) if name in own},
                runs=dict(sorted(by_seed.items())),
                last=mean_and_std([run["top1_last"] for run in by_seed.values()]),
                best=mean_and_std([run["top1_best"] for run in by_seed.values()]),
                minus_kd=_minus_kd(own, by_seed, groups.values()),
                holdout=own["holdout"],
            )
        )
    return sorted(standings, key=lambda standing: (standing.holdout, -standing.last[0]))


def _minus_kd(
    own: Mapping[str, Any],
    by_seed: Mapping[int, Mapping[str, Any]],
    groups: Iterable[tuple[Mapping[str, Any], Mapping[int, Mapping[str, Any]]]],
) -> Difference | None:
    """Return the difference to KD from the CNN teacher of the same student and training.

    It is None for KD itself, and without such runs of KD.
    """

    def training(settings: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in settings.items() if name not in TEACHING}

    if own["method"] == "kd":
        return None
    for other, kd in groups:
        plain = other["method"] == "kd" and other.get("target", "teacher") == "teacher"
        if plain and training(other) == training(own):
            pairs = [(by_seed[seed], kd[seed]) for seed in by_seed if seed in kd]
            return paired_difference([a["top1_last"] - b["top1_last"] for a, b in pairs])
    return None


def paired_difference(differences: Sequence[float]) -> Difference | None:
    """Return mean and 95 % interval; infinite bounds for one pair, None for none."""
    if not differences:
        return None
    mean, std = mean_and_std(differences)
    n = len(differences)
    if n == 1:
        return Difference(mean=mean, low=-math.inf, high=math.inf, n=1)
    from scipy.special import stdtrit  # imports faster than scipy.stats

    half = float(stdtrit(n - 1, 0.975)) * std / math.sqrt(n)
    return Difference(mean=mean, low=mean - half, high=mean + half, n=n)


def finite(difference: Difference) -> dict[str, float | int | None]:
    """Return a difference for JSON, which has no infinity."""
    known = difference.n > 1
    return {
        **asdict(difference),
        "low": difference.low if known else None,
        "high": difference.high if known else None,
    }


def mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the sample standard deviation, which is NaN for one value."""
    std = statistics.stdev(values) if len(values) > 1 else math.nan
    return statistics.fmean(values), std


def leaderboard_table(report: Report, title: str, standings: Sequence[Standing]) -> None:
    """Print the leaderboard: last and best top-1, and the paired difference to KD."""
    header = ("student", "method", "n", "last, %", "best, %", "− KD [95 %]")
    parts = {
        images: list(members) for images, members in groupby(standings, key=lambda s: s.images)
    }
    for images, members in parts.items():
        rows = [
            (
                standing.student,
                standing.configuration,
                f"{len(standing.runs)}",
                mean_std(standing.last),
                mean_std(standing.best),
                minus_kd(standing.minus_kd),
            )
            for standing in members
        ]
        report.table(title if len(parts) == 1 else f"{title} ({images})", header, rows, left=2)
    if len(parts) > 1:
        report.log("These tables are of different test images: do not compare one with another.")
    if standings:
        report.log(about_best(run for standing in standings for run in standing.runs.values()))


def mean_std(pair: tuple[float, float]) -> str:
    """Format mean ± standard deviation in percent."""
    mean, std = pair
    return percent(mean) if math.isnan(std) else f"{percent(mean)} ± {percent(std)}"


def minus_kd(difference: Difference | None) -> str:
    """Format a difference with its interval, in percentage points."""
    if difference is None:
        return ""
    text = f"{100 * difference.mean:+.2f}"
    if math.isfinite(difference.high):
        text += f" [{100 * difference.low:+.2f}, {100 * difference.high:+.2f}]"
    return text.replace("-", "−")
