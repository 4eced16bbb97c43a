"""Files of a hub repository (Hugging Face's, or a mirror of it): only those an export needs, checked, resumed.

`huggingface_hub` does the fetching, and honours HF_ENDPOINT, HF_HUB_OFFLINE, HF_TOKEN, HF_HOME and HF_HUB_CACHE; here is
what to fetch, whether there is room for it, whether it arrived whole, and what to say where it did not. No torch.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from ..errors import CheckpointError
from ..models import Origin
from .checkpoint import PIPELINES, read_json, shards
from .config_check import pipeline_fault
from .packages import require
from .report import megabytes
from .weight_files import TOKENIZER_FILES, choose_weights, expected, pickled, tokenizer_of

_TIMEOUT_S = 30
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_INDEX = "model_index.json"
_CONFIG = "config.json"
_SCHEDULER = "scheduler/scheduler_config.json"


class _Remote(NamedTuple):
    """What the hub says of a file. digest: of its content; sha256 for large files, git's blob hash for the others."""

    size: int | None
    sha256: str | None
    git: str | None


@dataclass(frozen=True)
class _Repository:
    """A repository at one commit, there or in the cache. `get` returns a file's path, fetched if it has to be."""

    name: str
    commit: str
    files: Mapping[str, _Remote]
    get: Callable[[str], Path]
    where: str = ""

    @property
    def title(self) -> str:
        return f"hub repository {self.name} at {self.commit[:7]}{self.where}"

    def need(self, file: str, what: str) -> str:
        if file not in self.files:
            raise CheckpointError(f"{self.title} lacks {file}; {what}")
        return file


def fetch_folder(
    origin: Origin, *, allow_pickle: bool = False, check: Callable[[Path], object] = lambda folder: None
) -> Path:
    """The snapshot folder of a diffusers repository, with its configurations, tokenizers and weights, fp16 preferred.

    check: called with the folder once the small files are there, before the weights are fetched; what it raises is
    raised.

    Raises CheckpointError, in one line: no such repository or revision, no access, no connection, not enough disk, a
    file that is missing, damaged or pickled.
    """
    with _repository(origin) as repository:
        index = repository.get(repository.need(_INDEX, "name a diffusers repository, or a file of this one"))
        values = read_json(index)
        if fault := pipeline_fault(values, PIPELINES):
            raise CheckpointError(f"{repository.title} {fault}")
        small, weights = _needed(repository, PIPELINES[values["_class_name"]], allow_pickle)
        _check_room(repository, [*small, *weights])
        _fetch(repository, small)
        check(index.parent)
        _fetch(repository, weights)
        return index.parent


def fetch_file(origin: Origin) -> Path:
    """One file of a repository, `origin.file`; raises as `fetch_folder` does."""
    with _repository(origin) as repository:
        assert origin.file is not None
        files = [repository.need(origin.file, "check its name")]
        _check_room(repository, files)
        return _fetch(repository, files)[0]


def fetch_network(origin: Origin, part: str, *, allow_pickle: bool = False) -> Path:
    """The snapshot folder of a repository that is one network, as the tiny autoencoders' are; raises as `fetch_folder`."""
    with _repository(replace(origin, file=_CONFIG)) as repository:
        config = repository.get(repository.need(_CONFIG, "name the repository of one network, as diffusers saves it"))
        files = [_CONFIG, *_weights(repository, part, "", allow_pickle)]
        _check_room(repository, files)
        _fetch(repository, files)
        return config.parent


def _needed(repository: _Repository, parts: tuple[str, ...], allow_pickle: bool) -> tuple[list[str], list[str]]:
    """The small files, and the weights."""
    whole = "export needs a whole diffusers repository"
    wanted, weights = [_INDEX, repository.need(_SCHEDULER, whole)], list[str]()
    for part in parts:
        wanted.append(repository.need(f"{part}/config.json", whole))
        weights += _weights(repository, part, f"{part}/", allow_pickle)
        if tokenizer := tokenizer_of(part):
            found = [f"{tokenizer}/{name}" for name in TOKENIZER_FILES if f"{tokenizer}/{name}" in repository.files]
            if f"{tokenizer}/tokenizer.json" not in found:
                for name in ("vocab.json", "merges.txt"):
                    repository.need(f"{tokenizer}/{name}", whole)
            wanted += found
    return wanted, weights


def _weights(repository: _Repository, part: str, folder: str, allow_pickle: bool) -> list[str]:
    """folder: where in the repository they are, such as 'unet/', or '' for its root."""
    names = {f.removeprefix(folder) for f in repository.files if f.startswith(folder)}
    weights = choose_weights(part, names, half_first=True, pickles=allow_pickle)
    if weights is None:
        if found := pickled(name for name in names if "/" not in name):
            raise CheckpointError(
                f"{repository.title} has the weights of {part} pickled only ({folder}{found}), which can run code when "
                "they are read; if you trust it, --allow-pickle reads them with torch's weights_only"
            )
        raise CheckpointError(f"{repository.title} has no weights of {part}; expected {folder}{expected(part)}")
    files = [weights.file]
    if weights.sharded:
        files += shards(repository.get(f"{folder}{weights.file}"))
    return [repository.need(f"{folder}{file}", "its index names it; fetch another revision") for file in files]


def _fetch(repository: _Repository, files: list[str]) -> list[Path]:
    return [_checked(repository, file, repository.get(file)) for file in files]


def _check_room(repository: _Repository, files: list[str]) -> None:
    from huggingface_hub import constants, try_to_load_from_cache

    def here(file: str) -> bool:
        return isinstance(try_to_load_from_cache(repository.name, file, revision=repository.commit), str)

    missing_bytes = sum(repository.files[file].size or 0 for file in files if not here(file))
    cache = Path(constants.HF_HUB_CACHE)
    free_bytes = shutil.disk_usage(next(p for p in (cache, *cache.parents) if p.exists())).free
    if missing_bytes > free_bytes:
        raise CheckpointError(
            f"{repository.title}: {megabytes(missing_bytes)} are to be fetched and {cache} has "
            f"{megabytes(free_bytes)} free; free some space, or set HF_HOME to a folder on another disk"
        )


def _checked(repository: _Repository, file: str, path: Path) -> Path:
    """Compare a file with the hub's digest. A damaged one leaves the cache, so that the next run fetches it again."""
    remote = repository.files[file]
    digest, wanted = hashlib.sha256(), remote.sha256
    if wanted is None and remote.git is not None:
        digest, wanted = hashlib.sha1(b"blob %d\0" % path.stat().st_size), remote.git
    if wanted is None:
        return path
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 22):
            digest.update(chunk)
    if digest.hexdigest() != wanted:
        damaged = path.resolve()
        path.unlink()
        damaged.unlink(missing_ok=True)
        raise CheckpointError(
            f"{repository.title}: {file} is damaged (its hash is {digest.hexdigest()[:12]}, the hub says "
            f"{wanted[:12]}); it was removed from the cache: export again"
        )
    return path


@contextlib.contextmanager
def _repository(origin: Origin) -> Iterator[_Repository]:
    require("huggingface_hub")
    import huggingface_hub
    from huggingface_hub import constants

    name, revision = str(origin.hub), origin.revision
    with _said(name, revision):
        if constants.is_offline_mode():
            yield _cached(name, revision, origin.file or _INDEX)
            return
        try:
            info = huggingface_hub.HfApi().model_info(name, revision=revision, files_metadata=True, timeout=_TIMEOUT_S)
            files = {
                s.rfilename: _Remote(s.size, s.lfs.sha256 if s.lfs else None, None if s.lfs else s.blob_id)
                for s in info.siblings
            }
        except (json.JSONDecodeError, TypeError, AttributeError, KeyError):  # a network's log-in page, half a mirror
            raise CheckpointError(
                f"hub repository {name}: {constants.ENDPOINT} does not answer as a hub does; check the network (does it "
                "ask to log in?) and HF_ENDPOINT"
            ) from None

        def get(file: str) -> Path:
            # by its branch's name once, which makes the cache remember the commit for when it is offline
            at = revision or "main" if file == (origin.file or _INDEX) else info.sha
            return Path(huggingface_hub.hf_hub_download(name, file, revision=at))

        yield _Repository(name, info.sha, files, get)


def _cached(name: str, revision: str | None, file: str) -> _Repository:
    from huggingface_hub import constants, try_to_load_from_cache

    found = try_to_load_from_cache(name, file, revision=revision or "main")
    if not isinstance(found, str):
        raise CheckpointError(
            f"hub repository {name}: {file} is not in {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE forbids to fetch "
            "it; unset that where there is a network"
        )
    folder = Path(found)
    for _ in PurePosixPath(file).parts:
        folder = folder.parent
    files = {p.relative_to(folder).as_posix(): _Remote(None, None, None) for p in folder.rglob("*") if p.is_file()}
    return _Repository(name, folder.name, files, folder.joinpath, " in the cache")


@contextlib.contextmanager
def _said(name: str, revision: str | None) -> Iterator[None]:
    """huggingface_hub's errors, whose texts have many lines, in one of ours."""
    from huggingface_hub import constants, errors

    at = f"hub repository {name} at {constants.ENDPOINT}"
    try:
        yield
    except errors.GatedRepoError:
        raise CheckpointError(
            f"{at} asks its users to accept its terms; do that on its page, then set HF_TOKEN to your token"
        ) from None
    except errors.RevisionNotFoundError:
        raise CheckpointError(f"{at} has no revision {revision}; check it, or leave it out for the newest") from None
    except errors.RepositoryNotFoundError:
        raise CheckpointError(
            f"{at} does not exist or is not public; check its name, or set HF_TOKEN to a token that may read it"
        ) from None
    except errors.LocalEntryNotFoundError as failure:  # neither the hub nor the cache gave it
        raise _broken_off(at, failure) from None
    except errors.EntryNotFoundError as failure:
        raise CheckpointError(f"{at} lacks a file that it lists ({_one_line(failure)}); try again later") from None
    except errors.HFValidationError:
        raise CheckpointError(f"{name!r} is no hub repository; its name is OWNER/NAME") from None
    except errors.HfHubHTTPError as failure:
        status = failure.response.status_code
        cure = "check HF_TOKEN" if status in (401, 403) else "try again later"
        raise CheckpointError(f"{at} answered {status}; {cure}") from None
    except (errors.HTTPError, OSError) as failure:
        if isinstance(failure, OSError) and (failure.filename or failure.errno in _NO_ROOM):
            raise CheckpointError(f"{constants.HF_HUB_CACHE} can't be written: {failure.strerror}") from None
        raise _broken_off(at, failure) from None


def _broken_off(at: str, failure: BaseException) -> CheckpointError:
    from huggingface_hub import constants

    return CheckpointError(
        f"{at} can't be reached or broke off ({_one_line(failure)}); check the network and run the same command "
        f"again (whole files are kept), or set HF_HUB_OFFLINE=1 to use what is in {constants.HF_HUB_CACHE}"
    )


def _one_line(failure: BaseException) -> str:
    return (str(failure).strip().splitlines() or [type(failure).__name__])[0]
