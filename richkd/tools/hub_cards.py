"""The cards (README.md) of stores and students on the Hugging Face hub.

Front matter for machines, text for people, all from the manifest or the summary. What was named
by files or by people is escaped: a class name is text, never Markdown, HTML or YAML.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from richkd.core.progress import harmless, percent, size
from richkd.core.teacher_names import FULL_NAMES
from richkd.data.entries import describe_splits
from richkd.store import schema
from richkd.tools.inspect import summarize
from richkd.training.run_folder import complete_run

TAGS = ["knowledge-distillation", "richkd"]
MOST_NAMES = 200  # class names that a card lists


def text(value: object) -> str:
    """A value as Markdown that shows just that; ASCII punctuation may always be escaped."""
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", one_line(value))


def one_line(value: object) -> str:
    """A value that cannot end a line, nor the front matter."""
    return harmless(" ".join(str(value).split()))


def store_card(folder: Path, repo_id: str) -> str:
    """The card of a complete store; errors as of `open_cache`."""
    from huggingface_hub import DatasetCardData

    summary = summarize(folder)
    manifest, accuracy = summary["manifest"], summary["accuracy"]
    dataset, views, teacher, clip = (manifest[k] for k in ("dataset", "views", "teacher", "clip"))
    name = repo_id.rpartition("/")[2].removesuffix(".zarr")
    front = DatasetCardData(
        pretty_name=f"richkd store of {one_line(dataset['name'])}",
        tags=[*TAGS, "zarr"],
        task_categories=["image-classification"],
        viewer=False,
        richkd={
            "dataset": one_line(dataset["name"]),
            "teacher": one_line(teacher["name"]),
            "clip": clip and one_line(clip["model"]),
            "views": views["count"],
            "seed": views["seed"],
            "alpha": manifest["alpha"],
            "scale": manifest["scale"],
            "images_inside": dataset["embedded"],
            "accuracy": accuracy,
        },
    )
    inside = (
        "**The images are inside** (`train/images`, `test/images`): whoever takes this store takes "
        "them too, and the licence of the data set holds for them."
        if dataset["embedded"]
        else "The images are not inside: whoever trains from this store needs the data set itself. "
        "The licence of the data set may hold for what was computed from it."
    )
    splits = describe_splits(schema.split_sizes(manifest))
    made = [
        ("Data", f"{text(dataset['name'])}, {splits} images of {manifest['image_size']} pixels"),
        (
            "Views",
            f"{views['count']} of each training image, {text(views['space'])}, "
            f"seed {views['seed']}",
        ),
        ("CNN teacher", f"{text(teacher['name'])}, SHA-256 {text(teacher['sha256'][:16])}"),
    ]
    if clip:
        made += [
            ("CLIP", f"{text(clip['model'])}, logit scale {clip['logit_scale']:.4g}"),
            ("Prompts", ", ".join(map(text, manifest["prompts"]))),
            ("Blend", f"alpha {manifest['alpha']}, scale {text(manifest['scale'])}"),
        ]
    rows = [
        (FULL_NAMES[kind], percent(share))
        for kind, share in accuracy.items()
        if kind in FULL_NAMES and share is not None
    ]
    arrays = [
        (
            f"`{array}`",
            "×".join(map(str, about["shape"])),
            about["dtype"],
            size(about["stored_bytes"]),
        )
        for array, about in summary["arrays"].items()
    ]
    return "\n\n".join(
        [
            f"---\n{front.to_yaml()}\n---",
            f"# What the teachers say of {text(dataset['name'])}",
            "A store of richkd: the outputs of a CNN teacher"
            + (" and of CLIP" if clip else "")
            + ", computed once for every view, in Zarr 3. Students are trained from it with no "
            "teacher in memory.",
            inside,
            "## How it was made",
            _table(("", ""), made),
            "## Accuracy",
            _table(("top-1 on the test images", "%"), rows),
            "## How to load it",
            f"With richkd, after `richkd pull {repo_id}`:",
            f'```python\nimport richkd\ncache = richkd.open_cache("cache/{name}.zarr")\n'
            f"print(cache, cache.slab(0).teacher_logits.shape)\n```",
            f"With zarr alone, after "
            f"`hf download {repo_id} --repo-type dataset --local-dir store`:",
            '```python\nimport zarr\nstore = zarr.open_group("store", mode="r")\n'
            'print(store.attrs["class_names"], store["test/teacher_logits"][:].shape)\n```',
            f"## What is inside\n\n{size(summary['stored_bytes'])}, "
            f"{size(summary['raw_bytes'])} before compression.",
            _table(("array", "shape", "type", "stored"), arrays),
            *_ending(manifest["class_names"], manifest["versions"]),
        ]
    )


def student_card(folder: Path, repo_id: str) -> str:
    """The card of a complete run; errors as of `complete_run`."""
    from huggingface_hub import EvalResult, ModelCardData

    run = complete_run(folder)
    about, settings = run.complete, run.settings
    name, dataset = repo_id.rpartition("/")[2], about.get("dataset", "unknown")
    dataset = one_line(dataset)
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type=dataset,
            dataset_name=dataset,
            dataset_split="test",
            metric_type="accuracy",
            metric_value=about[key],
            metric_name=label,
        )
        for key, label in (("top1_last", "top-1"), ("top5_last", "top-5"))
        if key in about
    ]
    front = ModelCardData(
        model_name=name,
        library_name="richkd",
        pipeline_tag="image-classification",
        tags=list(TAGS),
        eval_results=results,
    )
    teachers = about["teacher"]
    accuracy = [
        ("this student, last epoch", percent(about["top1_last"])),
        (
            f"its best epoch, {about['epoch_best']}, chosen on "
            f"{text(about.get('best_chosen_on', 'test'))} images",
            percent(about["top1_best"]),
        ),
        *(
            (FULL_NAMES[kind], percent(share))
            for kind, share in teachers.items()
            if kind in FULL_NAMES and share is not None
        ),
    ]
    target = about.get("target") or {}
    made = [
        ("Student", f"{text(about['student'])}, {about['parameters']:,} parameters"),
        ("Data", f"{text(dataset)}, {about['num_classes']} classes"),
        ("Method", text(about["method"])),
        *(
            (label, text(target[key]))
            for key, label in (("kind", "Target"), ("alpha", "Alpha"), ("scale", "Scale"))
            if key in target
        ),
        *(
            (label, text(settings[key]))
            for key, label in (
                ("epochs", "Epochs"),
                ("batch_size", "Batch size"),
                ("lr", "Learning rate"),
                ("seed", "Seed"),
            )
            if key in settings
        ),
    ]
    side = about["image_size"]
    mean, std = ([round(float(value), 4) for value in about[key]] for key in ("mean", "std"))
    return "\n\n".join(
        [
            f"---\n{front.to_yaml()}\n---",
            f"# {text(about['student'])} for {text(dataset)}",
            "A student of richkd, trained from the cached outputs of its teachers.",
            "## How it was made",
            _table(("", ""), made),
            "`recipe.toml` has every setting, `metrics.jsonl` every epoch.",
            "## Accuracy",
            _table(("top-1 on the test images", "%"), accuracy),
            "## How to load it",
            f"After `richkd pull {repo_id}`:",
            "```python\nfrom pathlib import Path\n"
            "from richkd.training.run_folder import complete_run, load_student\n"
            f'student = load_student(complete_run(Path("runs/{name}")), "last")\n```',
            f"It takes images [B,3,{side},{side}] with values in 0..1, less {mean}, divided by "
            f"{std}. `richkd export runs/{name}` makes ONNX of it.",
            *_ending(about["class_names"], about.get("versions", {})),
        ]
    )


def _ending(classes: Sequence[str], versions: Mapping[str, Any]) -> list[str]:
    names = ", ".join(map(text, classes[:MOST_NAMES])) + (
        ", …" if len(classes) > MOST_NAMES else ""
    )
    made_with = ", ".join(f"{text(name)} {text(version)}" for name, version in versions.items())
    return [f"## Classes\n\n{len(classes)}: {names}", f"## Versions\n\n{made_with}\n"]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
