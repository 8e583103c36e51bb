"""What every entry point shares: finding the configs, `+model=tiny` and `model=tiny` alike, and clear errors."""

import contextlib
import errno
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, HydraException, InstantiationException, MissingConfigException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from fcmae.config_check import check_config, closest, mandatory, no_choice
from fcmae.errors import RanksLostError, TransientError, UserError, in_a_line
from fcmae.files import write_text


def run(verb: str, task: Callable[[DictConfig], None]) -> None:
    """Runs `task` with the configuration that the command line asks for; the body of `python -m fcmae.<verb>`.

    What the user can mend is told in one line on standard error, with exit code 2.
    """
    # So that Hydra's own errors come here instead of being printed in its own way, over several lines.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    folder = config_folder()
    sys.argv[1:] = normalize(sys.argv[1:], verb, folder)

    def guarded(config: DictConfig) -> None:
        try:
            mandatory(config, folder)
            check_config(config, known=_keys(folder / f"{verb}.yaml"))
            task(config)
        except (TransientError, RanksLostError) as error:
            _fail(in_a_line(error), code=1)
        except UserError as error:
            _fail(in_a_line(error))
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM):
                raise
            # A write that fails, unlike an open, does not say which file it was for.
            file = error.filename or OmegaConf.select(config, "run_dir") or "a file"
            _fail(f"cannot write {file}: {error.strerror}; free space or mend permissions there")

    try:
        # A second Ctrl-C, or one before the training has begun, ends here.
        with _explained(verb, folder):
            hydra.main(version_base="1.3", config_path=str(folder), config_name=verb)(guarded)()
    except KeyboardInterrupt:
        print("fcmae: interrupted", file=sys.stderr)  # noqa: T201
        raise SystemExit(130) from None
    except UserError as error:
        _fail(in_a_line(error))


def compose(verb: str, arguments: list[str]) -> DictConfig:
    """The configuration that `run` would give its task, without what is Hydra's own, and without running anything.

    Args:
        verb: entry point, such as `pretrain`.
        arguments: of its command line, `key=value`.

    Raises:
        UserError: one of them is wrong, or missing.
    """
    folder = config_folder()
    sys.argv[1:] = normalize(arguments, verb, folder)  # where hints look for what else was typed
    with _explained(verb, folder):
        with hydra.initialize_config_dir(str(folder), version_base="1.3"):
            config = hydra.compose(verb, overrides=sys.argv[1:], return_hydra_config=True)
            HydraConfig.instance().set_config(config)
            with open_dict(config):
                del config["hydra"]
        mandatory(config, folder)
        OmegaConf.to_container(config, resolve=True)  # says which reference leads nowhere
    return config


@contextlib.contextmanager
def _explained(verb: str, folder: Path) -> Iterator[None]:
    """Turns Hydra's errors into one line that helps."""
    try:
        yield
    except MissingConfigException as error:
        raise UserError(_unknown_choice(error)) from None
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_unknown_key(error, verb, folder)) from None


def build(node: DictConfig, **overrides: Any) -> Any:
    """Hydra's instantiate, with the errors of what is built coming out as they are.

    Raises:
        UserError: ours; a package that is missing; options that a function or class does not take, or that Lightning
            refuses.
    """
    try:
        return hydra.utils.instantiate(node, _convert_="all", **overrides)
    except InstantiationException as error:
        cause = error.__cause__
        if cause is None:
            raise UserError(in_a_line(error)) from error
        if isinstance(cause, UserError):
            raise cause from None
        target = _failing(error, str(node.get("_target_", "")))
        if isinstance(cause, ModuleNotFoundError):
            raise UserError(f"{target} needs a package: {cause}") from error
        not_called = isinstance(cause, TypeError) and cause.__traceback__ and cause.__traceback__.tb_next is None
        if not_called or target.startswith("lightning."):
            raise UserError(f"{target} refuses its options: {in_a_line(cause)}") from error
        raise cause from None  # a mistake in somebody's class, who needs the traceback


def _failing(error: InstantiationException, asked: str) -> str:
    """The function or class that was called: as it was asked for, or as Hydra calls what is below that."""
    found = re.search(r"'([^']+)'", str(error))
    name = found[1] if found else asked
    return asked if asked.rpartition(".")[2] == name.rpartition(".")[2] else name


def config_folder() -> Path:
    """Where the YAML files are: inside an installed package, else beside it in a checkout."""
    package = Path(__file__).resolve().parent
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / "pretrain.yaml").is_file():
            return folder
    raise UserError(f"the configs are neither in {package} nor beside it: install fcmae again")


def normalize(arguments: list[str], verb: str, folder: Path) -> list[str]:
    """Gives every choice of a config group the form that Hydra wants; doing it twice changes nothing.

    Groups that stand in the verb's defaults list are overridden (`data=folder`), the others added (`+model=tiny`).
    """
    listed = _groups(folder / f"{verb}.yaml")
    groups = {path.name for path in folder.iterdir() if path.is_dir()}

    def form(argument: str) -> str:
        key, equals, value = argument.partition("=")
        name = key.removeprefix("+")
        if equals and verb == "finetune" and name == "init":  # what pre-training calls it
            argument, key, name = f"checkpoint={value}", "checkpoint", "checkpoint"
        if equals and name in groups:
            return f"{'' if name in listed else '+'}{name}={value}"
        if equals and re.search(r"=|[^\x00-\x7f]", value) and not re.search(r"[][{}'\",$\\]", value):
            return f'{key}="{value}"'  # Hydra takes such values, as in the names of checkpoints, in quotes alone
        return argument

    return [form(argument) for argument in arguments]


def _defaults(file: Path) -> list[Any]:
    return list(yaml.safe_load(file.read_text(encoding="utf-8")).get("defaults", []))


def _groups(file: Path) -> set[str]:
    """The config groups in a file's defaults list."""
    names = (str(name) for entry in _defaults(file) if isinstance(entry, dict) for name in entry)
    return {name.removeprefix("optional ") for name in names if not name.startswith("override ")}


def _keys(file: Path) -> set[str]:
    """The names that may stand in a composed configuration, outside of what the groups choose: `a`, `b.c`."""
    body = yaml.safe_load(file.read_text(encoding="utf-8"))
    below = {f"{key}.{name}" for key, value in body.items() if isinstance(value, dict) for name in value}
    parts = {entry.partition("@")[2] for entry in _defaults(file) if isinstance(entry, str) and "@" in entry}
    return {*body, *below, *parts, *_groups(file)} - {"defaults", "hydra"}


def _unknown_choice(error: MissingConfigException) -> str:
    wanted = error.missing_cfg_file or ""
    group, _, choice = wanted.rpartition("/")
    options = [option for option in error.options or [] if not option.startswith("_")]
    if not options:
        return in_a_line(error)
    return f"{group}={choice} is not one of {', '.join(options)}{closest(choice, options)}"


def _unknown_key(error: Exception, verb: str, folder: Path) -> str:
    message = str(error)
    found = re.search(r"Could not override '([^']+)'", message)
    if isinstance(error, ConfigCompositionException) and found:
        key = found.group(1)
        chosen = {argument.partition("=")[0].lstrip("+") for argument in sys.argv[1:]}
        group = key.partition(".")[0]
        of_verb = group in _keys(folder / f"{verb}.yaml")
        if of_verb and (folder / group).is_dir() and group not in _groups(folder / f"{verb}.yaml") | chosen:
            return no_choice(group, folder)
        known = _all_keys(verb, folder, without=key)
        if key not in known:
            beside = [name for name in known if name.rpartition(".")[0] == key.rpartition(".")[0]]
            return f"{key} is not an option{closest(key, beside)}"
    return " ".join(line.strip() for line in message.splitlines() if line.strip())


def _all_keys(verb: str, folder: Path, without: str) -> list[str]:
    """The dotted names of all options, as composed from the other arguments."""
    kept = [
        argument for argument in sys.argv[1:] if "=" in argument and argument.partition("=")[0].lstrip("+~") != without
    ]
    try:
        with hydra.initialize_config_dir(str(folder), version_base="1.3"):
            config = hydra.compose(verb, overrides=[argument for argument in kept if not argument.startswith("hydra")])
    except Exception:  # another argument is wrong as well; then there is no hint
        return []

    def walk(node: Any, prefix: str) -> list[str]:
        if not isinstance(node, dict):
            return [prefix]
        return [prefix, *(name for key, value in node.items() for name in walk(value, f"{prefix}.{key}".lstrip(".")))]

    return walk(OmegaConf.to_container(config, resolve=False), "")[1:]


def _fail(line: str, *, code: int = 2) -> NoReturn:
    print(f"fcmae: {line}", file=sys.stderr)  # noqa: T201
    refused = Path(os.environ.get("FCMAE_REFUSED") or os.devnull)
    if code == 2 and not refused.exists():  # a job's supervisor wants to know why it need not try again
        with contextlib.suppress(UserError, OSError):  # the disk may be what is full
            write_text(refused, f"{line}\n")
    raise SystemExit(code)
