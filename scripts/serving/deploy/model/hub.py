"""Fetch a model from the hub: pinned to a commit, and only the files that are needed.

huggingface_hub resolves the revision and lists the files with their checksums. `hub_download` moves
the bytes.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import msgspec

from serving.config import ModelConfig, Weights
from serving.deploy.model.files import WeightFiles, select_files
from serving.deploy.model.hub_cache import HubCache
from serving.deploy.model.hub_download import HubDownload, HubFile, size_of
from serving.deploy.model.hub_errors import explain_hub_error
from serving.engine.files import human, require_space
from serving.engine.manifest import ModelFile
from serving.errors import ModelError
from serving.progress import Report

if TYPE_CHECKING:
    from huggingface_hub import HfApi

DEFAULT_ENDPOINT = "https://huggingface.co"


def fetch_from_hub(
    config: ModelConfig,
    files_dir: Path,
    *,
    weights: Weights = "real",
    report: Report,
    retry_after_s: float = 1.0,
) -> tuple[WeightFiles, list[ModelFile], str]:
    """Bring the needed files of `config.id` into `files_dir`; returns them and the commit.

    The token comes from HF_TOKEN only and the hub from HF_ENDPOINT, both read now. Raises
    ModelError: offline mode, no network, no such model or revision, no access, no space, a wrong
    checksum. What arrived before an interruption is kept and continued by the next call.
    """
    api, cache = _open_hub(), HubCache(config.id)
    offline = is_offline()
    if offline:
        commit, listed = _list_cached(cache, config)
        report(f"{config.id}: from the hub's cache, since this machine is set to be offline")
    else:
        commit, listed = _list_files(api, config)
    files_dir.mkdir(parents=True, exist_ok=True)
    pinned = msgspec.structs.replace(config, revision=commit)
    download = HubDownload(api, pinned, files_dir, report=report, retry_after_s=retry_after_s)

    def bring(file: HubFile) -> None:
        if cache.take(file, files_dir / file.name):
            return
        if offline:
            raise ModelError(
                f"{file.name} of {config.id} is damaged in the hub's cache",
                remedy="unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE, to fetch it again",
            )
        download.fetch(file)

    def read(name: str) -> bytes:
        path = files_dir / name
        if not listed[name].matches(path):
            bring(listed[name])
        return path.read_bytes()

    kind, names = select_files(
        listed,
        read=read,
        where=f"{config.id} on the hub",
        allow_pickle=config.allow_pickle,
        weights=weights,
        needs_tokenizer=config.tokenizer is None,
    )
    wanted = [listed[name] for name in names]
    _remove_others(files_dir, {download.partial(file).name for file in wanted} | set(names))
    missing = [file for file in wanted if not file.matches(files_dir / file.name)]
    here = sum(size_of(download.partial(file)) for file in missing)
    to_fetch = max(0, sum(file.size for file in missing) - here)
    before = f" ({human(here)} arrived earlier)" if here else ""
    report(f"{config.id} at {commit[:12]}: {len(wanted)} files, {human(to_fetch)} to fetch{before}")
    if not all(map(cache.has, missing)):
        require_space(files_dir, to_fetch, config.id)
    for file in missing:
        bring(file)
    files = [ModelFile(path=file.name, size=file.size, sha256=file.sha256) for file in wanted]
    return WeightFiles(files_dir, kind, names), files, commit


def is_offline() -> bool:
    """Whether the environment forbids the network, by either of its two variables."""
    variables = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    return any(os.environ.get(name, "").upper() in {"1", "ON", "YES", "TRUE"} for name in variables)


def _list_cached(cache: HubCache, config: ModelConfig) -> tuple[str, dict[str, HubFile]]:
    """What the cache has of the revision. Raises ModelError when that is nothing."""
    found = cache.listing(config.revision or "main")
    if found is None:
        raise ModelError(
            f"{config.id} at {config.revision or 'main'} is not in the hub's cache ({cache.folder.parent}), "
            "and HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE forbids to fetch it",
            remedy="unset that variable, set HF_HUB_CACHE to the cache that has it, or set "
            "`model.id` to a local folder",
        )
    return found


def _open_hub() -> HfApi:
    # Without this the library reports to its default hub, even when HF_ENDPOINT is set.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub import HfApi

    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or DEFAULT_ENDPOINT
    return HfApi(endpoint=endpoint, token=os.environ.get("HF_TOKEN", "").strip() or False)


def _list_files(api: HfApi, config: ModelConfig) -> tuple[str, dict[str, HubFile]]:
    """The commit that the revision means now, and the top-level files there."""
    listed = {}
    try:
        info = api.model_info(
            config.id, revision=config.revision, files_metadata=True, timeout=20.0
        )
        if info.sha is None or info.siblings is None:
            raise ValueError("no commit or no files in the answer")
        for sibling in info.siblings:
            name = sibling.rfilename
            if "/" in name:
                continue  # nothing that is needed lies in a sub-folder
            if sibling.size is None or sibling.blob_id is None:
                raise ValueError(f"no size or checksum for {name}")
            sha256 = sibling.lfs.sha256 if sibling.lfs else None
            listed[name] = HubFile(name, sibling.size, sha256, sibling.blob_id)
    except httpx.HTTPError as exc:
        raise explain_hub_error(exc, config, api) from exc
    except (ValueError, KeyError, TypeError) as exc:
        raise ModelError(
            f"{api.endpoint} does not answer like a model hub: {exc}",
            remedy="check HF_ENDPOINT, and that no proxy or portal answers in its place",
        ) from exc
    return info.sha, listed


def _remove_others(files_dir: Path, keep: set[str]) -> None:
    """Remove files of another revision, so that nothing can load a mixture."""
    for path in files_dir.iterdir():
        if path.is_file() and path.name not in keep:
            path.unlink()
