"""The command line. Heavy imports happen inside the commands.

An error that the user can fix is one line on standard error and exit code 2; a bug is a traceback
and exit code 1.
"""

from __future__ import annotations

import inspect as inspection
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from functools import partial
from typing import Annotated, Any

import typer

from richkd.config import catalog, recipes
from richkd.config.flags import Flag, expand_home, flags, option, plain
from richkd.config.settings import (
    Distill,
    Precompute,
    Sweep,
    TrainTeacher,
    check_resume,
    describe,
    resolve,
)
from richkd.core.errors import RichKDError, local_path, machine_fault
from richkd.core.interrupts import Interrupted, interruptible
from richkd.core.launcher import check_processes, is_first, reports
from richkd.core.streams import fail

app = typer.Typer(
    name="richkd",
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


# Headings of the help.
START, STAGES, RESULTS = "Start here", "The two stages", "Results"
CACHES, LISTS = "Caches", "Lists and benchmarks"

# The settings of the CNN teacher and of CLIP.
TEACHERS = (
    "teacher teacher_weights teacher_weights_key teacher_size teacher_mean teacher_std "
    "teacher_crop teacher_interpolation teacher_classes teacher_head clip clip_precision prompts"
)


def _command(
    heading: str, *examples: str, name: str | None = None, settings: Sequence[Flag] = ()
) -> Callable[..., Any]:
    """Register a command; its docstring and examples are its help.

    Args:
        heading: its heading in the list of commands.
        examples: command lines, for its help.
        name: of the command, if not the function's.
        settings: flags; the function gets the given ones as `**given`.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        known = {flag.parameter.name: flag for flag in reversed(settings)}

        def command(**arguments: Any) -> None:
            not_given = {name for name in known if arguments[name] in (None, [])}
            function(
                **{
                    name: known[name].read(value) if name in known else value
                    for name, value in arguments.items()
                    if name not in not_given
                }
            )

        command.__signature__ = _signature(function, settings)  # type: ignore[attr-defined]
        text, epilog = _help_of(function), plain("\n\n".join(("Examples:", *examples)))
        verb = name or function.__name__
        app.command(verb, help=text, epilog=epilog, rich_help_panel=heading)(command)
        return function

    return register


def _signature(function: Callable[..., None], settings: Sequence[Flag]) -> inspection.Signature:
    """Return a signature for typer: the arguments, the settings, then the other options."""
    own = inspection.signature(function, eval_str=True).parameters
    arguments = [each for each in own.values() if each.default is each.empty]
    by_name: dict[str, inspection.Parameter] = {}
    for each in (*arguments, *(flag.parameter for flag in settings), *own.values()):
        by_name.setdefault(
            each.name, own.get(each.name, each)
        )  # its own option replaces a setting's
    return inspection.Signature(
        [
            each.replace(kind=each.KEYWORD_ONLY)
            for each in by_name.values()
            if each.kind is not each.VAR_KEYWORD
        ]
    )


def _help_of(function: Callable[..., None]) -> str:
    """Return a command's docstring, one line per paragraph."""
    paragraphs = inspection.cleandoc(function.__doc__ or "").split("\n\n")
    return plain("\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs))


path_option = partial(typer.Option, callback=expand_home)
path_argument = partial(typer.Argument, callback=expand_home)

Recipe = Annotated[str | None, path_option(help="TOML file, or the name of a packaged recipe")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="start over, replacing what richkd wrote there")
]
Resume = Annotated[bool, typer.Option("--resume", help="resume an interrupted run (the default)")]
Json = Annotated[bool, typer.Option("--json", help="print the result as JSON and nothing else")]
DataRoot = Annotated[str | None, option(Precompute, "data_root")]
Device = Annotated[str | None, option(Distill, "device")]
Weights = Annotated[str, typer.Option(help="last or best")]
Threshold = Annotated[
    float, typer.Option(help="top probability above which a prediction counts as confident")
]
Corruptions = Annotated[
    bool,
    typer.Option(
        "--corruptions",
        help=plain(
            "15 corruptions at five severities: from DATA_ROOT/CIFAR-100-C or -10-C, else "
            "computed (richkd[corruptions])"
        ),
    ),
]


def _refuse_validation(share: float | None) -> None:
    """Raise RichKDError: the validation images are chosen when the cache is made."""
    if share is not None:
        raise RichKDError(
            f"--validation {share:g}: validation images belong to the cache, because its teacher "
            f"must not be trained on them; make one with richkd precompute --validation {share:g}, "
            f"or use --holdout to set test images aside",
            code="validation-belongs-to-cache",
        )


NoValidation = Annotated[
    float | None, typer.Option("--validation", hidden=True, callback=_refuse_validation)
]


def _version(wanted: bool) -> None:
    if wanted:
        from richkd import __version__

        typer.echo(f"richkd {__version__}")
        raise typer.Exit


def top(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="print the version of richkd", callback=_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Distil image models from a CNN teacher fused with CLIP.

    Stage one (precompute) runs both teachers once and writes a Zarr cache; stage two (distill)
    trains students from the cache, with no teacher in memory.
    """


app.callback(help=_help_of(top))(top)


@_command(START, "richkd demo", "richkd demo --out runs/demo-1 --seed 1")
def demo(
    out: Annotated[str, path_option(help="folder for everything")] = "runs/demo",
    seed: Annotated[int, typer.Option(help="seed of the teacher and the students")] = 0,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Run both stages on embedded data, in a few minutes on a laptop.

    If interrupted, rerun the same command; it resumes.
    """
    from richkd.demo import run_demo

    _print(run_demo(out, seed, _report(as_json), overwrite=overwrite), as_json)


@_command(
    STAGES,
    "richkd train-teacher --dataset cifar100 --model resnet32x4",
    "richkd train-teacher --dataset shapes --limit 1000 --epochs 24 --schedule cosine",
    name="train-teacher",
    settings=flags(TrainTeacher, "dataset model epochs limit validation out"),
)
def train_teacher(
    recipe: Recipe = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
    **given: Any,
) -> None:
    """Train a CNN teacher with cross-entropy and save its weights.

    If interrupted, rerun the same command; it resumes.
    """
    check_resume(resume, overwrite)
    settings = resolve(TrainTeacher, _table(recipe, "train-teacher"), given)
    from pathlib import Path

    from richkd.data.datasets import introduce
    from richkd.teachers import cnn

    if settings.out:
        cnn.check_output(Path(settings.out), overwrite)
    report = _report(as_json)
    images = cnn.load_images(settings, report, overwrite=overwrite)
    introduce(images, report)
    summary = cnn.train_teacher(settings, images, report, overwrite=overwrite)
    _print(summary, as_json)


@_command(
    STAGES,
    "richkd precompute --dataset cifar100",
    "richkd precompute --dataset cifar100 --teacher-weights resnet32x4.pth --views 16",
    "richkd precompute --dataset imagefolder:my-images --class-names names.txt --broken skip",
    "richkd precompute --dataset imagefolder:my-images --teacher-weights resnet32x4.pth "
    "--teacher-mean 0.507,0.487,0.441 --teacher-std 0.267,0.256,0.276 --teacher-crop 1",
    "richkd precompute --dataset imagefolder:my-images --teacher timm/resnet50.a1_in1k "
    "--teacher-head probe",
    settings=[
        *flags(Precompute, "dataset limit validation", others=False),
        *flags(Precompute, TEACHERS, others=False),
        *flags(
            Precompute,
            "views alpha scale dtype keep_bits keep keep_temperature features rows out batch_size "
            "seed",
            without="teachers",
        ),
    ],
)
def precompute(
    recipe: Recipe = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
    **given: Any,
) -> None:
    """Stage one: run the CNN teacher and CLIP once, and write the cache.

    Without teacher weights, it trains the teacher first. If interrupted, rerun the same command; it
    resumes.
    """
    check_resume(resume, overwrite)
    settings = resolve(Precompute, _table(recipe, "precompute"), given)
    from richkd import precompute as stage_one
    from richkd.tools.inspect import summarize

    cache = stage_one.precompute(
        settings,
        overwrite=overwrite,
        teacher_recipe=_table(recipe, "train-teacher"),
        report=_report(as_json),
    )
    if not is_first():  # only one process of a job prints
        return
    if as_json:
        _print(summarize(cache.location.name), as_json)
    else:
        typer.echo(f"next: richkd distill --cache {cache.location}")


@_command(
    STAGES,
    "richkd add-teacher cache/cifar100.zarr --teacher wrn_40_2 --teacher-weights wrn_40_2.pth",
    "richkd add-teacher cache/cifar100.zarr --clip ViT-B-16-SigLIP:webli --name siglip",
    name="add-teacher",
    settings=[
        *flags(Precompute, TEACHERS, others=False),
        *flags(Precompute, "batch_size data_root device", others=False),
    ],
)
def add_teacher(
    cache: Annotated[str, path_argument(help="a complete cache")],
    name: Annotated[
        str, typer.Option(help="name among the cache's teachers; default by the network")
    ] = "",
    teacher: Annotated[
        str | None, typer.Option(help="CNN of the zoo or of timm, or pretrained by its tag")
    ] = None,
    clip: Annotated[
        str | None, path_option(help="CLIP, instead of a CNN: NAME:TAG, hf-hub:OWNER/NAME, …")
    ] = None,
    dataset: Annotated[
        str | None,
        path_option(help="where the images are now, if they moved: imagefolder:PATH, …"),
    ] = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
    **given: Any,
) -> None:
    """Add the rows of another CNN teacher or CLIP to a cache.

    Nothing else in the cache changes. richkd distill --weights blends its teachers. If interrupted,
    rerun the same command; it resumes.
    """
    check_resume(resume, overwrite)
    from richkd import precompute as stage_one
    from richkd.store.reader import open_cache
    from richkd.tools.inspect import summarize

    added = stage_one.add_teacher(
        cache,
        {**given, "teacher": teacher, "clip": clip, "dataset": dataset},
        name=name,
        overwrite=overwrite,
        report=_report(as_json),
    )
    if not is_first():
        return
    if as_json:
        _print(summarize(added.location.name), as_json)
    else:
        weights = ",".join(f"{name}=1" for name in open_cache(cache).teachers)
        typer.echo(f"next: richkd distill --cache {cache} --weights {weights}")


@_command(
    STAGES,
    "richkd plan --dataset imagenet --views 8 --clip ViT-L-14",
    "richkd plan --dataset imagefolder:my-images --keep top-50 --json",
    "richkd plan --dataset imagefolder:my-images --keep top-50 --measured gpu.json",
    settings=[
        *flags(Precompute, "dataset limit validation", others=False),
        *flags(Precompute, TEACHERS, others=False),
        *flags(
            Precompute,
            "views dtype keep_bits keep features rows batch_size",
            without="alpha scale keep_temperature seed out class_names broken background "
            "pixel_range teachers",
        ),
    ],
)
def plan(
    dataset: Annotated[
        str | None,
        typer.Option(help=f"{describe(Precompute, 'dataset')}; or imagenet, which needs no files"),
    ] = None,
    measured: Annotated[
        str | None, path_option(help="JSON of this plan, made on the machine that will do the work")
    ] = None,
    price: Annotated[
        float | None, typer.Option(help="storage price in USD per GB and month; default 0.023")
    ] = None,
    recipe: Recipe = None,
    as_json: Json = False,
    **given: Any,
) -> None:
    """Estimate what stage one would take: bytes, forward passes, hours and storage costs.

    It measures stage one on a few images on this machine. Random weights and images stand in for
    missing files; nothing is downloaded.
    """
    known = dataset == catalog.IMAGENET
    given["dataset"] = f"{catalog.IMAGE_FOLDER}:{dataset}" if known else dataset
    settings = resolve(Precompute, _table(recipe, "precompute"), given)
    from richkd.tools import plan as plans

    report = _report(as_json)
    price = plans.USD_A_GB_MONTH if price is None else price
    if settings.teachers:
        names = ", ".join(settings.teachers)
        report.log(f"planning without the further teachers of the recipe: {names}")
    result = plans.plan(settings, report, known=known, measured=measured, price=price)
    plans.show(result, report)
    _print(result, as_json)


@_command(CACHES, "richkd inspect cache/cifar100.zarr")
def inspect(
    cache: Annotated[str, path_argument(help="a cache, complete or not")],
    as_json: Json = False,
) -> None:
    """Show what is in a cache: data, teachers, accuracies, arrays and sizes."""
    from richkd.tools.inspect import show, summarize

    summary = summarize(cache)
    if as_json:
        _print(summary, as_json)
    else:
        show(summary, _report(as_json))


@_command(
    CACHES,
    "richkd verify cache/cifar100.zarr",
    "richkd verify cache/cifar100.zarr --teacher teachers/cifar100-resnet32x4.safetensors",
)
def verify(
    cache: Annotated[str, path_argument(help="a complete cache")],
    teacher: Annotated[
        str | None,
        path_option(
            help="weights of the CNN teacher, or the name of its pretrained weights, to recompute "
            "a sample of its rows; NAME=WEIGHTS for an added teacher"
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check every byte of a cache, and that its rows are correct."""
    from richkd.tools.verify import raise_faults, show_checks, verify_store

    report = _report(as_json)
    checks = verify_store(cache, teacher, report)
    if as_json:
        _print({"path": cache, "checks": [asdict(check) for check in checks]}, as_json)
    else:
        show_checks(cache, checks, report)
    raise_faults(cache, checks)


@_command(
    RESULTS,
    "richkd analyze cache/cifar100.zarr",
    "richkd analyze cache/cifar100.zarr --split train --threshold 0.9",
)
def analyze(
    cache: Annotated[str, path_argument(help="a complete cache")],
    threshold: Threshold = 0.8,
    split: Annotated[str, typer.Option(help="test, train (its first view) or validation")] = "test",
    out: Annotated[
        str | None,
        path_option(
            help="folder for the page; default the folder of the cache, or the current one"
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Analyse the teachers of a cache, from the cache alone, and write an HTML page."""
    from richkd.report.analysis import show, write_analysis

    report = _report(as_json)
    result = write_analysis(cache, report, threshold=threshold, split=split, out=out)
    show(result, report)
    _print(result, as_json)
    if not as_json:
        typer.echo(result["files"]["html"])


@_command(CACHES, "richkd repair cache/cifar100.zarr")
def repair(
    cache: Annotated[str, path_argument(help="a complete cache that is damaged")],
    as_json: Json = False,
) -> None:
    """Recompute the damaged blocks of a cache, and no others."""
    from richkd.tools.verify import repair_store

    blocks = repair_store(cache, _report(as_json))
    if as_json:
        _print({"path": cache, "blocks": blocks}, as_json)


@_command(
    STAGES,
    "richkd distill --cache cache/cifar100.zarr",
    "richkd distill --cache cache/cifar100.zarr --student ShuffleV2 --method dkd --target fused",
    "richkd distill --cache cache/cifar100.zarr --alpha auto --set temperature=4",
    settings=flags(
        Distill,
        "cache student method target epochs seed out alpha scale prompts clip_head holdout options "
        "student_options",
    ),
)
def distill(
    recipe: Recipe = None,
    validation: NoValidation = None,
    stop_after: Annotated[
        int | None,
        typer.Option(min=1, help="stop once this epoch is done; the same command goes on later"),
    ] = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
    **given: Any,
) -> None:
    """Stage two: train a student from a cache.

    If interrupted, rerun the same command; it resumes.
    """
    check_resume(resume, overwrite)
    settings = resolve(Distill, _table(recipe, "distill"), given)
    from richkd.analysis.results import results_table
    from richkd.distill import distill as stage_two

    report = _report(as_json)
    summary = stage_two(
        settings, resume=resume, overwrite=overwrite, stop_after=stop_after, report=report
    )
    if not is_first():
        return
    if as_json:
        _print(summary, as_json)
    elif "stopped_after" in summary:
        report.log(f"stopped after epoch {summary['stopped_after']} of {settings.epochs}")
    else:
        results_table(report, f"{summary['run']}", [summary])


@_command(
    STAGES,
    "richkd sweep --cache cache/cifar100.zarr --students resnet8x4,ShuffleV2 --dry-run",
    "richkd sweep --cache cache/cifar100.zarr --students resnet20 --methods kd,richkd --seeds 5",
    "richkd sweep --cache cache/cifar100.zarr --students resnet20 --engine ray --gpus-per-run 0.25",
    settings=[
        *flags(Distill, "cache", others=False),
        *flags(Sweep, "students methods seeds alpha", others=False),
        *flags(Distill, "epochs", others=False),
        *flags(Sweep, "out"),
        *flags(
            Distill,
            "target scale clip_head holdout",
            without="student student_options method options prompts seed",
        ),
    ],
)
def sweep(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="show the grid and its cost, but train nothing")
    ] = False,
    recipe: Recipe = None,
    validation: NoValidation = None,
    as_json: Json = False,
    **given: Any,
) -> None:
    """Train many students from one cache: a grid of students, methods, blends and seeds.

    Each run gives exactly the results it would give alone, and complete runs are not repeated. If
    interrupted, rerun the same command; it resumes.
    """
    grid = {field.name: given.pop(field.name, None) for field in fields(Sweep)}
    read = recipes.load(recipe) if recipe else None
    settings = resolve(Sweep, read.table("sweep") if read else {}, grid)
    from richkd.sweep.run import run_sweep

    report = _report(as_json)
    result = run_sweep(settings, read, given, dry_run=dry_run, report=report)
    _print(result, as_json)
    _check_failed(result)


@_command(
    START,
    "richkd run shapes",
    "richkd run richkd --teacher-weights resnet32x4.pth",
    "richkd run mine.toml --method kd --seed 1",
    settings=[
        *flags(Distill, "method target student epochs milestones seed options", others=False),
        *flags(
            Precompute,
            "dataset limit validation views teacher_weights teacher_weights_key teacher_classes "
            "clip data_root device",
            others=False,
        ),
    ],
)
def run(
    recipe: Annotated[str, path_argument(help="TOML file, or a name listed by richkd recipes")],
    cache: Annotated[
        str | None, path_option(help="location of the cache; default cache/DATASET-TEACHER.zarr")
    ] = None,
    out: Annotated[
        str | None,
        path_option(
            help="run folder; default runs/RECIPE/STUDENT-METHOD-sSEED, or runs/RECIPE for a sweep"
        ),
    ] = None,
    as_json: Json = False,
    **given: Any,
) -> None:
    """Run a recipe from end to end: teacher, stage one, stage two or its sweep, and report.

    Complete steps are not repeated. A recipe with a [sweep] trains its grid; with --student,
    --method, --target, --set or --seed it trains that one run instead.
    """
    from richkd.analysis.results import results_table
    from richkd.run import run_recipe

    report = _report(as_json)
    result = run_recipe(recipes.load(recipe), {**given, "cache": cache, "out": out}, report)
    if "run" in result:  # a sweep has printed its leaderboard
        results_table(report, f"{result['run']}", [result])
    _print(result, as_json)
    _check_failed(result)
    if not as_json:
        typer.echo(result["page"])


@_command(
    RESULTS,
    "richkd report runs",
    "richkd report runs --cache cache/cifar100.zarr --tensorboard",
    name="report",
)
def write_report(
    runs: Annotated[list[str], path_argument(help="folders that contain runs")],
    out: Annotated[
        str | None, path_option(help="folder for the page; default the first of RUNS")
    ] = None,
    cache: Annotated[
        str | None, path_option(help="include only the runs that were trained from this cache")
    ] = None,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="also write TensorBoard event files")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write an HTML page about all runs in a folder, with CSV and JSON beside it."""
    from pathlib import Path

    from richkd.report import write_report

    result = write_report(
        [Path(folder) for folder in runs],
        _report(as_json),
        out=local_path(out) if out else None,
        cache=cache,
        tensorboard=tensorboard,
    )
    _print(result, as_json)
    if not as_json:
        typer.echo(result["files"]["report.html"])


@_command(
    RESULTS,
    "richkd evaluate runs/A runs/B --corruptions",
    "richkd evaluate runs/A --shift other-images --limit 1000",
)
def evaluate(
    runs: Annotated[
        list[str],
        path_argument(help="complete runs on one dataset; the others are compared with the first"),
    ],
    weights: Weights = "last",
    threshold: Threshold = 0.8,
    limit: Annotated[
        int | None,
        typer.Option(help="use only the first N test images, of those on which no run chose its α"),
    ] = None,
    corruptions: Corruptions = False,
    corruption_files: Annotated[
        str | None, path_option(help="corruptions from this folder, in the layout of CIFAR-100-C")
    ] = None,
    shift: Annotated[
        str | None,
        path_option(help="other images: one folder per class, named or numbered like the classes"),
    ] = None,
    cache: Annotated[str | None, path_option(help="location of the cache, if it has moved")] = None,
    dataset: Annotated[
        str | None,
        path_option(help="where the images are now, if they moved: imagefolder:PATH, …"),
    ] = None,
    data_root: DataRoot = None,
    seed: Annotated[int, typer.Option(help="seed of the noise in corruptions")] = 0,
    device: Device = None,
    out: Annotated[
        str | None, path_option(help="folder for the page; default the first run's")
    ] = None,
    as_json: Json = False,
) -> None:
    """Evaluate students: calibration, classes, corruptions and shifts, on an HTML page.

    The results of each run are kept in its folder (evaluation.json), where richkd report finds
    them.
    """
    from richkd.report.evaluation import show, write_evaluation

    report = _report(as_json)
    result = write_evaluation(
        runs,
        report,
        out=out,
        weights=weights,
        threshold=threshold,
        limit=limit,
        cache=cache,
        dataset=dataset,
        data_root=data_root,
        corruptions=corruptions,
        corruption_files=corruption_files,
        shift=shift,
        seed=seed,
        device=device or "auto",
    )
    show(result, report)
    _print(result, as_json)
    if not as_json:
        typer.echo(result["files"]["html"])


@_command(RESULTS, "richkd export runs/A", "richkd export runs/A --format torch --weights best")
def export(
    run: Annotated[str, path_argument(help="a complete run")],
    kind: Annotated[str, typer.Option("--format", help="onnx or torch (torch.export)")] = "onnx",
    weights: Weights = "last",
    out: Annotated[
        str | None, path_option(help="file; default student.onnx in the run folder")
    ] = None,
    as_json: Json = False,
) -> None:
    """Export a run's student to ONNX or torch.export, and check it against PyTorch."""
    from richkd.tools.export import export

    result = export(run, kind, weights=weights, out=out)
    _print(result, as_json)
    if not as_json:
        typer.echo(f"{result['file']}: logits within {result['relative_error']:.0e} of PyTorch's")


@_command(
    RESULTS,
    "richkd push cache/cifar100.zarr me/cifar100-teachers",
    "richkd push runs/A me/resnet8x4-cifar100 --private",
)
def push(
    path: Annotated[str, path_argument(help="a complete cache, or a complete run")],
    repo_id: Annotated[str, typer.Argument(help="OWNER/NAME; created if missing")],
    private: Annotated[bool, typer.Option("--private", help="make the repository private")] = False,
    as_json: Json = False,
) -> None:
    """Upload a cache (as a dataset) or a student (as a model) to the Hugging Face hub, with a card.

    This includes the images or kept pixels in a cache, and the paths named in its recipe.
    """
    from richkd.tools.hub import push

    result = push(path, repo_id, _report(as_json), private=private)
    _print(result, as_json)
    if not as_json:
        typer.echo(result["url"])


@_command(
    RESULTS,
    "richkd pull me/cifar100-teachers",
    "richkd pull me/resnet8x4-cifar100 --out runs/theirs --revision v1",
)
def pull(
    repo_id: Annotated[
        str, typer.Argument(help="OWNER/NAME; prefix datasets/ or models/ if both exist")
    ],
    out: Annotated[
        str | None,
        path_option(help="folder; default cache/NAME.zarr for a cache, runs/NAME for a student"),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="branch, tag or commit")] = None,
    as_json: Json = False,
) -> None:
    """Download a cache or a student from the Hugging Face hub, and check every byte."""
    from richkd.tools.hub import pull

    result = pull(repo_id, _report(as_json), out=out, revision=revision)
    _print(result, as_json)
    if not as_json:
        typer.echo(result["path"])


@_command(LISTS, "richkd bench --quick", "richkd bench --cache cache/cifar100.zarr --json")
def bench(
    quick: Annotated[
        bool, typer.Option("--quick", help="fewer rounds; takes at most 3 minutes")
    ] = False,
    cache: Annotated[
        str | None, path_option(help="a real cache, to measure the compression of its rows")
    ] = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Measure the speed of steps, stage one, slabs, CRD and the cache on this machine."""
    from richkd.tools.bench import FULL, QUICK, run_bench

    result = run_bench(
        QUICK if quick else FULL, _report(as_json), device=device or "auto", cache=cache
    )
    _print(result, as_json)


@_command(START, "richkd doctor")
def doctor(data_root: DataRoot = None, as_json: Json = False) -> None:
    """Show what this machine has, and what each command lacks."""
    from richkd.tools import doctor as doctors

    report = _report(as_json)
    findings = doctors.examine(data_root or "data", report)
    doctors.show(findings, report)
    _print(doctors.as_json(findings), as_json)
    doctors.raise_missing(findings)


@_command(LISTS, "richkd recipes", name="recipes")
def list_recipes(as_json: Json = False) -> None:
    """List the packaged recipes."""
    from richkd.tools.listing import show_recipes

    _print(show_recipes(_report(as_json)), as_json)


@_command(LISTS, "richkd methods", "richkd methods dkd", name="methods")
def list_methods(
    name: Annotated[
        str | None, typer.Argument(help="show only this method, with its options")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the distillation methods, or the options of one."""
    from richkd.tools.listing import show_methods

    _print(show_methods(name, _report(as_json)), as_json)


@_command(LISTS, "richkd models", "richkd models 'mobilenet*'", name="models")
def list_models(
    pattern: Annotated[
        str | None,
        typer.Argument(
            help="pattern for names of the zoo and timm, e.g. 'mobilenet*'; default the zoo"
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """List the networks of the zoo, or all whose names match a pattern."""
    from richkd.tools.listing import show_models

    _print(show_models(pattern, _report(as_json)), as_json)


def _report(as_json: bool) -> Any:
    from richkd.core.progress import Report

    return Report(quiet=as_json)


def _print(result: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        from richkd.core.files import to_json

        typer.echo(to_json(result, indent=2))


def _check_failed(result: Mapping[str, Any]) -> None:
    """Raise RichKDError if runs of a sweep failed."""
    failed = result.get("failed")
    if failed:
        names = ", ".join(failure["run"] for failure in failed)
        raise RichKDError(
            f"{len(failed)} of the runs failed: {names}; rerun the same command to retry them, "
            f"each from its last epoch",
            code="sweep-runs-failed",
        )


def _table(recipe: str | None, section: str) -> dict[str, Any]:
    return recipes.load(recipe).table(section) if recipe else {}


def check_repeated(arguments: Sequence[str]) -> None:
    """Check that a command names one teacher; of a repeated flag, only the last would count."""
    for flag in ("--teacher", "--clip"):
        count = sum(each == flag or each.startswith(f"{flag}=") for each in arguments)
        if count > 1:
            raise RichKDError(
                f"{flag} is given {count} times, but a command takes one; add further teachers "
                f"with richkd add-teacher, or in a recipe",
                code="flag-repeated",
            )


def named(arguments: Sequence[str]) -> str:
    """Return the command among the words of a command line, "" if there is none."""
    return next((word for word in arguments if not word.startswith("-")), "")


def execute(arguments: Sequence[str]) -> int:
    """Run a command and return its exit code; the only place that turns errors into codes."""
    try:
        check_repeated(arguments)
        with interruptible():
            check_processes(named(arguments))
            code = app([*arguments] or ["--help"], standalone_mode=False)
    except RichKDError as error:
        code = fail(f"{error} [{error.code}]", 2) if reports(error.code) else 2
    except Interrupted as interrupted:
        warnings.simplefilter("ignore")  # about coroutines that are no longer awaited
        code = interrupted.exit_code
        code = fail(str(interrupted), code) if reports("") else code
    except (typer.Abort, KeyboardInterrupt):
        code = fail("interrupted", 130)
    except BrokenPipeError:  # the reader of the output closed the pipe
        code = 141
    except SystemExit as exit_:
        code = exit_.code
    except OSError as error:  # e.g. a full disk, or no permission
        code = fail(f"{error}; free some space, or check the path and its permissions", 2)
    except Exception as error:
        # a mistyped command or flag, whose class is not public in typer
        if hasattr(error, "format_message"):
            code = fail(f"{error.format_message().rstrip('.')}; see richkd --help", 2)
        elif (fault := machine_fault(error)) is not None:
            code = fail(fault, 2)
        else:
            raise
    return code if isinstance(code, int) else 0
