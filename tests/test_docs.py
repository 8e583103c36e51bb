"""What the pages tell to type is at least composed; README's commands are run, in test_readme.py."""

import re
import shlex
from pathlib import Path

import pytest

from fcmae.command_line.launch import compose

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("docs/*.md"), ROOT / "docker" / "README.md", ROOT / "CHANGELOG.md", *ROOT.glob("scripts/*.slurm")]
COMMAND = re.compile(r"(?:scripts/|-m fcmae\.)(pretrain|finetune)(?:\.slurm)? ((?:[^\n`#\\]|\\\n)+)")
TYPED = sorted({found for page in PAGES for found in COMMAND.findall(page.read_text()) if "..." not in found[1]})


def test_there_are_commands() -> None:
    assert len(TYPED) > 10


@pytest.mark.parametrize(("verb", "words"), TYPED)
def test_commands_of_all_pages_compose(verb: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as Hydra; what they name need not be there."""
    monkeypatch.setattr("sys.argv", ["fcmae"])
    several = "-m hydra/" in words or " -m " in f" {words}"
    arguments = [word for word in shlex.split(words.replace("\\\n", " ")) if "=" in word]
    if several:  # each point of a sweep by itself
        arguments = [f"{key}={value.split(',')[0]}" for key, _, value in (word.partition("=") for word in arguments)]
    compose(verb, [argument for argument in arguments if not argument.startswith("hydra")])
