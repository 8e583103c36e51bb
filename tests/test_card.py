"""Model cards: nothing in them but what is so, whatever names classes, runs and files have; and the comparison."""

import itertools
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from PIL import Image
from test_export_timm import Fill
from test_export_timm import trained as write

from fcmae.conversion.card import Facts, model_card
from fcmae.conversion.comparison import Difference, difference, photographs
from fcmae.conversion.formats import FORMATS, get_conversion
from fcmae.data.decoding import open_picture
from fcmae.data.preparation import Preparation
from fcmae.inference.trained import Trained

ORIGIN = {"source": "x/last.ckpt", "sha256": "0123456789abcdef" * 4, "license": None}
SECTIONS = ["Load it", "How it was trained", "Results", "Checked", "Licence"]
PRETRAINING = {"val_loss": 0.5, "val_loss_patch_mean": 0.9, "val_loss_nearest_patch": 1.1, "val_knn_acc1": 0.7}
FINE_TUNING = {"val_loss": 0.5, "val_acc1": 0.8, "val_ema_loss": 0.4, "val_ema_acc1": 0.9}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def encoder(run: Path, randomise: Fill) -> Trained:
    return write(run / "pretrain" / "checkpoints", randomise, classes=0)


@pytest.fixture(scope="module")
def classifier(run: Path, randomise: Fill) -> Trained:
    return write(run / "finetune" / "checkpoints", randomise, classes=5)


def card(trained: Trained, **changed: Any) -> str:
    """Of an export with these facts, and `about` over what it says of itself."""
    facts: dict[str, Any] = {"to": "timm", "name": "./x", "library": "timm 1.0", "difference": "0 of 1"}
    facts |= {"license": None, "lineage": [ORIGIN], "exported": "x"}
    about = {
        "task": "classification" if trained.class_names else "pretraining",
        "fcmae": "0.1",
        "run_name": "night",
        "weights": "network",
        "step": 20,
        "input": {"image_size": [64, 64]},
        "recipe": {"epochs": 3, "seed": 0, "data": {"image_size": 64}},
        "steps": {"data": "100 images, abc", "effective_batch": 8},
        "versions": {"torch": "2.6"},
    } | changed.pop("about", {})
    facts |= changed
    return model_card(trained, get_conversion(facts["to"]), Facts(**facts), about)


def front_matter(text: str) -> dict[str, Any]:
    data: dict[str, Any] = ModelCard(text).data.to_dict()
    return data


def parsed(text: str) -> list[Any]:
    tokens: list[Any] = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(ModelCard(text).text)
    return tokens


def headings(text: str) -> list[tuple[str, str]]:
    """Level and what is seen of it."""
    pairs = itertools.pairwise(parsed(text))
    return [(first.tag, seen(second)) for first, second in pairs if first.type == "heading_open"]


def seen(token: Any) -> str:
    return "".join(child.content for child in token.children)


def fences(text: str) -> dict[str, str]:
    return {token.info: token.content for token in parsed(text) if token.type == "fence"}


def rows(text: str) -> list[list[str]]:
    """The cells of all tables."""
    found: list[list[str]] = []
    for first, second in itertools.pairwise(parsed(text)):
        if first.type == "tr_open":
            found.append([])
        if first.type in ("td_open", "th_open"):
            found[-1].append(seen(second))
    return found


def results(trained: Trained, summary: Any, **about: Any) -> dict[str, str]:
    """The results in the card of a network beside whose checkpoint `summary` lies."""
    file = trained.source.file.parent.parent / "summary.json"
    file.write_text(summary if isinstance(summary, str) else json.dumps(summary))
    try:
        text = card(trained, about=about)
    finally:
        file.unlink()
    return {row[0]: row[1] for row in rows(text) if row[0].startswith("val_")}


# What a card says


def test_a_card_of_a_classifier(classifier):
    text = card(classifier, about={"weights": "moving average"})
    assert headings(text) == [("h1", "night"), *[("h2", name) for name in SECTIONS if name != "Results"]]
    listed = ", ".join(f"class {number}" for number in range(5))
    assert f"It tells one of 5 classes: {listed}." in text
    assert (
        "Input: 3 channels, 64x64 px; pixels in [0, 1] less the mean [0.4, 0.41, 0.42], divided by the deviation "
        "[0.3, 0.29, 0.28]." in text
    )
    assert [row for row in rows(text) if len(row) == 2][1:] == [
        ["images", "100 images, abc"],
        ["epochs", "3"],
        ["images per step", "8"],
        ["seed", "0"],
        ["step", "20"],
        ["weights", "moving average"],
        ["software", "fcmae 0.1, torch 2.6"],
    ]
    assert yaml.safe_load(fences(text)["yaml"]) == {"epochs": 3, "seed": 0, "data": {"image_size": 64}}
    assert front_matter(text)["pipeline_tag"] == "image-classification"
    assert "It tells any number of 5 classes" in card(replace(classifier, multi_label=True))
    assert "c19, ..." in card(replace(classifier, class_names=tuple(f"c{n}" for n in range(21))))
    assert "c20" not in card(replace(classifier, class_names=tuple(f"c{n}" for n in range(21))))


def test_a_card_of_an_encoder(encoder, classifier):
    text = card(encoder)
    assert "pre-trained without labels as a fully convolutional masked autoencoder (FCMAE)." in text
    assert front_matter(text)["pipeline_tag"] == "image-feature-extraction"
    assert ["weights", "network"] in rows(text)
    assert "| weights |" not in card(encoder, about={"weights": None})
    backbone = replace(classifier, class_names=())
    assert "the classifier is left out." in card(backbone, to="backbone", about={"task": "classification"})


def test_a_card_of_others_weights_tells_nothing_of_training(classifier):
    others = replace(classifier, source=replace(classifier.source, description=None))
    text = card(others)
    assert [name for _, name in headings(text)] == ["x", "Load it", "Checked", "Licence"]


def test_the_run_or_the_export_gives_the_title(encoder):
    assert headings(card(encoder, exported="a b"))[0] == ("h1", "night")
    assert headings(card(encoder, exported="a b", about={"run_name": None}))[0] == ("h1", "a b")


# Results


def test_results_are_of_the_exported_weights(encoder, classifier):
    of_network = {"val_loss": "0.5", "val_acc1": "0.8"}
    of_average = {"val_ema_loss": "0.4", "val_ema_acc1": "0.9"}
    assert results(classifier, {"steps": 20, **FINE_TUNING}) == of_network
    assert results(classifier, {"steps": 20, **FINE_TUNING}, weights="moving average") == of_average
    everything = {name: str(value) for name, value in PRETRAINING.items()}
    assert results(encoder, {"steps": 20, **PRETRAINING}) == everything
    del everything["val_knn_acc1"]
    assert results(encoder, {"steps": 20, **PRETRAINING}, weights="moving average") == everything


@pytest.mark.parametrize("step", [19, 21, None, "20", True])
def test_results_are_of_the_exported_step(step, classifier):
    assert results(classifier, {"steps": 20, **FINE_TUNING}, step=step) == {}
    assert results(classifier, {"steps": step, **FINE_TUNING}) == {}


def test_no_step_is_no_step(classifier):
    assert results(classifier, FINE_TUNING, step=None) == {}


@pytest.mark.parametrize(
    ("metric", "weights", "is_best"),
    [
        ("val_acc1", "network", True),
        ("val_ema_acc1", "network", False),
        ("val_acc1", "moving average", False),
        ("val_ema_acc1", "moving average", True),
    ],
)
def test_the_best_is_that_of_the_exported_weights(metric, weights, is_best, classifier):
    best = {"metric": metric, "value": 0.75, "step": 20}
    found = results(classifier, {"steps": 20, **FINE_TUNING}, best=best, weights=weights)
    chosen = {f"{metric}, at step 20, by which this checkpoint was chosen": "0.75"}
    if is_best:
        assert found == chosen
    else:
        assert found == results(classifier, {"steps": 20, **FINE_TUNING}, weights=weights) != {}


@pytest.mark.parametrize("size", [[96, 96], [64, 96]])
def test_no_results_at_another_size(size, classifier):
    best = {"metric": "val_acc1", "value": 0.75, "step": 20}
    for more in ({}, {"best": best}):
        about = {"input": {"image_size": size}, **more}
        assert results(classifier, {"steps": 20, **FINE_TUNING}, **about) == {}
        assert "The run's results were at another image size, 64 px" in card(classifier, about=about)
    told = card(classifier, about={"recipe": {"data": {"image_size": [64, 64]}}})
    assert "another image size" not in told


@pytest.mark.parametrize(
    "summary",
    ["", "{", "[]", "3", "\0", "[" * 100_000, '{"steps": 20', '{"steps": 20, "val_acc1": NaN}']
    + [{"steps": 20, "val_acc1": value} for value in ("1", None, [1], True, {}, 10**400, math.inf)]
    + [{"steps": 20, "val_acc1 | x": 1, "val_<b>": 1, "other": 1}],
    ids=lambda summary: str(summary)[:30],
)
def test_a_strange_summary_is_as_none(summary, classifier):
    assert results(classifier, summary) == {}


@pytest.mark.parametrize(
    "best",
    [None, 3, "x", [], {"metric": "val_acc1"}, {"metric": 3, "value": 1, "step": 2}]
    + [{"metric": metric, "value": value} for metric, value in (("val_acc1", "x"), ("a|b", 1), ("val_acc1", math.nan))],
    ids=str,
)
def test_a_strange_best_is_as_none(best, classifier):
    assert results(classifier, {"steps": 20, **FINE_TUNING}, best=best) == {"val_loss": "0.5", "val_acc1": "0.8"}


@pytest.mark.parametrize("strange", [None, 3, "x", []])
@pytest.mark.parametrize("key", ["recipe", "steps", "versions", "input", "best"])
def test_strange_descriptions_are_no_errors(key, strange, classifier):
    assert headings(card(classifier, about={key: strange}))


def test_what_a_backbone_leaves_out_had_the_results(classifier):
    best = {"metric": "val_acc1", "value": 0.75, "step": 20}
    backbone = replace(classifier, class_names=())
    text = card(backbone, to="backbone", about={"best": best, "task": "classification"})
    assert "images, with the classifier that is left out here." in text
    assert "left out here" not in card(classifier, about={"best": best})


# Loading


@pytest.mark.parametrize("to", FORMATS)
def test_lines_for_a_folder_and_for_the_hub(to, classifier):
    there = card(classifier, to=to, name="./my exports/x")
    assert "./my exports/x" in fences(there)["python"]
    assert "shell" not in fences(there)
    hub = fences(card(classifier, to=to, name="ada/digits"))
    if to in ("timm", "hf", "backbone"):
        assert "shell" not in hub
        assert "ada/digits" in hub["python"]
    else:
        assert hub["shell"] == "hf download ada/digits --local-dir digits\n"
        assert '"./digits/model.' in hub["python"]
        assert "ada" not in hub["python"]
    compile(hub["python"], "card", "exec")


@torch.inference_mode()
@pytest.mark.parametrize(
    ("to", "side"), [("hf", (64, 64)), ("hf", (64, 96)), ("timm", (64, 64)), ("torch", (64, 96)), ("onnx", (64, 64))]
)
def test_greys_of_16_bits_are_what_they_are_here(to, side, randomise, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    network = write(tmp_path / "run", randomise, channels=1, image_size=list(side))
    (tmp_path / "x").mkdir()
    get_conversion(to).write(network, tmp_path / "x")
    pixels = torch.randint(0, 2**16, (400, 600), generator=torch.Generator().manual_seed(0)).numpy()
    Image.fromarray(pixels.astype("uint16")).save("image.png")
    text = card(network, to=to)
    (told,) = re.findall(r"^Files of 16 bits.*", text, re.MULTILINE)
    eight, sixteen, more = re.findall("`(.*?)`", told)
    lines = fences(text)["python"]
    assert eight in lines
    names: dict[str, Any] = {}
    exec(f"{more}\n{lines.replace(eight, sixteen)}", names)
    preparation = network.preparation
    picture = open_picture("image.png", name="image.png", in_chans=1)
    ours = preparation.normalization()(preparation.transform()(picture)[None])
    assert torch.allclose(ours, torch.as_tensor(names["images"]), atol=1e-4)


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_16_bits_are_told_of_where_greys_are_opened(to, channels, randomise, tmp_path):
    text = card(write(tmp_path, randomise, channels=channels), to=to)
    assert ("Files of 16 bits" in text) == (channels == 1 and to != "backbone")


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize(
    "name", ['x"y', 'x"); import os; ("', "x\ny", "x\\", "```\n", "a'b", "x#", "", "\udc80", "x\u2028y"]
)
def test_no_name_gets_out_of_its_quotes(name, to, classifier):
    lines = fences(card(classifier, to=to, name=name))["python"]
    assert '"./NAME-OF-THE-FOLDER' in lines or "local-dir:./NAME-OF-THE-FOLDER" in lines
    compile(lines, "card", "exec")


# Licences


@pytest.mark.parametrize("license", [None, "mit"])
@pytest.mark.parametrize("known", [None, "cc-by-4.0"])
def test_every_file_is_listed_with_its_licence(license, known, encoder):
    for lineage in ([ORIGIN | {"license": known}], [ORIGIN | {"license": known, "source": "a"}, ORIGIN]):
        text = card(encoder, license=license, lineage=lineage)
        told = [row for row in rows(text) if len(row) == 3][1:]
        assert told == [[entry["source"], entry["license"] or "not known", "0123456789abcdef"] for entry in lineage]
        stated = f"The licence of this export: {license}." if license else "No licence is stated for it."
        assert stated in text.partition("## Licence")[2]
        assert front_matter(text).get("license") == license
    dropped = card(encoder, license="mit", lineage=[ORIGIN | {"license": "cc-by-4.0", "license_dropped": True}])
    assert "cc-by-4.0 (dropped)" in dropped
    assert "has declared" in dropped


@pytest.mark.parametrize("license", ["mit\nbase_model: x", "a b", "mit\n---\n", "*", "null: 1", "[a]", "é"])
def test_a_licence_that_is_none_stays_out_of_the_front_matter(license, encoder):
    assert "license" not in front_matter(card(encoder, license=license))


def test_base_models_are_the_repositories_of_the_hub(encoder):
    sources = ["hf-hub:facebook/a.b-c@0123", "x/last.ckpt", "hf-hub:ada/x", "timm:y", "hf-hub:ada/x@2", "hf-hub:a b/c"]
    sources += ["hf-hub:/home/x", "hf-hub:a/b/c", "hf-hub:a/b\nx: y"]
    text = card(encoder, lineage=[ORIGIN | {"source": source} for source in sources])
    assert front_matter(text)["base_model"] == ["facebook/a.b-c", "ada/x"]
    assert "base_model" not in front_matter(card(encoder))


# Names that would be more than names

FRAGMENTS = [
    "\n",
    "\r",
    "|",
    "`",
    "```",
    "````yaml",
    "~~~",
    "<script>",
    "</details>",
    "<!--",
    "---",
    "\n---\n",
    "\n## h\n",
]
FRAGMENTS += ["# h", "===", "**", "__", "_", "[a](b)", "![", "](", "\\", "\\|", "&lt;", "$x$", "://", "www.a", "\u2028"]
FRAGMENTS += ["\x00", "\u202e", "\udc80", "> ", "- ", "1. ", "\t", " ", '"', "'", "{}", "%", "a", "é", "\u0301"]
hostile = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=3), max_size=12).map("".join)


@settings(max_examples=150)
@given(words=st.lists(hostile, min_size=9, max_size=9), to=st.sampled_from(list(FORMATS)))
def test_a_card_has_its_own_sections_alone(words, to, classifier):
    run_name, first, second, source, license, option, data, name, version = words
    given = replace(classifier, class_names=(first, second), source=replace(classifier.source, source=source))
    text = card(
        given,
        to=to,
        name=name,
        license=license,
        lineage=[ORIGIN | {"source": source, "license": license, "sha256": option}],
        exported=name,
        about={
            "run_name": run_name,
            "recipe": {"epochs": 1, "seed": option, option: [option, data]},
            "steps": {"data": data},
            "versions": {version: version},
            "best": {"metric": "val_acc1", "value": 0.5, "step": 20},
            "step": option,
            "weights": "network",
        },
    )
    text.encode("utf-8")
    tokens = parsed(text)
    kept = [name for level, name in headings(text) if level != "h1"]
    assert kept == SECTIONS
    assert set(fences(text)) <= {"python", "yaml", "shell"}
    assert yaml.safe_load(fences(text)["yaml"]) == {"epochs": 1, "seed": option, option: [option, data]}
    compile(fences(text)["python"], "card", "exec")
    html = [token.content.strip() for token in tokens if token.type == "html_block"]
    assert html == ["<details><summary>all options</summary>", "</details>"]
    inline = {child.type for token in tokens if token.type == "inline" for child in token.children}
    assert inline <= {"text", "text_special", "code_inline", "softbreak"}
    blocks = {token.type.removesuffix("_open") for token in tokens if token.nesting == 1}
    assert blocks == {"heading", "paragraph", "table", "thead", "tbody", "tr", "th", "td"}
    assert {len(row) for row in rows(text)} == {2, 3}
    outside = "".join(token.content for token in tokens if token.type == "inline")
    assert not re.search(r"https?://|www\.", outside, re.IGNORECASE)
    assert front_matter(text).keys() <= {"license", "library_name", "pipeline_tag", "tags"}


@given(word=hostile.filter(lambda word: word.isprintable() and word == " ".join(word.split()) and 0 < len(word) <= 80))
def test_names_are_seen_as_they_are(word, classifier):
    text = card(classifier, about={"steps": {"data": word}, "run_name": word})
    assert ["images", word] in rows(text)
    assert headings(text)[0] == ("h1", word)


@pytest.mark.parametrize("ticks", [1, 3, 4, 9])
def test_the_fence_of_the_options_is_longer_than_any_in_them(ticks, classifier):
    text = card(classifier, about={"recipe": {"a": "`" * ticks}})
    assert f"\n{'`' * max(3, ticks + 1)}yaml\n" in text


def test_names_are_one_line_of_what_can_be_seen(classifier):
    assert headings(card(classifier, about={"run_name": " a\r\nb\tc\u2028d\x00\u202e "}))[0] == ("h1", "a b c d")
    assert headings(card(classifier, about={"run_name": "\x00"}))[0] == ("h1", '""')


def test_long_names_are_cut(classifier):
    assert headings(card(classifier, about={"run_name": "x" * 81}))[0] == ("h1", "x" * 77 + "...")
    assert headings(card(classifier, about={"run_name": "x" * 80}))[0] == ("h1", "x" * 80)


# The comparison


@pytest.mark.parametrize("scale", [1e-4, 1e-3, 0.1, 1.0, 50.0])
def test_rounding_is_a_share_of_the_scale(scale):
    bound = 1e-5 * max(1e-3, scale)
    assert Difference(0.99 * bound, scale, 2, (64, 64)).is_rounding
    assert not Difference(1.01 * bound, scale, 2, (64, 64)).is_rounding


def test_a_small_output_counts_as_much_as_a_large_one():
    large, small, images = torch.full((2, 3), 100.0), torch.full((2, 3), 0.1), torch.zeros(2, 3, 8, 9)
    found = difference([large, small], [large, small + 1e-4], images)
    assert found == Difference(pytest.approx(1e-4, rel=1e-3), pytest.approx(0.1), 2, (8, 9))
    assert not found.is_rounding
    assert difference([large, small], [large + 1e-4, small], images).is_rounding


@pytest.mark.parametrize("found", [[], [torch.zeros(2)], [torch.zeros(3), torch.zeros(1)]], ids=str)
def test_other_shapes_are_infinitely_far(found):
    apart = difference([torch.zeros(3), torch.zeros(2)], found, torch.zeros(2, 3, 8, 8))
    assert apart.largest == math.inf
    assert not apart.is_rounding
    assert not difference([], [], torch.zeros(2, 3, 8, 8)).is_rounding


@pytest.mark.parametrize("place", [0, 1])
def test_what_is_no_number_is_never_rounding(place):
    found = [torch.zeros(3), torch.zeros(3)]
    found[place] = torch.full((3,), math.nan)
    assert not difference([torch.zeros(3)] * 2, found, torch.zeros(2, 3, 8, 8)).is_rounding


@pytest.mark.parametrize("channels", [1, 3, 4, 13, 200])
@pytest.mark.parametrize("side", [(32, 32), (64, 96)])
def test_no_two_channels_of_the_photographs_are_alike(channels, side):
    preparation = Preparation(image_size=side, mean=(0.5,) * channels, std=(0.25,) * channels, crop_pct="auto")
    images = photographs(preparation)
    assert images.shape == (2, channels, *side)
    assert len(images.movedim(1, 0).flatten(1).unique(dim=0)) == channels


@pytest.mark.parametrize("channels", [3, 4, 13])
def test_two_channels_confused_are_noticed(channels, randomise, tmp_path):
    trained = write(tmp_path, randomise, channels=channels)
    alike = replace(trained.preparation, mean=(0.5,) * channels, std=(0.25,) * channels)
    images = photographs(alike)
    stem = trained.net.stem[0].weight
    with torch.inference_mode():
        right = trained.net(images)
        for first, second in itertools.combinations(range(channels), 2):
            order = list(range(channels))
            order[first], order[second] = second, first
            stem.copy_(stem[:, order].clone())
            assert not difference([right], [trained.net(images)], images).is_rounding
            stem.copy_(stem[:, order].clone())
        assert difference([right], [trained.net(images)], images).is_rounding
