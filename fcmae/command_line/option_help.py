"""What `--help` prints: a verb's choices and options, with the comments of the YAML files that they come from."""

import re
import textwrap
from collections.abc import Iterator, Sequence
from math import inf
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from fcmae.command_line.option_hints import choosable, defaults_of, of_another

_WIDTH = 120


class _Known(NamedTuple):
    """What the YAML files say of an option."""

    value: Any
    comment: str


def option_help(config: DictConfig, verb: str) -> str:
    """The help of a verb: the template of its YAML file, filled in.

    Args:
        config: as composed from the command line; its values are told as they are in force, references unresolved.
        verb: entry point, such as `pretrain`.
    """
    composed = HydraConfig.get()
    sources = [Path(source.path) for source in composed.runtime.config_sources if source.schema == "file"]
    folders = [folder for folder in sources if folder.is_dir()]  # first our own, then those of the user
    file = _found(folders, f"{composed.job.config_name}.yaml")
    known = _read(file) if file else {}
    for group, choice in composed.runtime.choices.items():
        name, _, package = str(group).partition("@")
        chosen = _found(folders, f"{name}/{choice}.yaml")
        if chosen and not chosen.read_text(encoding="utf-8").startswith("# @package"):  # whose values are others' keys
            prefix = package or name.replace("/", ".")
            known |= _read(chosen, prefix)
            known[prefix] = _Known(None, _joined(choice, known[prefix].comment))
    plain: Any = OmegaConf.to_container(config, resolve=False)
    return Template(composed.help.template).safe_substitute(
        APP_CONFIG_GROUPS="\n".join([*_choices(folders, file, verb), ""]) if file else "",
        CONFIG="\n".join(_options(plain, known)),
    )


def _found(folders: Sequence[Path], name: str) -> Path | None:
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


def _read(file: Path, prefix: str = "") -> dict[str, _Known]:
    """What a file, and those beside it that it is made from, say of each option; at the prefix itself, of the file."""
    known: dict[str, _Known] = {}
    for entry in filter(lambda entry: isinstance(entry, str), defaults_of(file)):
        name, _, package = entry.partition("@")
        base = file.parent / f"{name}.yaml"
        if base.is_file():
            known |= _read(base, package or prefix)
    comments = _comments(file.read_text(encoding="utf-8"))

    def add(node: Any, at: str) -> None:
        name = f"{prefix}.{at}".strip(".")
        before = known[name].comment if at and name in known else ""
        known[name] = _Known(node, comments.get(at) or before)
        for key, value in node.items() if isinstance(node, dict) else ():
            add(value, f"{at}.{key}".lstrip("."))

    add(OmegaConf.to_container(OmegaConf.load(file), resolve=False), "")
    return known


def _comments(text: str) -> dict[str, str]:
    """The comments of a YAML file, behind or above the key `a.b` or the default `group`; at its top, of the file."""
    found: dict[str, str] = {}
    above: list[str] = []
    path: list[str] = []
    for line in text.splitlines():
        if line.lstrip().startswith("#"):
            above.append(line.lstrip(" #"))
            continue
        if not path and above and not found:
            found[""], above = " ".join(above), []
        if entry := re.match(r"( *)(\w+):", line):
            path[len(entry[1]) // 2 :] = [entry[2]]
            name = ".".join(path)
        elif entry := re.match(r" *- (?:\w+@)?(\w+)\b", line):  # of the defaults list
            name = entry[1]
        if entry and (comment := " ".join([*above, line.partition(" # ")[2]]).strip()):
            found[name] = comment
        above = []
    return found


def _choices(folders: Sequence[Path], file: Path, verb: str) -> Iterator[str]:
    """A line for each group that one may choose from: ours that this verb takes, and all of the user's."""
    takes, comments = choosable(file), _comments(file.read_text(encoding="utf-8"))
    own = {path.name for folder in folders[1:] for path in folder.iterdir() if path.is_dir()}
    for group in sorted(takes | own - {"hydra"}):
        files = [path for folder in folders[group not in takes :] for path in (folder / group).glob("*.yaml")]
        names = sorted({path.stem for path in files if not path.stem.startswith("_")})
        names = [name for name in names if not of_another(verb, group, name)]
        if names:
            yield from _commented(f"{group}: {', '.join(names)}", comments.get(group, ""))


def _options(node: dict[str, Any], known: dict[str, _Known], prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        name = f"{prefix}.{key}".lstrip(".")
        branch = isinstance(value, dict) and value
        said = known.get(name, _Known(value, ""))
        changed = not branch and said.value not in (value, "???") and "${" not in str(said.value)
        comment = _joined(f"default {_shown(said.value)}", said.comment) if changed else said.comment
        yield from _commented("  " * name.count(".") + f"{key}:" + ("" if branch else f" {_shown(value)}"), comment)
        if branch:
            yield from _options(value, known, name)


def _shown(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=inf, allow_unicode=True).removesuffix("...\n").strip()


def _joined(what: str, comment: str) -> str:
    return f"{what}: {comment}" if comment else what


def _commented(line: str, comment: str) -> list[str]:
    """A line with its comment behind it if there is room, else above it."""
    if comment and len(f"{line} # {comment}") <= _WIDTH:
        return [f"{line} # {comment}"]
    indent = line[: len(line) - len(line.lstrip())]
    return [*_wrapped(comment, f"{indent}# ", f"{indent}# "), *_wrapped(line.lstrip(), indent, f"{indent}  ")]


def _wrapped(text: str, first: str, others: str) -> list[str]:
    return textwrap.wrap(
        text, _WIDTH, initial_indent=first, subsequent_indent=others, break_long_words=False, break_on_hyphens=False
    )
