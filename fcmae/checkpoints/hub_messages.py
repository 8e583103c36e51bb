"""What there is to say of names on the Hugging Face hub, and of what fails on the way to it."""

import errno
from collections.abc import Iterator

from huggingface_hub import constants
from huggingface_hub.utils import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    validate_repo_id,
)

from fcmae.errors import UserError

LOG_IN = "log in (hf auth login, or set HF_TOKEN)"
_LOCAL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


def check_repo(name: str, *, example: str) -> None:
    """Refuses what is no user/name of the hub.

    Raises:
        UserError: says what a name looks like.
    """
    try:
        validate_repo_id(name)
        valid = "/" in name and name.isascii()  # the library needs no user, and older ones no ASCII
    except HFValidationError:
        valid = False
    if not valid:
        raise UserError(f"{name!r} is no name on the hub: write {example}, of letters, digits and single -, _ or .")


def causes(error: BaseException) -> Iterator[BaseException]:
    """An exception, and what it was raised from, and so on; the hub's library wraps some twice."""
    yield error
    if error.__cause__ is not None:
        yield from causes(error.__cause__)


def first_line(error: BaseException) -> str:
    """What happened, in short: the first line of the innermost cause's message, or else its name."""
    *_, innermost = causes(error)
    if isinstance(innermost, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    lines = str(innermost).strip().splitlines() or [type(innermost).__name__]
    return lines[0].partition(" for url")[0].strip(" .")


def unreachable(repo: str, revision: str, reason: str) -> UserError:
    """For when the hub does not answer and nothing is cached: how to do without it."""
    page = f"{constants.ENDPOINT}/{repo}/tree/{revision}"
    unset, folder = "unset that, or " if constants.HF_HUB_OFFLINE else "", repo.replace("/", "--")
    return UserError(
        f"hf-hub:{repo} (revision {revision}) is not in the cache, and {constants.ENDPOINT} cannot be asked for it "
        f"({reason}): {unset}fetch model.safetensors, config.json, preprocessor_config.json and README.md of {page}, "
        f"as far as they are there, by hand into a folder {folder}, and give that in place of the name, as in "
        f"init={folder}"
    )


def failed(repo: str, revision: str, file: str, error: Exception) -> UserError:
    """For an error of the disk, of the hub, or of whatever library talks to it."""
    if isinstance(error, HfHubHTTPError) and not isinstance(error, LocalEntryNotFoundError):
        return refused(repo, revision, error)
    what = f"{file} of hf-hub:{repo}"
    if isinstance(error, OSError) and error.errno in _LOCAL:
        return UserError(
            f"{what} cannot be written to {constants.HF_HUB_CACHE} ({error.strerror}): free space or mend permissions "
            "there, or set HF_HOME to another folder"
        )
    return UserError(
        f"{what} could not be fetched from {constants.ENDPOINT} ({first_line(error)}): type the same again"
    )


def refused(repo: str, revision: str, error: HfHubHTTPError) -> UserError:
    """For the hub's answer that somebody must not, or cannot, have what was asked for."""
    page, status = f"{constants.ENDPOINT}/{repo}", error.response.status_code
    if isinstance(error, GatedRepoError):
        return UserError(f"hf-hub:{repo} is gated: accept its terms at {page}, then {LOG_IN}")
    if isinstance(error, RevisionNotFoundError):
        return UserError(f"hf-hub:{repo} has no revision {revision}: check the spelling at {page}/commits/main")
    if isinstance(error, RepositoryNotFoundError) or status == 404:
        return UserError(f"hf-hub:{repo} is not on {constants.ENDPOINT} or is private: check the spelling, or {LOG_IN}")
    if status in (401, 403):
        return UserError(f"hf-hub:{repo} may not be read with your token ({first_line(error)}): {LOG_IN}")
    return UserError(f"hf-hub:{repo} could not be fetched ({first_line(error)}): type the same again later")
