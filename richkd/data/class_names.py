"""Class names: from folder names, from WordNet, or from a file that the user provides.

CLIP knows a class only by its text and ignores case, so it cannot tell two classes with the same
text apart. Names that collide are made distinct where more is known about the classes, and every
such change is logged.
"""

from __future__ import annotations

import ast
import csv
import html
import json
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from runpy import run_path
from typing import Any

from richkd.core.errors import RichKDError, nearest
from richkd.core.text_files import read_text
from richkd.data.walk import listed

CURATED = "curated"  # in place of a file
_SYNSET = re.compile(r"n\d{8}")
_CAMEL_CASE = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_NUMBER_PREFIX = re.compile(r"(\d+)[._-]+(?=\D)")  # e.g. 001.Black_footed_Albatross
_COMMA = re.compile(r"\s*,\s*(?![^()]*\))")  # not inside parentheses
_NUMBER_AND_NAME = re.compile(r"(\d+)\s*[.):=-]*\s+(\S.*)")
# Column headings of a table of names, lower-case, without spaces and punctuation.
_HEADING = re.compile(
    r"category|categories|class(es|id|index|label|names?)?|description|dir|directory|folder(name)?"
    r"|id|idx|index|key|label(s|id|name)?|names?|number|synset(id)?|target|title|value|wnid|words"
)


@dataclass(frozen=True)
class ClassNames:
    """A name for each class, and notes for the user on how the names were chosen."""

    names: tuple[str, ...]
    notes: tuple[str, ...] = ()


def class_words(folder: str) -> str:
    """Turn a folder name into words: no underscores, no leading number, camel case separated.

    WordNet IDs (n02123045) become the first lemma, as timm's list of ImageNet classes has it.
    """
    return _folder_candidates(folder)[0]


def choose_names(given: str, folders: Sequence[str], synonyms: bool = False) -> ClassNames:
    """Name classes as the setting `class_names` says: a file, `curated`, or nothing.

    Args:
        given: the setting.
        folders: class folders in the order of their labels.
        synonyms: whether commas separate several names of a class, as in tables of ImageNet.

    Raises:
        RichKDError: as `read_class_names` and `curated_names`.
    """
    if not given:
        return name_classes(folders, synonyms)
    if given == CURATED and not Path(given).exists():
        return curated_names(synsets_of(folders) if synonyms else folders)
    return read_class_names(Path(given), folders)


def name_classes(folders: Sequence[str], synonyms: bool = False) -> ClassNames:
    """Name classes after their folders, with longer names where the short ones collide."""
    several = [_COMMA.split(folder.strip()) if synonyms else [folder] for folder in folders]
    candidates = [
        _synonym_candidates(names, folder) if len(names) > 1 else _folder_candidates(folder)
        for names, folder in zip(several, folders, strict=True)
    ]
    names = _make_distinct(candidates)
    notes = _same_text(names, folders)
    first = next((folder for folder in folders if synonyms and _COMMA.search(folder)), None)
    if first is not None:
        notes.append(f"only the first of several names separated by commas is used, e.g. {first!r}")
    changes = _changes(folders, names, candidates)
    if changes:
        curated = f", or {CURATED} (open_clip's)" if _in_imagenet(folders) else ""
        notes.insert(
            0,
            f"some classes would have had the same name and got other names: {listed(changes)}; "
            f"to choose other names, use --class-names FILE{curated}",
        )
    return ClassNames(names, tuple(notes))


def curated_names(folders: Sequence[str]) -> ClassNames:
    """Name classes as open_clip does for zero-shot ImageNet, by the WordNet IDs of their folders.

    Its names were chosen so that CLIP knows what is meant: `kite (bird of prey)`, `metal nail`. A
    folder beyond the 1,000 classes is named as by `name_classes`, and so are classes that would
    have the same name: open_clip has two missiles and two sunglasses.

    Raises:
        RichKDError: no folder is one of the 1,000 classes, or open_clip has no such names.
    """
    if not _in_imagenet(folders):
        raise RichKDError(
            f"class_names = {CURATED!r}: none of {len(folders):,} class folders, e.g. "
            f"{folders[0]!r}, is the WordNet ID of one of ImageNet's 1,000 classes; pass a file of "
            f"names, or leave --class-names out",
            code="class-names-wrong",
        )
    curated = _curated()
    candidates = [
        [*([curated[folder]] if folder in curated else []), *_folder_candidates(folder)]
        for folder in folders
    ]
    names = _make_distinct(candidates)
    found = sum(folder in curated for folder in folders)
    notes = [f"{found:,} of {len(folders):,} classes have the names that open_clip gives them"]
    if changes := _changes(folders, names, candidates):
        notes.append(
            f"some classes would have had the same name and got others: {listed(changes)}; to "
            f"choose other names, use --class-names FILE"
        )
    return ClassNames(names, (*notes, *_same_text(names, folders)))


def synsets_of(names: Sequence[str]) -> Sequence[str]:
    """Return the WordNet IDs of ImageNet's classes that are named by their lemmas, as in tables.

    All 1,000 in their usual order may have some names that differ, since two are plain `crane`. Of
    fewer, or in another order, each has to be the lemmas of one class only; else the names are
    returned.
    """
    from timm.data.imagenet_info import ImageNetInfo

    own, info = _synsets(), ImageNetInfo()
    lemmas = [info.label_name_to_description(synset) for synset in own]
    alike = sum(name.strip() == each for name, each in zip(names, lemmas, strict=False))
    if len(names) == len(own) and alike >= 0.95 * len(own):
        return own
    counts = Counter(lemmas)
    known = {each: synset for each, synset in zip(lemmas, own, strict=True) if counts[each] == 1}
    found = [known.get(name.strip(), "") for name in names]
    return found if all(found) else names


def check_distinct(names: Sequence[str]) -> None:
    """Raise RichKDError if two names are the same text to CLIP."""
    for fault in _same_text(names, names):
        raise RichKDError(
            f"{fault}, or run without CLIP by --clip none", code="class-names-ambiguous"
        )


def text_key(name: str) -> str:
    """Return a key that is equal for names that CLIP's tokenizer cannot tell apart."""
    return " ".join(unicodedata.normalize("NFKC", html.unescape(name)).casefold().split())


def _words(text: str) -> str:
    return " ".join(_CAMEL_CASE.sub(" ", text.replace("_", " ").replace("-", " ")).split())


# --- making names distinct -----------------------------------------------------------------------


@cache
def _imagenet() -> dict[str, tuple[list[str], str]]:
    """Return the lemmas and the gloss of every ImageNet class by its WordNet ID."""
    from timm.data.imagenet_info import ImageNetInfo

    info = ImageNetInfo("imagenet-22k")
    entries = {}
    for synset in info.label_names():  # type: ignore[no-untyped-call]
        lemmas = info.label_name_to_description(synset)
        gloss = info.label_name_to_description(synset, detailed=True)
        entries[synset] = (
            [lemma.strip() for lemma in lemmas.split(",")],
            gloss.removeprefix(f"{lemmas}: "),
        )
    return entries


@cache
def _synsets() -> tuple[str, ...]:
    """Return the WordNet IDs of ImageNet's 1,000 classes in the order of their labels."""
    from timm.data.imagenet_info import ImageNetInfo

    return tuple(sorted(ImageNetInfo().label_names()))  # type: ignore[no-untyped-call]


def _in_imagenet(folders: Iterable[str]) -> bool:
    """Return whether a folder is one of ImageNet's 1,000 classes."""
    return any(map(_SYNSET.fullmatch, folders)) and not {*folders}.isdisjoint(_synsets())


@cache
def _curated() -> dict[str, str]:
    """Return open_clip's name of each of ImageNet's 1,000 classes by its WordNet ID.

    Only the file with the names is run: stage two, which must not load open_clip, names classes as
    well.

    Raises:
        RichKDError: the installed open_clip does not have them.
    """
    try:
        spec = find_spec("open_clip")
        assert spec is not None and spec.origin is not None
        names = run_path(str(Path(spec.origin).with_name("zero_shot_metadata.py")))
        return dict(zip(_synsets(), names["IMAGENET_CLASSNAMES"], strict=True))
    except Exception as error:  # of whatever another version of it does
        raise RichKDError(
            f"class_names = {CURATED!r}: this open_clip does not have its names of ImageNet's "
            f"classes ({error!r}); install open_clip_torch 2.24 or later, or pass a file of names",
            code="class-names-unreadable",
        ) from None


def _wordnet(folder: str) -> tuple[list[str], str] | None:
    """Return lemmas and gloss of a folder named by a WordNet ID, else None."""
    return _imagenet().get(folder) if _SYNSET.fullmatch(folder) else None


def _folder_candidates(folder: str) -> list[str]:
    """Return possible names of a class by its folder, from the usual one to the most specific."""
    entry = _wordnet(folder)
    if entry is not None:
        return _synonym_candidates(entry[0], folder)
    return [
        _words(_NUMBER_PREFIX.sub("", folder)) or folder,
        _words(_NUMBER_PREFIX.sub(r"\1 ", folder)),
        folder,
    ]


def _synonym_candidates(synonyms: Sequence[str], folder: str) -> list[str]:
    """Return the first synonym alone, with the second, with all, and with WordNet's gloss."""
    first, *others = synonyms
    details = [", ".join(some) for some in ((others[:1], others) if others else ())]
    entry = _wordnet(folder)
    if entry is not None:
        gloss = " ".join(re.sub(r"\([^()]*\)", " ", entry[1]).split())  # no nested parentheses
        beginning = re.split("[;,]", gloss)[0].strip()
        details += ([beginning] if " " in beginning else []) + [gloss]
    return [first, *(f"{first} ({detail})" for detail in details)]


def _make_distinct(candidates: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """Choose each class's first candidate; classes that collide move on to their next ones."""
    chosen = [0] * len(candidates)
    while True:
        names = [some[number] for some, number in zip(candidates, chosen, strict=True)]
        colliding = [
            number
            for group in _groups(names)
            for number in group
            if chosen[number] + 1 < len(candidates[number])
        ]
        if not colliding:
            return tuple(names)
        for number in colliding:
            chosen[number] += 1


def _groups(names: Iterable[str]) -> list[list[int]]:
    """Return the positions of names that are the same text, group by group."""
    groups = defaultdict(list)
    for number, name in enumerate(names):
        groups[text_key(name)].append(number)
    return [group for group in groups.values() if len(group) > 1]


def _changes(
    folders: Sequence[str], names: Sequence[str], candidates: Sequence[Sequence[str]]
) -> list[str]:
    """List the classes that could not keep their first candidate and are distinct now."""
    same = {number for group in _groups(names) for number in group}
    return [
        f"{folder} → {name}"
        for number, (folder, name) in enumerate(zip(folders, names, strict=True))
        if name != candidates[number][0] and number not in same
    ]


def _same_text(names: Sequence[str], shown: Sequence[str]) -> list[str]:
    """Describe the names that are the same text to CLIP, if there are any."""
    groups = _groups(names)
    if not groups:
        return []
    classes = " and ".join(repr(shown[number]) for number in groups[0][:4])
    more = f" (and {len(groups) - 1} more such groups)" if len(groups) > 1 else ""
    return [
        f"the classes {classes} share one text, so CLIP cannot tell them apart{more}; give "
        f"them different names with --class-names FILE"
    ]


# --- files of names ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Entry:
    """One name in a file."""

    place: str  # for messages, e.g. `line 3`
    key: str | None  # the folder or number that the file gives for the name
    name: str

    @property
    def synonyms(self) -> list[str]:
        return [part for part in _COMMA.split(self.name) if part]


class _Fault(Exception):
    """A mistake in a file of names."""


def read_class_names(file: Path, folders: Sequence[str]) -> ClassNames:
    """Read class names from a file: one per line in the order of the folders, or FOLDER: NAME.

    FOLDER: NAME lines may omit folders. Tables (tabs, commas or semicolons), WordNet IDs or numbers
    before the names, and JSON are recognised. The first of several comma-separated synonyms counts.

    Args:
        file: text of any operating system, or JSON.
        folders: class folders in the order of their labels.

    Raises:
        RichKDError: the file is missing, names an unknown folder, has too few or too many names or
            the same name twice, or does not determine the folder of a name.
    """
    try:
        entries = _parse(read_text(file), folders)
        assign = _in_order if entries[0].key is None else _by_key
        found, notes = assign(entries, folders)
    except (OSError, ValueError, csv.Error) as error:
        raise RichKDError(
            f"cannot read --class-names {file}: {error}", code="class-names-unreadable"
        ) from None
    except _Fault as fault:
        raise RichKDError(f"--class-names {file}: {fault}", code="class-names-wrong") from None
    several = next((entry for entry in found.values() if len(entry.synonyms) > 1), None)
    if several is not None:
        notes.append(
            f"{file}: only the first of several names separated by commas is used, e.g. "
            f"{several.synonyms[0]!r} of {several.name!r}"
        )
    candidates = [_entry_candidates(found.get(folder), folder) for folder in folders]
    names = _make_distinct(candidates)
    for group in _groups(names):
        same = [folders[number] for number in group[:4]]
        places = [found[one].place if one in found else f"the folder {one}" for one in same]
        raise RichKDError(
            f"--class-names {file}: {' and '.join(places)} have the same name, "
            f"{names[group[0]]!r}, so CLIP cannot tell these classes apart; give each class a "
            f"name of its own",
            code="class-names-ambiguous",
        )
    changes = _changes(folders, names, candidates)
    if changes:
        notes.append(
            f"{file}: some classes have the same name and got longer names: {listed(changes)}"
        )
    return ClassNames(names, tuple(notes))


def count_names(file: Path, labels: Sequence[str]) -> int:
    """Return how many names a file lists, one for each label from 0; 0 if it says which is whose.

    A file that cannot be read has none: `read_class_names` says why.
    """
    try:
        entries = _parse(read_text(file), labels)
    except (OSError, ValueError, csv.Error, _Fault):
        return 0
    return len(entries) if all(entry.key is None for entry in entries) else 0


def _entry_candidates(entry: _Entry | None, folder: str) -> list[str]:
    """Return possible names of a class by its entry in the file, if it has one."""
    if entry is None or not entry.synonyms or entry.name == folder:
        return _folder_candidates(folder)
    return _synonym_candidates(entry.synonyms, folder)


def _parse(text: str, folders: Sequence[str]) -> list[_Entry]:
    """Return the names in a file of any of the supported forms."""
    if text.lstrip()[:1] in ("[", "{"):
        entries = _from_json(text)
    else:
        rows = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1)]
        rows = [(number, line) for number, line in rows if line]
        entries = _from_lines(rows, folders) if rows else []
    if not entries:
        raise _Fault("it contains no names")
    return entries


def _from_json(text: str) -> list[_Entry]:
    """Read a JSON list or object of names, or the same as a Python literal."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        repeated = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        if repeated:
            raise _Fault(f"the key {repeated[0]!r} appears twice")
        return dict(pairs)

    try:
        try:
            value = json.loads(text, object_pairs_hook=unique)
        except ValueError as error:
            try:
                value = ast.literal_eval(text.strip())
            except (ValueError, SyntaxError, TypeError):
                raise _Fault(f"it is not valid JSON ({error})") from None
    except (RecursionError, MemoryError):
        raise _Fault("it is not valid JSON (nested too deeply)") from None
    if not isinstance(value, dict | list | tuple):
        raise _Fault("it is neither a list of names nor an object of FOLDER: NAME")
    entries = []
    for number, one in enumerate(value.items() if isinstance(value, dict) else value, 1):
        key, each = one if isinstance(value, dict) else (None, one)
        place = f"entry {number}"
        if isinstance(each, list | tuple) and [*map(type, each)] == [str, str]:
            folder, name = each  # as in imagenet_class_index.json
            entries.append(_Entry(place, folder.strip(), name.replace("_", " ")))
        elif isinstance(each, str):
            entries.append(_Entry(place, None if key is None else str(key).strip(), each))
        elif key is not None and type(each) is int:  # NAME: number
            entries.append(_Entry(place, str(each), str(key)))
        else:
            raise _Fault(f"{place} is neither a name nor FOLDER: NAME")
    return [replace(entry, name=" ".join(entry.name.split())) for entry in entries]


def _from_lines(rows: list[tuple[int, str]], folders: Sequence[str]) -> list[_Entry]:
    """Read a text file, given its non-empty lines with their numbers."""
    lines = [line for _, line in rows]
    if any("\t" in line for line in lines):
        without = next((number for number, line in rows if "\t" not in line), None)
        if without is not None:
            raise _Fault(f"line {without} has no tab, unlike other lines; write FOLDER: NAME lines")
        return _from_table(rows, lambda line: line.split("\t"), folders, certain=True)
    if all(":" in line for line in lines):
        return _from_table(rows, lambda line: line.split(":", 1), folders, certain=True)
    for separator in (",", ";", "|", "=", "→", "->"):
        if all(separator in line for line in lines):
            table = _from_table(rows, partial(_cells, separator=separator), folders)
            if table:
                return table
    by_id = [line.split(None, 1) for line in lines]
    if all(len(cells) == 2 and re.search(r"\d", cells[0]) for cells in by_id):
        ids = {key for key, _ in by_id}
        if ids <= {*folders} or ids >= {*folders} or all(map(_SYNSET.fullmatch, ids)):
            return _from_table(rows, lambda line: line.split(None, 1), folders, certain=True)
    matches = [_NUMBER_AND_NAME.fullmatch(line) for line in lines]
    numbers = {int(match[1]) if match else None for match in matches}
    if numbers in (*_numberings(len(folders)), {*_leading_numbers(folders)}):
        return [
            _Entry(f"line {number}", match[1], match[2])
            for (number, _), match in zip(rows, matches, strict=True)
            if match
        ]
    return _from_list(rows, folders)


def _from_table(
    rows: list[tuple[int, str]],
    split: Callable[[str], list[str]],
    folders: Sequence[str],
    certain: bool = False,
) -> list[_Entry]:
    """Read a table with a column of folders or numbers; return [] if it has no such column.

    Args:
        rows: lines with their numbers.
        split: splits a line into cells.
        folders: class folders.
        certain: the lines are known to be a table, whose first column is the default.
    """
    table = [(number, [_unquoted(cell) for cell in split(line)]) for number, line in rows]
    if len(table) > 1 and all(_is_heading(cell) for cell in table[0][1]):
        del table[0]
    width = max(len(cells) for _, cells in table)
    columns = [[cells[at] for _, cells in table if at < len(cells)] for at in range(width)]
    full = [at for at, column in enumerate(columns) if len(column) == len(table)]
    known = {*folders}
    keys = [
        at
        for at in full
        if known <= {*columns[at]}
        or sum(cell in known for cell in columns[at]) >= len(table) / 2
        or all(map(_SYNSET.fullmatch, columns[at]))
    ]
    keys += [at for at in full if all(cell.isdecimal() for cell in columns[at])]
    if not keys and not certain:
        return []
    key = keys[0] if keys else 0
    others = [at for at in range(width) if at not in (key, *keys)]
    if not others and width > 1:  # the names are themselves numbers or folders
        others = [at for at in range(width) if at != key][:1]
    if len(others) > 1 and min(others) < key:
        raise _Fault(f"line {table[0][0]} has {width} columns; keep two, the folder and the name")
    return [
        _Entry(
            f"line {number}",
            cells[key],
            ", ".join(cells[at] for at in others if at < len(cells) and cells[at]),
        )
        for number, cells in table
    ]


def _from_list(rows: list[tuple[int, str]], folders: Sequence[str]) -> list[_Entry]:
    """Read lines that contain nothing but names, in the order of the folders."""
    if len(rows) == len(folders) + 1 and _is_heading(rows[0][1]):
        del rows[0]
    entries = [
        _Entry(f"line {number}", None, _unquoted(line.removesuffix(","))) for number, line in rows
    ]
    for entry in entries:
        if re.search(r",\S", entry.name):
            raise _Fault(
                f"{entry.place}, {entry.name!r}: {entry.name.split(',')[0]!r} is not a class "
                f"folder; write FOLDER: NAME lines, or names without commas"
            )
    return entries


def _cells(line: str, separator: str) -> list[str]:
    if separator in ",;":
        cells = next(csv.reader([line], delimiter=separator, skipinitialspace=True))
    else:
        cells = line.split(separator)
    while len(cells) > 1 and not cells[-1].strip():
        del cells[-1]
    return cells


def _unquoted(cell: str) -> str:
    cell = cell.strip()
    quoted = len(cell) > 1 and cell[0] == cell[-1] and cell[0] in "\"'"
    return cell[1:-1].strip() if quoted else cell


def _is_heading(cell: str) -> bool:
    return _HEADING.fullmatch(re.sub(r"[\W_]", "", cell).casefold()) is not None


# --- assigning names to folders ------------------------------------------------------------------


def _by_key(entries: list[_Entry], folders: Sequence[str]) -> tuple[dict[str, _Entry], list[str]]:
    """Assign entries to folders by the folders or numbers that the file gives."""
    keys = [entry.key or "" for entry in entries]
    folder_of = {folder: folder for folder in folders}
    if all(key.isdecimal() for key in keys) and not {*keys} & {*folders}:
        folder_of = _by_number({int(key) for key in keys}, folders)
        keys = [str(int(key)) for key in keys]
    found: dict[str, _Entry] = {}
    unknown = []
    for key, entry in zip(keys, entries, strict=True):
        folder = folder_of.get(key)
        if folder is None:
            unknown.append(entry)
        elif folder in found:
            raise _Fault(f"{found[folder].place} and {entry.place} both name {entry.key!r}")
        else:
            found[folder] = entry
    unnamed = [folder for folder in folders if folder not in found]
    if unknown and unnamed:
        more = f" (nor are {len(unknown) - 1} more keys)" if len(unknown) > 1 else ""
        raise _Fault(
            f"{unknown[0].place} names {unknown[0].key!r}, which is not a class folder{more}; "
            f"{nearest(unknown[0].key or '', folders)}"
        )
    notes = []
    if unknown:
        notes.append(
            f"ignored in the file of class names: {listed([repr(one.key) for one in unknown])}, "
            f"for which there is no class folder"
        )
    if unnamed:
        notes.append(
            f"the file of class names covers {len(found):,} of {len(folders):,} classes; the "
            f"others are named after their folders: {listed(unnamed)}"
        )
    return found, notes


def _by_number(numbers: set[int], folders: Sequence[str]) -> dict[str, str]:
    """Map each number to the folder that begins with it, or else to the folder in that position."""
    leading = _leading_numbers(folders)
    if leading.keys() == numbers:
        return {str(number): folder for number, folder in leading.items()}
    count = len(folders)
    if numbers not in _numberings(count):
        raise _Fault(
            f"it has the numbers {min(numbers)} to {max(numbers)} for {count} classes; number them "
            f"from 0 to {count - 1}, or write FOLDER: NAME lines"
        )
    _check_order(folders)
    return {str(number): folder for number, folder in zip(sorted(numbers), folders, strict=True)}


def _leading_numbers(folders: Sequence[str]) -> dict[int, str]:
    """Map the numbers that folders begin with to the folders; {} unless all have different ones."""
    leading = [re.match(r"[0-9]+", folder) for folder in folders]
    own = {int(match[0]): folder for match, folder in zip(leading, folders, strict=True) if match}
    return own if len(own) == len(folders) else {}


def _numberings(count: int) -> tuple[set[int], set[int]]:
    return {*range(count)}, {*range(1, count + 1)}


def _in_order(entries: list[_Entry], folders: Sequence[str]) -> tuple[dict[str, _Entry], list[str]]:
    """Assign entries to folders in order, unless the names themselves determine their folders."""
    if len(entries) != len(folders):
        raise _Fault(
            f"it has {len(entries)} names for {len(folders)} classes; write one name per line in "
            f"the order of the folders, or FOLDER: NAME lines"
        )
    folders_of = defaultdict(set)
    for folder in folders:
        for word in (class_words(folder), folder):
            folders_of[text_key(word)].add(folder)
    only = {word: min(some) for word, some in folders_of.items() if len(some) == 1}
    meant = [only.get(text_key(" ".join(entry.synonyms[:1]))) for entry in entries]
    if {*meant} == {*folders}:
        found = {folder: entry for folder, entry in zip(meant, entries, strict=True) if folder}
        note = "the class names are the folder names in another order and were matched by name"
        return found, [] if meant == [*folders] else [note]
    misplaced = [
        (entry, folder, other)
        for entry, folder, other in zip(entries, folders, meant, strict=True)
        if other not in (None, folder)
    ]
    few = 2 * len(misplaced) < sum(other is not None for other in meant)
    if misplaced and not (few and all(map(_SYNSET.fullmatch, folders))):  # lemmas overlap
        entry, folder, other = misplaced[0]
        raise _Fault(
            f"{entry.place}, {entry.name!r}, would name the folder {folder!r} by the order of the "
            f"folders, but there is also a folder {other!r}; write FOLDER: NAME lines"
        )
    _check_order(folders)
    return dict(zip(folders, entries, strict=True)), []


def _check_order(folders: Sequence[str]) -> None:
    """Raise _Fault if alphabetical and numerical order of the folders differ."""
    natural = sorted(folders, key=_natural_key)
    for number, (folder, other) in enumerate(zip(folders, natural, strict=True), 1):
        if folder != other:
            raise _Fault(
                f"the order of the folders is ambiguous: entry {number} would name {folder!r} in "
                f"alphabetical order and {other!r} in numerical order; write FOLDER: NAME lines"
            )


def _natural_key(folder: str) -> list[tuple[int, str]]:
    """Return a sort key by which 2 comes before 10."""
    parts = re.split(r"(\d+)", folder)
    return [(0, text) if at % 2 == 0 else (int(text), "") for at, text in enumerate(parts)]
