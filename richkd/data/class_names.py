"""What classes are called: by their folders, by WordNet, or by a file of names.

CLIP is asked for names, and reads them without case; two classes of one name would be one text to
it. So names that collide are told apart where anything is known of the classes, and it is said.
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
from pathlib import Path
from typing import Any

from richkd.core.errors import RichKDError, nearest
from richkd.core.text_files import read_text

_SYNSET = re.compile(r"n\d{8}")
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_NUMBERED = re.compile(r"(\d+)[._-]+(?=\D)")  # as in 001.Black_footed_Albatross
_BETWEEN_SYNONYMS = re.compile(r"\s*,\s*(?![^()]*\))")
_NUMBER_AND_NAME = re.compile(r"(\d+)\s*[.):=-]*\s+(\S.*)")
_SHOWN = 4  # examples in a line
# What columns are called in the first line of a table, without what separates words.
_HEADINGS = {
    "category",
    "categories",
    "class",
    "classes",
    "classid",
    "classindex",
    "classlabel",
    "classname",
    "classnames",
    "description",
    "dir",
    "directory",
    "folder",
    "foldername",
    "id",
    "idx",
    "index",
    "key",
    "label",
    "labelid",
    "labels",
    "labelname",
    "name",
    "names",
    "number",
    "synset",
    "synsetid",
    "target",
    "title",
    "value",
    "wnid",
    "words",
}


@dataclass(frozen=True)
class ClassNames:
    """A name for each class, and what is to be said of them."""

    names: tuple[str, ...]
    notes: tuple[str, ...] = ()


def class_words(folder: str) -> str:
    """A folder's name as words: no underscores, no numbers in front, camel case apart.

    WordNet ids (n02123045) are looked up among timm's ImageNet classes; the first lemma is taken.
    """
    if _SYNSET.fullmatch(folder):
        lemmas, _ = _wordnet().get(folder, ([folder], ""))
        return lemmas[0]
    return _words(_NUMBERED.sub("", folder)) or folder


def name_classes(folders: Sequence[str]) -> ClassNames:
    """The words of folders' names, told apart where several would be the same."""
    names = _tell_apart([_by_folder(folder) for folder in folders])
    return ClassNames(names, (*_told_apart(folders, names), *_same_text(names, folders)))


def check_distinct(names: Sequence[str]) -> None:
    """Refuse names that are one text to CLIP.

    Raises:
        RichKDError: some are.
    """
    for fault in _same_text(names, names):
        raise RichKDError(
            f"{fault}, or leave CLIP out with --clip none", code="class-names-ambiguous"
        )


def text_key(name: str) -> str:
    """The same for names that are one text to CLIP, whose tokenizer lowers case."""
    return " ".join(unicodedata.normalize("NFKC", html.unescape(name)).casefold().split())


def _words(text: str) -> str:
    return " ".join(_CAMEL.sub(" ", text.replace("_", " ").replace("-", " ")).split())


@cache
def _wordnet() -> dict[str, tuple[list[str], str]]:
    """The lemmas and the gloss of each noun that is a class of ImageNet."""
    from timm.data.imagenet_info import ImageNetInfo

    known = ImageNetInfo("imagenet-22k")
    found = {}
    for synset in known.label_names():  # type: ignore[no-untyped-call]
        lemmas = known.label_name_to_description(synset)
        gloss = known.label_name_to_description(synset, detailed=True)
        found[synset] = (
            [lemma.strip() for lemma in lemmas.split(",")],
            gloss.removeprefix(f"{lemmas}: "),
        )
    return found


# --- telling classes apart -----------------------------------------------------------------------


def _by_folder(folder: str) -> list[str]:
    """Names of a class by its folder: the usual one, then others that say more."""
    if _SYNSET.fullmatch(folder) and folder in _wordnet():
        lemmas, _ = _wordnet()[folder]
        return [*_by_synonyms(lemmas), *_by_gloss(folder, lemmas[0])]
    return [class_words(folder), _words(_NUMBERED.sub(r"\1 ", folder)), folder]


def _by_synonyms(synonyms: Sequence[str]) -> list[str]:
    """The first of some synonyms, then with the next, then with all."""
    first, *others = synonyms
    more = [others[:1], others] if others else []
    return [first, *(f"{first} ({', '.join(some)})" for some in more)]


def _by_gloss(folder: str, name: str) -> list[str]:
    """A name with what WordNet says of the class, where it is one of WordNet's."""
    if not _SYNSET.fullmatch(folder) or folder not in _wordnet():
        return []
    _, gloss = _wordnet()[folder]
    whole = " ".join(re.sub(r"\([^()]*\)", " ", gloss).split())  # no brackets in brackets
    first = re.split("[;,]", whole)[0].strip()
    return [f"{name} ({part})" for part in ([first] if " " in first else []) + [whole]]


def _tell_apart(candidates: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """The first candidate of each class; of those that are the same, the next ones."""
    chosen = [0] * len(candidates)
    while True:
        names = [some[number] for some, number in zip(candidates, chosen, strict=True)]
        again = [
            number
            for group in _groups(names)
            for number in group
            if chosen[number] + 1 < len(candidates[number])
        ]
        if not again:
            return tuple(names)
        for number in again:
            chosen[number] += 1


def _groups(names: Iterable[str]) -> list[list[int]]:
    """The numbers of names that are one text, group by group."""
    groups = defaultdict(list)
    for number, name in enumerate(names):
        groups[text_key(name)].append(number)
    return [group for group in groups.values() if len(group) > 1]


def _told_apart(folders: Sequence[str], names: Sequence[str]) -> list[str]:
    """Say which classes have another name than their folder alone would give."""
    alike = {names[number] for group in _groups(names) for number in group}
    told = [
        f"{folder} → {name}"
        for folder, name in zip(folders, names, strict=True)
        if name != class_words(folder) and name not in alike
    ]
    if not told:
        return []
    return [
        f"names that several classes would have are told apart: {_listed(told)}; name classes "
        f"otherwise with --class-names FILE"
    ]


def _same_text(names: Sequence[str], shown: Sequence[str]) -> list[str]:
    """Say which names are one text to CLIP all the same."""
    groups = _groups(names)
    if not groups:
        return []
    classes = " and ".join(repr(shown[number]) for number in groups[0][:_SHOWN])
    more = f" (and so on, {len(groups)} texts of several classes)" if len(groups) > 1 else ""
    return [
        f"the classes {classes} share one text, by which CLIP cannot tell them apart{more}; give "
        f"them names with --class-names FILE"
    ]


def _listed(parts: Sequence[str]) -> str:
    more = f" and {len(parts) - _SHOWN} more" if len(parts) > _SHOWN else ""
    return ", ".join(parts[:_SHOWN]) + more


# --- files of names ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Entry:
    """A name in a file."""

    place: str  # for messages, such as `line 3`
    key: str | None  # the folder or number that it is for, where the file says so
    name: str

    @property
    def synonyms(self) -> list[str]:
        return [part for part in _BETWEEN_SYNONYMS.split(self.name) if part]


def read_class_names(file: Path, folders: Sequence[str]) -> ClassNames:
    """Names from a file: a line a class in the order of the folders, or with FOLDER in front.

    FOLDER: NAME lines may leave folders out. Tables (tabs, commas or semicolons), WordNet ids or
    numbers in front of names, and JSON are read as what they are; of synonyms the first counts.

    Args:
        file: text of any system, or JSON.
        folders: of the classes, sorted as they are numbered.

    Raises:
        RichKDError: no such file, a folder that there is not, too few or too many names, the same
            name twice, or names of which it is uncertain to which folders they belong.
    """
    try:
        text = read_text(file)
        entries = _entries(text, folders)
        keyed = entries[0].key is not None
        found, notes = (_by_key if keyed else _in_order)(entries, folders)
    except (OSError, ValueError, csv.Error) as error:
        raise RichKDError(
            f"cannot read --class-names {file}: {error}", code="class-names-unreadable"
        ) from None
    except _Fault as fault:
        raise RichKDError(f"--class-names {file}: {fault}", code="class-names-wrong") from None
    several = next((entry for entry in found.values() if len(entry.synonyms) > 1), None)
    if several is not None:
        notes.append(
            f"{file}: of names with commas the first counts, such as {several.synonyms[0]!r} of "
            f"{several.name!r}"
        )
    candidates = [
        _by_entry(found[folder], folder) if folder in found else _by_folder(folder)
        for folder in folders
    ]
    names = _tell_apart(candidates)
    for group in _groups(names):
        same = [folders[number] for number in group[:_SHOWN]]
        places = [found[one].place if one in found else f"the folder {one}" for one in same]
        raise RichKDError(
            f"--class-names {file}: {' and '.join(places)} have the same name, "
            f"{names[group[0]]!r}, by which CLIP cannot tell classes apart; give each class a name "
            f"of its own",
            code="class-names-ambiguous",
        )
    told = [
        f"{folder} → {name}"
        for folder, name, some in zip(folders, names, candidates, strict=True)
        if name != some[0]
    ]
    if told:
        notes.append(f"{file}: names that several classes have are told apart: {_listed(told)}")
    return ClassNames(names, tuple(notes))


class _Fault(Exception):
    """What is wrong with a file of names."""


def _by_entry(entry: _Entry, folder: str) -> list[str]:
    """Names of a class by its entry in a file."""
    if not entry.synonyms or entry.name == folder:
        return _by_folder(folder)
    return [*_by_synonyms(entry.synonyms), *_by_gloss(folder, entry.synonyms[0])]


def _entries(text: str, folders: Sequence[str]) -> list[_Entry]:
    """The names in a file, in any of the forms that are read."""
    if text.lstrip()[:1] in ("[", "{"):
        entries = _from_json(text)
    else:
        rows = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1)]
        rows = [(number, line) for number, line in rows if line]
        entries = _from_lines(rows, folders) if rows else []
    if not entries:
        raise _Fault("there is no name in it")
    return entries


def _from_json(text: str) -> list[_Entry]:
    """The names of a list or of an object, or of the same as Python writes them."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
        if twice:
            raise _Fault(f"the key {twice[0]!r} is there twice")
        return dict(pairs)

    try:
        try:
            value = json.loads(text, object_pairs_hook=once)
        except ValueError as error:
            try:
                value = ast.literal_eval(text.strip())
            except (ValueError, SyntaxError, TypeError):
                raise _Fault(f"it is no JSON that can be read ({error})") from None
    except (RecursionError, MemoryError):
        raise _Fault("it is no JSON that can be read (too deep)") from None
    if not isinstance(value, dict | list | tuple):
        raise _Fault("it is no list of names, and no object of FOLDER: NAME")
    entries = []
    for number, one in enumerate(value.items() if isinstance(value, dict) else value, 1):
        key, each = one if isinstance(value, dict) else (None, one)
        place = f"entry {number}"
        if isinstance(each, list | tuple) and [*map(type, each)] == [str, str]:
            folder, name = each  # as imagenet_class_index.json has them
            entries.append(_Entry(place, folder.strip(), name.replace("_", " ").strip()))
        elif isinstance(each, str):
            entries.append(_Entry(place, None if key is None else str(key).strip(), each.strip()))
        elif key is not None and type(each) is int:  # the number of a name
            entries.append(_Entry(place, str(each), str(key).strip()))
        else:
            raise _Fault(f"{place} is neither a name nor FOLDER: NAME")
    return [replace(entry, name=" ".join(entry.name.split())) for entry in entries]


def _from_lines(rows: list[tuple[int, str]], folders: Sequence[str]) -> list[_Entry]:
    """The names of a text file, a line each."""
    lines = [line for _, line in rows]
    if any("\t" in line for line in lines):
        without = next((number for number, line in rows if "\t" not in line), None)
        if without is not None:
            raise _Fault(f"line {without} has no tab as other lines have; write FOLDER: NAME lines")
        return _from_table(rows, lambda line: line.split("\t"), folders, certain=True)
    if all(":" in line for line in lines):
        return _from_table(rows, lambda line: line.split(":", 1), folders, certain=True)
    for mark in (",", ";", "|", "=", "→", "->"):
        if all(mark in line for line in lines):
            table = _from_table(rows, partial(_cells, mark=mark), folders)
            if table:
                return table
    by_id = [line.split(None, 1) for line in lines]
    if all(len(cells) == 2 and re.search(r"\d", cells[0]) for cells in by_id):
        ids = {key for key, _ in by_id}
        if ids <= {*folders} or ids >= {*folders} or all(map(_SYNSET.fullmatch, ids)):
            return _from_table(rows, lambda line: line.split(None, 1), folders, certain=True)
    numbered = [_NUMBER_AND_NAME.fullmatch(line) for line in lines]
    numbers = [int(match[1]) for match in numbered if match]
    numberings = [*_numberings(len(folders)), {*_leading_numbers(folders)}]
    if len(numbers) == len(lines) and {*numbers} in numberings:
        return [
            _Entry(f"line {number}", match[1], match[2])
            for (number, _), match in zip(rows, numbered, strict=True)
            if match
        ]
    return _from_list(rows, folders)


def _from_table(
    rows: list[tuple[int, str]],
    cut: Callable[[str], list[str]],
    folders: Sequence[str],
    certain: bool = False,
) -> list[_Entry]:
    """The names of a table with a column of folders or of numbers; none where there is none.

    Args:
        rows: lines by their numbers.
        cut: a line into cells.
        folders: of the classes.
        certain: it is a table; the first column is that of the folders, where no other is.
    """
    table = [(number, [_unquoted(cell) for cell in cut(line)]) for number, line in rows]
    if len(table) > 1 and all(_is_heading(cell) for cell in table[0][1]):
        del table[0]
    width = max(len(cells) for _, cells in table)
    columns = [[cells[at] for _, cells in table if at < len(cells)] for at in range(width)]
    full = [at for at, column in enumerate(columns) if len(column) == len(table)]
    known, wanted = {*folders}, len(table) / 2
    keys = [
        at
        for at in full
        if known <= {*columns[at]}
        or sum(cell in known for cell in columns[at]) >= wanted
        or all(map(_SYNSET.fullmatch, columns[at]))
    ]
    keys += [at for at in full if all(cell.isdecimal() for cell in columns[at])]
    if not keys and not certain:
        return []
    key = keys[0] if keys else 0
    others = [at for at in range(width) if at not in (key, *keys)]
    if not others and width > 1:  # names that are numbers or folders themselves
        others = [at for at in range(width) if at != key][:1]
    if len(others) > 1 and min(others) < key:
        raise _Fault(
            f"line {table[0][0]} has {width} columns; keep two, that of the folder and the name"
        )
    return [
        _Entry(
            f"line {number}",
            cells[key],
            ", ".join(cells[at] for at in others if at < len(cells) and cells[at]),
        )
        for number, cells in table
    ]


def _from_list(rows: list[tuple[int, str]], folders: Sequence[str]) -> list[_Entry]:
    """The names of a file that has nothing but names, in the order of the folders."""
    if len(rows) == len(folders) + 1 and _is_heading(rows[0][1]):
        del rows[0]
    entries = [
        _Entry(f"line {number}", None, _unquoted(line.removesuffix(","))) for number, line in rows
    ]
    for entry in entries:
        if re.search(r",\S", entry.name):
            raise _Fault(
                f"{entry.place}, {entry.name!r}: {entry.name.split(',')[0]!r} is no folder of a "
                f"class; write lines of FOLDER: NAME, or names without commas"
            )
    return entries


def _cells(line: str, mark: str) -> list[str]:
    quoted = mark in ",;"
    cells = (
        next(csv.reader([line], delimiter=mark, skipinitialspace=True))
        if quoted
        else (line.split(mark))
    )
    while len(cells) > 1 and not cells[-1].strip():
        del cells[-1]
    return cells


def _unquoted(cell: str) -> str:
    cell = cell.strip()
    quoted = len(cell) > 1 and cell[0] == cell[-1] and cell[0] in "\"'"
    return cell[1:-1].strip() if quoted else cell


def _is_heading(cell: str) -> bool:
    return re.sub(r"[\W_]", "", cell).casefold() in _HEADINGS


# --- to which folder a name belongs --------------------------------------------------------------


def _by_key(entries: list[_Entry], folders: Sequence[str]) -> tuple[dict[str, _Entry], list[str]]:
    """The entry of each folder, by the folders or numbers that the entries have."""
    keys = [entry.key or "" for entry in entries]
    folder_of = {folder: folder for folder in folders}
    if all(key.isdecimal() for key in keys) and not {*keys} & {*folders}:
        folder_of = _by_number({int(key) for key in keys}, folders)
        keys = [str(int(key)) for key in keys]
    found: dict[str, _Entry] = {}
    strange = []
    for key, entry in zip(keys, entries, strict=True):
        folder = folder_of.get(key)
        if folder is None:
            strange.append(entry)
        elif folder in found:
            raise _Fault(f"{found[folder].place} and {entry.place} both name {entry.key!r}")
        else:
            found[folder] = entry
    notes = []
    if strange and len(found) < len(folders):
        more = f", and {len(strange) - 1} more are none" if len(strange) > 1 else ""
        raise _Fault(
            f"{strange[0].place} names {strange[0].key!r}, which is no folder of a class{more}; "
            f"{nearest(strange[0].key or '', folders)}"
        )
    if strange:
        notes.append(
            f"of the file of class names, {len(strange):,} entries are of no folder, such as "
            f"{strange[0].key!r}"
        )
    if len(found) < len(folders):
        rest = [folder for folder in folders if folder not in found]
        notes.append(
            f"the file of class names has {len(found):,} of {len(folders):,} classes; the others "
            f"are called as their folders: {_listed(rest)}"
        )
    return found, notes


def _by_number(numbers: set[int], folders: Sequence[str]) -> dict[str, str]:
    """The folder of each number: the one that begins with it, else by the order of the folders."""
    own = _leading_numbers(folders)
    if own.keys() == numbers:
        return {str(number): folder for number, folder in own.items()}
    count = len(folders)
    if numbers not in _numberings(count):
        raise _Fault(
            f"it has the numbers {min(numbers)} to {max(numbers)} for {count} classes; number them "
            f"from 0 to {count - 1}, or write lines of FOLDER: NAME"
        )
    _check_order(folders, "numbers")
    return {str(number): folder for number, folder in zip(sorted(numbers), folders, strict=True)}


def _leading_numbers(folders: Sequence[str]) -> dict[int, str]:
    """The folders by the numbers that they begin with; none unless all do, with others."""
    leading = [re.match(r"[0-9]+", folder) for folder in folders]
    own = {int(match[0]): folder for match, folder in zip(leading, folders, strict=True) if match}
    return own if len(own) == len(folders) else {}


def _numberings(count: int) -> tuple[set[int], set[int]]:
    return {*range(count)}, {*range(1, count + 1)}


def _in_order(entries: list[_Entry], folders: Sequence[str]) -> tuple[dict[str, _Entry], list[str]]:
    """The entry of each folder, in the order of the folders unless the names themselves differ."""
    if len(entries) != len(folders):
        raise _Fault(
            f"it has {len(entries)} names for {len(folders)} classes; write a name a line in the "
            f"order of the folders, or lines of FOLDER: NAME"
        )
    words = defaultdict(set)
    for folder in folders:
        for word in (class_words(folder), folder):
            words[text_key(word)].add(folder)
    own = {word: min(some) for word, some in words.items() if len(some) == 1}
    meant = [own.get(text_key(" ".join(entry.synonyms[:1]))) for entry in entries]
    if {*meant} == {*folders}:
        moved = [*meant] != [*folders]
        note = "the class names are those of the folders in another order: they are matched by name"
        found = {folder: entry for folder, entry in zip(meant, entries, strict=True) if folder}
        return found, [note] if moved else []
    pairs = [*zip(entries, folders, meant, strict=True)]
    elsewhere = [
        (entry, folder, other) for entry, folder, other in pairs if other not in (None, folder)
    ]
    few = 2 * len(elsewhere) < sum(other is not None for other in meant)
    if elsewhere and not (few and all(map(_SYNSET.fullmatch, folders))):  # lemmas overlap
        entry, folder, other = elsewhere[0]
        raise _Fault(
            f"{entry.place}, {entry.name!r}, would name the folder {folder!r} in the order of the "
            f"folders, and there is a folder {other!r}; write lines of FOLDER: NAME"
        )
    _check_order(folders, "lines")
    return dict(zip(folders, entries, strict=True)), []


def _check_order(folders: Sequence[str], what: str) -> None:
    """Refuse to count folders that are in another order by their numbers than by their letters."""
    natural = sorted(folders, key=_naturally)
    for number, (folder, other) in enumerate(zip(folders, natural, strict=True), 1):
        if folder != other:
            raise _Fault(
                f"the order of the folders is uncertain: number {number} of the {what} would name "
                f"{folder!r} in the order of letters and {other!r} in that of numbers; write lines "
                f"of FOLDER: NAME"
            )


def _naturally(folder: str) -> list[tuple[int, str]]:
    """A key to sort by in which 2 comes before 10."""
    parts = re.split(r"(\d+)", folder)
    return [(0, text) if at % 2 == 0 else (int(text), "") for at, text in enumerate(parts)]
