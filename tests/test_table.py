"""Tables: however a picture is written, it is one picture."""

from pathlib import Path

import pytest
from test_labelled import write

from fcmae import UserError
from fcmae.data.table import Table


def table(root: Path, *names: str) -> Table:
    """Of one picture more, `z.png`, to validate with like the last of these."""
    write(root, "a.png", "b/c.png", "z.png")
    lines = [f"{name},x,train" for name in names[:-1]] + [f"{names[-1]},x,val", "z.png,y,val"]
    (root / "labels.csv").write_text("\n".join(["image,label,split", *lines]))
    return Table(path=root, table=root / "labels.csv", multi_label=False, in_chans=1)


@pytest.mark.parametrize(
    ("first", "second", "name"),
    [
        ("a.png", "./a.png", "a.png"),
        ("b//c.png", "b/c.png", "b/c.png"),
        ("b/../a.png", "a.png", "a.png"),
        ("ROOT/a.png", "a.png", "a.png"),
        ("ROOT/b/./c.png", "b/c.png", "b/c.png"),
    ],
)
def test_a_picture_written_in_two_ways_is_one(first: str, second: str, name: str, tmp_path: Path) -> None:
    names = [written.replace("ROOT", str(tmp_path)) for written in (first, second)]
    for pair in (names, names[::-1]):
        with pytest.raises(UserError, match=rf"labels.csv, line 3: {name} stands there a second time: remove the line"):
            table(tmp_path, *pair)


def test_pictures_have_the_names_that_folders_give_them(tmp_path: Path) -> None:
    root = tmp_path / "in"
    write(tmp_path, "out.png")
    source = table(root, "./a.png", f"{root}/b/c.png", "../out.png", f"{tmp_path}/out.png")
    found = [source.sample_id(index) for index in range(len(source))]
    assert found == ["a.png", "b/c.png", "../out.png", f"{tmp_path}/out.png", "z.png"]  # outside, links may matter
    assert all(source.open(index).decode().size == (6, 5) for index in range(len(source)))
