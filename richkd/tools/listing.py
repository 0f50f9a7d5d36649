"""List the available recipes, methods and networks."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from richkd.config import recipes
from richkd.core.errors import RichKDError, unknown
from richkd.core.progress import Report


def show_recipes(report: Report) -> dict[str, Any]:
    """Print a table of the recipes that richkd includes, and return them by name."""
    found = [recipes.load(str(path)) for path in sorted(recipes.packaged().glob("*.toml"))]
    rows = [(recipe.name, recipe.about) for recipe in found]
    report.table("richkd run NAME", ("recipe", "what"), rows, left=2)
    return {
        recipe.name: {"about": recipe.about, "published": asdict(recipe)["published"]}
        for recipe in found
    }


def show_methods(name: str | None, report: Report) -> dict[str, Any]:
    """Print the methods, or one of them with its options and their defaults, and return them.

    Raises:
        RichKDError: there is no such method.
    """
    from richkd.losses import EVERY, METHODS, describe_method

    if name is not None and name not in METHODS:
        raise unknown("method", name, METHODS)
    found = {method: describe_method(method) for method in ([name] if name else sorted(METHODS))}
    if name is None:
        report.table(
            "richkd distill --method NAME",
            ("method", "what", "target"),
            [(m, entry["about"], entry["target"] or "") for m, entry in found.items()],
            left=2,
        )
    else:
        entry = found[name]
        words = {EVERY: "the logits of every teacher"}
        reads = (
            ", ".join(words.get(read, read) for read in entry["reads"]) or "only images and labels"
        )
        defaults = [
            (f"--set {option}", "the alpha of the blend" if value is None else f"{value}")
            for option, value in entry["options"].items()
        ]
        about = [("what", entry["about"]), ("reads", reads), ("target", entry["target"] or "none")]
        report.table(name, ("", ""), about + defaults, left=2)
    return found


def show_models(pattern: str | None, report: Report) -> dict[str, Any]:
    """Print models with their parameters and pooled width at 100 classes, and return them.

    Without a pattern, the models are the zoo; with one, all whose names match it.

    Raises:
        RichKDError: no name matches.
    """
    from fnmatch import fnmatchcase

    import torch

    from richkd.models import ZOO, create_model
    from richkd.models.registry import import_timm

    names = list(ZOO)
    if pattern is not None:
        known = dict.fromkeys([*ZOO, *import_timm().list_models()])
        names = [name for name in known if fnmatchcase(name.lower(), pattern.lower())]
        if not names:
            raise RichKDError(
                f"no model matches {pattern!r}; give a pattern such as 'mobilenet*'",
                code="unknown-model",
            )
    found: dict[str, Any] = {}
    for name in names:
        with torch.device("meta"):
            model = create_model(name, 100)
        found[name] = {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "num_features": model.num_features,
            "zoo": name in ZOO,
        }
    report.table(
        "the CIFAR zoo" if pattern is None else f"{pattern}: {len(found)} models",
        ("model", "from", "parameters", "features"),
        [
            (
                name,
                "zoo" if entry["zoo"] else "timm",
                f"{entry['parameters'] / 1e6:.2f} M",
                str(entry["num_features"]),
            )
            for name, entry in found.items()
        ],
        left=2,
    )
    return found
