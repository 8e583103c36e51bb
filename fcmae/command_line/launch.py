"""What every entry point shares: finding the configs, `+model=tiny` and `model=tiny` alike, and clear errors."""

import contextlib
import errno
import os
import re
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException, MissingConfigException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

import fcmae
from fcmae.command_line.config_check import check_config, mandatory
from fcmae.command_line.option_help import option_help
from fcmae.command_line.option_hints import (
    choosable,
    groups_of,
    keys_of,
    of_another,
    other_group,
    unknown_choice,
    unknown_key,
)
from fcmae.command_line.original_options import translate
from fcmae.errors import RanksLostError, TransientError, UserError, in_a_line
from fcmae.files import write_text

_WITH_HELP = ("hydra.mode=RUN", "hydra.run.dir=.", "hydra.output_subdir=null")
"""So that help is told once and leaves no files behind."""
_FOLDERS_OF_THEIR_OWN = ("--config-", "-cd", "-cp", "-cn", "hydra.searchpath=", "+hydra.searchpath=")
_OF_HYDRA = tuple(
    f"--{name}"
    for name in (
        *("help", "hydra-help", "version", "cfg", "resolve", "package", "run", "multirun", "shell-completion", "info"),
        *("config-path", "config-name", "config-dir", "experimental-rerun"),
    )
)


def run(verb: str, task: Callable[[DictConfig], None]) -> None:
    """Runs `task` with the configuration that the command line asks for; the body of `python -m fcmae.<verb>`.

    What the user can mend is told in one line on standard error, with exit code 2.
    """
    # So that Hydra's own errors come here instead of being printed in its own way, over several lines.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    try:
        folder = config_folder()
        sys.argv[1:] = normalize(sys.argv[1:], verb, folder)
    except UserError as error:
        _fail(in_a_line(error))

    helps = "-h" in sys.argv[1:] or "--help" in sys.argv[1:]
    if helps:
        left_out = ("-h", "--help", "-m", "--multirun", "--resolve")
        sys.argv[1:] = [*(argument for argument in sys.argv[1:] if argument not in left_out), *_WITH_HELP]

    def explain(config: DictConfig) -> None:
        print(option_help(config, verb))  # noqa: T201

    def guarded(config: DictConfig) -> None:
        try:
            mandatory(config, folder)
            check_config(config, known=keys_of(folder / f"{verb}.yaml"))
            task(config)
        except (TransientError, RanksLostError) as error:
            _fail(in_a_line(error), code=1)
        except UserError as error:
            _fail(in_a_line(error))
        except OSError as error:
            # A write that fails, unlike an open, does not say which file it was for.
            file = error.filename or OmegaConf.select(config, "run_dir") or "a file"
            if error.errno in (errno.EACCES, errno.EPERM):
                _fail(f"may not use {file}: {error.strerror}; mend its permissions")
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                _fail(f"cannot write {file}: {error.strerror}; free space or mend permissions there")
            raise

    try:
        # A second Ctrl-C, or one before the training has begun, ends here.
        with _ending_on_sigterm(), _explained(verb, folder):
            started = hydra.main(version_base="1.3", config_path=str(folder), config_name=verb)
            started(explain if helps else guarded)()
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
def _ending_on_sigterm() -> Iterator[None]:
    """Lets SIGTERM end a verb that does not listen to it, but not before it has removed what is half-written."""
    mine = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    try:
        if mine:
            signal.signal(signal.SIGTERM, _leave)
        yield
    finally:
        if mine:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _leave(signum: int, frame: object) -> NoReturn:
    raise SystemExit(128 + signum)


@contextlib.contextmanager
def _explained(verb: str, folder: Path) -> Iterator[None]:
    """Turns Hydra's errors into one line that helps."""
    try:
        yield
    except MissingConfigException as error:
        raise UserError(unknown_choice(error)) from None
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(unknown_key(error, verb, folder)) from None


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
            without = "; trainer=cpu takes the CPU" if "No supported gpu backend" in str(cause) else ""
            raise UserError(f"{target} refuses its options: {in_a_line(cause)}{without}") from error
        raise cause from None  # a mistake in somebody's class, who needs the traceback


def _failing(error: InstantiationException, asked: str) -> str:
    """The function or class that was called: as it was asked for, or as Hydra calls what is below that."""
    found = re.search(r"'([^']+)'", str(error))
    name = found[1] if found else asked
    return asked if asked.rpartition(".")[2] == name.rpartition(".")[2] else name


def config_folder() -> Path:
    """Where the YAML files are: inside an installed package, else beside it in a checkout."""
    package = Path(fcmae.__file__).resolve().parent
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / "pretrain.yaml").is_file():
            return folder
    raise UserError(f"the configs are neither in {package} nor beside it: install fcmae again")


def normalize(arguments: list[str], verb: str, folder: Path) -> list[str]:
    """Gives every choice of a config group the form that Hydra wants; doing it twice changes nothing.

    Groups that stand in the verb's defaults list are overridden (`data=folder`), the others added (`+model=tiny`).

    Raises:
        UserError: an option that is not written `key=value`, or a choice that is made in another way, or not for
            this verb; other choices than ours are let through where folders of the user's own are named.
    """
    _check_written(arguments, verb, folder)
    listed = groups_of(folder / f"{verb}.yaml")
    groups = {path.name for path in folder.iterdir() if path.is_dir()}
    others = groups - choosable(folder / f"{verb}.yaml")
    own = any(argument.startswith(_FOLDERS_OF_THEIR_OWN) for argument in arguments)

    def form(argument: str) -> str:
        key, equals, value = argument.partition("=")
        name = key.removeprefix("+")
        if equals and verb == "finetune" and name == "init":  # what pre-training calls it
            argument, key, name = f"checkpoint={value}", "checkpoint", "checkpoint"
        if name == "model.size" and value != "custom" and (folder / "model" / f"{value}.yaml").is_file():
            raise UserError(f"{argument} names a size without its depths and dims: choose it with +model={value}")
        if equals and name in others and not (own and not (folder / name / f"{value}.yaml").is_file()):
            raise UserError(other_group(argument, verb, folder))
        if of_another(verb, name, value):
            other = "finetune" if verb == "pretrain" else "pretrain"
            raise UserError(f"{argument} is a recipe of fcmae.{other}: choose one of fcmae.{verb}'s, or use that")
        if equals and name in groups:
            return f"{'' if name in listed else '+'}{name}={value}"
        if equals and re.search(r"=|~|[^\x00-\x7f]", value) and not re.search(r"[][{}'\",$\\]", value):
            return f'{key}="{value}"'  # Hydra takes such values, as in names of checkpoints and ~/x, in quotes alone
        return argument

    return [form(argument) for argument in arguments]


def _check_written(arguments: Sequence[str], verb: str, folder: Path) -> None:
    """Refuses `--key value`, as other programs have it; Hydra would answer with a page about its own options."""
    if all(argument.partition("=")[0] in _OF_HYDRA for argument in arguments if argument.startswith("--")):
        return
    typed = [argument for argument in arguments if argument not in _OF_HYDRA]
    options, notes = translate(verb, typed, known=keys_of(folder / f"{verb}.yaml"))
    here = f", here {shlex.join(options)}" if options else " (--help lists them)"
    raise UserError("; ".join([f"options are written key=value{here}", *notes]))


def _fail(line: str, *, code: int = 2) -> NoReturn:
    sys.stderr.write(f"fcmae: {line}\n")  # in one piece, which print need not do: other ranks write there, too
    refused = Path(os.environ.get("FCMAE_REFUSED") or os.devnull)
    if code == 2 and not refused.exists():  # a job's supervisor wants to know why it need not try again
        with contextlib.suppress(UserError, OSError):  # the disk may be what is full
            write_text(refused, f"{line}\n")
    raise SystemExit(code)
