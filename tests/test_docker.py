"""The files of docker/ agree with each other and with the project; scripts/docker_check.sh builds and runs them."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from docker.utils.build import exclude_paths

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NAMES = ["Dockerfile", "Dockerfile.minkowski"]
DEFINITION = (ROOT / "docker/fcmae.def").read_text()


def instructions(name: str) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile, as (RUN, what follows)."""
    lines = [line for line in (ROOT / "docker" / name).read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n", "", "\n".join(lines))
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


def copied(name: str) -> list[str]:
    """What a Dockerfile takes from the context."""
    copies = [shlex.split(rest) for word, rest in instructions(name) if word == "COPY"]
    return [source for words in copies if not words[0].startswith("--from") for source in words[:-1]]


def section(name: str) -> str:
    """A section of the Apptainer definition."""
    (found,) = re.findall(rf"^%{name}\n(.*?)(?=^%|\Z)", DEFINITION, flags=re.MULTILINE | re.DOTALL)
    return str(found)


@pytest.fixture(scope="module")
def context() -> set[str]:
    """The files that a build service is sent; the SDK adds .dockerignore itself."""
    found = exclude_paths(str(ROOT), (ROOT / ".dockerignore").read_text().splitlines())
    return {path for path in found if (ROOT / path).is_file()} - {".dockerignore"}


def test_nothing_but_what_is_copied_reaches_the_context(context: set[str]) -> None:
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout: nothing says which files belong to the project")
    sources = [source for name in NAMES for source in copied(name)]
    files = [file for file in listed.stdout.splitlines() if (ROOT / file).is_file()]
    assert context == {file for file in files if any(Path(file).is_relative_to(source) for source in sources)}


@pytest.mark.parametrize("name", NAMES)
def test_what_is_copied_is_in_the_context(name: str, context: set[str]) -> None:
    assert copied(name)
    for source in copied(name):
        assert any(Path(file).is_relative_to(source) for file in context), source


def test_the_wheel_has_what_its_build_reads() -> None:
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    read = [PROJECT["readme"], *PROJECT["license-files"], *build["packages"], *build["force-include"], "pyproject.toml"]
    assert sorted(read) == sorted(copied("Dockerfile"))


@pytest.mark.parametrize("name", NAMES)
def test_images_end_without_root(name: str) -> None:
    users = [rest for word, rest in instructions(name) if word == "USER"]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[-1]), "a number, for those who ask whether it is root"


def test_dependencies_are_installed_before_the_code_arrives() -> None:
    last = [rest for _, rest in instructions("Dockerfile")]
    last = last[len(last) - last[::-1].index("python") :]  # the stage from `FROM python` on
    order = [next(n for n, rest in enumerate(last) if part in rest) for part in ("pip install -r", "/wheel ", "*.whl")]
    assert order == sorted(order)


def test_the_default_command_says_what_is_inside() -> None:
    program, *arguments = json.loads(instructions("Dockerfile")[-1][1])
    assert program == "python"
    said = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert said.startswith(f"fcmae {PROJECT['version']} | torch {torch.__version__} | "), said


def test_versions_agree() -> None:
    texts = [(ROOT / "docker" / name).read_text() for name in (*NAMES, "fcmae.def", "README.md")]
    texts.append((ROOT / "scripts/docker_check.sh").read_text())
    for pattern in (r"fcmae:(\d[\w.]*)", r"fcmae-(\d[\w.]*)-py3", r'image\.version[ ="]+([\w.]+)'):
        found = {version for text in texts for version in re.findall(pattern, text)}
        assert found == {PROJECT["version"]}, pattern


def test_minkowski_is_built_as_its_script_wants() -> None:
    (extra,) = PROJECT["optional-dependencies"]["minkowski"]
    assert extra in (ROOT / "scripts/install_minkowski.sh").read_text()
    packages = re.search(r'^packages="([^"]+)"', (ROOT / "scripts/install_minkowski.sh").read_text(), re.MULTILINE)
    installed = " ".join(rest for name in NAMES for word, rest in instructions(name) if word == "RUN").split()
    assert packages
    assert set(packages[1].split()) <= set(installed)


def test_the_definition_installs_what_the_image_does() -> None:
    def packages(text: str) -> set[str]:
        found = re.search(r"--no-install-recommends ([^&\n]+)", text)
        assert found
        return set(found[1].split())

    (first, *_) = [rest for word, rest in instructions("Dockerfile") if word == "RUN"]
    assert packages(section("post")) == packages(first)
    base = dict(re.findall(r"^\s*(\w+)=(\S+)$", section("arguments"), flags=re.MULTILINE))["base"]
    assert ("ARG", f"BASE={base}") in instructions("Dockerfile")


@pytest.mark.parametrize("name", ["post", "environment", "runscript", "test"])
def test_the_scripts_of_the_definition_are_shell(name: str) -> None:
    subprocess.run(["sh", "-n"], input=section(name), text=True, check=True)


def test_hadolint_finds_nothing() -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if hadolint is None:
        pytest.skip("hadolint is not installed: make lint-tools")
    subprocess.run([hadolint, *(f"docker/{name}" for name in NAMES)], cwd=ROOT, check=True)
