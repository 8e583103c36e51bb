"""`python -m fcmae.predict checkpoint=outputs/finetune/x images=DIR out=predictions.csv`: the classes of images."""

import torch
from omegaconf import DictConfig
from torch import Tensor

from fcmae.command_line.config_check import check_whole
from fcmae.command_line.launch import run
from fcmae.command_line.run_inference import Work, open_work
from fcmae.errors import UserError
from fcmae.evaluation.tables import open_predictions


def predict(config: DictConfig) -> None:
    """Writes the likeliest classes of every image, with their probabilities.

    Raises:
        UserError: something that the user can mend; no table is left then.
    """
    check_whole(config, "top_k", least=1)
    work = open_work(config)
    names = work.trained.class_names
    if not names:
        raise UserError(
            f"{work.trained.source.file} holds no classifier: fine-tune it first (python -m fcmae.finetune), or use "
            "python -m fcmae.embed for its features"
        )
    top_k = min(config.top_k, len(names))
    with open_predictions(work.out, top_k=top_k) as table:
        for output in work.outputs(work.trained.net):
            best = probabilities(output.values, work).topk(top_k, dim=1)
            rows = zip(output.sample_ids, best.indices.tolist(), best.values.tolist(), strict=True)
            for sample_id, classes, shares in rows:
                table.write(sample_id, [(names[index], share) for index, share in zip(classes, shares, strict=True)])
    work.say_done()


def probabilities(logits: Tensor, work: Work) -> Tensor:
    """(B, classes): that add up to 1, or one each where an image may have several classes."""
    return torch.sigmoid(logits) if work.trained.multi_label else logits.softmax(1)


if __name__ == "__main__":
    run("predict", predict)
