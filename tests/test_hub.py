"""What comes from the hub is what the hub has, or one line says what to do; what is pushed arrives whole."""

import errno
import hashlib
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from fake_hub import FakeHub
from huggingface_hub import constants, file_download
from huggingface_hub.utils import close_session, disable_progress_bars, enable_progress_bars
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save
from timm.models.convnext import ConvNeXt

from fcmae import UserError
from fcmae.checkpoints.hub import Fetched, fetch, known_license
from fcmae.checkpoints.weights import read_weights
from fcmae.conversion.push import check_login, check_name, push

WEIGHTS, CARD = b"weights of a network" * 5000, b"---\nlicense: mit\n---\n# Card\n"
FILES = {"model.safetensors": WEIGHTS, "config.json": b"{}", "README.md": CARD}
NAME = "hf-hub:ada/net"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub which this process takes for the only one, nobody logged in; and a cache with nothing in it."""
    with FakeHub() as hub:
        # huggingface_hub has read its environment already.
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(tmp_path / "tokens"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        for name in ("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY"):
            monkeypatch.setattr(constants, name, True)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between its tries
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        close_session()  # it knows the proxies of earlier tests
        disable_progress_bars()
        hub.add("ada/net", FILES)
        yield hub
    enable_progress_bars()
    close_session()


@pytest.fixture
def log_in(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def log_in(**account: Any) -> None:
        monkeypatch.setenv("HF_TOKEN", "hf_ada")
        hub.log_in("hf_ada", "ada", **account)

    return log_in


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An export."""
    files = {
        **FILES,
        "fcmae.json": b'{"format": 1}',
        ".hidden": b"",
        "onnx/model.onnx": b"\0" * 999,
        "usage.py": b"net",
    }
    for name, content in files.items():
        file = tmp_path / "export" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return tmp_path / "export"


def refusal(call: Callable[[], Any]) -> str:
    """The one line of the UserError that it raises."""
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def content(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def no_network(hub: FakeHub, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if how == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif how == "refused":
        hub.__exit__()
    else:
        hub.faults["main"] = ["503"] * 99


# --- downloads


def test_weights_come_with_what_describes_them_and_nothing_else(hub):
    others = {"tf_model.h5": b"h5", "pytorch_model.bin": b"old", "onnx/model.onnx": b"onnx"}
    described = {"preprocessor_config.json": b"{}", "fcmae.json": b"{}"}
    commit = hub.add("ada/net", {**FILES, **others, **described})
    found = fetch(NAME)
    assert content(found.folder) == {**FILES, **described}
    assert found == Fetched(
        folder=found.weights.parent,
        weights=found.folder / "model.safetensors",
        repo="ada/net",
        revision=commit,
        license="mit",
        sha256=sha256(WEIGHTS),
    )


def test_older_weights_where_there_are_no_others(hub):
    hub.add("ada/net", {"pytorch_model.bin": WEIGHTS, "tf_model.h5": b"h5"})
    found = fetch(NAME)
    assert (found.weights.name, content(found.folder)) == ("pytorch_model.bin", {"pytorch_model.bin": WEIGHTS})


@pytest.mark.parametrize("how", ["online", "offline"])
def test_a_commit_stays_what_it_was(hub, how, monkeypatch):
    old = hub.repos["ada/net"].head
    hub.add("ada/net", {"model.safetensors": b"new"})
    for name, weights in ((NAME, b"new"), (f"{NAME}@{old}", WEIGHTS)):
        assert fetch(name).weights.read_bytes() == weights
    if how == "offline":
        no_network(hub, how, monkeypatch)
    assert (fetch(f"{NAME}@{old}").revision, fetch(NAME).revision) == (old, hub.repos["ada/net"].head)


@pytest.mark.parametrize("how", ["offline", "refused", "503"])
def test_what_was_fetched_needs_no_network(hub, how, monkeypatch):
    first = fetch(NAME)
    no_network(hub, how, monkeypatch)
    assert fetch(NAME) == first
    assert hub.count("GET", sha256(WEIGHTS)) == 1


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_weights_are_read_by_their_name_on_the_hub(hub, file, randomise):
    net = randomise(ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 16, 32, 64), use_grn=True, ls_init_value=None))
    stream = io.BytesIO()
    torch.save(net.state_dict(), stream)
    hub.add("ada/net", {file: save(net.state_dict()) if "safe" in file else stream.getvalue()})
    read = read_weights(NAME).weights
    assert read.keys() == net.state_dict().keys()
    assert all(torch.equal(value, read[name]) for name, value in net.state_dict().items())


def test_a_broken_connection_is_taken_up_again(hub, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # what has come of a chunk, 10 MiB else, is lost
    hub.faults[sha256(WEIGHTS)] = ["cut"]
    assert fetch(NAME).weights.read_bytes() == WEIGHTS
    ranges = [part for method, path, part in hub.requests if method == "GET" and path.startswith("/cdn")]
    assert ranges == ["", f"bytes={len(WEIGHTS) // 2}-"]


@pytest.mark.parametrize("links", [True, False])
def test_other_bytes_than_the_hub_has_are_refused_and_removed(hub, links, monkeypatch):
    if not links:
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS", True)
        monkeypatch.setattr(file_download, "_are_symlinks_supported_in_dir", {})
    hub.faults[sha256(WEIGHTS)] = ["other"]
    said = refusal(lambda: fetch(NAME))
    other = sha256(bytes(255 - byte for byte in WEIGHTS))
    assert said == (
        f"model.safetensors of hf-hub:ada/net is damaged, its SHA-256 is {other[:12]}... and not "
        f"{sha256(WEIGHTS)[:12]}...: it is removed again, type the same again to fetch it anew"
    )
    assert not [file for file in Path(constants.HF_HUB_CACHE).rglob("*") if file.name in ("model.safetensors", other)]
    found = fetch(NAME)
    assert (found.weights.is_symlink(), found.weights.read_bytes()) == (links, WEIGHTS)


@pytest.mark.parametrize("how", ["online", "offline"])
def test_a_file_that_was_damaged_in_the_cache_is_noticed(hub, how, monkeypatch, tmp_path):
    weights = fetch(NAME).weights
    blob = weights.parent / weights.readlink()
    shared = blob.rename(tmp_path / "shared")  # where repositories share a blob, it is a link itself
    blob.symlink_to(shared)
    shared.write_bytes(WEIGHTS[:-1] + b"?")
    if how == "offline":
        no_network(hub, how, monkeypatch)
    assert "is damaged" in refusal(lambda: fetch(NAME))
    assert not any(path.is_symlink() or path.exists() for path in (weights, blob, shared))
    if how == "offline":
        assert "is not in the cache" in refusal(lambda: fetch(NAME))
    else:
        assert fetch(NAME).weights.read_bytes() == WEIGHTS


def test_names_of_timm(hub):
    hub.add("timm/convnextv2_tiny.fcmae", FILES)
    found = fetch("timm:convnextv2_tiny.fcmae")
    assert (found.repo, found.license) == ("timm/convnextv2_tiny.fcmae", "cc-by-nc-4.0")
    assert "convnextv2_tiny.fcmae, " in refusal(lambda: fetch("timm:convnextv2_tinny.fcmae"))
    for name in ("convnextv2_small", "resnet18.a1_in1k", "", "convnextv2_tiny.fcmae@main"):
        assert refusal(lambda name=name: fetch(f"timm:{name}")).startswith(f"timm:{name} is no ConvNeXt V2")


def test_the_environment_counts(hub, tmp_path):
    """The same in another process, to which the hub's usual variables are all there is."""
    own = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))}
    own |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "TQDM_POSITION": "-1"}  # a bar for no terminal
    code = f"from fcmae.checkpoints.hub import fetch\nprint(fetch({NAME!r}).folder)"
    ran = subprocess.run([sys.executable, "-c", code], env=own, capture_output=True, text=True)
    assert not ran.returncode, ran.stderr
    found = Path(ran.stdout.strip())
    assert found.is_relative_to(tmp_path / "home")
    assert content(found) == FILES
    assert "100%" in ran.stderr


# --- what is said of downloads that cannot be


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("hf-hub:ada", "'ada' is no name on the hub: write hf-hub:user/name or hf-hub:user/name@revision, of letters"),
        ("hf-hub:a b/c", "'a b/c' is no name on the hub: write"),
        ("hf-hub:ada/net/more", "'ada/net/more' is no name on the hub: write"),
        ("hf-hub:../../etc", "is no name on the hub"),
        ("hf-hub:ada/net@", "'hf-hub:ada/net@' is no name on the hub: write hf-hub:user/name"),
        ("hf-hub:ada/nett", "hf-hub:ada/nett is not on {url} or is private: check the spelling, or log in (hf auth"),
        ("hf-hub:ada/net@v1", "hf-hub:ada/net has no revision v1: check the spelling at {url}/ada/net/commits/main"),
        ("hf-hub:ada/secret", "hf-hub:ada/secret is not on {url} or is private"),
        ("hf-hub:ada/gated", "hf-hub:ada/gated is gated: accept its terms at {url}/ada/gated, then log in (hf auth"),
        ("hf-hub:ada/bare", "hf-hub:ada/bare has none of model.safetensors, "),
    ],
)
def test_what_is_not_there_or_not_for_everybody(hub, name, said):
    hub.add("ada/secret", FILES, seen_by="owner")
    hub.add("ada/gated", FILES, seen_by="accepted")
    hub.add("ada/bare", {"README.md": CARD, "model-00001-of-00002.safetensors": WEIGHTS})
    assert said.format(url=hub.url) in refusal(lambda: fetch(name))
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.incomplete"))


@pytest.mark.parametrize("name", ["ada/secret", "ada/gated"])
def test_who_is_logged_in_may_read(hub, log_in, name):
    hub.add(name, FILES, seen_by="owner" if name == "ada/secret" else "accepted")
    log_in()
    assert fetch(f"hf-hub:{name}").weights.read_bytes() == WEIGHTS


def test_a_token_that_is_no_good(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_old")
    hub.faults["main"] = ["401"]
    assert "hf-hub:ada/net may not be read with your token" in refusal(lambda: fetch(NAME))


@pytest.mark.parametrize(
    ("how", "why"), [("offline", "HF_HUB_OFFLINE is set"), ("refused", "Connection refused"), ("503", "503")]
)
def test_no_network_and_nothing_in_the_cache(hub, how, why, monkeypatch):
    no_network(hub, how, monkeypatch)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it waits, and then tries again"))
    said = refusal(lambda: fetch(NAME))
    assert said.startswith(
        f"hf-hub:ada/net (revision main) is not in the cache, and {hub.url} cannot be asked for it ("
    )
    assert why in said
    assert (
        f"preprocessor_config.json and README.md of {hub.url}/ada/net/tree/main, as far as they are there, by hand"
        in said
    )
    assert said.endswith("init=ada--net")


def test_a_download_that_never_ends_well(hub):
    hub.faults[sha256(WEIGHTS)] = ["503"]
    assert "model.safetensors" not in content(Path(constants.HF_HUB_CACHE))
    assert "hf-hub:ada/net could not be fetched (Server error '503" in refusal(lambda: fetch(NAME))
    hub.faults[sha256(WEIGHTS)] = ["cut"] * 99
    assert f"model.safetensors of hf-hub:ada/net could not be fetched from {hub.url} (" in refusal(lambda: fetch(NAME))
    hub.faults.clear()
    assert fetch(NAME).weights.read_bytes() == WEIGHTS


def test_a_full_disk(hub, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(file_download, "http_get", full)
    said = refusal(lambda: fetch(NAME))
    assert said == (
        f"model.safetensors of hf-hub:ada/net cannot be written to {constants.HF_HUB_CACHE} (No space left on device): "
        "free space or mend permissions there, or set HF_HOME to another folder"
    )


# --- licences


@pytest.mark.parametrize(
    ("card", "config", "license"),
    [
        (CARD, {"pretrained_cfg": {"license": "apache-2.0"}}, "mit"),
        (b"# No front matter", {"pretrained_cfg": {"license": "apache-2.0"}}, "apache-2.0"),
        (b"---\n: [broken\n---\n", {"pretrained_cfg": {"license": "apache-2.0"}}, "apache-2.0"),
        (b"---\n- a list\n---\n", {}, None),
        (b"\xff\xfe", [], None),
        (None, {"pretrained_cfg": None}, None),
    ],
)
def test_the_licence_is_what_the_card_says_else_timm(hub, card, config, license):
    files = {"model.safetensors": WEIGHTS, "config.json": json.dumps(config).encode()}
    hub.add("ada/net", files | ({"README.md": card} if card else {}))
    assert fetch(NAME).license == license


def test_the_authors_licence_holds_wherever_their_weights_are_copied_to(hub):
    hub.add("facebook/convnextv2-tiny-1k-224", {**FILES, "README.md": b"---\nlicense: apache-2.0\n---\n"})
    assert fetch("hf-hub:facebook/convnextv2-tiny-1k-224").license == "cc-by-nc-4.0"
    for name in timm.list_pretrained("convnextv2*"):
        config = timm.get_pretrained_cfg(name)
        for known in (config.hf_hub_id, config.url.rpartition("/")[2]):
            assert known_license(known) == config.license == "cc-by-nc-4.0"
    for other in ("ada/convnextv2_tiny.fcmae", "facebook/convnext-tiny-224", "timm/convnext_tiny.in12k", "model.pth"):
        assert known_license(other) is None


# --- uploads


def test_what_is_pushed_comes_back(hub, log_in, folder):
    log_in()
    check_login("ada/mine")
    assert "ada/mine" not in hub.repos
    assert push(folder, "ada/mine") == f"{hub.url}/ada/mine"
    repo = hub.repos["ada/mine"]
    assert repo.commits[repo.head] == content(folder)
    assert repo.messages == ["Upload export exported by fcmae"]
    assert repo.seen_by == "owner"
    found = fetch("hf-hub:ada/mine")
    assert found.revision == repo.head
    assert content(found.folder).items() <= content(folder).items()
    assert found.sha256 == sha256((folder / "model.safetensors").read_bytes())


def test_pushed_once_more(hub, log_in, folder):
    log_in(orgs=("lab",))
    push(folder, "lab/net", private=False)
    (folder / "model.safetensors").write_bytes(b"better")
    check_login("lab/net", private=False)
    push(folder, "lab/net", private=False)
    repo = hub.repos["lab/net"]
    assert (len(repo.commits), repo.seen_by) == (2, "all")
    assert repo.commits[repo.head] == content(folder)


def test_nothing_private_goes_to_a_public_place(hub, log_in, folder):
    log_in()
    before = hub.repos["ada/net"].head
    for call in (lambda: check_login("ada/net"), lambda: push(folder, "ada/net")):
        assert refusal(call).startswith("ada/net is there already and everybody can see it: give another name")
    assert hub.repos["ada/net"].head == before


@pytest.mark.parametrize(
    "repo", ["mine", "a/b/c", "ada/a b", "ada/net@main", "hf-hub:ada/net", "ada/", "/net", "", "."]
)
def test_names_that_cannot_be_pushed_to(hub, folder, repo):
    assert refusal(lambda: check_name(repo)) == refusal(lambda: push(folder, repo))
    assert not hub.requests


@given(st.text(max_size=20) | st.from_regex(r"[\w.-]{1,5}(/[\w.-]{1,5})?", fullmatch=True))
def test_a_name_is_taken_or_refused_in_one_line(name):
    try:
        check_name(name)
    except UserError as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017
    else:
        assert all(part.isascii() and part.strip("./") for part in name.split("/", 1))


def test_nobody_is_logged_in(hub, folder):
    for call in (lambda: check_login("ada/mine"), lambda: push(folder, "ada/mine")):
        said = refusal(call)
        assert "log in (hf auth login, or set HF_TOKEN)" in said
        assert "token" in said
    assert list(hub.repos) == ["ada/net"]


@pytest.mark.parametrize(
    ("account", "repo", "said"),
    [
        (
            {"role": "read"},
            "ada/mine",
            "your token may only read, which is not enough for ada/mine: take one with write",
        ),
        ({"orgs": ("lab",)}, "bob/net", "bob/net is not yours to write to: put one of ada, lab before the slash"),
    ],
)
def test_a_token_that_may_not_write(hub, log_in, folder, account, repo, said):
    log_in(**account)
    assert refusal(lambda: check_login(repo)).startswith(said)
    assert refusal(lambda: push(folder, repo)).startswith(f"your token may not write to {repo}: take one with write")
    assert repo not in hub.repos


def test_a_token_that_nobody_knows(hub, folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_old")
    for call in (lambda: check_login("ada/mine"), lambda: push(folder, "ada/mine")):
        assert refusal(call).startswith(f"{hub.url} does not accept your token for ada/mine: log in")


@pytest.mark.parametrize("how", ["offline", "refused"])
def test_no_network_to_push(hub, log_in, folder, how, monkeypatch):
    log_in()
    no_network(hub, how, monkeypatch)
    why = "HF_HUB_OFFLINE is set" if how == "offline" else "[Errno 111] Connection refused"
    before = f"ada/mine could not be pushed to {hub.url} ({why}): "
    assert refusal(lambda: check_login("ada/mine")).startswith(f"{before}type the same again when it answers")
    again = f"the export is whole, `hf upload ada/mine {folder} . --private` uploads it"
    assert refusal(lambda: push(folder, "ada/mine")) == before + again


@pytest.mark.parametrize("place", ["main", "batch", sha256(WEIGHTS)])
def test_an_upload_that_breaks_off_leaves_no_commit(hub, log_in, folder, place):
    log_in()
    hub.storage.clear()
    hub.faults[place] = ["503"] * 99
    assert "503" in refusal(lambda: push(folder, "ada/mine"))
    assert not hub.repos["ada/mine"].commits
    hub.faults.clear()
    push(folder, "ada/mine")
    assert hub.repos["ada/mine"].commits[hub.repos["ada/mine"].head] == content(folder)
