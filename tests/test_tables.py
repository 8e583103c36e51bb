"""Tables of predictions and features: exact, whole, or not there."""

import csv
import importlib.util
import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fcmae.errors import UserError
from fcmae.evaluation import table_formats
from fcmae.evaluation.tables import FEATURES, PREDICTIONS, check_table, names_beside, open_features, open_predictions

HAS_ARROW = importlib.util.find_spec("pyarrow") is not None
NAMES = ['a, "b"', "two\nlines", "über 狗", "caf\udce9", "", "=1+1"]
SEEN = [*NAMES[:3], "caf\\udce9", *NAMES[4:]]


def with_parquet(endings: tuple[str, ...]) -> list[Any]:
    needs_arrow = pytest.mark.skipif(not HAS_ARROW, reason="needs pyarrow")
    return [pytest.param(ending, marks=needs_arrow if ending == ".parquet" else ()) for ending in endings]


def read_predictions(path: Path) -> list[tuple[str, list[tuple[str, np.float32]]]]:
    """As (image, [(class, probability), ...])."""
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [
            (row["image"], [(p["class"], np.float32(p["probability"])) for p in row["predictions"]]) for row in rows
        ]
    if path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8") as file:
            flat = list(csv.DictReader(file))
    else:
        import pyarrow.parquet

        flat = pyarrow.parquet.read_table(path).to_pylist()
    pairs = (len(flat[0]) - 1) // 2
    return [
        (row["image"], [(row[f"class_{k}"], np.float32(row[f"probability_{k}"])) for k in range(1, pairs + 1)])
        for row in flat
    ]


def read_features(path: Path) -> tuple[list[str], np.ndarray]:
    """The names (N,) and the features (N, D), in float32."""
    if path.suffix == ".npy":
        with names_beside(path).open(newline="", encoding="utf-8") as file:
            return [row["image"] for row in csv.DictReader(file)], np.load(path)
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [row["image"] for row in rows], np.array([row["features"] for row in rows], np.float32)
    if path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8") as file:
            header, *cells = csv.reader(file)
        assert header == ["image", *(f"feature_{index}" for index in range(len(header) - 1))]
        return [row[0] for row in cells], np.array([row[1:] for row in cells], np.float64).astype(np.float32)
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path)
    width = table.schema.field("features").type.list_size
    return table["image"].to_pylist(), np.array(table["features"].to_pylist(), np.float32).reshape(-1, width)


def some_rows(count: int, top_k: int) -> list[tuple[str, list[tuple[str, float]]]]:
    random = np.random.default_rng(0)
    return [
        (NAMES[i % len(NAMES)], [(NAMES[(i + k) % len(NAMES)], float(random.random())) for k in range(top_k)])
        for i in range(count)
    ]


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("ending", with_parquet(PREDICTIONS))
def test_predictions_come_back(tmp_path, ending, top_k, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_formats, "_VALUES_PER_GROUP", 40)  # several row groups
    path, rows = tmp_path / f"table{ending}", some_rows(20, top_k)
    with open_predictions(path, top_k=top_k) as table:
        for image, ranked in rows:
            table.write(image, ranked)
            assert not path.exists()
    seen = dict(zip(NAMES, SEEN, strict=True))
    expected = [(seen[image], [(seen[name], np.float32(share)) for name, share in ranked]) for image, ranked in rows]
    assert read_predictions(path) == expected
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_probabilities_are_short(tmp_path) -> None:
    for ending in (".csv", ".jsonl"):
        with open_predictions(tmp_path / f"table{ending}", top_k=2) as table:
            table.write("1.png", [("cat", float(np.float32(0.9))), ("dog", 1e-7)])
    assert (tmp_path / "table.csv").read_text() == (
        "image,class_1,probability_1,class_2,probability_2\n1.png,cat,0.9,dog,1e-07\n"
    )
    row = {
        "image": "1.png",
        "predictions": [{"class": "cat", "probability": 0.9}, {"class": "dog", "probability": 1e-07}],
    }
    assert (tmp_path / "table.jsonl").read_text() == json.dumps(row) + "\n"


@pytest.mark.parametrize("ending", with_parquet(FEATURES))
@settings(max_examples=25)
@given(
    batches=st.lists(st.integers(0, 5), min_size=1, max_size=5),
    width=st.integers(1, 12),
    data=st.data(),
    group=st.integers(1, 60),
)
def test_features_come_back_bit_by_bit(tmp_path_factory, ending, batches, width, data, group) -> None:
    path = tmp_path_factory.mktemp("features") / f"features{ending}"
    finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
    values = [data.draw(hnp.arrays(np.float32, (size, width), elements=finite)) for size in batches]
    names = [[f"{batch}/{SEEN[row]}" for row in range(size)] for batch, size in enumerate(batches)]
    with pytest.MonkeyPatch.context() as patch, open_features(path) as table:
        patch.setattr(table_formats, "_VALUES_PER_GROUP", group)
        for images, features in zip(names, values, strict=True):
            table.write(images, features)
    read_names, read_values = read_features(path)
    expected = np.concatenate(values)
    assert read_names == [name for images in names for name in images]
    assert read_values.dtype == np.float32
    np.testing.assert_array_equal(read_values.reshape(expected.shape).view(np.int32), expected.view(np.int32))


@pytest.mark.skipif(not HAS_ARROW, reason="needs pyarrow")
def test_parquet_is_written_group_by_group(tmp_path) -> None:
    import pyarrow.parquet

    path, values = tmp_path / "features.parquet", np.random.default_rng(0).normal(size=(2000, 1023))
    with open_features(path) as table:
        for rows in np.split(values, 100):
            table.write([str(index) for index in range(20)], rows)
    file = pyarrow.parquet.ParquetFile(path)
    assert [file.metadata.row_group(index).num_rows for index in range(4)] == [512, 512, 512, 464]
    assert str(file.schema_arrow.field("features").type) == "fixed_size_list<element: float>[1023]"


def test_an_array_can_grow_beyond_its_first_header(tmp_path) -> None:
    path = tmp_path / "features.npy"
    with open_features(path) as table:
        for batch in range(101):
            table.write([f"{batch}"] * 1000, np.full((1000, 1), batch, np.float64))
    values = np.load(path, mmap_mode="r")
    assert values.shape == (101_000, 1)
    assert (values[:, 0] == np.arange(101).repeat(1000)).all()


class Stop(BaseException):
    """Stands for Ctrl-C."""


@pytest.mark.parametrize(
    "error", [Stop(), KeyboardInterrupt(), UserError("mine"), FileNotFoundError(2, "gone", "1.png")]
)
@pytest.mark.parametrize("ending", with_parquet(FEATURES))
def test_an_interrupted_table_leaves_what_was_there(tmp_path, ending, error, recwarn) -> None:
    path = tmp_path / f"features{ending}"
    path.write_text("before")
    with pytest.raises(type(error)) as caught, open_features(path) as table:  # noqa: PT012  # what is tested
        table.write(["1.png", "2.png"], np.ones((2, 3), np.float32))
        raise error
    assert caught.value is error  # a picture that is gone is no table that cannot be written
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert path.read_text() == "before"
    assert not list(recwarn)


@pytest.mark.parametrize("ending", with_parquet(PREDICTIONS))
def test_interrupted_predictions_leave_nothing(tmp_path, ending) -> None:
    with pytest.raises(Stop), open_predictions(tmp_path / f"table{ending}", top_k=1) as table:  # noqa: PT012
        table.write("1.png", [("cat", 1.0)])
        raise Stop
    assert not list(tmp_path.iterdir())


def run(script: str, folder: Path) -> str:
    """What a script says, which has nothing to complain about."""
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout


@pytest.mark.skipif(not HAS_ARROW, reason="needs pyarrow")
def test_an_interrupted_parquet_file_is_let_go_of(tmp_path) -> None:
    script = """
        import contextlib
        from pathlib import Path
        import numpy as np
        from fcmae.evaluation.tables import open_features
        with contextlib.suppress(KeyboardInterrupt), open_features(Path("features.parquet")) as table:
            table.write(["1.png"], np.ones((1, 3)))
            raise KeyboardInterrupt
    """
    assert run(script, tmp_path) == ""


@pytest.mark.parametrize("bytes_free", [0, 1000, 200_000])
def test_a_full_disk_is_told_and_nothing_is_left(tmp_path, bytes_free) -> None:
    script = f"""
        import resource, sys
        from pathlib import Path
        import numpy as np
        from fcmae.errors import UserError
        from fcmae.evaluation.tables import open_features, open_predictions
        resource.setrlimit(resource.RLIMIT_FSIZE, ({bytes_free}, {bytes_free}))
        random = np.random.default_rng(0)
        def features(path):
            with open_features(path) as table:
                for _ in range(20):
                    table.write(["x"] * 50, random.normal(size=(50, 100)))
        def predictions(path):
            with open_predictions(path, top_k=1) as table:
                for number in random.random(25_000):
                    table.write("x" + str(number), [("c" + str(number), number)])
        for write, endings in ((features, {FEATURES[: 4 if HAS_ARROW else 3]}), (predictions, {PREDICTIONS})):
            for ending in endings:
                if ending == ".parquet" and not {HAS_ARROW}:
                    continue
                try:
                    write(Path("table" + ending))
                except UserError as error:
                    sys.stdout.write(f"{{error}}\\n")
    """
    endings = [ending for ending in (*FEATURES, *PREDICTIONS) if HAS_ARROW or ending != ".parquet"]
    expected = [
        f"cannot write table{ending}: File too large; free space or mend permissions there" for ending in endings
    ]
    assert run(script, tmp_path).splitlines() == expected
    assert not list(tmp_path.iterdir())


def test_other_endings_are_refused(tmp_path) -> None:
    for name, hint in (("table.cvs", "; did you mean .*table.csv?"), ("table.jsnol", "; did you mean .*table.jsonl?")):
        with pytest.raises(UserError, match=rf"its name must end in \.csv, \.jsonl, \.parquet{hint}"):
            check_table(tmp_path / name, PREDICTIONS)
    for name in ("table", "table.npy", "csv"):
        with pytest.raises(UserError, match=r"\.parquet$"), open_predictions(tmp_path / name, top_k=1):
            pass
    with (
        pytest.raises(UserError, match=r"must end in \.csv, \.jsonl, \.parquet, \.npy"),
        open_features(tmp_path / "x.pt"),
    ):
        pass
    check_table(tmp_path / "TABLE.CSV", PREDICTIONS)
    with open_predictions(tmp_path / "TABLE.CSV", top_k=1) as table, open_features(tmp_path / "X.NPY") as features:
        table.write("1.png", [("cat", 1.0)])
        features.write(["1.png"], np.ones((1, 2)))
    assert {file.name for file in tmp_path.iterdir()} == {"TABLE.CSV", "X.NPY", "X.NPY.images.csv"}


def test_pyarrow_is_asked_for(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"needs pyarrow: pip install 'fcmae\[parquet\]'"):
        check_table(tmp_path / "table.parquet", FEATURES)


def test_places_that_cannot_be_written(tmp_path) -> None:
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(UserError, match=r"is a folder: name a file, such as .*folder\.csv/table\.csv"):
        check_table(tmp_path / "folder.csv", FEATURES)
    with pytest.raises(UserError, match=r"cannot write .*No such file"), open_features(tmp_path / "no" / "table.npy"):
        pass


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_no_number_is_refused(tmp_path, bad) -> None:
    values = np.ones((3, 2))
    values[1, 1] = bad
    with (
        pytest.raises(UserError, match=r"^b: the model gives NaN or infinity"),
        open_features(tmp_path / "x.npy") as table,
    ):
        table.write(["a", "b", "c"], values)
    with pytest.raises(UserError, match=r"^a: the model"), open_predictions(tmp_path / "x.csv", top_k=1) as predictions:
        predictions.write("a", [("cat", bad)])
    assert not list(tmp_path.iterdir())


def test_tables_without_rows(tmp_path) -> None:
    with open_predictions(tmp_path / "table.csv", top_k=1):
        pass
    assert (tmp_path / "table.csv").read_text() == "image,class_1,probability_1\n"
    for ending in (".npy", ".csv"):
        with pytest.raises(UserError, match="would be empty"), open_features(tmp_path / f"features{ending}"):
            pass
    assert [file.name for file in tmp_path.iterdir()] == ["table.csv"]
