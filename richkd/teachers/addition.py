"""Check what is asked of a teacher that is added to a cache, and resolve its settings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from richkd.config.settings import NO_TEACHER, Precompute, check_name, resolve
from richkd.core.choices import CNN_ROWS
from richkd.core.errors import RichKDError
from richkd.models import check_names
from richkd.store.added import check_new_name
from richkd.store.location import Location
from richkd.store.schema import Manifest
from richkd.teachers.class_order import check_teacher_classes
from richkd.teachers.pretrained import by_name, check_teacher_name
from richkd.teachers.request import check_settings

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
    if len(named & {"teacher", "clip"}) != 1:
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
    one = {name: value for name, value in given.items() if value is not None}
    if "teacher" in one and "rows" in shared:  # it has no blend of its own
        shared["rows"] = [name for name in shared["rows"] if name in CNN_ROWS]
    other = {"clip": "none"} if "teacher" in one else {"teacher": NO_TEACHER}
    return resolve(Precompute, shared, {**other, **one, "out": location.name})


def default_name(settings: Precompute) -> str:
    """Return a name for an added teacher, from its network or CLIP."""
    named = settings.clip if settings.teacher == NO_TEACHER else settings.teacher
    own = PurePath(named.replace("\\", "/")).name
    return re.sub("[^A-Za-z0-9_-]+", "-", own).strip("-_")[:40] or "teacher"


def check_addition(
    settings: Precompute, out: Location, name: str, overwrite: bool
) -> Mapping[str, Any] | None:
    """Raise RichKDError for whatever can be refused before any image is read.

    Returns:
        The manifest of the teacher of this name, complete or not, unless it is to be replaced.
    """
    check_new_name(name)
    if settings.teacher != NO_TEACHER:
        check_teacher_name(settings)
        if not by_name(settings):
            check_names([settings.teacher])
        check_teacher_classes(settings)
    return check_settings(settings, out, overwrite)


def check_further(tables: Mapping[str, Any]) -> None:
    """Check the tables of further teachers in a recipe, before the first one is computed."""
    for name, table in tables.items():
        check_new_name(name)
        where = f"[precompute.teachers.{name}]"
        if not isinstance(table, Mapping):
            raise RichKDError(
                f"{where} = {table!r}: must be a table, with the settings of one teacher",
                code="teacher-not-named",
            )
        check_given_teacher(table, where)
