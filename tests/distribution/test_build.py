"""`python -m build` makes a source archive and a wheel with the package and its licence, which need no checkout."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
FILES = ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
FOLDERS = ("qlora_kit", "tests", "benchmarks", "docs", "scripts")
FEW = {"--max-steps": "2", "--exact-match": "2"}  # the demo, short


@dataclass(frozen=True)
class Built:
    """What was built, and from what."""

    checkout: Path
    source_archive: Path
    wheel: Path


def run(*args: str | Path, cwd: Path, path: Path | None = None) -> str:
    """What a command prints; `path` is where Python finds the package."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env |= {} if path is None else {"PYTHONPATH": str(path)}
    done = subprocess.run([str(arg) for arg in args], cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Built:
    """Both archives, made from a copy of the checkout with a run lying in it."""
    folder = tmp_path_factory.mktemp("build")
    checkout = folder / "checkout"
    for name in FOLDERS:
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, checkout / name)
    (checkout / "runs" / "x").mkdir(parents=True)
    (checkout / "runs" / "x" / "run.json").write_text("{}")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", checkout, cwd=folder)
    (source_archive,) = (folder / "dist").glob("*.tar.gz")
    (wheel,) = (folder / "dist").glob("*.whl")
    return Built(checkout, source_archive, wheel)


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory) -> Path:
    """The wheel alone, installed into a folder; its dependencies are those of this environment."""
    target = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", target, built.wheel, cwd=target)
    return target


def package_files(checkout: Path) -> set[str]:
    """Every file of the package in the checkout, as its path there."""
    folder = checkout / "qlora_kit"
    return {path.relative_to(checkout).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_the_wheel_holds_the_package_its_data_and_the_licence_and_nothing_else(built):
    names = {name for name in zipfile.ZipFile(built.wheel).namelist() if not name.endswith("/")}
    package = {name for name in names if ".dist-info/" not in name}
    assert package == package_files(built.checkout)
    assert {"qlora_kit/py.typed", "qlora_kit/demo/base/model.safetensors", "qlora_kit/demo/data/train.jsonl"} <= package
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_source_archive_holds_the_package_and_the_licence_and_no_tests_or_runs(built):
    with tarfile.open(built.source_archive) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert package_files(built.checkout) | {"LICENSE", "README.md", "pyproject.toml"} <= names
    assert not {name for name in names if name.startswith(("tests", "runs", "benchmarks", "docs"))}


def test_the_wheel_says_its_licence_and_reads_as_the_readme(built):
    with zipfile.ZipFile(built.wheel) as wheel:
        (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = wheel.read(name).decode()
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    assert "\nLicense-File: LICENSE\n" in metadata
    assert metadata.endswith((ROOT / "README.md").read_text(encoding="utf-8"))


def test_the_demo_runs_outside_the_checkout(built, installed, tmp_path):
    """The Makefile's own commands, with few steps: one through the module, one through the console script."""
    train, merge = demo_commands()
    where = run(sys.executable, "-c", "import qlora_kit; print(qlora_kit.__file__)", cwd=tmp_path, path=installed)
    assert Path(where.strip()).is_relative_to(installed)
    run(sys.executable, "-m", "qlora_kit", *train, cwd=tmp_path, path=installed)
    assert (tmp_path / "runs" / "demo" / "adapter" / "adapter_model.safetensors").is_file()
    run(installed / "bin" / "qlora-kit", *merge, cwd=tmp_path, path=installed)
    assert (tmp_path / "release" / "demo" / "merge_report.json").is_file()


def demo_commands() -> list[list[str]]:
    """The arguments of `qlora-kit` behind `make demo`, shortened."""
    recipe = re.search(r"^demo:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe is not None
    lines = recipe[1].replace("\\\n", " ").splitlines()
    commands = [re.sub(r"\S+python scripts/(\w+)\.py", r"\1", line) for line in lines]
    return [shortened(shlex.split(command)) for command in commands]


def shortened(arguments: list[str]) -> list[str]:
    """With the values of `FEW`."""
    flags = ["", *arguments]
    return [FEW.get(flag, argument) for flag, argument in zip(flags, arguments, strict=False)]
