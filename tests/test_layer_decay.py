"""The learning rate and weight decay of every parameter at fine-tuning, as the authors' code assigns them.

`data/official_param_groups.json` was recorded from the authors' code: for each size [lr scale, weight decay] of every
parameter, in their names, with the scales rounded to ten decimals.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.models.convnext import ConvNeXt

from fcmae import UserError
from fcmae.checkpoints.names import official_name
from fcmae.training.layer_decay import finetune_groups, layer_scales

RECORDED = json.loads((Path(__file__).parent / "data" / "official_param_groups.json").read_text())


def micro_net(**options: Any) -> ConvNeXt:
    options = {"depths": (1, 2, 3, 1), "dims": (8, 16, 32, 64), "use_grn": True, "ls_init_value": None} | options
    return ConvNeXt(num_classes=5, **options)


@pytest.mark.parametrize("conv_mlp", [False, True])
@pytest.mark.parametrize("size", RECORDED)
def test_every_parameter_is_as_the_authors_have_it(size, conv_mlp):
    recorded = RECORDED[size]
    with torch.device("meta"):
        net = timm.create_model(f"convnextv2_{size}", conv_mlp=conv_mlp)
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    groups = finetune_groups(
        net,
        weight_decay=recorded["weight_decay"],
        layer_decay=recorded["layer_decay"],
        layer_decay_kind=recorded["layer_decay_type"],
    )
    pairs = [(official_name(names[id(p)]), [g["lr_scale"], g["weight_decay"]]) for g in groups for p in g["params"]]
    assert len(pairs) == len(recorded["params"])
    ours = {name: [round(scale, 10), decay] for name, (scale, decay) in pairs}
    assert ours == recorded["params"]
    assert len({group["name"] for group in groups}) == len(groups)


def test_the_groups_go_into_an_optimizer_from_the_stem_up():
    net = micro_net()
    groups = finetune_groups(net, weight_decay=0.3, layer_decay=0.9, layer_decay_kind="single")
    optimizer = torch.optim.AdamW(groups, lr=1.0)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(net.parameters()))
    scales = [group["lr_scale"] for group in optimizer.param_groups]
    assert scales == sorted(scales)
    assert scales[-1] == 1
    assert optimizer.param_groups[-1]["params"] == [net.head.fc.weight]
    head = [parameter for group in optimizer.param_groups if group["is_head"] for parameter in group["params"]]
    assert {id(parameter) for parameter in head} == {id(parameter) for parameter in net.head.parameters()}
    assert optimizer.param_groups[-1]["name"] == "head, rate x 1, decayed"
    assert optimizer.param_groups[0]["name"] == f"rate x {0.9**7:.9g}, not decayed"


def test_what_is_not_trained_is_left_out():
    net = micro_net()
    net.stem.requires_grad_(False)
    net.stages.requires_grad_(False)
    groups = finetune_groups(net, weight_decay=0.3, layer_decay=0.9, layer_decay_kind="single")
    assert [group["weight_decay"] for group in groups] == [0.0, 0.3]
    assert [len(group["params"]) for group in groups] == [3, 1]  # norm and bias; matrix


def test_without_decay_every_parameter_has_the_whole_rate():
    net = micro_net()
    names = [name for name, _ in net.named_parameters()]
    assert layer_scales(names, (1, 2, 3, 1), decay=1, kind="single") == dict.fromkeys(names, 1.0)
    groups = finetune_groups(net, weight_decay=0.3, layer_decay=1, layer_decay_kind="single")
    told = [(group["lr_scale"], group["is_head"], group["weight_decay"]) for group in groups]
    assert told == [(1, False, 0), (1, False, 0.3), (1, True, 0), (1, True, 0.3)]


@given(depths=st.lists(st.integers(1, 30), min_size=4, max_size=4), decay=st.floats(0.5, 0.999))
def test_each_block_has_a_layer_of_its_own(depths, decay):
    blocks = [f"stages.{stage}.blocks.{block}.conv_dw.weight" for stage in range(4) for block in range(depths[stage])]
    scales = layer_scales(["stem.0.weight", *blocks, "head.fc.weight"], depths, decay=decay, kind="single")
    assert scales["head.fc.weight"] == 1
    assert scales["stem.0.weight"] == scales[blocks[0]]
    for lower, upper in zip(blocks, [*blocks[1:], "head.fc.weight"], strict=True):
        assert math.isclose(scales[lower], decay * scales[upper], rel_tol=1e-9)


@pytest.mark.parametrize("decay", [0, -0.1, 1.1, math.nan, math.inf])
def test_a_decay_out_of_its_bounds(decay):
    with pytest.raises(UserError, match=rf"layer_decay={decay} is outside \(0, 1\]: give the factor per layer"):
        layer_scales(["stem.0.weight"], (1, 1, 1, 1), decay=decay, kind="single")


def test_an_unknown_kind():
    with pytest.raises(UserError, match="layer_decay_kind='block' is unknown: use single or group"):
        layer_scales(["stem.0.weight"], (1, 1, 1, 1), decay=0.9, kind="block")


def test_groups_are_for_the_depth_that_they_are_written_for():
    told = r"12 groups of 3 blocks, for depths \[3, 3, 27, 3\], and the model has \[1, 2, 3, 1\]: use .*=single"
    with pytest.raises(UserError, match=told):
        finetune_groups(micro_net(), weight_decay=0.3, layer_decay=0.6, layer_decay_kind="group")
