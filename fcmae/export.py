"""`python -m fcmae.export checkpoint=outputs/finetune/x to=hf out=DIR`: a trained network for other libraries."""

from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console

from fcmae.checkpoints.descriptions import is_license
from fcmae.command_line.config_check import check_choice
from fcmae.command_line.launch import run
from fcmae.command_line.run_inference import image_sides
from fcmae.conversion.exporting import check_out, convert
from fcmae.conversion.formats import FORMATS, get_conversion
from fcmae.conversion.push import check_login, check_name, push
from fcmae.errors import UserError
from fcmae.inference.trained import load_trained


def export(config: DictConfig) -> None:
    """Writes a trained network in another library's format and shows that it computes the same there.

    Raises:
        UserError: something that the user can mend; nothing is left of the export then.
    """
    check_choice(config, "to", tuple(FORMATS))
    for name in ("drop_license", "private"):
        check_choice(config, name, (True, False))
    check_choice(config, "ema", (None, True, False))
    for name in ("checkpoint", "out"):
        if not isinstance(config[name], str):
            raise UserError(f"{name}={config[name]} must be text")
    if config.license is not None and not is_license(config.license):
        raise UserError(f"license={config.license} is no name of a licence: write it as apache-2.0 or cc-by-4.0")
    if config.drop_license and config.license is None:
        raise UserError("drop_license=true says nothing without license=: name the licence that is to take its place")
    out = Path(config.out)
    out = out.resolve() if out.is_symlink() else out
    check_out(out)
    conversion = get_conversion(config.to)
    if config.push is not None:
        check_name(config.push)
        check_login(config.push, private=config.private)
    with Console(stderr=True).status("reading the checkpoint") as status:  # shown on terminals only
        trained = load_trained(config.checkpoint, ema=config.ema, image_size=image_sides(config.image_size))
        done = convert(
            trained,
            conversion,
            out,
            to=config.to,
            name=config.push or f"./{out.name}",
            license=config.license,
            drop_license=config.drop_license,
            progress=status.update,
        )
    console = Console(highlight=False, soft_wrap=True)
    for line in done.lines():
        console.print(line, markup=False)
    if config.push is not None:
        console.print(f"uploaded: {push(out, config.push, private=config.private)}", markup=False)


if __name__ == "__main__":
    run("export", export)
