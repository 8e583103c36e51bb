"""Learning rates of fine-tuning that fall from the classifier to the stem, as the authors assign them."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

from timm.models.convnext import ConvNeXt
from torch import nn

from fcmae.checkpoints.names import Size
from fcmae.errors import UserError

LayerDecay = Literal["single", "group"]
_GROUPED_DEPTHS = (3, 3, 27, 3)  # 12 groups of 3 blocks


def layer_scales(names: Iterable[str], depths: Sequence[int], *, decay: float, kind: LayerDecay) -> dict[str, float]:
    """What the learning rate of each parameter is multiplied with: decay to the power of its distance to the head.

    Args:
        names: timm's names of a ConvNeXt's parameters.
        depths: its blocks per stage.
        decay: per layer; 1 gives every parameter the whole rate.
        kind: what a layer is. `single`: each block, with the downsampling before it, or the stem. `group`: three
            blocks, with the downsampling that leads to their stage; the stem is a layer below them. Written by the
            authors for depths 3, 3, 27, 3 (base, large, huge).

    Raises:
        UserError: a decay outside (0, 1], an unknown kind, or depths that it is not made for.
    """
    if not 0 < decay <= 1:
        raise UserError(f"layer_decay={decay} is outside (0, 1]: give the factor per layer, such as 0.9, or 1 for none")
    if kind not in ("single", "group"):
        raise UserError(f"layer_decay_kind={kind!r} is unknown: use single or group")
    if kind == "group" and tuple(depths) != _GROUPED_DEPTHS:
        raise UserError(
            f"layer_decay_kind=group is 12 groups of 3 blocks, for depths {list(_GROUPED_DEPTHS)}, "
            f"and the model has {list(depths)}: use layer_decay_kind=single"
        )
    layer_of = _single_layer if kind == "single" else _group_layer
    head = layer_of("head", depths)
    return {name: decay ** (head - layer_of(name, depths)) for name in names}


def finetune_groups(
    net: ConvNeXt, *, weight_decay: float, layer_decay: float, layer_decay_kind: LayerDecay
) -> list[dict[str, Any]]:
    """The trained parameters by learning rate and weight decay, for a torch optimiser.

    Nothing one-dimensional is decayed: biases, norms and GRN.

    Returns:
        Groups from the stem to the head, with `params`, `weight_decay`, `lr_scale` (the learning rate is to be
        multiplied with it at every step), a readable `name`, and `is_head`: whether they are the classifier and the
        norm before it.

    Raises:
        UserError: as `layer_scales`.
    """
    trained = {name: parameter for name, parameter in net.named_parameters() if parameter.requires_grad}
    depths = Size.of(dict(net.named_parameters())).depths
    scales = layer_scales(trained, depths, decay=layer_decay, kind=layer_decay_kind)
    members: dict[tuple[float, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in trained.items():
        members.setdefault((scales[name], name.startswith("head."), parameter.ndim > 1), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": weight_decay if decayed else 0.0,
            "lr_scale": scale,
            "is_head": is_head,
            "name": f"{'head, ' if is_head else ''}rate x {scale:.9g}, {'decayed' if decayed else 'not decayed'}",
        }
        for (scale, is_head, decayed), parameters in sorted(members.items(), key=lambda item: item[0])
    ]


def _single_layer(name: str, depths: Sequence[int]) -> int:
    match name.split("."):
        case ["stem", *_]:
            return 1  # the layer of the first block, not one below it
        case ["stages", stage, "downsample", *_]:
            return sum(depths[: int(stage)]) + 1
        case ["stages", stage, "blocks", block, *_]:
            return sum(depths[: int(stage)]) + int(block) + 1
    return sum(depths) + 1


def _group_layer(name: str, depths: Sequence[int]) -> int:
    match name.split("."):
        case ["stem", *_]:
            return 0
        case ["stages", "2", "blocks", block, *_]:
            return 3 + int(block) // 3
        case ["stages", stage, *_]:
            return (1, 2, 3, 12)[int(stage)]
    return 13
