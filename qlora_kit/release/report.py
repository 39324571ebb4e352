"""What a merge found: `merge_report.json`, the model card written from it, and the lines that the command prints."""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qlora_kit import runs
from qlora_kit.release.factors import Adapter
from qlora_kit.release.place import REPORT_FILE
from qlora_kit.release.proof import TensorProof, summary
from qlora_kit.release.request import Request, RunRecord
from qlora_kit.release.verify import ModelProof
from qlora_kit.task_models import GENERATION

Report = dict[str, Any]


def make_report(
    request: Request,
    base_hash: str,
    adapters: Sequence[Adapter],
    records: Sequence[RunRecord],
    into: str,
    licences: Mapping[str, str | None],
    left_out: Sequence[str],
    untied: bool,
    tensors: Sequence[TensorProof],
    model: ModelProof | None,
    choice: Mapping[str, Any] | None,
) -> Report:
    """The content of `merge_report.json`. Paths in it are those that the user typed."""
    return {
        "release": {
            "into": into,
            "asked_for": request.into,
            "dtype": request.dtype,
            "format": request.format,
            "left_out": list(left_out),
            "untied": untied,
            "task": request.base.task or GENERATION,
        },
        "base": {
            "model": request.base.model,
            "revision": request.base.revision,
            "hash": base_hash,
            "is_that_of_the_run": all(record.base_hash == base_hash for record in records) if records else None,
            "seen_as": _seen_as(request),
            "license": licences.get("base"),
        },
        "adapters": [_adapter(adapter) for adapter in adapters],
        "runs": [_run(record) for record in records],
        "licenses": dict(licences),
        "choice": dict(choice) if choice is not None else None,
        "proof": {"tensors": summary(tensors), "model": model.to_dict() if model is not None else None},
        "command": command_of(request),
        "versions": runs.versions(),
        "made": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _seen_as(request: Request) -> str:
    double = ", double quantization" if request.base.bits == 4 and request.base.double_quant else ""
    return request.held + double


def _adapter(adapter: Adapter) -> Report:
    settings = adapter.settings
    kinds = [kind for kind, key in (("rsLoRA", "use_rslora"), ("DoRA", "use_dora")) if settings.get(key)]
    return {
        "folder": adapter.given,
        "weight": adapter.weight,
        "r": settings.get("r"),
        "alpha": settings.get("lora_alpha"),
        "kinds": kinds,
        "layers": len(adapter.factors),
        "whole_tensors": sorted(adapter.whole),
    }


def _run(record: RunRecord) -> Report:
    """What the release owes to a run; without the folders that the run used."""
    results, settings = record.content.get("results", {}), record.content["settings"]
    return {
        "folder": record.given,
        "data": settings["data"]["data"],
        "examples": record.content.get("examples", {}).get("train"),
        "steps": record.content.get("steps"),
        "train_loss": results.get("train_loss"),
        "eval_loss": results.get("eval_loss"),
        "settings": {group: settings[group] for group in ("base", "adapter", "optim") if group in settings},
        "versions": record.content.get("versions"),
    }


def command_of(request: Request) -> str:
    """The command that makes this release again."""
    words = ["qlora-kit", "merge"]
    if request.run is not None:
        words += ["--run", request.run]
    if request.run is None or [given for given, _ in request.adapters] != [f"{request.run.rstrip('/')}/adapter"]:
        for given, weight in request.adapters:
            words += ["--adapter", given if weight == 1.0 else f"{given}:{weight:g}"]
        words += ["--base", request.base.model, "--bits", str(request.base.bits)]
    words += ["--into", request.into, "--dtype", request.dtype, "--format", request.format, "--out", request.out]
    if request.data_given and request.data is not None:
        words += ["--data", request.data.data]
    if request.allow_other_base:
        words.append("--allow-other-base")
    return shlex.join(words)


def write_report(report: Report, folder: Path) -> None:
    """Write the report and the card into the release."""
    runs.write_json(folder / REPORT_FILE, report)
    runs.write_text(folder / runs.CARD_FILE, card(report))


def card(report: Report) -> str:
    """The Markdown card of the release."""
    base, release = report["base"], report["release"]
    name = Path(base["model"].rstrip("/")).name
    licence = base["license"]
    lines = [
        "---",
        "library_name: transformers",
        *([f"license: {licence}"] if licence else []),
        f"base_model: {base['model']}",
        "tags: [lora, merged, qlora_kit]",
        "---",
        "",
        f"# {name}, fine-tuned and merged",
        "",
        f"- base: `{base['model']}`, hash `{base['hash']}`, merged into {_base_text(report)}",
        *(f"- adapter: {_adapter_text(adapter)}" for adapter in report["adapters"]),
        *(f"- trained on `{run['data']}`{_run_text(run)}" for run in report["runs"]),
        f"- weights: {release['dtype']}" + (", then quantized to nf4" if release["format"] == "nf4" else ""),
        f"- licences: {_licence_text(report['licenses'])}",
        "",
        "```python",
        *_how_to_load(release["task"]),
        "```",
        "",
        "## Proof",
        "",
        *(f"- {line}" for line in proof_lines(report)),
        "",
        f"All figures are in `{REPORT_FILE}`. Made again by:",
        "",
        f"    {report['command']}",
        "",
    ]
    return "\n".join(lines)


def _how_to_load(task: str) -> list[str]:
    if task != GENERATION:
        return ["from transformers import pipeline", "", f'classify = pipeline("{task}", model="this folder")']
    return [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("this folder", dtype="auto")',
        'tokenizer = AutoTokenizer.from_pretrained("this folder")',
    ]


def _base_text(report: Report) -> str:
    if report["release"]["into"] == "original":
        return f"its own weights (the adapter saw them as {report['base']['seen_as']})"
    return f"the weights that the adapter saw ({report['base']['seen_as']})"


def _adapter_text(adapter: Mapping[str, Any]) -> str:
    parts = [f"`{adapter['folder']}`", f"r = {adapter['r']}, alpha = {adapter['alpha']:g}", *adapter["kinds"]]
    parts.append(f"{adapter['layers']} layers")
    if adapter["whole_tensors"]:
        parts.append(f"{len(adapter['whole_tensors'])} tensors trained whole")
    if adapter["weight"] != 1.0:
        parts.append(f"weight {adapter['weight']:g}")
    return ", ".join(parts)


def _run_text(run: Mapping[str, Any]) -> str:
    parts = [f"{run['examples']:,} examples"] if run["examples"] else []
    if run["steps"]:
        parts.append(f"{run['steps']:,} steps")
    if run["eval_loss"] is not None:
        parts.append(f"held-out loss {run['eval_loss']:.4f}")
    return "".join(f", {part}" for part in parts)


def _licence_text(licences: Mapping[str, str | None]) -> str:
    return "; ".join(f"{what}: {licence or 'not known'}" for what, licence in licences.items())


def proof_lines(report: Report) -> list[str]:
    """The proof in words."""
    tensors, model = report["proof"]["tensors"], report["proof"]["model"]
    lines = [
        f"{tensors['tensors']:,} tensors, each read back as it was written; {tensors['changed']:,} of them changed by "
        f"the adapter, the others the base's"
    ]
    worst = tensors["rounding_to_change"]
    if worst is not None and worst["worst"]:
        lines.append(
            f"rounding to {report['release']['dtype']} is at most {worst['worst']:.1%} of what the adapter changed in "
            f"a tensor ({worst['tensor']})"
        )
    return lines + ([] if model is None else _model_lines(model)) + _choice_lines(report["choice"])


def _model_lines(model: Mapping[str, Any]) -> list[str]:
    exact, answer = model["exact"], model["answer"]
    if model["task"] == GENERATION:
        unit, each, answers, greedy = "token", "a token", "next tokens", "the greedy answer"
    else:
        unit, each, answers, greedy = "example", "an example", "labels", "the list of likeliest labels"
    blocks = "" if model["blocks"] == "all" else f", {model['blocks']} blocks (the whole does not fit into memory)"
    lines = [
        f"loaded by stock transformers as {model['loaded_as']}{blocks}, on {exact['tokens']:,} {unit}s of "
        f"{model['source']}",
        f"logits differ from {model['reference']} by at most {exact['relative_max']:.1e} and on average "
        f"{exact['relative_mean']:.1e} of their scale (allowed: {model['limit']['relative_max']:.1e}, "
        f"{model['limit']['why']})",
        f"KL {_small(exact['kl'])} nats {each}, {exact['agreement']:.2%} of {answers} the same{_losses(exact)}",
    ]
    if answer["same"]:
        lines.append(f"{greedy} is the same text" if model["task"] == GENERATION else f"{greedy} is the same")
    else:
        lines.append(
            f"{greedy} parts at {unit} {answer['parted_at']}, where the first two choices are "
            f"{answer['lead']:.2g} apart: a tie within the rounding"
        )
    served = model["served"]
    lines.append(
        f"each in its own arithmetic, as trained and as served: {served['relative_mean']:.1e} of the scale on average, "
        f"KL {_small(served['kl'])}{_losses(served)}"
    )
    if model["from_live"] is not None:
        own = model["from_live"]
        lines.append(
            f"against the model that trained (another base): {own['relative_mean']:.1e} of the scale on average, KL "
            f"{_small(own['kl'])}{_losses(own)}"
        )
    return lines


def _losses(comparison: Mapping[str, Any]) -> str:
    if comparison["loss"] is None:
        return ""
    return f", loss {comparison['loss']:.4f} for {comparison['reference_loss']:.4f}"


def _small(value: float) -> str:
    return f"{max(value, 0.0):.1e}"


def _choice_lines(choice: Mapping[str, Any] | None) -> list[str]:
    if choice is None:
        return []
    scores = ", ".join(
        f"{into}: loss {own['loss']:.4f}, KL from the model that trained {_small(own['kl'])}"
        for into, own in choice["scores"].items()
    )
    return [f"the {choice['chosen']} base was chosen on {choice['source']} ({scores})"]


def closing(report: Report, out: str) -> list[str]:
    """What the command says at its end."""
    release = report["release"]
    lines = [f"{out}: merged into {_base_text(report)}, {release['dtype']}, {release['format']}"]
    if release["left_out"]:
        lines.append(f"left out: {len(release['left_out'])} tensors of the base's files that the model does not use")
    model = report["proof"]["model"]
    if release["format"] == "nf4" and model is not None and model["exact"]["loss"] is not None:
        before, after = model["exact"]["reference_loss"], model["exact"]["loss"]
        lines.append(f"quantizing after the merge cost this: the loss was {before:.4f} and is {after:.4f} now")
    if release["untied"]:
        lines.append("the head and the embedding are no longer one tensor: the adapter changed them apart")
    return lines + [f"proof: {line}" for line in proof_lines(report)]
