"""The table, the settings to train with, and the picture of a search."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import yaml
from matplotlib.image import imread
from rich.console import Console

from qlora_kit import AdapterConfig, DataConfig, EvalConfig, RunConfig
from qlora_kit.search.choice import FINISHED, Tried, best_of, choose
from qlora_kit.search.picture import draw
from qlora_kit.search.report import best_yaml, closing, table
from qlora_kit.search.result import SearchResult

MIB = 1 << 20


def result_of(tried, config=None) -> SearchResult:
    best, chosen = best_of(tried, higher=True), choose(tried, higher=True)
    return SearchResult(
        folder=Path("x"),
        metric="f1",
        n_folds=3,
        tried=tuple(tried),
        best=best,
        chosen=chosen,
        config=config or RunConfig(),
    )


def tried(r: int, lr: float, values, state: str = FINISHED, device_bytes: int | None = 100 * MIB) -> Tried:
    return Tried(
        point={"r": r, "lr": lr},
        rank=r,
        state=state,
        values=tuple(values),
        trainable=1000 * r,
        device_bytes=device_bytes,
    )


MANY = [
    tried(4, 1e-4, [0.80, 0.82, 0.84], device_bytes=100 * MIB),
    tried(8, 1e-4, [0.85, 0.86, 0.87], device_bytes=110 * MIB),
    tried(16, 1e-4, [0.85, 0.87, 0.88], device_bytes=130 * MIB),
    tried(4, 1e-3, [0.70, 0.75, 0.74], device_bytes=100 * MIB),
    tried(8, 1e-3, [], "ruled out: needs 9.00 GiB, and 8.00 GiB are given"),
    tried(16, 1e-3, [0.5], "diverged after 1 folds"),
]


def printed(result: SearchResult) -> str:
    out = io.StringIO()
    Console(file=out, width=160).print(table(result))
    return out.getvalue()


def test_the_table_shows_every_combination_and_marks_the_choice():
    lines = printed(result_of(MANY)).splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["4", "8", "16", "4", "8", "16"]
    assert "0.8600 ± 0.0058" in lines[3]  # s = 0.01, √3 folds
    assert lines[3].rstrip().endswith("chosen")
    assert lines[4].rstrip().endswith("best")
    assert "0.8500 – 0.8700" in lines[3]
    assert "8,000" in lines[3]
    assert "110 MiB" in lines[3]
    assert "ruled out: needs 9.00 GiB" in lines[6]
    assert "±" not in lines[7]
    assert "diverged" in lines[7]


def test_the_closing_lines_say_what_to_do_next():
    lines = "\n".join(closing(result_of([*MANY, tried(32, 1e-4, [], "running")])))
    assert "best: r = 16, lr = 0.0001: f1 0.8667" in lines
    assert "chosen: r = 8, lr = 0.0001" in lines
    assert "1 combinations are still open" in lines
    assert "train --config x/best.yaml" in lines


def test_the_file_to_train_with_holds_the_choice_and_what_is_not_the_default():
    config = RunConfig(
        adapter=AdapterConfig(r=8, targets=("q_proj", "v_proj")),
        data=DataConfig(data="mine.jsonl", columns={"text": "a"}),
        evaluation=EvalConfig(exact_match=10, eval_steps=5, keep_best=False),
        out="search/x",
        overwrite=True,
    )
    given = yaml.safe_load(best_yaml(result_of(MANY, config)))
    assert given == {
        "model": "demo",
        "r": 8,
        "targets": ["q_proj", "v_proj"],
        "data": "mine.jsonl",
        "columns": {"text": "a"},
        "lr": 2e-4,
        "keep_best": False,
    }
    held_out = RunConfig(data=DataConfig(data="mine.jsonl", eval_data="dev.jsonl"), evaluation=config.evaluation)
    kept = yaml.safe_load(best_yaml(result_of(MANY, held_out)))
    assert (kept["exact_match"], kept["eval_steps"], kept["eval_data"]) == (10, 5, "dev.jsonl")


@pytest.mark.parametrize(
    "combinations",
    [
        MANY,
        MANY[:1],
        [tried(8, lr, [0.1 * n, 0.2, 0.3], device_bytes=None) for n, lr in enumerate((1e-4, 1e-3, 1e-2), start=1)],
        [tried(r, lr / 1e4, [r / 100, lr / 100, 0.3]) for r in (4, 8) for lr in range(1, 12)],
    ],
    ids=["many", "one", "equal sizes, no memory", "more series than colours"],
)
def test_the_picture_is_drawn_of_whatever_is_there(combinations):
    image = imread(io.BytesIO(draw(result_of(combinations))))
    assert image.shape[0] > 500
    assert image[..., :3].min() < 0.2  # not an empty page
    assert image[..., :3].std() > 0.05
