"""Repositories of the Hugging Face Hub, read and written."""

from __future__ import annotations

from pathlib import Path

from dualout.errors import InputError, first_line
from dualout.version import __version__

_CLIENTS = ("huggingface_hub", "httpx", "httpx2", "requests")
"""Whose errors are the connection's: huggingface_hub changed its HTTP library with each major version."""


def check(repo_id: str) -> None:
    """Refuse what is no name of a repository, before any work.

    Raises:
        InputError: for that.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InputError(f"a repository of the Hub is named NAME/REPOSITORY, got {repo_id!r}: {error}") from error


def is_name(text: str) -> bool:
    """Whether it may be a repository's name, rather than a path."""
    return not text.startswith((".", "/", "~")) and text.count("/") == 1 and not {":", "\\"} & set(text)


def download(repo_id: str, patterns: list[str]) -> Path:
    """The local directory of a repository's files with these names, downloaded unless it is there already.

    Raises:
        InputError: when there is no such repository, or no connection.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo_id, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"{repo_id!r} is no directory here, and the Hugging Face Hub did not give it: {first_line(error)}"
        ) from error


def logged_in() -> bool:
    """Whether there is a login on this machine; nothing is asked of the Hub."""
    from huggingface_hub import get_token

    return get_token() is not None


def upload(
    directory: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
) -> str:
    """Put a directory's files into a model repository, in one commit; returns its address.

    Raises:
        InputError: without a login, a connection or the right to write there.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    api = HfApi(token=token, library_name="dualout", library_version=__version__)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            folder_path=directory, repo_id=repo_id, revision=revision, commit_message=commit_message
        )
    except OfflineModeIsEnabled as error:
        raise InputError(f"cannot upload to {repo_id}: HF_HUB_OFFLINE is set, so the Hub is not reached") from error
    except Exception as error:
        if not isinstance(error, OSError) and type(error).__module__.partition(".")[0] not in _CLIENTS:
            raise
        raise InputError(f"cannot upload to {repo_id}: {_reason(error)}") from error
    return str(commit.commit_url)


def _reason(error: Exception) -> str:
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    said = first_line(error)
    status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None
    if status in (401, 403) or isinstance(error, LocalTokenNotFoundError):
        return f"{said}; log in with an account that may write there: hf auth login, or set HF_TOKEN"
    if status is None:
        return f"the Hugging Face Hub is not reached ({said}); check the connection and try again"
    return said
