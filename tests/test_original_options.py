"""Command lines of the original implementation are told in our words, and these are right."""

import re
import sys
from pathlib import Path

import pytest

from fcmae.command_line.launch import compose
from fcmae.command_line.original_options import otherwise, renamed, translate

PAGE = (Path(__file__).parents[1] / "docs" / "from_the_original.md").read_text()
VALUES = {"model": "convnextv2_atto", "layer_decay_type": "group", "aa": "rand-m9-mstd0.5-inc1"}
OURS = {"pretrain": [], "finetune": ["checkpoint=x", "data.path=x", "+model=tiny"]}


@pytest.mark.parametrize(("verb", "name"), [(verb, name) for verb in OURS for name in renamed(verb)])
def test_every_name_is_an_option_of_ours(verb: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["x"])
    options, notes = translate(verb, [f"--{name}", VALUES.get(name, "1")])
    assert not notes
    model = [] if name == "model" else ["+model=atto"]
    given = {option.partition("=")[0] for option in options}
    beside = [option for option in OURS[verb] if option.partition("=")[0] not in given and "model" not in option]
    config = compose(verb, [*model, *beside, *options])
    key, _, value = options[-1].partition("=")
    node = config
    for part in key.removeprefix("+").split("."):
        node = node[part]
    assert (node.size if name == "model" else str(node)) == value


def test_the_page_says_the_same() -> None:
    rows = re.findall(r"^\| `--(\w+)` \| (.*) \| (.*) \|$", PAGE, re.MULTILINE)
    for column, verb in ((1, "pretrain"), (2, "finetune")):
        assert {row[0]: row[column].strip("`") for row in rows if row[column]} == renamed(verb)
    notes = re.findall(r"^\| `--(\w+)` \| ([^|]*) \|$", PAGE, re.MULTILINE)
    assert {name: note.replace("`", "") for name, note in notes} == otherwise()


@pytest.mark.parametrize(
    ("typed", "options", "notes"),
    [
        (["--model", "convnextv2_atto", "--epochs=3"], ["+model=atto", "epochs=3"], []),
        (["--batch-size", "8", "seed=1"], ["data.batch_size=8", "seed=1"], []),
        (["--norm_pix_loss", "--blr", "1e-4"], ["optim.base_lr=1e-4"], ["--norm_pix_loss: it is the default; .*"]),
        (["--lr", "1e-4"], [], ["--lr: give optim.base_lr=, the rate per 256 images of a step"]),
        (["--blurr", "--epochs"], ["epochs=VALUE"], ["--blurr: is not known here"]),
        (["--world_size", "2", "epochs=3"], ["epochs=3"], ["--world_size: is not known here"]),
    ],
)
def test_what_is_typed_is_translated(typed: list[str], options: list[str], notes: list[str]) -> None:
    found = translate("pretrain", typed)
    assert found.options == options
    assert len(found.notes) == len(notes)
    for note, wanted in zip(found.notes, notes, strict=True):
        assert re.fullmatch(wanted, note)
