"""Weights from the Hugging Face hub: fetched once, compared with the hub's checksum, kept in its own cache."""

import contextlib
import difflib
import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path

import timm
import yaml
from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_url, metadata_load
from huggingface_hub.utils import EntryNotFoundError, HfHubHTTPError

from fcmae.checkpoints.descriptions import is_license
from fcmae.checkpoints.hub_messages import check_repo, failed, first_line, refused, unreachable
from fcmae.checkpoints.lineage import binding, sha256
from fcmae.checkpoints.names import WEIGHT_FILES
from fcmae.errors import UserError

log = logging.getLogger(__name__)

_BESIDE = ("config.json", "preprocessor_config.json", "fcmae.json", "README.md")
_LATER = (408, 429)  # HTTP's answers, beside all from 500 on, that another day's may differ from

# The authors give their weights away under CC-BY-NC 4.0 (README of facebookresearch/ConvNeXt-V2), and timm says so.
# The cards of Hugging Face's copies, facebook/convnextv2-*, say Apache 2.0.
_AUTHORS_LICENSE = "cc-by-nc-4.0"
_AUTHORS_WEIGHTS = re.compile(
    r"facebook/convnextv2-.+|timm/convnextv2_.+|convnextv2_[a-z]+_(1k|22k)_\d+_(fcmae|ema)\b.*"
)


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """What was fetched of a repository on the hub.

    Attributes:
        folder: holds `weights` and, as far as the repository has them, config.json, preprocessor_config.json,
            fcmae.json and README.md. It belongs to the hub's cache: nothing in it may be changed.
        weights: the file in it with the weights.
        repo: user/name.
        revision: the commit.
        license: of the weights, if it is known; see `known_license`, the card, timm's config.json.
        sha256: of the weights, in hexadecimal digits.
    """

    folder: Path
    weights: Path
    repo: str
    revision: str
    license: str | None
    sha256: str


def fetch(name: str) -> Fetched:
    """Weights and what describes them, from the hub or, once they were fetched, from its cache, also without network.

    HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE do what they do everywhere.

    Args:
        name: `hf-hub:user/name` or `hf-hub:user/name@revision`, as timm writes it; or `timm:` and a model of timm's
            with its tag, `timm:convnextv2_tiny.fcmae`.

    Raises:
        UserError: no such name or revision, not for everybody, no weights there, no network, a full disk; or other
            bytes came than the hub has, which are removed again.
    """
    repo, revision = _locate(name)
    listed, reason = _listing(repo, revision)
    for candidate in WEIGHT_FILES if listed is None else [file for file in WEIGHT_FILES if file in listed]:
        if weights := _download(repo, revision, candidate, cached=listed is None):
            break
    else:
        if listed is None:
            raise unreachable(repo, revision, reason)
        raise UserError(
            f"hf-hub:{repo} has none of {', '.join(WEIGHT_FILES)} (revision {revision}): name a repository with the "
            "weights of one network of PyTorch"
        )
    checksum = _check(weights, repo, online=listed is not None)
    commit = weights.parent.name
    for file in _BESIDE:
        if listed is None or file in listed:
            _download(repo, commit, file, cached=listed is None)
    license = binding([known_license(repo), stated_license(weights.parent)])
    log.warning("hf-hub:%s: licence %s", repo, license or "not stated")
    return Fetched(
        folder=weights.parent,
        weights=weights,
        repo=repo,
        revision=commit,
        license=license,
        sha256=checksum,
    )


def known_license(name: str) -> str | None:
    """The licence of the authors' weights, whatever the place says that they were copied to; None for all others.

    Args:
        name: of a repository on the hub, or of a file: `facebook/convnextv2-tiny-1k-224`,
            `convnextv2_tiny_1k_224_fcmae.pt`.
    """
    return _AUTHORS_LICENSE if _AUTHORS_WEIGHTS.fullmatch(name.lower()) else None


def _locate(name: str) -> tuple[str, str]:
    """Repository and revision."""
    source, _, given = name.partition(":")
    if source == "timm":
        return _timm_repo(given), constants.DEFAULT_REVISION
    repo, at, revision = given.partition("@")
    example = "hf-hub:user/name or hf-hub:user/name@revision"
    if source != "hf-hub" or (at and not revision):
        raise UserError(f"{name!r} is no name on the hub: write {example}, or timm:convnextv2_tiny.fcmae")
    check_repo(repo, example=example)
    return repo, revision or constants.DEFAULT_REVISION


def _timm_repo(model: str) -> str:
    known = timm.list_pretrained("convnextv2*")
    with contextlib.suppress(RuntimeError):  # no such tag
        config = timm.get_pretrained_cfg(model)
        if model.startswith("convnextv2_") and config and config.hf_hub_id:
            return str(config.hf_hub_id)
    near = difflib.get_close_matches(model, known, n=3) or known[:3]
    raise UserError(f"timm:{model} is no ConvNeXt V2 with weights that timm knows: it has {', '.join(near)}, ...")


def _listing(repo: str, revision: str) -> tuple[set[str] | None, str]:
    """The repository's files; or None, and why the hub does not answer.

    Asked once: `hf_hub_download` alone tries for half a minute before it says that there is no network.
    """
    try:
        found = HfApi().model_info(repo, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except HfHubHTTPError as error:
        if error.response.status_code >= 500 or error.response.status_code in _LATER:
            return None, first_line(error)
        raise refused(repo, revision, error) from error
    except Exception as error:  # of whatever library talks to it
        return None, first_line(error)
    return {file.rfilename for file in found.siblings or ()}, ""


def _download(repo: str, revision: str, file: str, *, cached: bool) -> Path | None:
    """The file in the cache, fetched unless it is there; None if, `cached`, it is not there and must not be fetched."""
    try:
        return Path(HfApi().hf_hub_download(repo, file, revision=revision, local_files_only=cached))
    except Exception as error:
        if cached and isinstance(error, EntryNotFoundError):
            return None
        raise failed(repo, revision, file, error) from error


def _check(file: Path, repo: str, *, online: bool) -> str:
    """The checksum of a file in the cache, after comparison with the hub's; one that differs is removed.

    In the cache a file is a link to a blob, which is named by the hub's checksum: SHA-256 for all that is large.
    Where links are not possible the hub is asked again.
    """
    stated = ""
    if file.is_symlink():
        stated = file.readlink().name
    elif online:
        try:
            stated = get_hf_file_metadata(hf_hub_url(repo, file.name, revision=file.parent.name)).etag or ""
        except Exception as error:
            raise failed(repo, file.parent.name, file.name, error) from error
    found = sha256(file)
    if not re.fullmatch("[0-9a-f]{64}", stated) or stated == found:
        return found
    try:
        _remove(file)
        what = "it is removed again, type the same again to fetch it anew"
    except OSError as error:
        what = f"remove {file.resolve()} ({first_line(error)}), then type the same again"
    raise UserError(
        f"{file.name} of hf-hub:{repo} is damaged, its SHA-256 is {found:.12}... and not {stated:.12}...: {what}"
    )


def _remove(file: Path) -> None:
    """A link goes with what it leads to; a blob may itself be a link, to one that repositories share."""
    target = file.parent / file.readlink() if file.is_symlink() else None
    file.unlink(missing_ok=True)
    if target is not None:
        _remove(target)


def stated_license(folder: Path) -> str | None:
    """What card and timm's config.json in a folder say; if the card says what the weights were made from, that too."""
    stated: list[object] = []
    with contextlib.suppress(OSError, ValueError, RecursionError, yaml.YAMLError):  # not there, or damaged
        card = metadata_load(folder / "README.md") or {}
        origins = card.get("base_model")
        stated += [known_license(name) for name in _texts(origins)] + _texts(card.get("license"))
    with contextlib.suppress(OSError, ValueError, RecursionError):
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not any(stated) and isinstance(config, dict) and isinstance(found := config.get("pretrained_cfg"), dict):
            stated.append(found.get("license"))
    return binding([license for license in stated if isinstance(license, str) and is_license(license)])


def _texts(value: object) -> list[str]:
    """One or several, as a card may have them."""
    several = value[:9] if isinstance(value, list) else [value]
    return [text for text in several if isinstance(text, str) and len(text) < 200]
