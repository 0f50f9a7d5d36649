"""Read tables of Hugging Face's `datasets`: `hf:NAME@CONFIG:SPLIT`.

NAME is a dataset of the Hub, a folder with Parquet files, or one that `save_to_disk` wrote. The
package keeps tables as Arrow files, which are mapped into memory: an image is a slice of a file.
Only data is read: versions from 4.0 on run no code of a dataset.
"""

from __future__ import annotations

import errno
import hashlib
import io
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from packaging.version import Version

from richkd.config.catalog import TableName, table_name
from richkd.config.settings import Images
from richkd.core.errors import RichKDError, nearest
from richkd.core.progress import Report
from richkd.data.contents import Contents, Labelled, of_labelled
from richkd.data.labels import Raw, Value, choose_splits, kept_splits
from richkd.data.layouts import Layout
from richkd.data.sources import Which
from richkd.data.walk import listed

PACKAGE, LEAST = "datasets", "4.0"  # earlier versions may run code of a dataset
_LABELS = ("label", "labels", "fine_label", "cls", "class")  # in order of preference


@dataclass(frozen=True)
class TableRows:
    """Images in one column of a table."""

    table: Any  # a datasets.Dataset of that column, as Arrow
    column: str
    place: str
    split: str
    rows: NDArray[np.int64]  # [N]

    @classmethod
    def of(cls, table: Any, column: str, place: str, split: str) -> TableRows:
        """Make a source of all rows of a split."""
        images = table.select_columns([column]).with_format("arrow")
        return cls(images, column, f"{place}, split {split}", split, np.arange(len(table)))

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def origin(self) -> str:
        """The dataset and the split."""
        return self.place

    def name(self, index: int) -> str:
        """Return the row's number and where it is."""
        return f"row {self.rows[index]} of {self.place}"

    def key(self, index: int) -> str:
        """Return the split and the row's number."""
        return f"{self.split}/{self.rows[index]}"

    def file(self, index: int) -> BinaryIO:
        """Return the bytes of an image, or the file that the table names.

        Raises:
            OSError: the table or the file cannot be read.
        """
        try:
            cell = self.table[int(self.rows[index])][self.column][0].as_py()
        except Exception as error:  # pyarrow raises errors of several kinds
            raise OSError(errno.EIO, _line(error)) from None
        if isinstance(cell, dict):
            if cell.get("bytes") is None and cell.get("path"):
                return io.BytesIO(Path(cell["path"]).read_bytes())
            cell = cell.get("bytes")
        return io.BytesIO(cell or b"")

    def take(self, which: Which) -> TableRows:
        """Select rows."""
        return replace(self, rows=self.rows[which])

    def state(self) -> str:
        """Return a digest of the Arrow files, of the files that they name, and of the rows."""
        digest = hashlib.sha256(f"{self.column} {len(self.table)}".encode())
        for each in self.table.cache_files:
            found = Path(each["filename"]).stat()
            digest.update(f"{each['filename']} {found.st_size} {found.st_mtime_ns} ".encode())
        for path in self._named():
            with suppress(OSError):  # a missing file is found when it is read
                found = Path(path).stat()
                digest.update(f"{path} {found.st_size} {found.st_mtime_ns} ".encode())
        digest.update(self.rows.data)
        return digest.hexdigest()

    def _named(self) -> Iterator[str]:
        """Yield the paths of images that are files of their own."""
        import pyarrow as pa
        from pyarrow import compute

        cells = self.table.data.column(self.column)
        if not pa.types.is_struct(cells.type) or cells.type.get_field_index("path") < 0:
            return
        external = compute.is_null(compute.struct_field(cells, "bytes"))
        paths = compute.struct_field(cells, "path").filter(external)
        yield from paths.drop_null().unique().to_pylist()


def contents(
    settings: Images,
    _: Path,
    layout: Layout | None,
    skipped: Collection[str] | None,
    report: Report,
) -> Contents:
    """Return the contents of a table.

    Args:
        settings: which images.
        layout: the splits and columns that a cache was made from; None to choose them.
        skipped: the rows that stage one left out; None to decode every image once.
        report: shows the progress.

    Raises:
        RichKDError: `datasets` is missing or cannot read it, it has no split or column that fits,
            or an image or a label is invalid.
    """
    where = table_name(settings.dataset)
    place = f"hf:{where.name}{where.config and '@'}{where.config}"
    tables = _load(where, place, report)
    if layout is None:
        no_train = f"name the split to train on: {place}:SPLIT"
        no_test = "split it once, by train_test_split and save_to_disk, and use hf:FOLDER"
        splits, notes = choose_splits(tables, where.train, place, no_train, no_test)
        asked: Mapping[str, str] = {"image": settings.image_column, "label": settings.label_column}
    else:
        splits, notes, asked = kept_splits(tables, layout, place), [], layout.columns
    features = tables[splits["train"]].features
    image = _image_column(features, asked["image"], place)
    label = _label_column(features, asked["label"], place)
    for name in splits.values():
        if image not in tables[name].features:
            where_not = f"{place}, split {name},"
            raise _no_column("image_column", image, tables[name].features, where_not)
    classes = _class_names(tables[splits["train"]], label)
    own = Labelled(
        place=place,
        splits=splits,
        labels={
            name: _labels(tables[name], label, classes, f"{place}, split {name}")
            for name in splits.values()
        },
        sources={name: TableRows.of(tables[name], image, place, name) for name in splits.values()},
        classes=classes,
        columns={"image": image, "label": label},
        notes=[f"images are read from the column {image}, labels from {label}", *notes],
    )
    return of_labelled(settings, own, layout, skipped, report)


def _load(where: TableName, place: str, report: Report) -> Mapping[str, Any]:
    """Return the splits of a dataset by name."""
    if find_spec(PACKAGE) is None:
        raise RichKDError(
            f"{place}: reading it takes the package datasets; pip install 'richkd[hf]'",
            code="extra-missing",
        )
    if not where.local and where.name.startswith(("/", ".")):
        raise RichKDError(f"{place}: no such folder; check the path", code="dataset-folder-missing")
    import datasets

    if Version(datasets.__version__) < Version(LEAST):
        raise RichKDError(
            f"{place}: datasets {datasets.__version__} may run code of a dataset, and at least "
            f"{LEAST} is needed; pip install -U 'richkd[hf]'",
            code="extra-missing",
        )
    folder = Path(where.name)
    saved = [name for name in ("dataset_dict.json", "state.json") if (folder / name).is_file()]
    if not saved:
        report.log(f"reading {place} with datasets, which keeps it as Arrow files in its own cache")
    try:
        with _quiet():
            found = (
                datasets.load_from_disk(where.name)
                if saved
                else datasets.load_dataset(where.name, where.config or None)
            )
    except Exception as error:  # of many kinds, also of its own dependencies
        hint = (
            "check the folder, which needs Parquet files such as data/train-00000-of-00001.parquet"
            if where.local
            else "check the name and the network; of a folder, give its place now: hf:FOLDER"
        )
        raise RichKDError(
            f"cannot read {place} ({_line(error)}); {hint}", code="table-unreadable"
        ) from None
    if not isinstance(found, datasets.DatasetDict):
        return {"train": found}
    return {str(name): table for name, table in found.items()}


def _line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(". ")[:300] or type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """Show no progress bars of `datasets`, which would write over richkd's own."""
    import datasets

    shown = datasets.is_progress_bar_enabled()
    level = datasets.utils.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        datasets.utils.logging.set_verbosity(level)
        if shown:
            datasets.enable_progress_bars()


def _types(features: Mapping[str, Any]) -> str:
    def kind(feature: Any) -> str:
        name = type(feature).__name__
        return str(feature.dtype) if name == "Value" else name

    return listed([f"{name} ({kind(feature)})" for name, feature in features.items()], most=8)


def _image_column(features: Mapping[str, Any], asked: str, place: str) -> str:
    """Return the column of the images."""
    found = [name for name, each in features.items() if type(each).__name__ == "Image"]
    if asked:
        if asked not in features:
            raise _no_column("image_column", asked, features, place)
        if asked not in found and not _may_hold_images(features[asked]):
            raise RichKDError(
                f"image_column = {asked!r}: it holds no images; {place} has "
                f"{_types(features)}: choose another column, or cast it to Image, and save",
                code="column-no-images",
            )
        return asked
    if len(found) == 1:
        return found[0]
    if found:
        raise RichKDError(
            f"{place} has several columns of images, {listed(found)}; choose one with "
            f"--image-column",
            code="column-ambiguous",
        )
    raise RichKDError(
        f"{place} has no column of images, only {_types(features)}; if one holds encoded images as "
        f"bytes, name it with --image-column",
        code="column-no-images",
    )


def _may_hold_images(feature: Any) -> bool:
    """Return whether a column has bytes, or pairs of bytes and a path, without being images."""
    if isinstance(feature, dict):
        return "bytes" in feature and _may_hold_images(feature["bytes"])
    return getattr(feature, "dtype", "") in ("binary", "large_binary")


def _label_column(features: Mapping[str, Any], asked: str, place: str) -> str:
    """Return the column of the labels."""
    if asked:
        if asked not in features:
            raise _no_column("label_column", asked, features, place)
        if not _may_hold_labels(features[asked]):
            raise RichKDError(
                f"label_column = {asked!r}: it holds neither integers nor texts; {place} has "
                f"{_types(features)}",
                code="column-no-labels",
            )
        return asked
    named = [name for name, each in features.items() if type(each).__name__ == "ClassLabel"]
    if len(named) == 1:
        return named[0]
    usable = named or [name for name, each in features.items() if _may_hold_labels(each)]
    usual = next((name for name in _LABELS if name in usable), None)
    if usual is not None:
        return usual
    remedy = f"among {_types(features)}; choose one of classes, integers or texts (--label-column)"
    if named:
        raise RichKDError(
            f"{place} has several columns of labels, {listed(named)}, {remedy}",
            code="column-ambiguous",
        )
    raise RichKDError(f"{place} has no column of labels {remedy}", code="column-no-labels")


def _may_hold_labels(feature: Any) -> bool:
    dtype = getattr(feature, "dtype", "")
    return isinstance(dtype, str) and dtype.startswith(("int", "uint", "string", "large_string"))


def _no_column(setting: str, asked: str, features: Mapping[str, Any], place: str) -> RichKDError:
    return RichKDError(
        f"{setting} = {asked!r}: {place} has no such column, {nearest(asked, [*features])}",
        code="column-missing",
    )


def _class_names(table: Any, column: str) -> tuple[str, ...]:
    """Return the names of the classes in the order of their numbers; none if it names none."""
    return tuple(getattr(table.features.get(column), "names", None) or ())


def _labels(table: Any, column: str, classes: Sequence[str], place: str) -> Raw:
    """Return the labels of a split, as positions in classes if it names the same ones.

    None if it lacks the column. `save_to_disk` permits splits to number the classes differently.

    Raises:
        RichKDError: the column cannot be read, or the split names other classes.
    """
    if column not in table.features:
        return Raw((), np.full(len(table), -1, np.int64))
    try:
        cells = table.select_columns([column]).with_format("arrow")[:][column]
        cells = cells.combine_chunks().dictionary_encode()
    except Exception as error:  # pyarrow raises errors of several kinds
        raise RichKDError(
            f"cannot read the column {column} of {place} ({_line(error)}); write it again",
            code="table-unreadable",
        ) from None
    codes = cells.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    raw, own = Raw.of(cells.dictionary.to_pylist(), codes), _class_names(table, column)
    if own == tuple(classes) or not raw.values:
        return raw
    if {*own} != {*classes}:
        raise RichKDError(
            f"{place} names the classes {listed(own) or '–'} in {column}, but the training split "
            f"names {listed(classes) or '–'}; give the column the same features in both",
            code="labels-differ",
        )
    numbers: dict[Value, int] = {number: classes.index(name) for number, name in enumerate(own)}
    return Raw(tuple(numbers.get(value, value) for value in raw.values), raw.codes)
