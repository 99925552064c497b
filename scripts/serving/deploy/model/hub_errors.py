"""The hub's errors in the words of this workflow, each with a remedy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import httpx

from serving.config import ModelConfig
from serving.errors import ModelError

if TYPE_CHECKING:
    from huggingface_hub import HfApi


def explain_hub_error(exc: httpx.HTTPError, config: ModelConfig, api: HfApi) -> ModelError:
    """What went wrong when `api` was asked for the model of `config`."""
    from huggingface_hub import errors

    page = f"{api.endpoint}/{config.id}"
    if isinstance(exc, httpx.TransportError):
        return ModelError(
            f"cannot reach {api.endpoint}: {exc}",
            remedy="check the network and proxy (HTTPS_PROXY), or set HF_ENDPOINT to a mirror, or "
            "`model.id` to a local folder",
        )
    if isinstance(exc, errors.GatedRepoError):
        account = "the account of HF_TOKEN" if api.token else "your account, and set HF_TOKEN"
        return ModelError(
            f"{config.id} is gated: its owner grants access by request",
            remedy=f"accept the terms at {page} with {account}",
        )
    if isinstance(exc, errors.RevisionNotFoundError):
        return ModelError(
            f"{config.id} has no revision {config.revision!r}",
            remedy=f"`model.revision` takes a branch, tag or commit listed at {page}/commits",
        )
    if isinstance(exc, errors.RepositoryNotFoundError):
        lacking = "HF_TOKEN has no access to it" if api.token else "HF_TOKEN is not set"
        folder = Path(config.id).is_dir()
        return ModelError(
            f"there is no {config.id} at {api.endpoint}, or it is private and {lacking}",
            remedy=f"a folder of that name is here: write `./{config.id}`"
            if folder
            else "check the spelling of `model.id`; for a private model set HF_TOKEN",
        )
    status = exc.response.status_code if isinstance(exc, errors.HfHubHTTPError) else 0
    if status in (401, 403):
        return ModelError(
            f"the hub refuses HF_TOKEN for {config.id} ({status})"
            if api.token
            else f"the hub serves {config.id} only to known accounts ({status})",
            remedy=f"set HF_TOKEN to a valid token with read access ({api.endpoint}/settings/tokens)",
        )
    return ModelError(
        f"{api.endpoint} answered {status or exc} when asked for {config.id}",
        remedy="try again later; see status.huggingface.co for outages",
    )
