"""The cards (README.md) of caches and students on the Hugging Face hub.

All content of a card comes from the manifest or the run's summary, through the Markdown templates
beside this module. Names given by files or people are escaped: they never become Markdown, HTML or
YAML.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from richkd.core.progress import harmless, percent, size
from richkd.data.entries import describe_splits
from richkd.store import schema
from richkd.tools.inspect import summarize
from richkd.training.run_folder import complete_run

if TYPE_CHECKING:
    from huggingface_hub import RepoCard
    from huggingface_hub.repocard_data import CardData

TAGS = ["knowledge-distillation", "richkd"]


def text(value: object) -> str:
    """Return Markdown that displays exactly `value`, as one line.

    Markdown allows a backslash before any ASCII punctuation.
    """
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", one_line(value))


def one_line(value: object) -> str:
    """Return `value` as one line without control characters, safe to quote in YAML."""
    return harmless(" ".join(str(value).split()))


def store_card(folder: Path, repo_id: str) -> str:
    """Return the card of a complete cache; raise RichKDError as `open_cache` does."""
    from huggingface_hub import DatasetCard, DatasetCardData

    summary = summarize(folder)
    manifest, accuracy = summary["manifest"], summary["accuracy"]
    dataset, views, clip = (manifest[key] for key in ("dataset", "views", "clip"))
    front = DatasetCardData(
        pretty_name=f"richkd cache of {one_line(dataset['name'])}",
        tags=[*TAGS, "zarr"],
        task_categories=["image-classification"],
        viewer=False,
        richkd={
            "dataset": one_line(dataset["name"]),
            "teacher": one_line(manifest["teacher"]["name"]),
            "clip": clip and one_line(clip["model"]),
            "views": views["count"],
            "seed": views["seed"],
            "alpha": manifest["alpha"],
            "scale": manifest["scale"],
            "images_inside": dataset["embedded"] or "pixels" in manifest,
            "accuracy": accuracy,
        },
    )
    splits = describe_splits(schema.split_sizes(manifest))
    return _fill(DatasetCard, "cache", front, repo_id, {**summary, **manifest, "splits": splits})


def student_card(folder: Path, repo_id: str) -> str:
    """Return the card of a complete run; raise RichKDError as `complete_run` does."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    run = complete_run(folder)
    summary = {"dataset": "unknown", "versions": {}, **run.complete}
    dataset = one_line(summary["dataset"])
    front = ModelCardData(
        model_name=repo_id.rpartition("/")[2],
        library_name="richkd",
        pipeline_tag="image-classification",
        tags=list(TAGS),
        eval_results=[
            EvalResult(
                task_type="image-classification",
                dataset_type=dataset,
                dataset_name=dataset,
                dataset_split="test",
                metric_type="accuracy",
                metric_value=summary[key],
                metric_name=label,
            )
            for key, label in (("top1_last", "top-1"), ("top5_last", "top-5"))
            if key in summary
        ],
    )
    constants = {k: [round(float(value), 4) for value in summary[k]] for k in ("mean", "std")}
    values = {**summary, **constants, "settings": run.settings}
    return _fill(ModelCard, "student", front, repo_id, values)


def _fill(
    card: type[RepoCard], kind: str, front: CardData, repo_id: str, values: Mapping[str, Any]
) -> str:
    """Fill the template of a kind; every string in `values` is escaped."""
    versions = [f"{name} {version}" for name, version in values["versions"].items()]
    filled = card.from_template(
        front,
        template_path=str(Path(__file__).with_name(f"{kind}_card.md.jinja")),
        about=_escaped(values),
        versions=_escaped(versions),
        repo_id=repo_id,
        name=repo_id.rpartition("/")[2].removesuffix(".zarr"),
        percent=percent,
        size=size,
    )
    return str(filled)


def _escaped(value: Any) -> Any:
    """Return the same value with every string in it escaped; keys are the format's own."""
    if isinstance(value, str):
        return text(value)
    if isinstance(value, Mapping):
        return {key: _escaped(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_escaped(each) for each in value]
    return value
