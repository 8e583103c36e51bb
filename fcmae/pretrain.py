"""`python -m fcmae.pretrain +model=tiny`: masked-autoencoder pre-training."""

from fcmae.stopping import watch

if __name__ == "__main__":
    watch()  # before the imports below, which take seconds

import shlex
from functools import partial

from omegaconf import DictConfig

from fcmae.checkpoints.format import describe
from fcmae.checkpoints.names import Size
from fcmae.command_line.config_check import check_choice, check_run, check_same_input, check_whole
from fcmae.command_line.launch import build, run
from fcmae.command_line.run_inference import stage_numbers
from fcmae.command_line.run_setting import run_setting
from fcmae.data.datamodule import ImageDataModule
from fcmae.training.callbacks.online_probe import OnlineProbe
from fcmae.training.callbacks.reconstructions import Reconstructions
from fcmae.training.pretraining import PretrainModule
from fcmae.training.run_folder import RunFolder
from fcmae.training.session import Parts, train
from fcmae.training.warm_start import WarmStartAdamW, start_from


def pretrain(config: DictConfig) -> None:
    """Runs, or goes on with, the pre-training that a configuration describes.

    Args:
        config: as composed from `configs/pretrain.yaml`.

    Raises:
        UserError: something that the user can mend.
    """
    check_run(config)
    check_whole(config, "pictures", least=0)
    check_same_input(config)
    check_choice(config, "probe.kind", ("knn", "linear"))
    check_whole(config, "probe.every_n_epochs", least=1)
    check_choice(config, "strict", (True, False))
    if config.warm_start.decoder_steps is not None:
        check_whole(config, "warm_start.decoder_steps", least=0)
    setting = run_setting(config, next_command=partial(_next_command, config))

    def parts(folder: RunFolder) -> Parts:
        data: ImageDataModule = build(config.data)
        data.split()  # finds the images, or says that there are none
        earlier = None if config.resume == "never" else folder.newest_checkpoint()
        model, optim = build(config.model), build(config.optim)
        options = {"adapt_in_chans": config.adapt_in_chans, "strict": config.strict}
        start = start_from(config.init, model, run_dir=folder.path, earlier=earlier, **options)
        if config.init is not None:
            optim = WarmStartAdamW.of(optim, **setting.config["warm_start"], new_decoder=start.new_decoder)
        description = describe(setting.config, "pretraining", lineage=start.lineage, new_decoder=start.new_decoder)
        module = PretrainModule(model=model, optim=optim, seed=config.seed, description=description)
        pictures = Reconstructions(folder=folder.images, pictures=config.pictures)
        probes = (
            []
            if config.probe.data is None
            else [OnlineProbe(images=data, **setting.config["probe"] | {"stages": stage_numbers(config.probe.stages)})]
        )
        return Parts(
            module=module,
            data=data,
            callbacks=[pictures, *probes],
            best_by=[probe.metric for probe in probes],
            lines=start.lines,
        )

    train(setting, parts)


def _next_command(config: DictConfig, eight_bits: bool) -> str:
    """Fine-tunes this network on the user's images: its shape, channels and size, where they are not the usual ones.

    Args:
        config: of the pre-training.
        eight_bits: whether its images had 8 bits per channel.
    """
    model, data = config.model, config.data
    options = Size(tuple(model.depths), tuple(model.dims)).options.split()
    if not model.get("use_grn", True):  # an own function may have no such option
        options.append("model.use_grn=false")
    if data.in_chans != 3:
        options.append(f"data.in_chans={data.in_chans}")
    if data.in_chans not in (1, 3) or not eight_bits:
        options.append("augment.randaugment=null")
    if data.image_size != 224:
        options.append(f"data.image_size={str(data.image_size).replace(' ', '')}")
    return shlex.join(["python", "-m", "fcmae.finetune", *options, f"checkpoint={config.run_dir}", "data.path=DIR"])


if __name__ == "__main__":
    run("pretrain", pretrain)
