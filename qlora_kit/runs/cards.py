"""The README of a run folder and of its adapter, written from what the run recorded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qlora_kit.tasks import registry


def adapter_card(record: Mapping[str, Any]) -> str:
    """The Markdown card of the adapter of the run recorded in `record` (the content of `run.json`)."""
    base, adapter = record["settings"]["base"], record["settings"]["adapter"]
    lines = [
        "---",
        "library_name: peft",
        f"base_model: {base['model']}",
        "tags: [lora, qlora_kit]",
        "---",
        "",
        f"# {_title(base, adapter)}",
        "",
        *_random_note(base),
        f"- base: `{base['model']}`, {_bits(base)}, hash `{record['base_hash']}`",
        f"- adapter: {_adapter(adapter)}; {record['parameters']['trainable']:,} trainable parameters",
        f"- data: `{record['settings']['data']['data']}`, {record['examples']['train']:,} examples",
        f"- trained {record['steps']} steps; {_results(record)}",
        "",
        *_how_to_load(base),
        "",
    ]
    return "\n".join(lines)


def run_card(record: Mapping[str, Any]) -> str:
    """The Markdown card of the run folder."""
    folder = "model/" if record["settings"]["base"]["full"] else "adapter/"
    body = adapter_card(record).split("---\n", 2)[2].lstrip()
    files = [
        "## Files",
        "",
        f"- `{folder}`: the trained weights, with the tokenizer",
        "- `run.json`: every setting, the versions, the device, and the base's content hash",
        "- `plan.json`: the memory that was predicted for a GPU, part by part (unless `--no-preflight`)",
        "- `metrics.jsonl`: one line for each step and evaluation",
        "- `checkpoints/`: where training can be resumed from",
        "",
        "Repeat the run with `qlora-kit train --config run.json`.",
        "",
    ]
    return body + "\n" + "\n".join(files)


def _title(base: Mapping[str, Any], adapter: Mapping[str, Any]) -> str:
    name = str(base["model"]).rstrip("/").rsplit("/", 1)[-1]
    return f"{name}, every weight trained" if base["full"] else f"LoRA adapter (r = {adapter['r']}) for {name}"


def _how_to_load(base: Mapping[str, Any]) -> list[str]:
    if base["weights"] == "random":
        return ["It fits no published weights: its base was drawn by the seed in `run.json`."]
    auto_class = registry.task_named(base.get("task")).model.auto_class
    kind, folder = (auto_class, "model") if base["full"] else (auto_class.replace("Auto", "AutoPeft"), "adapter")
    library = "transformers" if base["full"] else "peft"
    if base.get("labels") and not base["full"]:
        names = f"num_labels={len(base['labels'])}"
        loaded = f'model = {kind}.from_pretrained("{folder}", {names})  # their names are in labels.json'
        return ["```python", f"from {library} import {kind}", "", loaded, "```"]
    return ["```python", f"from {library} import {kind}", "", f'model = {kind}.from_pretrained("{folder}")', "```"]


def _random_note(base: Mapping[str, Any]) -> list[str]:
    if base["weights"] != "random":
        return []
    return ["> **The base has random weights.** This run measures memory and speed; its output means nothing.", ""]


def _bits(base: Mapping[str, Any]) -> str:
    if base["bits"] == 4:
        return f"4 bits ({base['quant_type'].upper()}{', double quantization' if base['double_quant'] else ''})"
    return f"{base['bits']} bits"


def _adapter(adapter: Mapping[str, Any]) -> str:
    alpha = 2 * adapter["r"] if adapter["alpha"] is None else adapter["alpha"]
    kinds = [kind for kind, on in (("rsLoRA", adapter["rslora"]), ("DoRA", adapter["dora"])) if on]
    kinds += ["LoRA-XS"] if adapter["variant"] == "lora-xs" else []
    kinds += [f"begun by {adapter['init']}"] if adapter["init"] != "default" else []
    return ", ".join([f"r = {adapter['r']}, alpha = {alpha:g}", adapter["adapter_dtype"], *kinds])


def _results(record: Mapping[str, Any]) -> str:
    results = record["results"]
    parts = [f"training loss {results['train_loss']:.4f}"]
    if results.get("eval_loss") is not None:
        parts.append(f"held-out loss {results['eval_loss']:.4f}")
    if results.get("exact_match_after") is not None:
        parts.append(f"exact match {results['exact_match_before']:.1%} → {results['exact_match_after']:.1%}")
    task = registry.task_named(record["settings"]["base"].get("task"))
    return ", ".join([*parts, *task.figures(results.get("metrics") or {})])
