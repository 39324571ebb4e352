"""`make docs` builds the site, and fails on a link that leads nowhere."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def checkout(tmp_path) -> Path:
    """What the site is made of, to be changed."""
    for name in ("docs", "qlora_kit"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    return tmp_path


def build(checkout: Path) -> subprocess.CompletedProcess[str]:
    """The Makefile's own command, run in `checkout`."""
    recipe = re.search(r"^docs:.*\n\t(.*)\n", (ROOT / "Makefile").read_text(), re.MULTILINE)
    command = recipe[1].replace("$(BIN)/mkdocs", f"{sys.executable} -m mkdocs")
    env = {**os.environ, "PYTHONPATH": str(checkout)}
    return subprocess.run(command, shell=True, cwd=checkout, env=env, capture_output=True, text=True, check=False)


def test_the_site_is_built_from_the_code_and_the_pages(checkout):
    done = build(checkout)
    assert done.returncode == 0, done.stderr
    page = (checkout / "site" / "python-api" / "index.html").read_text(encoding="utf-8")
    assert "Run the training that" in page  # a docstring
    assert "<code>batch_size</code>" in page  # a setting
    assert "<td>QLoRA, 4 bits</td>" in (checkout / "site" / "benchmarks" / "index.html").read_text(encoding="utf-8")


def test_broken_links_fail_the_build(checkout):
    links = ("nowhere.md", "memory.md#nowhere", "tasks/", "nowhere.png")
    with (checkout / "docs" / "search.md").open("a", encoding="utf-8") as page:
        page.write("".join(f"\n[a link]({link})\n" for link in links))
    done = build(checkout)
    assert done.returncode != 0
    assert [link for link in links if f"'{link}'" not in done.stderr] == []
