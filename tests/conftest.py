"""What every test module shares."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from devices import HIDES, shows_cuda

if TYPE_CHECKING:
    from tiny_runs import TinyRuns

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_configure(config: pytest.Config) -> None:
    """Hide CUDA from ordinary tests, before anything asks for it; then set up the libraries."""
    if not shows_cuda(config.option.markexpr):
        os.environ[HIDES] = ""
    import torch

    from qlora_kit.system.quiet import quiet_libraries, quiet_progress_bars

    quiet_libraries()
    quiet_progress_bars()
    torch.set_num_threads(1)  # tiny tensors: a second thread costs more than it brings


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real data sets; a test that uses them is skipped where they are absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip("the real data sets are not at ../shared/data")
    return SHARED_DATA


@pytest.fixture(scope="session")
def tiny_runs(tmp_path_factory) -> TinyRuns:
    """Finished runs of three steps, each made when a test first asks for it; tests leave them as they are."""
    from tiny_runs import TinyRuns

    return TinyRuns(tmp_path_factory.mktemp("tiny_runs"))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip GPU tests where there is no CUDA device to be seen, and let no other test run where there may be one."""
    import torch

    if not torch.cuda.is_available():
        reason = "needs a CUDA device, and -m gpu, for other tests see none"
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))
    ordinary = [item.nodeid for item in items if "gpu" not in item.keywords]
    if shows_cuda(config.option.markexpr) and ordinary:
        raise pytest.UsageError(f"{ordinary[0]} is not marked gpu: give -m gpu, which runs nothing else")


@pytest.fixture
def in_this_process(monkeypatch):
    """Both sides of a proof answer here, where the libraries are imported already."""
    from qlora_kit.release.proof import (
        live_side,
        release_side,
        verify,  # here: most tests need none of it
    )

    def run(sides: verify.Sides) -> None:
        live_side.main(sides.job)
        for into, release in sides.releases.items():
            (sides.folder / into).mkdir()
            release_side.main(release, sides.folder / live_side.ROWS_FILE, sides.folder / into)

    monkeypatch.setattr(verify.Sides, "run", run)
