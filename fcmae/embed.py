"""`python -m fcmae.embed checkpoint=outputs/pretrain/x images=DIR out=features.npy`: the features of images."""

from omegaconf import DictConfig

from fcmae.command_line.launch import run
from fcmae.command_line.run_inference import open_work, stage_numbers
from fcmae.evaluation.tables import open_features
from fcmae.inference.features import feature_function


def embed(config: DictConfig) -> None:
    """Writes a row of features for every image.

    Raises:
        UserError: something that the user can mend; no file is left then.
    """
    work = open_work(config)
    stages = stage_numbers(config.stages)
    with open_features(work.out) as table:
        for output in work.outputs(feature_function(work.trained.net, stages)):
            table.write(output.sample_ids, output.values.cpu().numpy())
    work.say_done()


if __name__ == "__main__":
    run("embed", embed)
