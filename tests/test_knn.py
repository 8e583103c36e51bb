"""A vote of the nearest neighbours, against scikit-learn's."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

from fcmae.errors import UserError
from fcmae.evaluation import knn
from fcmae.evaluation.knn import KNN, accuracy

MARGIN = 1e-9  # below it, rounding may decide


def check_against_sklearn(x, y, queries, *, classes: int, k: list[int], temperature: float) -> float:
    """Compares what no rounding can decide; returns the share of the queries for which that is all.

    x (N, F), queries (M, F): float64; y (N,).
    """
    model = KNN(torch.tensor(x), torch.tensor(y), classes=classes, k=k, temperature=temperature)
    scores, predictions = model.scores(torch.tensor(queries)), model.predict(torch.tensor(queries))
    unit_x, unit_queries = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (x, queries))
    similarity = -np.sort(-unit_queries @ unit_x.T, axis=1)
    clear = []
    for number in k:
        reference = KNeighborsClassifier(
            number, metric="cosine", weights=lambda distance: np.exp((1 - distance) / temperature)
        ).fit(x, y)
        shares = np.zeros((len(queries), classes))
        shares[:, reference.classes_] = reference.predict_proba(queries)
        best = -np.sort(-shares, axis=1)
        same_neighbours = similarity[:, number - 1] - similarity[:, min(number, len(x) - 1)] > MARGIN
        same_neighbours |= number == len(x)
        certain = same_neighbours & (best[:, 0] - best[:, 1] > MARGIN)
        np.testing.assert_allclose(scores[number][same_neighbours], shares[same_neighbours], rtol=0, atol=1e-9)
        np.testing.assert_array_equal(predictions[number][certain], reference.predict(queries)[certain])
        clear.append(certain.mean())
    return float(np.mean(clear))


def test_digits_as_in_sklearn() -> None:
    x, y = load_digits(return_X_y=True)
    share = check_against_sklearn(x[:1300], y[:1300], x[1300:], classes=10, k=[10, 20, 100, 200], temperature=0.07)
    assert share > 0.99


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**31),
    images=st.integers(2, 40),
    features=st.integers(2, 8),
    classes=st.integers(2, 6),
    temperature=st.floats(0.02, 2),
    data=st.data(),
)
def test_any_features_as_in_sklearn(seed, images, features, classes, temperature, data) -> None:
    random = np.random.default_rng(seed)
    x, queries = random.normal(size=(images, features)), random.normal(size=(7, features))
    y = random.integers(0, classes, images)
    k = data.draw(st.lists(st.integers(1, images), min_size=1, max_size=4, unique=True))
    check_against_sklearn(x, y, queries, classes=classes, k=k, temperature=temperature)


def test_memory_stays_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    x, labels, queries = torch.randn(50, 4), torch.randint(0, 3, (50,)), torch.randn(23, 4)
    model = KNN(x, labels, classes=3, k=[5, 50])
    expected, largest = model.scores(queries), []
    topk = torch.Tensor.topk

    def watched(self, *args, **kwargs):
        largest.append(self.numel())
        return topk(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "topk", watched)
    monkeypatch.setattr(knn, "_HELD", 3 * (50 + 5 * 3))
    for number, scores in model.scores(queries).items():
        torch.testing.assert_close(scores, expected[number])
        assert model.predict(queries)[number].equal(scores.argmax(1))
    assert max(largest) == 150  # three images at a time


def test_memory_stays_bounded_with_many_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    x, labels, queries = torch.randn(50, 4), torch.randint(0, 1000, (50,)), torch.randn(23, 4)
    model = KNN(x, labels, classes=1000, k=[5, 50])
    expected, largest = model.predict(queries), []
    stack = torch.stack

    def watched(votes):
        stacked = stack(votes)
        largest.append(stacked.numel())
        return stacked

    monkeypatch.setattr(torch, "stack", watched)
    monkeypatch.setattr(knn, "_HELD", 20_000)
    for number, predicted in model.predict(queries).items():
        assert predicted.equal(expected[number])
    assert max(largest) == 3 * 2 * 1000  # of three images at a time, which hold twice that and more


def test_k_above_the_training_images_is_dropped() -> None:
    x, labels = torch.randn(20, 4), torch.randint(0, 3, (20,))
    model = KNN(x, labels, classes=3, k=[200, 20, 10, 100, 10])
    assert model.k == (10, 20)
    assert list(model.predict(x)) == [10, 20]
    with pytest.raises(UserError, match=r"k=\[100, 200\], but only 20 labelled training images"):
        KNN(x, labels, classes=3, k=[100, 200])


def test_images_without_a_label_do_not_vote() -> None:
    x, labels, queries = torch.randn(30, 4), torch.randint(0, 3, (30,)), torch.randn(9, 4)
    hidden = torch.arange(30) % 3 == 0
    some = KNN(x, labels.masked_fill(hidden, -1), classes=3, k=[4, 20, 21])
    assert some.k == (4, 20)
    torch.testing.assert_close(
        some.scores(queries), KNN(x[~hidden], labels[~hidden], classes=3, k=[4, 20]).scores(queries)
    )


def test_the_nearer_weighs_more_and_the_first_class_wins_a_tie() -> None:
    x = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, 0.8], [1.0, 0.0]])
    labels, query = torch.tensor([2, 1, 1, 3]), torch.tensor([[2.0, 0.0]])
    scores = KNN(x, labels, classes=4, k=[4], temperature=0.5).scores(query)[4][0].double()
    weight = np.exp(-0.4 / 0.5)  # of a similarity of 0.6 relative to one of 1
    np.testing.assert_allclose(scores, np.array([0, 2 * weight, 1, 1]) / (2 + 2 * weight), rtol=1e-6)
    assert KNN(x, labels, classes=4, k=[2]).predict(query)[2].tolist() == [2]


def test_a_small_temperature_leaves_the_nearest_alone() -> None:
    x, labels, queries = torch.randn(40, 4), torch.randint(0, 5, (40,)), torch.randn(30, 4)
    nearest = KNN(x, labels, classes=5, k=[1]).predict(queries)[1]
    model = KNN(x, labels, classes=5, k=[40], temperature=1e-6)
    assert model.predict(queries)[40].equal(nearest)
    torch.testing.assert_close(model.scores(queries)[40].sum(1), torch.ones(30))


def test_low_precision_features_vote_in_float32() -> None:
    x, labels, queries = torch.randn(40, 16), torch.randint(0, 5, (40,)), torch.randn(30, 16)
    exact = KNN(x.bfloat16().float(), labels, classes=5, k=[9]).scores(queries.bfloat16().float())[9]
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        scores = KNN(x.bfloat16(), labels, classes=5, k=[9]).scores(queries.bfloat16())[9]
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, exact)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_queries_come_to_the_device_of_the_training_images() -> None:
    x, labels, queries = torch.randn(400, 16).double(), torch.randint(0, 5, (400,)), torch.randn(30, 16).double()
    model = KNN(x.cuda(), labels, classes=5, k=[9, 100])
    for number, scores in KNN(x, labels, classes=5, k=[9, 100]).scores(queries).items():
        torch.testing.assert_close(model.scores(queries)[number].cpu(), scores)
        assert accuracy(model.predict(queries)[number], scores.argmax(1)) == 1


def test_what_cannot_be_done_is_refused() -> None:
    x, labels = torch.randn(20, 4), torch.randint(0, 3, (20,))
    with pytest.raises(UserError, match="temperature=0"):
        KNN(x, labels, classes=3, temperature=0)
    for k in ([], [0, 5]):
        with pytest.raises(UserError, match="k="):
            KNN(x, labels, classes=3, k=k)
    with pytest.raises(UserError, match="below 2 classes"):
        KNN(x, labels.clamp(min=2), classes=2, k=[5])
    with pytest.raises(UserError, match="3 features per image, but 4 in training"):
        KNN(x, labels, classes=3, k=[5]).predict(x[:, :3])
    for bad in (float("nan"), float("inf")):
        broken = x.clone()
        broken[3, 2] = bad
        with pytest.raises(UserError, match="diverged"):
            KNN(broken, labels, classes=3, k=[5])
        with pytest.raises(UserError, match="diverged"):
            KNN(x, labels, classes=3, k=[5]).predict(broken)


def test_accuracy_counts_what_has_a_label() -> None:
    predictions = torch.tensor([0, 1, 2, 2, 1])
    assert accuracy(predictions, torch.tensor([0, 1, 1, -1, -1])) == pytest.approx(2 / 3)
    assert accuracy(predictions, torch.tensor([1, 2, 0, 0, -1])) == 0
    with pytest.raises(UserError, match="none of 5 images has a label"):
        accuracy(predictions, torch.full((5,), -1))
