"""The README keeps its word: its example runs, its commands exist, its figures are those of the committed results."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from qlora_kit.cli.main import COMMANDS, command_of
from qlora_kit.config.rules import flag
from qlora_kit.config.settings import settings

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    example = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    exec(compile(example, "README.md", "exec"), {})
    assert "runs/from-python/adapter" in capsys.readouterr().out
    assert (tmp_path / "runs" / "from-python" / "adapter" / "adapter_model.safetensors").is_file()


def test_the_figures_are_those_of_the_committed_results():
    script = ROOT / "benchmarks" / "readme.py"
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr or "run `python benchmarks/readme.py`"


def test_every_command_flag_and_file_that_it_names_exists():
    switches = {flag(f"no_{field.name}") for _, field, hint in settings() if hint is bool}
    flags = (
        {flag(field.name) for _, field, _ in settings()}
        | switches
        | {flag(name) for command in map(command_of, COMMANDS) for name in command.own_names()}
        | {
            "--ablation",
            "--run",
            "--config",
            "--rows",
            "--check",
            "--help",
            "--fit",
            "--gpu",
            "--plot",
            "--cpu",
        }
    )
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", README))
    assert named <= flags
    assert set(re.findall(r"qlora-kit ([a-z]+)", README)) <= set(COMMANDS)
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert links
    assert all((ROOT / link).exists() for link in links)


@pytest.mark.parametrize("target", ["demo", "test", "test-slow", "lint"])
def test_make_knows_its_targets(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_make_installs_a_torch_that_the_package_takes():
    """A set-up whose second line asked for another torch would fetch gigabytes."""
    (asked,) = re.findall(r'"(torch[^"]+)"', (ROOT / "Makefile").read_text())
    (taken,) = re.findall(r'"(torch[<>=][^"]+)"', (ROOT / "pyproject.toml").read_text())
    versions = [f"2.{minor}.{patch}" for minor in range(30) for patch in range(3)]
    installed, usable = (set(Requirement(r).specifier.filter(versions)) for r in (asked, taken))
    assert installed <= usable
    assert {"2.8.0", "2.13.0", "2.15.0"} <= usable
    assert "2.16.0" not in usable
