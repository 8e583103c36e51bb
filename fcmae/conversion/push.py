"""An exported folder onto the Hugging Face hub."""

import shlex
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, constants
from huggingface_hub.utils import HfHubHTTPError, LocalTokenNotFoundError, RepositoryNotFoundError

from fcmae.checkpoints.hub_messages import LOG_IN, causes, check_repo, first_line
from fcmae.errors import UserError


def check_name(repo: str) -> None:
    """Refuses what cannot be the name of a repository, without asking anybody.

    Raises:
        UserError: it is no user/name.
    """
    check_repo(repo, example="user/name")


def check_login(repo: str, *, private: bool = True) -> None:
    """Refuses, before any work is done, what `push` would refuse after it; what a token may do is known only roughly.

    Raises:
        UserError: nobody is logged in, or may not write there; the repository is public and should not be; no network.
    """
    try:
        account = HfApi().whoami()
        role = account.get("auth", {}).get("accessToken", {}).get("role")
        if role == "read":
            raise UserError(f"your token may only read, which is not enough for {repo}: {_write_access()}")
        spaces = [account["name"], *(org["name"] for org in account.get("orgs", []))]
        if role == "write" and repo.partition("/")[0].lower() not in map(str.lower, spaces):
            raise UserError(f"{repo} is not yours to write to: put one of {', '.join(spaces)} before the slash")
        _check_visibility(repo, private=private)
    except UserError:
        raise
    except Exception as error:  # of the hub, or of whatever library talks to it
        raise _failed(repo, error, "type the same again when it answers, or leave the upload out") from error


def push(folder: Path, repo: str, *, private: bool = True) -> str:
    """Uploads all files of a folder in one commit; the repository is made if it is not there.

    Files that an earlier commit put there under other names stay.

    Args:
        folder: an export.
        repo: user/name.
        private: whether nobody else may see it. A repository that is there already keeps what it is.

    Returns:
        The repository's address.

    Raises:
        UserError: as `check_name` and `check_login`, or the upload broke off; the folder stays as it is.
    """
    check_name(repo)
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    additions = [
        CommitOperationAdd(path_in_repo=file.relative_to(folder).as_posix(), path_or_fileobj=file) for file in files
    ]
    hub = HfApi()
    try:
        url = hub.create_repo(repo, private=private, exist_ok=True)
        _check_visibility(repo, private=private)
        # Not upload_folder, which leaves some files out and may make several commits.
        hub.create_commit(repo, additions, commit_message=f"Upload {folder.resolve().name} exported by fcmae")
    except UserError:
        raise
    except Exception as error:  # of the hub, or of whatever library talks to it
        command = f"hf upload {repo} {shlex.quote(str(folder))} .{' --private' if private else ''}"
        raise _failed(repo, error, f"the export is whole, `{command}` uploads it") from error
    return str(url)


def _check_visibility(repo: str, *, private: bool) -> None:
    """`create_repo` takes a public repository for good that should be private."""
    try:
        public = not HfApi().model_info(repo, timeout=constants.HF_HUB_ETAG_TIMEOUT).private
    except RepositoryNotFoundError:
        return
    if private and public:
        raise UserError(
            f"{repo} is there already and everybody can see it: give another name, or push with private=false"
        )


def _failed(repo: str, error: Exception, fix: str) -> UserError:
    if isinstance(error, LocalTokenNotFoundError):
        return UserError(f"{repo} can be written to only with a token, and there is none: {LOG_IN}")
    answer = next((cause for cause in causes(error) if isinstance(cause, HfHubHTTPError)), None)
    status = answer.response.status_code if answer else None
    if status == 401:
        return UserError(f"{constants.ENDPOINT} does not accept your token for {repo}: {LOG_IN}")
    if status == 403 or isinstance(answer, RepositoryNotFoundError):
        return UserError(f"your token may not write to {repo}: {_write_access()}")
    return UserError(f"{repo} could not be pushed to {constants.ENDPOINT} ({first_line(error)}): {fix}")


def _write_access() -> str:
    return f"take one with write access ({constants.ENDPOINT}/settings/tokens), or another user's name"
