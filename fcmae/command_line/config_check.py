"""Checks of a composed configuration, before anything is built from it."""

import inspect
import types
from collections.abc import Callable, Collection, Iterator, Sequence
from importlib import import_module
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf

from fcmae.command_line.option_hints import closest, no_choice
from fcmae.errors import UserError, in_a_line
from fcmae.files import expanded

_PLACES = (
    *("checkpoint", "init", "images", "out", "run_dir", "json", "plot"),
    *("data.path", "data.val_path", "data.table", "data.cache_dir", "probe.data"),
)
_SCALARS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def mandatory(config: DictConfig, folder: Path) -> None:
    """Asks for what has no default, and says in all places where `~` is.

    Raises:
        UserError: names the first missing option; for the model, its choices.
    """
    if "model" in config and OmegaConf.is_missing(config.model, "size"):
        raise UserError(no_choice("model", folder))
    for key in sorted(map(str, OmegaConf.missing_keys(config))):
        raise UserError(f"{key} is not given: add {key}=VALUE")
    for key in _PLACES:
        place = OmegaConf.select(config, key)
        if place == "":  # it would be the folder that one is in
            raise UserError(f"{key}= is empty: give a value; is a variable of the shell not set?")
        if "~" in str(place):
            plain = OmegaConf.to_container(place) if OmegaConf.is_config(place) else place
            OmegaConf.update(config, key, expanded(plain))


def check_config(config: DictConfig, known: set[str]) -> None:
    """Compares every option with the function or class that takes it.

    Args:
        config: the composed configuration.
        known: names allowed at its top, and below those of them that are no group: `a`, `b.c`.

    Raises:
        UserError: an option that nothing takes, or one of the wrong kind.
    """
    plain: Any = OmegaConf.to_container(config, resolve=True)
    for key, value in plain.items():
        below = {name for name in known if name.startswith(f"{key}.")}
        names = [f"{key}.{name}" for name in value] if below and isinstance(value, dict) else []
        for name in (key, *names):
            if name not in known:
                raise UserError(f"{name} is not an option{closest(name, below or known)}")
    # `masking`, which is typed, before `model.masking`, which follows from it, and so the data before the model.
    for name, node in sorted(_targets(plain, ""), key=lambda found: (found[0].count("."), found[0])):
        _check_node(name, node)


def check_whole(config: DictConfig, name: str, least: int, most: int | None = None) -> None:
    """Refuses what is no whole number from `least`, up to `most`.

    Raises:
        UserError: says so.
    """
    value = OmegaConf.select(config, name)
    if type(value) is not int or value < least or (most is not None and value > most):
        raise UserError(
            f"{name}={value!r} must be a whole number from {least}" + (f" to {most}" if most is not None else "")
        )


def check_choice(config: DictConfig, name: str, choices: Collection[Any]) -> None:
    """Refuses what is none of `choices`.

    Raises:
        UserError: says so.
    """
    value = OmegaConf.select(config, name)
    if value not in choices:
        raise UserError(f"{name}={value!r} is unknown: use {' or '.join(str(choice) for choice in choices)}")


def check_run(config: DictConfig) -> None:
    """What every training run's configuration has, whatever it trains.

    Raises:
        UserError: a value out of its bounds.
    """
    for name in ("epochs", "trainer.max_epochs", "save.every_n_steps", "save.keep"):
        check_whole(config, name, least=1)
    check_whole(config, "seed", least=0, most=2**32 - 1)
    check_whole(config, "rank_timeout", least=1)
    if config.trainer.limit_train_batches is not None:
        check_whole(config, "trainer.limit_train_batches", least=1)
    if config.effective_batch is not None:
        check_whole(config, "effective_batch", least=1)
    rising = OmegaConf.select(config, "optim.warmup_epochs"), OmegaConf.select(config, "optim.head_epochs") or 0
    if all(isinstance(epochs, int | float) for epochs in rising) and sum(rising) > config.epochs:
        told = f"optim.warmup_epochs={rising[0]}" + (f" after optim.head_epochs={rising[1]}" if rising[1] else "")
        left = config.epochs - rising[1]
        how = f"such as optim.warmup_epochs={left // 20}, a twentieth" if left > 0 else "or give more epochs"
        raise UserError(f"{told} is longer than the run, epochs={config.epochs}: make it shorter, {how}")
    if not str(config.run_name or "").strip("./"):
        raise UserError(f"run_name={config.run_name!r} names no folder: give it a name, or leave it out")
    if ".." in PurePath(str(config.run_name)).parts:
        raise UserError(f"run_name={config.run_name} leads elsewhere: give it a name alone, or the folder, run_dir=DIR")
    check_choice(config, "resume", ("auto", "never"))
    check_choice(config, "channels_last", (True, False))
    check_choice(config, "compile", (True, False))


def check_same_input(config: DictConfig) -> None:
    """Refuses a model for other images than the data gives.

    Raises:
        UserError: says so.
    """
    for name in ("image_size", "in_chans"):
        if name in config.model and config.model[name] != config.data[name]:
            raise UserError(
                f"model.{name}={config.model[name]} differs from data.{name}={config.data[name]}: "
                f"set data.{name}, which the model follows"
            )


def check_kinds(config: DictConfig, takes: Callable[..., Any], names: Collection[str], prefix: str = "") -> None:
    """Compares some options with the annotations of the function or class that takes them.

    Raises:
        UserError: one of the wrong kind.
    """
    hints = get_type_hints(takes.__init__ if inspect.isclass(takes) else takes)
    for name in names:
        value = config[name]
        plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
        _check_kind(f"{prefix}{name}", plain, hints[name])


def _targets(node: Any, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(node, dict):
        if "_target_" in node:
            yield name, node
        for key, value in node.items():
            yield from _targets(value, f"{name}.{key}".lstrip("."))


def _check_node(name: str, node: dict[str, Any]) -> None:
    path = str(node["_target_"])
    attribute = path.rpartition(".")[2]
    try:
        target = _located(path)
    except ImportError as error:
        raise UserError(f"{name}._target_={path} cannot be imported: {in_a_line(error)}") from error
    if not callable(target):
        raise UserError(f"{name}._target_={path} is no class or function: name one")
    try:
        parameters = inspect.signature(target).parameters
    except ValueError:  # some that are written in C do not tell
        return
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    ours = path.startswith("fcmae.")  # others' annotations may need names that only they know
    hints = get_type_hints(target.__init__ if inspect.isclass(target) else target, include_extras=True) if ours else {}
    for key, value in node.items():
        if str(key).startswith("_"):
            continue
        if key not in parameters and not takes_any:
            # Of a class of one's own it may be in the YAML that another class was chosen from.
            left_out = "" if path.startswith(("fcmae.", "lightning.")) else f"; ~{name}.{key} leaves it out"
            raise UserError(f"{name}.{key} is not an option of {attribute}{closest(key, list(parameters))}{left_out}")
        _check_kind(f"{name}.{key}", value, hints.get(key, Any))


def _located(path: str) -> Any:
    """What `module.name` means, also where the module is a class: `module.Class.method`.

    Raises:
        ImportError: there is no such thing. Other errors of a module are its author's, who needs the traceback.
    """
    module, _, attribute = path.rpartition(".")
    if not module or not all(part.isidentifier() for part in path.split(".")):
        raise ImportError("it is not of the form module.Class")
    try:
        holder = import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module or "." not in module:  # else it may be a class
            raise
        holder = _located(module)
    if not hasattr(holder, attribute):
        raise ImportError(f"{module} has no {attribute}{closest(attribute, dir(holder))}")
    return getattr(holder, attribute)


def _check_kind(name: str, value: Any, hint: Any) -> None:
    """Refuses scalars and lists of scalars where the annotation allows others only; leaves the rest to the callee.

    `Annotated[int, "auto"]` is what the callee gets as an int, and the command line also takes as auto.
    """
    if get_origin(hint) is Annotated:
        if value in hint.__metadata__:
            return
        hint = hint.__origin__
    choices = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    lists = [choice for choice in choices if get_origin(choice) in (Sequence, list, tuple)]
    if lists and isinstance(value, list):
        for entry in value:
            _check_kind(f"an entry of {name}", entry, get_args(lists[0])[0])
        return
    literals = [choice for literal in choices if get_origin(literal) is Literal for choice in get_args(literal)]
    kinds = [kind for kind in choices if kind in _SCALARS]
    if literals and not kinds:
        if value not in literals:
            known = " or ".join(map(repr, literals))
            raise UserError(
                f"{name}={value!r} must be a list, such as [1, 2], or {known}"
                if lists
                else f"{name}={value!r} is unknown: use {known}"
            )
        return
    if value is None and type(None) in choices:
        return
    if lists and not kinds:
        raise UserError(f"{name}={value!r} must be a list, such as [1, 2]")
    if not kinds or (isinstance(value, dict | list) and len(kinds) < len(choices) and not lists):
        return
    allowed = {*kinds, *({int} if float in kinds else ())}
    if type(value) not in allowed:
        raise UserError(f"{name}={value!r} must be {' or '.join(_SCALARS[kind] for kind in kinds)}")
