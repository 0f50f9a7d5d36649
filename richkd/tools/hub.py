"""Stores and students on the Hugging Face hub: a store is a data set there, a student a model.

Their files lie in the repository as they lie on the disk, with a card (README.md) beside them, so
that other programs read them too. Only files of known kinds come back, none that could run code;
what came is checked to the last byte before it takes its place.

The token, the cache and the host are those of huggingface_hub (HF_TOKEN, HF_HOME, HF_ENDPOINT).
"""

from __future__ import annotations

import glob
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from richkd.core.errors import RichKDError, first_line, local_path
from richkd.core.files import check_unlocked, check_writable, locked
from richkd.core.progress import Report
from richkd.models.weights import read_safetensors
from richkd.store.location import METADATA
from richkd.store.manifest import read_manifest
from richkd.store.reader import open_cache
from richkd.tools.hub_cards import store_card, student_card
from richkd.tools.verify import find_damage
from richkd.training.run_folders import complete_run

if TYPE_CHECKING:
    from huggingface_hub import HfApi

TIMEOUT_S = 10  # for the first answer; a hub that has answered may be slow
CARD = "README.md"
_ADDRESS = re.compile(r"https?://([\w.-]+|\[[\da-fA-F:]+\])(:\d{1,5})?(/\S*)?")
_NOT_OURS = {CARD, ".gitattributes"}  # what the hub itself puts into a new repository


@dataclass(frozen=True)
class Kind:
    """What a repository can hold. Patterns are fnmatch's, in which * goes across folders."""

    name: str
    repo_type: str
    marker: str  # the file that shows it
    head: tuple[str, ...]  # little files, from which a stranger's repository is told at once
    files: tuple[str, ...]
    not_files: tuple[str, ...]
    look: Callable[[Path], object]  # at the head; RichKDError where it is something else
    check: Callable[[Path, Report], object]  # every byte
    card: Callable[[Path, str], str]
    target: str


def check_store(folder: Path, report: Report) -> None:
    """Open a store and read every byte of it.

    Raises:
        RichKDError: it is not complete, or damaged.
    """
    cache = open_cache(folder)
    for damage in find_damage(cache.location, cache.manifest, report):
        raise RichKDError(
            f"{folder} is damaged: {damage.file}: {damage.reason}; richkd repair "
            f"computes those blocks again",
            code="cache-damaged",
        )


def check_run(folder: Path, report: Report) -> None:
    """Read the files of a complete run; errors as of `complete_run` and `read_safetensors`."""
    complete_run(folder)
    for file in ("last.safetensors", "best.safetensors"):
        read_safetensors(folder / file)


STORE = Kind(
    "store",
    "dataset",
    METADATA,
    (METADATA,),
    # a chunk's name is numbers only: a file of another kind cannot pass for one
    (METADATA, f"*/{METADATA}", "*/c/*"),
    ("*/c/*[!0-9/]*", "*..*", "/*"),
    read_manifest,
    check_store,
    store_card,
    "cache/{}.zarr",
)
STUDENT = Kind(
    "student",
    "model",
    "recipe.toml",
    ("recipe.toml", "summary.json"),
    (
        "recipe.toml",
        "summary.json",
        "metrics.jsonl",
        "last.safetensors",
        "best.safetensors",
        "evaluation.json",
        "evaluation-best.json",
    ),
    (),
    complete_run,
    check_run,
    student_card,
    "runs/{}",
)
KINDS = (STORE, STUDENT)


def push(path: str, repo_id: str, report: Report, *, private: bool = False) -> dict[str, Any]:
    """Put a complete store or run into a repository on the hub, with a card.

    What an earlier push left there and this one does not have is deleted.

    Args:
        path: the store, or the run folder.
        repo_id: OWNER/NAME; made where it is not there.
        report: where progress goes.
        private: only for those whom its owner lets in.

    Returns:
        The repository, what it holds, its address and its new commit.

    Raises:
        RichKDError: no complete store or run, one that is damaged, a repository that holds
            something else or is public already, or the hub refuses or cannot be reached.
    """
    folder = Path(path)
    kind = next((kind for kind in KINDS if (folder / kind.marker).is_file()), None)
    if kind is None:
        raise RichKDError(
            f"{path} is neither a store nor a run folder; richkd precompute and "
            f"richkd distill make them",
            code="hub-nothing-to-push",
        )
    _split(repo_id, prefixes=False)
    check_unlocked(folder)
    kind.check(folder, report)
    card = kind.card(folder, repo_id)
    api = _api()
    with _explained(api, repo_id), _bars(report):
        _check_vacant(api, kind, repo_id, private=private)
        report.log(f"pushing {path} to {api.endpoint}")
        url = api.create_repo(
            repo_id, repo_type=kind.repo_type, private=private or None, exist_ok=True
        )
        note = f"{kind.name.capitalize()} by richkd"
        api.upload_folder(
            repo_id=repo_id,
            repo_type=kind.repo_type,
            folder_path=folder,
            commit_message=note,
            allow_patterns=list(kind.files),
            ignore_patterns=list(kind.not_files),
            delete_patterns=list(kind.files),
        )
        # last: where there is a card, there is all that it tells of
        done = api.upload_file(
            repo_id=repo_id,
            repo_type=kind.repo_type,
            path_or_fileobj=card.encode(),
            path_in_repo=CARD,
            commit_message=f"Card of the {kind.name}",
        )
    return {"repo": repo_id, "kind": kind.name, "url": str(url), "commit": done.oid}


def pull(
    repo_id: str, report: Report, *, out: str | None = None, revision: str | None = None
) -> dict[str, Any]:
    """Fetch a store or a student from the hub, and check it before it takes its place.

    A pull that was interrupted is resumed, and what is there already is not pulled again.

    Args:
        repo_id: OWNER/NAME; datasets/OWNER/NAME or models/OWNER/NAME where both are there.
        report: where progress goes.
        out: where to; default cache/NAME.zarr or runs/NAME.
        revision: a branch, a tag or a commit; default the newest.

    Returns:
        The path, what it is, and the commit that it was.

    Raises:
        RichKDError: something else is there already, no such repository or revision, it holds
            nothing of richkd's or something damaged, or the hub refuses or cannot be reached.
    """
    local_path(out or "")
    kinds, repo_id = _split(repo_id)
    api = _api()
    with _explained(api, repo_id, revision):
        kind, commit = _look_up(api, kinds, repo_id, revision)
    name = repo_id.rpartition("/")[2]
    target = Path(out or kind.target.format(name.removesuffix(".zarr")))
    check_writable(target)
    done = {"path": str(target), "kind": kind.name, "repo": repo_id, "commit": commit}
    with locked(target):
        there = target.exists() or target.is_symlink()
        if there and not (target / kind.marker).is_file():
            raise RichKDError(
                f"{target} exists; choose another --out, or move it away", code="foreign-file"
            )
        with _workplace(target, commit) as temporary:
            folder = temporary / "files"

            def fetch(patterns: tuple[str, ...], check: Callable[[Path], object]) -> None:
                with _explained(api, repo_id, revision), _bars(report):
                    api.snapshot_download(
                        repo_id,
                        repo_type=kind.repo_type,
                        revision=commit,
                        local_dir=folder,
                        cache_dir=temporary,
                        etag_timeout=TIMEOUT_S,
                        allow_patterns=list(patterns),
                        ignore_patterns=list(kind.not_files),
                    )
                _check_came(check, folder, kind, f"{repo_id} at {commit[:12]}")

            fetch(kind.head, kind.look)
            if there:
                _check_there(kind, target, folder, f"{repo_id} at {commit[:12]}", report)
                return done
            report.log(f"pulling the {kind.name} {repo_id} from {api.endpoint}")
            fetch(kind.files, lambda folder: kind.check(folder, report))
            shutil.rmtree(folder / ".cache")  # what huggingface_hub notes on its downloads
            folder.rename(target)
    return done


@contextmanager
def _workplace(target: Path, commit: str) -> Iterator[Path]:
    """A folder beside the target, so that taking its place is one rename.

    What came before an interruption is in it the next time, but not what came of another commit,
    nor what was refused.
    """
    folder = target.with_name(f".{target.name}.{commit[:12]}.pull")
    for other in target.parent.glob(f".{glob.escape(target.name)}.*.pull"):
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)
    try:
        yield folder
    except RichKDError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)


def _check_there(kind: Kind, target: Path, head: Path, what: str, report: Report) -> None:
    """Find that what is at the target is what would be pulled, of which this is the head.

    Raises:
        RichKDError: it is something else, or damaged.
    """
    for file in kind.head:
        if (
            not (target / file).is_file()
            or (target / file).read_bytes() != (head / file).read_bytes()
        ):
            raise RichKDError(
                f"{target} exists and is not {what}, for {file} differs; choose another --out, or "
                f"move it away",
                code="foreign-file",
            )
    kind.check(target, report)
    report.log(f"{target} is complete already")


def _api() -> HfApi:
    from huggingface_hub import HfApi

    from richkd.core.versions import richkd_version

    # huggingface_hub reads HF_ENDPOINT once, when something first imports it
    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or None
    if endpoint and not _ADDRESS.fullmatch(endpoint):
        raise RichKDError(
            f"HF_ENDPOINT is {endpoint!r}; give https://HOST, or unset it", code="hub-endpoint"
        )
    return HfApi(endpoint=endpoint, library_name="richkd", library_version=richkd_version())


def _split(repo_id: str, *, prefixes: bool = True) -> tuple[tuple[Kind, ...], str]:
    """What a repository's id leaves open to be in it, and the id without its prefix."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    kinds: tuple[Kind, ...] = KINDS
    name = repo_id
    for kind in KINDS if prefixes else ():
        if repo_id.startswith(f"{kind.repo_type}s/") and repo_id.count("/") == 2:
            kinds, name = (kind,), repo_id.partition("/")[2]
    try:
        validate_repo_id(name)
        if "/" not in name:
            raise HFValidationError("no owner")
    except HFValidationError:
        raise RichKDError(
            f"{repo_id!r} cannot be a repository; give OWNER/NAME, of letters, digits and single "
            f"- _ . inside",
            code="hub-name",
        ) from None
    return kinds, name


def _files(info: Any) -> set[str]:
    return {file.rfilename for file in info.siblings or ()}


def _look_up(
    api: HfApi, kinds: tuple[Kind, ...], repo_id: str, revision: str | None
) -> tuple[Kind, str]:
    """What a repository holds, and its commit: data sets and models may have the same name."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    found: list[tuple[Kind, str]] = []
    there = False
    unseen: Exception | None = None
    for kind in kinds:
        try:
            info = api.repo_info(
                repo_id, repo_type=kind.repo_type, revision=revision, timeout=TIMEOUT_S
            )
        except RevisionNotFoundError as error:
            unseen = error
            continue
        except RepositoryNotFoundError as error:
            unseen = unseen or error
            continue
        there = True
        if kind.marker in _files(info):
            found.append((kind, str(info.sha)))
    if len(found) > 1:
        raise RichKDError(
            f"{repo_id} is both a store and a student; say datasets/{repo_id} or models/{repo_id}",
            code="hub-ambiguous",
        )
    if found:
        return found[0]
    if unseen is not None and not there:
        raise unseen
    raise RichKDError(
        f"{repo_id} on {api.endpoint} is nothing of richkd's: it has no "
        f"{' and no '.join(kind.marker for kind in kinds)}; richkd push makes such a repository",
        code="hub-foreign",
    )


def _check_vacant(api: HfApi, kind: Kind, repo_id: str, *, private: bool) -> None:
    """Refuse a repository that holds something else, or that everybody sees."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        info = api.repo_info(repo_id, repo_type=kind.repo_type, timeout=TIMEOUT_S)
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        return
    if kind.marker not in _files(info) and _files(info) - _NOT_OURS:
        raise RichKDError(
            f"{repo_id} on {api.endpoint} holds other files, and no {kind.name}; "
            f"choose another name",
            code="hub-foreign",
        )
    if private and not info.private:
        raise RichKDError(
            f"{repo_id} on {api.endpoint} is public already; make it private in its "
            f"settings, or choose another name",
            code="hub-public",
        )


def _check_came(check: Callable[[Path], object], folder: Path, kind: Kind, what: str) -> None:
    """What came, by its name on the hub: the reason is of it, the remedies are not."""
    try:
        check(folder)
    except RichKDError as error:
        reason = str(error).replace(str(folder), what).partition(";")[0]
        raise RichKDError(
            f"{what} is no whole {kind.name} ({reason}); pull it again, or ask its owner to push "
            f"it again; nothing was kept",
            code="hub-damaged",
        ) from None


@contextmanager
def _bars(report: Report) -> Iterator[None]:
    """huggingface_hub's own bars, but none where nothing is to be said."""
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if not report.quiet or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@contextmanager
def _explained(api: HfApi, repo_id: str, revision: str | None = None) -> Iterator[None]:
    """Turn what the hub and the network answer into one line; what is no such error passes."""
    from huggingface_hub import errors
    from huggingface_hub.errors import HTTPError  # its transport's

    try:
        yield
    except (
        HTTPError,
        errors.OfflineModeIsEnabled,
        errors.LocalEntryNotFoundError,
        errors.FileMetadataError,
        RuntimeError,
        ValueError,
        KeyError,
    ) as error:
        # two of them are wrapped around the one that tells why
        wrapped = isinstance(error, (errors.LocalEntryNotFoundError, RuntimeError))
        reason = error.__cause__ if wrapped and error.__cause__ else error
        raise RichKDError(_reason(api, repo_id, revision, reason), code="hub-failed") from None


def _reason(api: HfApi, repo_id: str, revision: str | None, error: BaseException) -> str:
    from huggingface_hub import errors

    host = f"{api.endpoint}"
    log_in = "log in by `hf auth login` or set HF_TOKEN"
    copy = "or copy the folder itself: it is whole as it lies"
    said = first_line(error)
    if isinstance(error, errors.RevisionNotFoundError):
        why = f"{repo_id} on {host} has no revision {revision!r}; give a branch, a tag or a commit"
    elif isinstance(error, errors.GatedRepoError):
        why = f"{repo_id} on {host} is gated; ask for access on its page, and {log_in}"
    elif isinstance(error, errors.RepositoryNotFoundError):
        why = f"no repository {repo_id} on {host}, or it is private; see to its name, or {log_in}"
    elif isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        why = {
            401: f"{host} wants a token for {repo_id}, or refuses yours (401); {log_in}",
            403: f"{host} does not let you at {repo_id} (403); use a token that may read it, and "
            f"write to it where you push",
        }.get(
            status,
            f"{host} answered {status} for {repo_id} ({error.server_message or said}); "
            f"try again later, {copy}",
        )
    elif isinstance(error, errors.OfflineModeIsEnabled):
        why = f"{host} was not asked, because HF_HUB_OFFLINE is set; unset it, {copy}"
    elif isinstance(
        error, (RuntimeError, ValueError, KeyError)
    ):  # by Xet, or an answer that is none
        why = f"{host} and {repo_id}: the transfer failed ({said}); try again, {copy}"
    else:
        why = f"cannot reach {host} ({said}); see to the network and HF_ENDPOINT, {copy}"
    return why
