"""The lines that a run says at its beginning and its end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.table import Table

from qlora_kit.config.settings import VARIANTS, BaseConfig, RunConfig
from qlora_kit.system.progress import PHASES, human_bytes
from qlora_kit.tasks import registry
from qlora_kit.tasks.labels import shown
from qlora_kit.tasks.task import Task

SHOWN_FIELDS, SHOWN_CHARACTERS = 8, 40  # of the fields of the data that nothing reads, and of the name of one

if TYPE_CHECKING:
    import torch

    from qlora_kit.adapters.unquantized import Unquantized
    from qlora_kit.lean.piece import Outcome


def opening(config: RunConfig, device: torch.device) -> list[str]:
    """Where it runs, and a warning about random weights."""
    import torch

    if device.type == "cuda":
        lines = [f"device: {torch.cuda.get_device_name(device)}"]
    else:
        lines = [f"device: CPU ({torch.get_num_threads()} threads); no CUDA device is used"]
    if config.base.weights == "random":
        lines.append("the base has random weights: for memory and speed work, its output means nothing")
    return lines


def task_lines(asked: BaseConfig, resolved: BaseConfig) -> list[str]:
    """What the model is trained to do, where that is not to write, and whether the data said so."""
    task = registry.task_named(resolved.task)
    if not task.is_announced:
        return []
    why = " (as the data and the model say)" if asked.task is None else ""
    labels = f": {len(resolved.labels)} labels, {shown(resolved.labels)}" if resolved.labels else ""
    several = ", several to an example" if resolved.multi_label else ""
    return [f"task: {task.name}{why}{labels}{several}"]


def unread_lines(unread: Mapping[str, Mapping[str, int]]) -> list[str]:
    """What nothing reads of the data (in words): each field and how many records have it, or with 0 a whole file."""
    return [f"not read of {what}: {_counted(fields)}" for what, fields in unread.items() if fields]


def _counted(fields: Mapping[str, int]) -> str:
    parts = [_shortened(name) + _records(count) for name, count in fields.items()]
    more = [f"and {len(parts) - SHOWN_FIELDS} more"] if len(parts) > SHOWN_FIELDS else []
    return ", ".join([*parts[:SHOWN_FIELDS], *more])


def _records(count: int) -> str:
    return f" ({count:,} {'record' if count == 1 else 'records'})" if count else ""


def _shortened(name: str) -> str:
    name = "".join(character if character.isprintable() else "�" for character in name)
    return name if len(name) <= SHOWN_CHARACTERS else f"{name[: SHOWN_CHARACTERS - 1]}…"


def unquantized_lines(found: Unquantized | None, bits: int) -> list[str]:
    """What 4 or 8 bits leave in 16, where that is much of the model and the settings allow it; and factors with it."""
    if found is None:
        return []
    if bits <= 8:
        return [f"{found.said} stay in 16 bits, and {found.said_of_factors}: stacks like {found.example}"]
    if not found.without_factors:
        return []
    return [f"of {found.said_of_share} that are stacks like {found.example}, {found.said_of_factors}"]


def step_table(outcomes: Mapping[str, Outcome]) -> Table:
    """What each piece of the lean step did to the model, and why not where it did not."""
    table = Table("piece", "put on", "left as it was", title="the lean step", title_justify="left", box=None)
    for name, outcome in outcomes.items():
        table.add_row(name, outcome.done, outcome.left)
    return table


def overview(record: Mapping[str, Any]) -> list[str]:
    """What trains on what, from the content of `run.json`."""
    settings, count, examples = record["settings"], record["parameters"], record["examples"]
    adapter = settings["adapter"]
    kind = "every weight" if settings["base"]["full"] else f"{VARIANTS[adapter['variant']]} r = {adapter['r']}"
    task = registry.task_named(settings["base"]["task"])
    unit = "rows" if settings["data"]["pack"] else task.row_unit  # several examples to a row
    base_count = count["total"] - (0 if settings["base"]["full"] else count["trainable"])
    lines = [
        f"{settings['base']['model']}: {base_count:,} parameters at {settings['base']['bits']} bits; "
        f"training {kind}, {count['trainable']:,} ({count['trainable'] / base_count:.2%} of them), "
        f"with {record['resolved']['optim']}",
        f"data: {examples['train']:,} {unit} to train on, "
        f"{examples['evaluation']:,} held out, at most {record['resolved']['seq_len']} tokens each",
    ]
    if record["truncated"] or record["dropped"]:
        lines.append(
            f"of the training examples {record['truncated']:,} are cut at {record['resolved']['seq_len']} tokens, and "
            f"{record['dropped']:,} are left out, with nothing to learn in them (see `qlora-kit preview`)"
        )
    return lines


def closing(result: Mapping[str, Any], task: Task) -> list[str]:
    """How it went and what it leaves, from the fields of the `RunResult` of a `task`."""
    lines = []
    if result["exact_match_after"] is not None:
        lines.append(
            f"exact match on held-out examples: {result['exact_match_before']:.1%} before, "
            f"{result['exact_match_after']:.1%} after"
        )
    held_out = "" if result["eval_loss"] is None else f", held-out loss {result['eval_loss']:.4f}"
    held_out += "".join(f", {figure}" for figure in task.figures(result["metrics"]))
    lines.append(
        f"done: {result['steps']} steps, training loss {result['train_loss']:.4f}{held_out}, "
        f"{result['tokens_per_s']:,.0f} tokens/s, peak {human_bytes(result['peak_bytes'])} "
        f"({PHASES[result['peak_phase']]})"
    )
    lines.append(f"{result['adapter'].name}: {result['adapter']}")
    return lines
