"""The Hugging Face Hub: a bundle pushed as a model repository."""

from __future__ import annotations

from pathlib import Path

from qsun.errors import OutputError


def check_token() -> None:
    """Refuse before the work what would be refused after it.

    Raises:
        OutputError: no token is set.
    """
    from huggingface_hub import get_token

    if not get_token():
        raise OutputError("--push needs a token of the Hugging Face Hub: set HF_TOKEN, or log in")


def push_folder(folder: Path, repository: str) -> str:
    """Upload a folder in one commit, as a private repository where it is new; gives its address.

    Raises:
        OutputError: the Hub refused it or could not be reached; what lies in `folder` stays.
    """
    import httpx
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi()
    try:
        address = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="qsun export")
    except (HfHubHTTPError, HFValidationError, httpx.HTTPError, OSError) as error:
        raise OutputError(f"could not push {folder} to {repository}: {error}") from error
    return str(address)
