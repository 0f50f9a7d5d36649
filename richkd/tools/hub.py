"""Share caches and students on the Hugging Face hub, as dataset and model repositories.

A repository holds the files as they are on disk, beside a card (README.md), so that other programs
can read them too. Only files of known kinds are downloaded, none of which could run code, and every
byte is checked before the download takes its final place.

huggingface_hub chooses the token, its cache and the host (HF_TOKEN, HF_HOME, HF_ENDPOINT).
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
from richkd.core.versions import richkd_version
from richkd.models.weights import read_safetensors
from richkd.store.location import METADATA
from richkd.store.manifest import read_manifest
from richkd.store.reader import open_cache
from richkd.tools.hub_cards import store_card, student_card
from richkd.tools.verify import find_damage
from richkd.training.run_folder import complete_run

if TYPE_CHECKING:
    from huggingface_hub import HfApi

TIMEOUT_S = 10  # of the first answer; a hub that has answered may be slow
CARD = "README.md"
_ADDRESS = re.compile(r"https?://([\w.-]+|\[[\da-fA-F:]+\])(:\d{1,5})?(/\S*)?")
_HUB_FILES = {CARD, ".gitattributes"}  # files that the hub itself puts into a new repository


def check_store(folder: Path, report: Report) -> None:
    """Read every byte of a cache; raise RichKDError if it is incomplete or damaged."""
    cache = open_cache(folder)
    for group in (cache, *map(cache.addition, cache.added)):
        for damage in find_damage(group.location, group.manifest, report):
            raise RichKDError(
                f"{group.location} is damaged: {damage.file}: {damage.reason}; richkd repair "
                f"computes those blocks again",
                code="cache-damaged",
            )


def check_run(folder: Path, report: Report) -> None:
    """Read the files of a run; raise RichKDError if it is incomplete or damaged."""
    complete_run(folder)
    for file in ("last.safetensors", "best.safetensors"):
        read_safetensors(folder / file)


@dataclass(frozen=True)
class Kind:
    """What a repository can hold. The patterns are fnmatch's, whose * matches slashes too."""

    name: str  # in results for scripts
    noun: str  # in messages
    repo_type: str
    marker: str  # the file by which a folder or repository of this kind is recognised
    head: tuple[str, ...]  # small files, downloaded first to recognise a foreign repository
    files: tuple[str, ...]  # patterns of what is shared
    not_files: tuple[str, ...]  # and of exceptions
    check_head: Callable[[Path], object]  # raises RichKDError if the head is something else
    check: Callable[[Path, Report], object]  # reads every byte
    card: Callable[[Path, str], str]
    target: str  # default path of a download


CACHE = Kind(
    name="store",
    noun="cache",
    repo_type="dataset",
    marker=METADATA,
    head=(METADATA,),
    # names of chunks are numbers only, so no other kind of file can pass for one
    files=(METADATA, f"*/{METADATA}", "*/c/*"),
    not_files=("*/c/*[!0-9/]*", "*..*", "/*"),
    check_head=read_manifest,
    check=check_store,
    card=store_card,
    target="cache/{}.zarr",
)
STUDENT = Kind(
    name="student",
    noun="student",
    repo_type="model",
    marker="recipe.toml",
    head=("recipe.toml", "summary.json"),
    files=(
        "recipe.toml",
        "summary.json",
        "metrics.jsonl",
        "last.safetensors",
        "best.safetensors",
        "evaluation.json",
        "evaluation-best.json",
    ),
    not_files=(),
    check_head=complete_run,
    check=check_run,
    card=student_card,
    target="runs/{}",
)
KINDS = (CACHE, STUDENT)


def push(path: str, repo_id: str, report: Report, *, private: bool = False) -> dict[str, Any]:
    """Upload a complete cache or run to a repository on the hub, with a card.

    Files of an earlier push that are not part of this one are deleted from the repository.

    Args:
        path: the cache or run folder.
        repo_id: OWNER/NAME; created if it does not exist.
        report: where to log progress.
        private: make a new repository visible only to its owner and people they invite.

    Returns:
        The repository, the kind of its content, its address and the new commit.

    Raises:
        RichKDError: the cache or run is missing, incomplete or damaged; the repository holds
            something else, or is public although `private` is set; or the hub refuses or cannot be
            reached.
    """
    folder = Path(path)
    kind = next((kind for kind in KINDS if (folder / kind.marker).is_file()), None)
    if kind is None:
        raise RichKDError(
            f"{path} is neither a cache nor a run folder; create one with richkd precompute or "
            f"richkd distill",
            code="hub-nothing-to-push",
        )
    _check_name(repo_id, repo_id)
    check_unlocked(folder)
    kind.check(folder, report)
    card = kind.card(folder, repo_id)
    api = _api()
    repo: dict[str, Any] = {"repo_id": repo_id, "repo_type": kind.repo_type}
    with _hub(api, repo_id, report):
        _check_vacant(api, kind, repo_id, private=private)
        report.log(f"pushing {path} to {api.endpoint}")
        url = api.create_repo(**repo, private=private or None, exist_ok=True)
        api.upload_folder(
            **repo,
            folder_path=folder,
            commit_message=f"Upload a richkd {kind.noun}",
            allow_patterns=list(kind.files),
            ignore_patterns=list(kind.not_files),
            delete_patterns=list(kind.files),
        )
        # last, so that everything a card describes has been uploaded
        done = api.upload_file(
            **repo,
            path_or_fileobj=card.encode(),
            path_in_repo=CARD,
            commit_message=f"Describe the {kind.noun}",
        )
    return {"repo": repo_id, "kind": kind.name, "url": str(url), "commit": done.oid}


def pull(
    repo_id: str, report: Report, *, out: str | None = None, revision: str | None = None
) -> dict[str, Any]:
    """Download a cache or a student from the hub and check it before it takes its place.

    An interrupted download is resumed; one that is complete is checked, not repeated.

    Args:
        repo_id: OWNER/NAME; datasets/OWNER/NAME or models/OWNER/NAME if both exist.
        report: where to log progress.
        out: the path to write to; by default cache/NAME.zarr or runs/NAME.
        revision: a branch, a tag or a commit; by default the newest.

    Returns:
        The path, the kind of content, and the repository's commit.

    Raises:
        RichKDError: the path holds something else, the repository or revision does not exist, its
            content is damaged or not richkd's, or the hub refuses or cannot be reached.
    """
    local_path(out or "")
    kinds, repo_id = _parse(repo_id)
    api = _api()
    with _hub(api, repo_id, report, revision):
        kind, commit = _look_up(api, kinds, repo_id, revision)
    target = Path(out or kind.target.format(repo_id.rpartition("/")[2].removesuffix(".zarr")))
    check_writable(target)
    source = f"{repo_id} at {commit[:12]}"
    result = {"path": str(target), "kind": kind.name, "repo": repo_id, "commit": commit}
    with locked(target):
        exists = target.exists() or target.is_symlink()
        if exists and not (target / kind.marker).is_file():
            raise RichKDError(
                f"{target} exists; choose another --out, or move it away", code="foreign-file"
            )
        with _work_folder(target, commit) as work:
            folder = work / "files"

            def download(patterns: tuple[str, ...], check: Callable[[Path], object]) -> None:
                with _hub(api, repo_id, report, revision):
                    _download(api, kind, repo_id, commit, work, patterns)
                _check_download(check, folder, kind, source)

            download(kind.head, kind.check_head)
            if exists:
                _check_existing(kind, target, folder, source, report)
                return result
            report.log(f"pulling the {kind.noun} {repo_id} from {api.endpoint}")
            download(kind.files, lambda folder: kind.check(folder, report))
            shutil.rmtree(folder / ".cache")  # huggingface_hub's records of the download
            folder.rename(target)
    return result


def _download(
    api: HfApi, kind: Kind, repo_id: str, commit: str, work: Path, patterns: tuple[str, ...]
) -> None:
    api.snapshot_download(
        repo_id,
        repo_type=kind.repo_type,
        revision=commit,
        local_dir=work / "files",
        cache_dir=work,
        etag_timeout=TIMEOUT_S,
        allow_patterns=list(patterns),
        ignore_patterns=list(kind.not_files),
    )


@contextmanager
def _work_folder(target: Path, commit: str) -> Iterator[Path]:
    """Yield a folder beside the target, so that one rename puts the download in place.

    It survives an interruption, to resume from, but not an error, and not another commit.
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


def _check_download(check: Callable[[Path], object], folder: Path, kind: Kind, source: str) -> None:
    """Check what was downloaded; errors name its source on the hub and the remedy there."""
    try:
        check(folder)
    except RichKDError as error:
        reason = str(error).replace(str(folder), source).partition(";")[0]
        raise RichKDError(
            f"{source} is not an intact {kind.noun} ({reason}); pull it again, or ask its owner to "
            f"push it again; nothing was kept",
            code="hub-damaged",
        ) from None


def _check_existing(kind: Kind, target: Path, head: Path, source: str, report: Report) -> None:
    """Check that the target is an intact copy of the source, which starts with `head`."""
    for file in kind.head:
        copy = target / file
        if not copy.is_file() or copy.read_bytes() != (head / file).read_bytes():
            raise RichKDError(
                f"{target} exists and is not {source}: {file} differs; choose another --out, or "
                f"move it away",
                code="foreign-file",
            )
    kind.check(target, report)
    report.log(f"{target} is already complete")


def _api() -> HfApi:
    from huggingface_hub import HfApi

    # huggingface_hub itself reads HF_ENDPOINT only once, when it is first imported
    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or None
    if endpoint and not _ADDRESS.fullmatch(endpoint):
        raise RichKDError(
            f"HF_ENDPOINT is {endpoint!r}; set it to https://HOST, or unset it", code="hub-endpoint"
        )
    return HfApi(endpoint=endpoint, library_name="richkd", library_version=richkd_version())


def _parse(name: str) -> tuple[tuple[Kind, ...], str]:
    """Split a name into the kinds that its prefix (datasets/, models/) allows, and OWNER/NAME."""
    kinds: tuple[Kind, ...] = KINDS
    repo_id = name
    for kind in KINDS:
        if name.startswith(f"{kind.repo_type}s/") and name.count("/") == 2:
            kinds, repo_id = (kind,), name.partition("/")[2]
    _check_name(repo_id, name)
    return kinds, repo_id


def _check_name(repo_id: str, given: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
        if "/" not in repo_id:
            raise HFValidationError("no owner")
    except HFValidationError:
        raise RichKDError(
            f"{given!r} is not a name of a repository; give OWNER/NAME in letters, digits and "
            f"single - _ . between them",
            code="hub-name",
        ) from None


def _look_up(
    api: HfApi, kinds: tuple[Kind, ...], repo_id: str, revision: str | None
) -> tuple[Kind, str]:
    """Return what a repository holds, and its commit; a dataset and a model may share a name."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    infos: dict[Kind, Any] = {}
    missing: list[Exception] = []
    for kind in kinds:
        try:
            infos[kind] = _info(api, kind, repo_id, revision)
        except (RevisionNotFoundError, RepositoryNotFoundError) as error:
            missing.append(error)
    found = [(kind, str(info.sha)) for kind, info in infos.items() if kind.marker in _files(info)]
    if len(found) > 1:
        raise RichKDError(
            f"{repo_id} is both a cache and a student; give datasets/{repo_id} or models/{repo_id}",
            code="hub-ambiguous",
        )
    if found:
        return found[0]
    if not infos:  # a missing revision explains more than the absence of the other repository
        raise max(missing, key=lambda error: isinstance(error, RevisionNotFoundError))
    markers = " and no ".join(kind.marker for kind in kinds)
    raise RichKDError(
        f"{repo_id} on {api.endpoint} is neither a cache nor a student of richkd: it has no "
        f"{markers}; create such a repository with richkd push",
        code="hub-foreign",
    )


def _check_vacant(api: HfApi, kind: Kind, repo_id: str, *, private: bool) -> None:
    """Refuse a repository that holds something else, or one that is public but must be private."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        info = _info(api, kind, repo_id)
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        return
    if kind.marker not in _files(info) and _files(info) - _HUB_FILES:
        raise RichKDError(
            f"{repo_id} on {api.endpoint} holds other files and no {kind.noun}; "
            f"choose another name",
            code="hub-foreign",
        )
    if private and not info.private:
        raise RichKDError(
            f"{repo_id} on {api.endpoint} is already public; make it private in its "
            f"settings, or choose another name",
            code="hub-public",
        )


def _info(api: HfApi, kind: Kind, repo_id: str, revision: str | None = None) -> Any:
    return api.repo_info(repo_id, repo_type=kind.repo_type, revision=revision, timeout=TIMEOUT_S)


def _files(info: Any) -> set[str]:
    return {file.rfilename for file in info.siblings or ()}


@contextmanager
def _hub(api: HfApi, repo_id: str, report: Report, revision: str | None = None) -> Iterator[None]:
    """Turn errors of the hub and the network into RichKDError; hide progress bars if quiet."""
    from huggingface_hub import errors, utils

    hide = report.quiet and not utils.are_progress_bars_disabled()
    if hide:
        utils.disable_progress_bars()
    try:
        yield
    except (
        errors.HTTPError,  # of the hub's HTTP library
        errors.OfflineModeIsEnabled,
        errors.LocalEntryNotFoundError,
        errors.FileMetadataError,
        RuntimeError,
        ValueError,
        KeyError,
    ) as error:
        # two of them wrap the error that tells why
        wraps = isinstance(error, errors.LocalEntryNotFoundError | RuntimeError)
        cause = (wraps and error.__cause__) or error
        raise RichKDError(_reason(api, repo_id, revision, cause), code="hub-failed") from None
    finally:
        if hide:
            utils.enable_progress_bars()


def _reason(api: HfApi, repo_id: str, revision: str | None, error: BaseException) -> str:
    """Return what went wrong and what to do, in one line."""
    from huggingface_hub import errors

    host, message = api.endpoint, first_line(error)
    log_in = "log in with `hf auth login` or set HF_TOKEN"
    copy = "or copy the folder by other means: it is complete in itself"
    match error:
        case errors.RevisionNotFoundError():
            why = f"{repo_id} on {host} has no revision {revision!r}; give a branch, tag or commit"
        case errors.GatedRepoError():
            why = f"{repo_id} on {host} is gated; ask for access on its page, and {log_in}"
        case errors.RepositoryNotFoundError():
            why = (
                f"no repository {repo_id} on {host}, or it is private; check its name, or {log_in}"
            )
        case errors.HfHubHTTPError() if error.response.status_code == 401:
            why = f"{host} needs a valid token for {repo_id} (401); {log_in}"
        case errors.HfHubHTTPError() if error.response.status_code == 403:
            why = f"{host} denies access to {repo_id} (403); use a token with that permission"
        case errors.HfHubHTTPError():
            answer = f"{error.response.status_code} ({error.server_message or message})"
            why = f"{host} answered {answer} for {repo_id}; try again later, {copy}"
        case errors.OfflineModeIsEnabled():
            why = f"{host} was not asked, because HF_HUB_OFFLINE is set; unset it, {copy}"
        case RuntimeError() | ValueError() | KeyError():  # from Xet, or an answer of no hub
            why = f"transfer of {repo_id} with {host} failed ({message}); try again, {copy}"
        case _:
            why = f"cannot reach {host} ({message}); check the network and HF_ENDPOINT, {copy}"
    return why
