"""What only a GPU can show: whole training steps with the engine taken there. `scripts/gpu_check.sh` runs it."""

import json
from pathlib import Path

import micro
import pytest
import torch
from timm.utils import ModelEmaV3

import fcmae
from fcmae.engines import auto
from fcmae.models.block import compiled_block
from fcmae.models.classifier import create_classifier
from fcmae.training.batch_augment import BatchAugment
from fcmae.training.classification_loss import ClassificationLoss

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SHALLOW = {"depths": (1, 1, 2, 1), "image_size": 224}


def model_and_optimizer(**options) -> tuple[fcmae.FCMAE, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = fcmae.create_model("tiny", **SHALLOW | options).cuda().to(memory_format=torch.channels_last).train()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


def random_images(batch: int = 8) -> torch.Tensor:
    images = torch.randn(batch, 3, 224, 224, device="cuda").cumsum(2).cumsum(3) / 32
    return images.contiguous(memory_format=torch.channels_last)


def step(model: fcmae.FCMAE, optimizer: torch.optim.Optimizer, images: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(images).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    return loss.detach()


def test_auto_takes_triton():
    assert auto.choose("cuda") == "triton"


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("recompute", ["none", "mlp", "block"])
def test_a_step_never_waits_for_the_device(recompute, compiled):
    model, optimizer = model_and_optimizer(grad_checkpointing=recompute)
    if compiled:
        model.encoder.run_block = model.decoder.run_block = compiled_block()
    images = random_images()
    for _ in range(2):  # compiles and tunes
        step(model, optimizer, images)
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = [step(model, optimizer, images) for _ in range(2)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(loss.isfinite() for loss in losses)


def test_both_engines_give_the_same_gradients():
    images, gradients = random_images(), {}
    for engine in ("torch", "triton"):
        model, _ = model_and_optimizer(engine=engine)
        mask = model.masking(torch.zeros_like(images, device="cpu")).to("cuda")
        with torch.backends.cudnn.flags(allow_tf32=False):
            model(images, mask).loss.backward()
        gradients[engine] = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for name, theirs in gradients["torch"].items():
        ours = gradients["triton"][name]
        assert (ours - theirs).norm() <= 1e-3 * theirs.norm() + 1e-9, name


def test_both_engines_learn_the_same():
    curves = {}
    for engine in ("torch", "triton"):
        model, optimizer = model_and_optimizer(engine=engine)
        torch.manual_seed(1)
        losses = []
        for _ in range(50):
            with torch.backends.cudnn.flags(allow_tf32=False):
                loss = model(random_images(4)).loss
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        curves[engine] = torch.stack(losses).cpu()
    assert curves["torch"][-5:].mean() < 0.98 * curves["torch"][0]  # it does learn
    torch.testing.assert_close(curves["triton"], curves["torch"], rtol=5e-3, atol=0)


def test_a_whole_step_in_a_cuda_graph():
    model, optimizer = model_and_optimizer()
    optimizer.param_groups[0]["capturable"] = True
    images = random_images()
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            step(model, optimizer, images)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(model, optimizer, images)
    losses = []
    for _ in range(20):
        graph.replay()
        losses.append(loss.clone())
    losses = torch.stack(losses).cpu()
    assert losses.isfinite().all()
    assert losses.unique().numel() > 15  # other masks, other weights, every time
    assert losses[-5:].mean() < losses[:5].mean()


def test_the_command(tmp_path: Path):
    result = micro.pretrain(tmp_path, *micro.MICRO, "trainer.accelerator=gpu", "compile=true")
    assert result.code == 0, result.err
    assert "engine: triton (auto)" in (tmp_path / micro.RUN / "train.log").read_text()
    assert json.loads((tmp_path / micro.RUN / "summary.json").read_text())["val_loss"] < 1.2


def test_the_logged_norm_is_that_of_the_gradients_whatever_the_precision(tmp_path: Path):
    """In float16 the loss is scaled, by 65536 at first."""
    norms = {}
    for precision in ("32-true", "16-mixed"):
        options = ["trainer.accelerator=gpu", f"trainer.precision={precision}", f"run_name={precision}"]
        once = ["epochs=1", "optim.warmup_epochs=0", "trainer.max_steps=1", "trainer.log_every_n_steps=1"]
        result = micro.pretrain(tmp_path, *micro.MICRO, *options, *once)
        assert result.code == 0, result.err
        lines = (tmp_path / "outputs/pretrain" / precision / "metrics.jsonl").read_text().splitlines()
        norms[precision] = next(told["grad_norm"] for told in map(json.loads, lines) if "grad_norm" in told)
    assert norms["16-mixed"] == pytest.approx(norms["32-true"], rel=0.05)


def test_a_fine_tuning_step_never_waits_for_the_device():
    net = create_classifier("atto", num_classes=10, drop_path_rate=0.1).cuda().to(memory_format=torch.channels_last)
    average, augment = ModelEmaV3(net, decay=0.99), BatchAugment(random_erasing=0.25, mixup=0.8, cutmix=1.0)
    weights = torch.ones(10, device="cuda")
    criterion = ClassificationLoss(label_smoothing=0.1, class_weights=weights, multi_label=False).cuda()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)
    images, labels = random_images(), torch.arange(8, device="cuda")

    def step() -> torch.Tensor:
        mixed, shares = augment(images.clone(), labels, 10)
        with torch.autocast("cuda", torch.bfloat16):
            loss = criterion(net(mixed), shares)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update(net)
        return loss.detach()

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = [step() for _ in range(4)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(loss.isfinite() for loss in losses)


def test_fine_tuning_and_what_follows(tmp_path: Path):
    model = ["+model=custom", "model.depths=[1,1,1,1]", "model.dims=[8,16,32,64]"]
    options = ["data=digits", "data.image_size=64", "checkpoint=null", "trainer.accelerator=gpu", "run_name=x"]
    options += ["epochs=4", "optim.base_lr=0.02", "model.head_init_scale=1", "ema.decay=0.9", "ema.warmup=true"]
    result = micro.command("finetune", tmp_path, *model, *options)
    assert result.code == 0, result.err
    summary = json.loads((tmp_path / "outputs/finetune/x/summary.json").read_text())
    assert summary["val_acc1"] > 0.3
    for device in ("cpu", "cuda"):
        options = ["checkpoint=outputs/finetune/x", "data=digits", f"device={device}", f"out={device}"]
        result = micro.command("evaluate", tmp_path, *options, "precision=32")
        assert result.code == 0, result.err
    cpu, cuda = (json.loads((tmp_path / device / "metrics.json").read_text()) for device in ("cpu", "cuda"))
    assert cuda["loss"] == pytest.approx(cpu["loss"], rel=5e-3)  # TensorFloat32 may be on
    assert cuda["acc1"] == pytest.approx(cpu["acc1"], abs=0.01)


def test_the_micro_batch_that_fits_is_found_and_trains(tmp_path: Path) -> None:
    options = ["+model=tiny", "data.batch_size=auto", "effective_batch=512", "data.image_size=224", "epochs=1"]
    options += [
        "trainer=gpu",
        "trainer.limit_train_batches=8",
        "data.val_images=8",
        "pictures=0",
        "optim.warmup_epochs=0",
    ]
    done = micro.pretrain(tmp_path, *options, "data.num_workers=0", "run_dir=run")
    assert done.code == 0, done
    line = next(line for line in done.err.splitlines() if line.startswith("micro-batch: "))
    assert int(line.split()[1]) >= 64, line
