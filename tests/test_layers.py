"""Imports point down, floor by floor, and optional packages stay in their own files."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import fcmae

PACKAGE = Path(fcmae.__file__).parent
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
FLOORS = [
    {"errors"},
    {"files", "stopping"},
    {"masking"},
    {"packing"},
    {"engines"},
    {"models"},
    {"data", "checkpoints", "evaluation"},
    {"inference"},
    {"conversion"},
    {"training"},
    {"benchmark"},
    {"cluster"},
    {"command_line"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
ENTRY = len(FLOORS)  # every other module that lies directly in the package
ONLY_IN = {"MinkowskiEngine": "engines/minkowski.py", "triton": "engines/triton.py"}


def imports(source: str) -> Iterator[str]:
    """What a source imports, wherever in it: `from a.b import c` gives a.b.c, and so does a use of fcmae.b.c."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            yield from (f"{node.module}.{name.name}" for name in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "fcmae":
            yield f"fcmae.{node.attr}"


def offences(file: Path, source: str) -> Iterator[str]:
    room = file.parts[0].removesuffix(".py")
    floor = FLOOR.get(room, ENTRY)
    for name in imports(source):
        package, _, inner = name.partition(".")
        home = fcmae._HOME.get(inner, "")  # of a public name, such as create_model
        theirs = (home.removeprefix("fcmae.") or inner).partition(".")[0]
        inside = package == "fcmae" and theirs and (PACKAGE / theirs).exists() | (PACKAGE / f"{theirs}.py").exists()
        if inside and theirs != room and FLOOR.get(theirs, ENTRY) >= floor and floor < ENTRY:
            yield f"{room} imports {name}, which is not below it"
        if floor <= FLOOR["models"] and package in ("lightning", "pytorch_lightning", "hydra", "omegaconf"):
            yield f"{room} imports {name}, the models know no trainer and no configuration"
        if ONLY_IN.get(package, file.as_posix()) != file.as_posix():
            yield f"{package} is imported outside {ONLY_IN[package]}"


@pytest.mark.parametrize("file", FILES, ids=str)
def test_imports_point_down(file):
    assert not list(offences(file, (PACKAGE / file).read_text()))
    assert file.name not in ("utils.py", "helpers.py", "common.py")


def test_every_room_has_a_floor():
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert rooms <= FLOOR.keys()


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("masking.py", "from fcmae.packing import pack"),
        ("models/encoder.py", "def f():\n    import fcmae.training.pretrain"),
        ("models/encoder.py", "from lightning.pytorch import Trainer"),
        ("engines/torch.py", "import hydra"),
        ("engines/torch.py", "from fcmae import models"),
        ("engines/torch.py", "from fcmae import create_model"),
        ("engines/torch.py", "import fcmae\nmodel = fcmae.create_model('atto')"),
        ("data/folder.py", "from fcmae.checkpoints import load"),
        ("engines/torch.py", "import triton.language as tl"),
        ("training/pretrain.py", "import MinkowskiEngine as ME"),
    ],
)
def test_the_rule_notices(file, source):
    assert list(offences(Path(file), source))
