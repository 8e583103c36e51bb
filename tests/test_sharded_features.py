"""Probes on sources that lie in shards: features are cached, and never those of other pictures."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from micro import MODEL, command
from PIL import Image

SHORT = [*MODEL[:2], "data.image_size=64", "data.batch_size=4", "data.num_workers=0", "trainer=cpu"]


def draw(folder: Path, seed: int) -> None:
    generator = np.random.default_rng(seed)
    for part in ("train", "val"):
        for label in ("a", "b"):
            (folder / part / label).mkdir(parents=True, exist_ok=True)
            for number in range(10):
                pixels = generator.integers(0, 256, (70, 80, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / part / label / f"{number}.png")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    draw(folder / "images", seed=0)
    tune = ["+model=custom", *SHORT, "checkpoint=null", "data.path=images", "run_name=x", "epochs=1"]
    done = command("finetune", folder, *tune, "optim.warmup_epochs=0", "batch_augment=none")
    assert done.code == 0, done
    return folder


def pack(place: Path) -> None:
    shutil.rmtree(place / "shards", ignore_errors=True)
    done = command("shard", place, "data=imagefolder", "data.path=images", "out=shards", "num_workers=0")
    assert done.code == 0, done


def evaluate(place: Path, *options: str) -> tuple[float, int]:
    """(loss of the probe, how many files of features there are)."""
    done = command(
        *("evaluate", place, "checkpoint=outputs/finetune/x", "probe=knn", "knn.k=[5]", "out=evaluated"),
        *("num_workers=0", "device=cpu", *options),
    )
    assert done.code == 0, done
    metrics = json.loads((place / "evaluated" / "metrics.json").read_text())
    return metrics["loss"], len(list((place / "evaluated").glob("features-*")))


def test_shards_that_were_packed_anew_have_other_features(place: Path) -> None:
    shutil.rmtree(place / "evaluated", ignore_errors=True)
    options = ["data=webdataset", "data.path=shards/train", "data.val_path=shards/val"]
    pack(place)
    first = evaluate(place, *options)
    assert first[1] == 2
    assert evaluate(place, *options) == first
    draw(place / "images", seed=1)
    pack(place)
    loss, files = evaluate(place, *options)
    assert files == 4
    assert loss != first[0]


@pytest.mark.parametrize("options", [["data.val_split=validation"], []], ids=["two splits", "one split"])
def test_probes_take_hugging_face_data_sets(options: list[str], place: Path) -> None:
    shutil.rmtree(place / "evaluated", ignore_errors=True)
    source = ["data=hf", "data.path=images", *options]
    first = evaluate(place, *source)
    assert first[1] == 2
    assert evaluate(place, *source) == first
