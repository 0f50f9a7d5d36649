"""Check what is asked of a teacher that is added to a cache, and resolve its settings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from richkd.config.settings import NO_TEACHER, Precompute, check_name, resolve, to_table
from richkd.core.choices import CNN_ROWS
from richkd.core.errors import RichKDError
from richkd.models import check_names
from richkd.store.added import check_new_name
from richkd.store.folder import Folder
from richkd.store.location import Location
from richkd.store.schema import Manifest
from richkd.teachers.class_order import check_teacher_classes
from richkd.teachers.pretrained import by_name, check_teacher_name
from richkd.teachers.request import check_settings, check_teachers

# settings of the teacher itself; it takes the others over from the cache
OF_CNN = {name for name in Precompute.__dataclass_fields__ if name.startswith("teacher_")}
OF_CLIP = {"clip_precision", "prompts"}
OWN = {"teacher", "clip", *OF_CNN, *OF_CLIP, "batch_size"}
WHERE = {"dataset", "data_root", "device"}  # of the images, and of the computation
LEFT_OUT = {*OWN, "alpha", "scale", "device", "out", "teachers"}


def check_given_teacher(given: Mapping[str, Any], where: str) -> None:
    """Check that settings name one teacher and nothing that belongs to the other kind.

    Args:
        given: the settings by name; None for those that were not given.
        where: what they belong to, for the message.

    Raises:
        RichKDError: they name no teacher, or two, or a setting that is not one of a teacher's.
    """
    named = {name for name, value in given.items() if value is not None}
    for name in named - OWN - WHERE:
        check_name(name, Precompute, where)
        raise RichKDError(
            f"{where}: {name} is the cache's own, for all of its teachers; leave it out",
            code="setting-of-the-cache",
        )
    one = [given[name] for name in ("teacher", "clip") if name in named]
    if len(one) != 1 or one[0] in ("", "none"):
        raise RichKDError(
            f"{where}: name one teacher, either a CNN (--teacher) or a CLIP (--clip); call "
            f"richkd add-teacher once for each",
            code="teacher-not-named",
        )
    for kind, other in (("teacher", OF_CLIP), ("clip", OF_CNN)):
        if kind in named and (wrong := sorted(named & other)):
            raise RichKDError(
                f"{where}: --{wrong[0].replace('_', '-')} does not belong to --{kind}; leave it "
                f"out",
                code="setting-of-other-teacher",
            )


def addition_settings(
    manifest: Manifest, given: Mapping[str, Any], location: Location
) -> Precompute:
    """Return the settings of stage one for a teacher that is added to a cache.

    Args:
        manifest: of the cache, whose images, views and data types they take over.
        given: the settings that `check_given_teacher` accepts.
        location: of the cache.
    """
    shared = {name: value for name, value in manifest["recipe"].items() if name not in LEFT_OUT}
    return _resolved(shared, given, location.name)


def _resolved(shared: Mapping[str, Any], given: Mapping[str, Any], out: str) -> Precompute:
    """Return the settings of an added teacher, from those of the cache and its own."""
    shared = dict(shared)
    one = {name: value for name, value in given.items() if value is not None}
    if "teacher" in one and "rows" in shared:  # it has no blend of its own
        shared["rows"] = [name for name in shared["rows"] if name in CNN_ROWS]
    other = {"clip": "none"} if "teacher" in one else {"teacher": NO_TEACHER}
    return resolve(Precompute, shared, {**other, **one, "out": out})


def default_name(settings: Precompute) -> str:
    """Return a name for an added teacher, from its network or CLIP."""
    named = settings.clip if settings.teacher == NO_TEACHER else settings.teacher
    own = PurePath(named.replace("\\", "/")).name
    return re.sub("[^A-Za-z0-9_-]+", "-", own).strip("-_")[:40] or "teacher"


def check_added(settings: Precompute) -> None:
    """Check the teacher of the settings, without an image or the network."""
    if settings.teacher != NO_TEACHER:
        check_teacher_name(settings)
        if not by_name(settings):
            check_names([settings.teacher])
        check_teacher_classes(settings)
    check_teachers(settings)


def check_addition(
    settings: Precompute, out: Location, name: str, overwrite: bool
) -> Mapping[str, Any] | None:
    """Raise RichKDError for whatever can be refused before any image is read.

    Returns:
        The manifest of the teacher of this name, complete or not, unless it is to be replaced.
    """
    check_new_name(name)
    check_added(settings)
    if isinstance(out, Folder) and (out.path.is_symlink() or out.path.parent.is_symlink()):
        link = out.path if out.path.is_symlink() else out.path.parent
        raise RichKDError(
            f"{link} is a symbolic link, and teachers are added to a cache itself; choose another "
            f"--name, or replace the link by what it points to",
            code="teacher-is-link",
        )
    try:
        present = check_settings(settings, out, overwrite)
    except RichKDError as error:
        error.args = (str(error).replace("choose another --out", "choose another --name"),)
        raise
    is_cnn = settings.teacher != NO_TEACHER
    if present is not None and ("teacher" in present) != is_cnn:
        kind = "CNN" if "teacher" in present else "CLIP"
        raise RichKDError(
            f"{out} holds another teacher of this name, a {kind}; choose another --name, or "
            f"replace it with --overwrite",
            code="teacher-exists",
        )
    return present


def check_further(settings: Precompute) -> None:
    """Check the further teachers of a recipe, before the first one is computed."""
    shared = {name: value for name, value in to_table(settings).items() if name not in LEFT_OUT}
    for name, table in settings.teachers.items():
        check_new_name(name)
        where = f"[precompute.teachers.{name}]"
        if not isinstance(table, Mapping):
            raise RichKDError(
                f"{where} = {table!r}: must be a table, with the settings of one teacher",
                code="teacher-not-named",
            )
        check_given_teacher(table, where)
        check_added(_resolved(shared, table, settings.out))
