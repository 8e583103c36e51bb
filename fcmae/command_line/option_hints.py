"""What to say to an option that there is not: which one may be meant, and what has to be chosen before."""

import difflib
import re
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.errors import ConfigCompositionException, MissingConfigException
from omegaconf import OmegaConf

from fcmae.errors import in_a_line

_MEANT = {"lr": "base_lr", "batch": "batch_size", "workers": "num_workers", "size": "image_size"}
"""Usual words for what has another name here."""
_NOT_OF = {"pretrain": "finetune_.*", "finetune": "fcmae|smoke"}
"""Recipes that are another verb's."""


def defaults_of(file: Path) -> list[Any]:
    """A file's defaults list."""
    return list((yaml.safe_load(file.read_text(encoding="utf-8")) or {}).get("defaults", []))


def closest(word: str, known: Collection[str], *, elsewhere: Collection[str] = ()) -> str:
    """`; did you mean …?` when something similar is known, else nothing.

    Args:
        word: as typed.
        known: names that may be meant, in the same place.
        elsewhere: dotted names of other places, meant if they end alike.
    """
    last = word.rpartition(".")[2]
    for end in (last, _MEANT.get(last)):
        alike = [name for name in (*known, *elsewhere) if name.rpartition(".")[2] == end and name != word]
        if alike:  # the model's size and channels follow the data's
            return f"; did you mean {min(alike, key=lambda name: name.startswith('model.'))}?"
    matches = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {matches[0]}?" if matches else ""


def no_choice(group: str, folder: Path) -> str:
    """What to say when a group without a default is not chosen."""
    return f"no {group} is chosen: add +{group}=NAME with one of {', '.join(_choices(group, folder))}"


def groups_of(file: Path) -> set[str]:
    """The config groups in a file's defaults list."""
    names = (str(name) for entry in defaults_of(file) if isinstance(entry, dict) for name in entry)
    return {name.removeprefix("optional ") for name in names if not name.startswith("override ")}


def choosable(file: Path) -> set[str]:
    """The config groups that one may choose from: those in the defaults list that do not follow, and the model."""
    return _parts(file) | groups_of(file) - _following(file).keys()


def keys_of(file: Path) -> set[str]:
    """The names that may stand in a composed configuration, outside of what the groups choose: `a`, `b.c`."""
    body = yaml.safe_load(file.read_text(encoding="utf-8"))
    below = {f"{key}.{name}" for key, value in body.items() if isinstance(value, dict) for name in value}
    return {*body, *below, *_parts(file), *groups_of(file)} - {"defaults", "hydra"}


def of_another(verb: str, group: str, choice: str) -> bool:
    """Whether this is a recipe of another verb."""
    return group == "experiment" and verb in _NOT_OF and bool(re.fullmatch(_NOT_OF[verb], choice))


def other_group(argument: str, verb: str, folder: Path) -> str:
    """What to say to a choice, `group=choice`, in a group that is not for this verb."""
    group, _, choice = argument.removeprefix("+").partition("=")
    file = folder / f"{verb}.yaml"
    if group in _following(file):
        return f"{argument} cannot be chosen, it follows from {_following(file)[group]}: leave it out"
    if group == "trainer" and "device" in keys_of(file):
        instead = "device=cpu takes the CPU" if choice == "cpu" else "device=cuda takes a GPU"
        return f"{argument} is not for fcmae.{verb}: {instead}"
    takes = ", ".join(sorted(choosable(file)))
    return f"{group} is not a group of fcmae.{verb}, which has {takes or 'none: --help lists its options'}"


def unknown_choice(error: MissingConfigException) -> str:
    """What to say when a group has no such choice."""
    wanted = error.missing_cfg_file or ""
    group, _, choice = wanted.rpartition("/")
    options = [option for option in error.options or [] if not option.startswith("_")]
    if not options:
        return in_a_line(error)
    return f"{group}={choice} is not one of {', '.join(options)}{closest(choice, options)}"


def unknown_key(error: Exception, verb: str, folder: Path) -> str:
    """What to say when Hydra cannot place an option, or anything else of the command line is wrong.

    Args:
        error: Hydra's.
        verb: entry point, such as `pretrain`.
        folder: of the YAML files.
    """
    message = str(error)
    found = re.search(r"Could not override '([^']+)'", message)
    if isinstance(error, ConfigCompositionException) and found:
        key = found.group(1)
        typed = {argument.partition("=")[0].lstrip("+") for argument in sys.argv[1:]}
        group, _, name = key.partition(".")
        listed = groups_of(folder / f"{verb}.yaml")
        if group in keys_of(folder / f"{verb}.yaml") and (folder / group).is_dir() and group not in listed | typed:
            return no_choice(group, folder)
        known, chosen = _composed(verb, folder, without=key)
        if key not in known:
            having = _choices(group, folder, with_key=name) if group in chosen and name else []
            if having:
                return f"{group}={chosen[group]} has no {name}: choose {group}={_or(having)}"
            beside = [other for other in known if other.rpartition(".")[0] == key.rpartition(".")[0]]
            return f"{key} is not an option{closest(key, beside, elsewhere=known)}"
    return " ".join(line.strip() for line in message.splitlines() if line.strip())


def _or(choices: Sequence[str]) -> str:
    return " or ".join(filter(None, (", ".join(choices[:-1]), choices[-1])))


def _parts(file: Path) -> set[str]:
    """What a file's defaults list puts somewhere, as `model` of `_autoencoder@model`."""
    return {entry.partition("@")[2] for entry in defaults_of(file) if isinstance(entry, str) and "@" in entry}


def _following(file: Path) -> dict[str, str]:
    """The groups whose choice follows from another's, and that group: `optional demonstration: finetune_${data}`."""
    pairs = [pair for entry in defaults_of(file) if isinstance(entry, dict) for pair in entry.items()]
    found = {str(name).removeprefix("optional "): re.search(r"\$\{(\w+)\}", str(choice)) for name, choice in pairs}
    return {name: match[1] for name, match in found.items() if match}


def _choices(group: str, folder: Path, *, with_key: str | None = None) -> list[str]:
    """The choices of a group, or those that have an option of this name."""
    files = sorted(path for path in (folder / group).glob("*.yaml") if not path.stem.startswith("_"))
    return [
        path.stem for path in files if with_key is None or with_key in yaml.safe_load(path.read_text(encoding="utf-8"))
    ]


def _composed(verb: str, folder: Path, without: str) -> tuple[list[str], dict[str, str]]:
    """The dotted names of all options and the choice of each group, as composed from the other arguments."""
    kept = [
        argument for argument in sys.argv[1:] if "=" in argument and argument.partition("=")[0].lstrip("+~") != without
    ]
    overrides = [argument for argument in kept if not argument.startswith(("hydra", "-"))]
    try:
        with hydra.initialize_config_dir(str(folder), version_base="1.3"):
            config = hydra.compose(verb, overrides=overrides, return_hydra_config=True)
        plain: Any = OmegaConf.to_container(config, resolve=False)
    except Exception:  # another argument is wrong as well; then there is no hint
        return [], {}
    chosen = {str(group): str(choice) for group, choice in plain.pop("hydra")["runtime"]["choices"].items()}

    def walk(node: Any, prefix: str) -> list[str]:
        if not isinstance(node, dict):
            return [prefix]
        return [prefix, *(name for key, value in node.items() for name in walk(value, f"{prefix}.{key}".lstrip(".")))]

    return walk(plain, "")[1:], chosen
