"""Logistic regression on frozen features, against scikit-learn's."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.multiclass import OneVsRestClassifier
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from torch import Tensor

from fcmae.errors import UserError
from fcmae.evaluation import linear_probe as module
from fcmae.evaluation.linear_probe import PENALTIES, linear_probe


class Data(NamedTuple):
    """Features (N, F) and labels to learn from, and held out."""

    x: Tensor
    y: Tensor
    held_x: Tensor
    held_y: Tensor

    def standardized(self) -> tuple[np.ndarray, np.ndarray]:
        scaler = StandardScaler().fit(self.x.double())
        return scaler.transform(self.x.double()), scaler.transform(self.held_x.double())


def split(features: Tensor, labels: Tensor, seed: int = 0) -> Data:
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
    learn, held = order[:1297], order[1297:]
    return Data(features[learn], labels[learn], features[held], labels[held])


@pytest.fixture(scope="module", autouse=True)
def _one_thread_of_numpy() -> Iterator[None]:
    """More of them wait for each other a hundred times as long as they work."""
    with threadpool_limits(1):
        yield


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    x, y = load_digits(return_X_y=True)
    return torch.tensor(x, dtype=torch.float32), torch.tensor(y)


@pytest.fixture(scope="module")
def random_features(digits: tuple[Tensor, Tensor]) -> Tensor:
    """Of a network that has learned nothing: (1797, 128), strongly correlated."""
    torch.manual_seed(1)
    net = timm.create_model("convnextv2_atto", num_classes=0, in_chans=1, depths=(1, 1, 2, 1), dims=(16, 32, 64, 128))
    images = F.interpolate(digits[0].view(-1, 1, 8, 8) / 8 - 1, size=(32, 32), mode="bicubic")
    with torch.inference_mode():
        return torch.cat([net.eval()(part) for part in images.split(300)])


def attributes(digit: Tensor) -> Tensor:
    """Several labels per image: even, at least 5, a prime, and one that is never there. (N,) -> (N, 4)."""
    prime = torch.isin(digit, torch.tensor([2, 3, 5, 7]))
    return torch.stack([digit % 2 == 0, digit >= 5, prime, digit < 0], dim=1)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", ["pixels", "network"])
def test_within_half_a_point_of_sklearn(digits, random_features, kind, seed) -> None:
    data = split(digits[0] if kind == "pixels" else random_features, digits[1], seed)
    probe = linear_probe(*data, classes=10)
    x, held_x = data.standardized()
    references = {
        penalty: LogisticRegression(C=1 / penalty, max_iter=5000, tol=1e-6).fit(x, data.y).score(held_x, data.held_y)
        for penalty in PENALTIES
    }
    assert probe.scores[probe.best] == max(probe.scores.values())
    assert probe.scores[probe.best] == pytest.approx(max(references.values()), abs=0.005)
    assert list(probe.scores) == list(PENALTIES)
    assert list(probe.scores.values()) == pytest.approx(list(references.values()), abs=0.02)  # weak ones are slow


@pytest.mark.parametrize("images", [1297, 60])
def test_the_solution_is_that_of_sklearn(digits, images) -> None:
    data = split(digits[0].double(), digits[1])
    data = data._replace(x=data.x[:images], y=data.y[:images])
    probe = linear_probe(*data, classes=10, penalties=[100.0])
    x, held_x = data.standardized()
    reference = LogisticRegression(C=0.01, max_iter=5000, tol=1e-8).fit(x, data.y).decision_function(held_x)
    np.testing.assert_allclose(probe.logits, reference, rtol=0, atol=2e-3)
    assert probe.scores == {100.0: np.mean(reference.argmax(1) == data.held_y.numpy())}


def test_several_labels_per_image(digits) -> None:
    data = split(digits[0].double(), attributes(digits[1]))
    probe = linear_probe(*data, classes=4, penalties=[10.0, 100.0])
    x, held_x = data.standardized()
    for penalty, score in probe.scores.items():
        model = OneVsRestClassifier(LogisticRegression(C=1 / penalty, max_iter=5000, tol=1e-8)).fit(x, data.y[:, :3])
        reference = model.decision_function(held_x)
        assert score == pytest.approx(average_precision_score(data.held_y[:, :3], reference), abs=1e-3)
        if penalty == probe.best:
            np.testing.assert_allclose(probe.logits[:, :3], reference, rtol=0, atol=0.05)
    assert (probe.logits[:, 3] < -5).all()  # what is never there


def test_neither_units_nor_order_nor_pieces_matter(digits, monkeypatch: pytest.MonkeyPatch) -> None:
    data = split(digits[0].double(), digits[1])
    expected = linear_probe(*data, classes=10, penalties=[100.0]).logits
    units, offset = torch.linspace(1e-3, 1e3, 64).double(), torch.linspace(-5, 50, 64).double()
    order = torch.randperm(len(data.x))
    monkeypatch.setattr(module, "_LOGITS", 7000)
    with torch.inference_mode():
        changed = Data(data.x[order] * units + offset, data.y[order], data.held_x * units + offset, data.held_y)
        torch.testing.assert_close(
            linear_probe(*changed, classes=10, penalties=[100.0]).logits, expected, rtol=0, atol=1e-3
        )


@pytest.mark.parametrize("several", [False, True])
def test_the_gradient_is_that_of_the_loss(several) -> None:
    x, weight = torch.randn(12, 5).double(), torch.randn(6, 4).double()
    y = torch.rand(12, 4).double().round() if several else torch.randint(0, 4, (12,))
    loss, gradient = module._loss_and_gradient(x, y, weight)
    weight.requires_grad_()
    logits = x @ weight[:-1] + weight[-1]
    expected = F.binary_cross_entropy_with_logits(logits, y) * 48 if several else F.cross_entropy(logits, y) * 12
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, weight)[0])


def test_autocast_changes_nothing(digits) -> None:
    data = split(*digits)
    expected = linear_probe(*data, classes=10, penalties=[1000.0]).logits
    with torch.autocast("cpu", torch.bfloat16):
        logits = linear_probe(*data, classes=10, penalties=[1000.0]).logits
    assert logits.equal(expected)


def test_images_without_a_label_are_left_out(digits) -> None:
    data = split(digits[0].double(), digits[1])
    hidden, held_hidden = torch.rand(len(data.y)) < 0.5, torch.rand(len(data.held_y)) < 0.5
    some = data._replace(y=data.y.masked_fill(hidden, -1), held_y=data.held_y.masked_fill(held_hidden, -1))
    only = Data(data.x[~hidden], data.y[~hidden], data.held_x[~held_hidden], data.held_y[~held_hidden])
    probe, expected = (linear_probe(*rows, classes=10, penalties=[100.0]) for rows in (some, only))
    assert probe.scores == expected.scores
    torch.testing.assert_close(probe.logits[~held_hidden], expected.logits)


def test_constant_features_say_nothing() -> None:
    x, y = torch.randn(60, 3), torch.randint(0, 2, (60,))
    constant = torch.tensor([0.1, 300.0]).expand(60, 2)
    rounded = constant * (
        1 + torch.finfo(torch.float32).eps * torch.randn(60, 1).sign()
    )  # as by batches of other sizes
    assert rounded.std(0).all()
    expected = linear_probe(x, y, x, y, classes=2, penalties=[1.0]).logits
    for features in (constant, rounded):
        padded, elsewhere = torch.cat([x, features], dim=1), torch.cat([x, features + 1e-3], dim=1)
        logits = linear_probe(padded, y, elsewhere, y, classes=2, penalties=[1.0]).logits
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-3)


def test_of_equals_the_largest_penalty_is_the_best() -> None:
    y = torch.arange(40) % 2
    x = torch.stack([y * 2.0 - 1, torch.randn(40) * 0.01], dim=1)
    probe = linear_probe(x, y, x, y, classes=2, penalties=[0.1, 10.0, 1.0])
    assert probe.scores == {10.0: 1.0, 1.0: 1.0, 0.1: 1.0}
    assert probe.best == 10.0
    assert probe.logits.abs().max() < linear_probe(x, y, x, y, classes=2, penalties=[0.1]).logits.abs().max()


def test_what_cannot_be_done_is_refused() -> None:
    x, y = torch.randn(20, 4), torch.randint(0, 3, (20,))
    for penalties in ([], [1.0, 0.0]):
        with pytest.raises(UserError, match="penalties="):
            linear_probe(x, y, x, y, classes=3, penalties=penalties)
    with pytest.raises(UserError, match="max_iterations=0"):
        linear_probe(x, y, x, y, classes=3, max_iterations=0)
    with pytest.raises(UserError, match="3 features per image, but 4 in training"):
        linear_probe(x, y, x[:, :3], y, classes=3)
    with pytest.raises(UserError, match="diverged"):
        linear_probe(x / 0, y, x, y, classes=3)
    with pytest.raises(UserError, match="no training image has a label"):
        linear_probe(x, y.clamp(max=-1), x, y, classes=3)
    with pytest.raises(UserError, match="none of 20 images has a label"):
        linear_probe(x, y, x, y.clamp(max=-1), classes=3)
    nothing = torch.zeros(20, 3)
    with pytest.raises(UserError, match="none of 20 held-out images has a label"):
        linear_probe(x, F.one_hot(y, 3), x, nothing, classes=3)
