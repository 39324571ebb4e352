"""The recipes of `configs/`: each is loaded, planned within the GPU that it names, and run for two steps.

What a test needs to know of a recipe is read off the recipe itself: its settings, and of its comment the commands, the
columns after "Data:" and the GPU after "Memory:". So every file in the folder is covered.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import classifiers
import families
import pytest
import text_pairs
import yaml

from qlora_kit import RunConfig, SearchConfig
from qlora_kit.__main__ import main

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
GB = 10**9  # the smaller of what the two letters may mean: what a display takes is left over
SIZES_GB = (2, 4, 6, 8, 12, 16, 24)  # of GPUs
OF_SEARCH = {field.name for field in dataclasses.fields(SearchConfig)}
SOME_PASSES = 2  # forward passes of a step that the tiny runs take

# The published shapes of models, so that no test asks the hub: a name that the planner knows, or a config.json.
SHAPES: dict[str, str | dict[str, Any]] = {
    "demo": "demo",
    "meta-llama/Llama-3.1-8B-Instruct": "llama-3.1-8b",
    "Qwen/Qwen2.5-7B-Instruct": "qwen2.5-7b",
    "Qwen/Qwen2.5-1.5B": "qwen2.5-1.5b",
    "Qwen/Qwen2.5-0.5B": "qwen2.5-0.5b",
    "Qwen/Qwen3-4B-Base": "qwen3-4b",
    "openai-community/gpt2-large": "gpt2-large",
    "google-bert/bert-base-cased": {"model_type": "bert", "vocab_size": 28996},
    "google-t5/t5-small": {"model_type": "t5", "decoder_start_token_id": 0},
    "sentence-transformers/all-MiniLM-L6-v2": {
        "model_type": "bert",
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_hidden_layers": 6,
    },
}
TINY = {"llama": "llama", "qwen2.5": "qwen2", "qwen3": "qwen3", "gpt2": "gpt2", "bert": "bert", "t5": "t5"}

_TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
_CONTEXT = "Ann Lee lives in Oslo."
_ANSWERS = {"text": ["Oslo"], "answer_start": [_CONTEXT.index("Oslo")]}
ROWS: dict[tuple[str, ...], list[dict[str, Any]]] = {  # by the columns that a recipe's comment names
    ("messages",): [{"messages": _TALK}],
    ("instruction", "input", "output"): [{"instruction": "add", "input": "1 and 2", "output": "3"}],
    ("prompt", "completion"): [{"prompt": "1 and 2", "completion": "3"}],
    ("question", "answer"): [{"question": "1 and 2?", "answer": "3"}],
    ("text",): [{"text": "one and two are three"}],
    ("text", "label"): classifiers.ROWS,
    ("sentence", "label"): [{"sentence": row["text"], "label": row["label"]} for row in classifiers.ROWS],
    ("tokens", "tags"): classifiers.SENTENCES,
    ("question", "context", "answers"): [
        {"question": "Where?", "context": _CONTEXT, "answers": answers}
        for answers in (_ANSWERS, {"text": [], "answer_start": []})
    ],
    ("dialogue", "summary"): [{"dialogue": "A: hi. B: hello.", "summary": "They greet."}],
    ("source", "target"): text_pairs.ROWS,
}


class Recipe:
    """A file of `configs/`: its settings, and what its comment says."""

    def __init__(self, path: Path) -> None:
        self.path = path
        text = path.read_text(encoding="utf-8")
        self.settings: dict[str, Any] = yaml.safe_load(text)
        self.comment = [line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#")]
        self.title = self.comment[0]
        self.commands = [line.split() for line in self.comment if line.startswith("qlora-kit ")]

    def said(self, label: str) -> str:
        """The sentences of the comment behind `label`."""
        (start,) = [number for number, line in enumerate(self.comment) if line.startswith(f"{label}: ")]
        paragraph = " ".join(self.comment[start:]).removeprefix(f"{label}: ")
        return re.split(r" {2,}| (?:Data|Memory|Model): ", paragraph)[0]

    @property
    def columns(self) -> tuple[str, ...]:
        """Those named first in what it says of its data."""
        return tuple(re.findall(r"`(\w+)`", re.split(r"[.;(]| or ", self.said("Data"))[0]))

    @property
    def gpu_gb(self) -> int:
        """The size of the GPU that it is for."""
        (size,) = re.findall(r"a GPU of (\d+) GB", self.said("Memory"))
        return int(size)

    @property
    def is_search(self) -> bool:
        """Whether it is for `qlora-kit search`."""
        return "folds" in self.settings

    @property
    def command(self) -> str:
        """The command that it is for."""
        return "search" if self.is_search else "train"

    @property
    def run_settings(self) -> dict[str, Any]:
        """Those of one run: of a search, the one with the largest values."""
        if not self.is_search:
            return self.settings
        own = {name: value for name, value in self.settings.items() if name not in OF_SEARCH}
        return {name: max(value, key=float) if isinstance(value, list) else value for name, value in own.items()}

    @property
    def passes(self) -> int:
        """Forward passes of an optimizer step."""
        return int(self.settings.get("grad_accum", 1))

    @property
    def tiny(self) -> str:
        """The tiny model of the same kind."""
        shape = SHAPES[self.settings["model"]]
        kind = shape if isinstance(shape, str) else shape["model_type"]
        return next(tiny for name, tiny in TINY.items() if kind.startswith(name))


RECIPES = [Recipe(path) for path in sorted(CONFIGS.iterdir()) if path.name != "README.md"]
every_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.path.stem)


@every_recipe
def test_its_comment_says_what_it_is_for_and_what_it_takes(recipe):
    assert recipe.path.suffix == ".yaml"
    assert recipe.title.endswith(".")
    assert recipe.columns in ROWS
    assert recipe.gpu_gb
    file = f"configs/{recipe.path.name}"
    assert [recipe.command] == [command[1] for command in recipe.commands if file in command and command[1] != "plan"]
    assert "task" in recipe.settings  # said there, so that a plan needs no data


def test_the_table_says_what_the_recipes_say():
    rows = [line for line in (CONFIGS / "README.md").read_text(encoding="utf-8").splitlines() if line.startswith("| [")]
    assert sorted(rows) == sorted(
        f"| [{r.path.name}]({r.path.name}) | {r.title.rstrip('.')} | {r.settings['model']} | {r.gpu_gb} GB |"
        for r in RECIPES
    )


@every_recipe
def test_its_settings_are_known_and_allowed(recipe):
    config = RunConfig.from_flat(recipe.run_settings)
    assert config.base.model == recipe.settings["model"]
    if recipe.is_search:
        SearchConfig.from_flat(recipe.settings)


def test_a_mistake_in_a_recipe_is_one_message(tmp_path, capsys):
    file = tmp_path / "recipe.yaml"
    file.write_text((CONFIGS / "chat-8b.yaml").read_text(encoding="utf-8") + "ebochs: 2\n", encoding="utf-8")
    with pytest.raises(SystemExit) as caught:
        main(["plan", "--config", str(file)])
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert "ebochs" in said
    assert "epochs?" in said


@pytest.mark.slow
@every_recipe
def test_what_it_plans_fits_the_gpu_that_it_names_and_no_smaller_one(recipe, tmp_path, capsys):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe.run_settings), encoding="utf-8")
    main(["plan", "--config", str(file), *_shape(recipe, tmp_path), "--no-baselines", "--json"])
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert not plan["unplanned"]
    assert recipe.gpu_gb == next(size for size in SIZES_GB if plan["device_bytes"] <= size * GB)


def _shape(recipe: Recipe, folder: Path) -> list[str]:
    """The flags that name the model's shape instead of the hub's model."""
    shape = SHAPES[recipe.settings["model"]]
    if isinstance(shape, str):
        return ["--model", shape]
    file = folder / "config.json"
    file.write_text(json.dumps(shape))
    return ["--model", str(file), "--weights", "random"]


@pytest.mark.slow
@every_recipe
def test_two_steps_on_a_tiny_model(recipe, tmp_path):
    flags = [text for name, value in instead_of(recipe, tmp_path).items() for text in (flag(name), str(value))]
    main([recipe.command, "--config", str(recipe.path), "--no-preflight", "--out", str(tmp_path / "out"), *flags])
    if recipe.is_search:
        best = yaml.safe_load((tmp_path / "out" / "best.yaml").read_text())
        assert RunConfig.from_flat(best).adapter.r in (4, 8)
        return
    metrics = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["loss"] for line in metrics if "loss" in line}
    assert list(losses) == [1, 2]
    assert all(math.isfinite(loss) for loss in losses.values())


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def instead_of(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """What a test gives in the place of the recipe's own values; all others stay."""
    instead: dict[str, Any] = {"max_steps": 2, "grad_accum": min(recipe.passes, SOME_PASSES), "device": "cpu"}
    if "exact_match" in recipe.settings:
        instead["exact_match"] = 3
    if recipe.is_search:
        instead |= {"folds": 2, "r": "4,8", "lr": "1e-3"}
    if recipe.settings["model"] == "demo":  # it is tiny, and here
        return instead
    data = classifiers.save_rows(folder / "data.jsonl", (ROWS[recipe.columns] * 24)[:24])
    if "eval_data" in recipe.settings:
        instead["eval_data"] = data
    return {**instead, "model": save_tiny(recipe, folder / "base"), "data": data, "seq_len": 64}


def save_tiny(recipe: Recipe, folder: Path) -> Path:
    """A model folder of the recipe's kind."""
    if recipe.tiny == "t5":
        return text_pairs.save_base(folder, "t5")
    if recipe.settings["task"] == "text-generation":
        return families.save_tiny(folder, recipe.tiny)
    return classifiers.save_base(folder, recipe.tiny)
