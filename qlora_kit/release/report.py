"""What a merge found: `merge_report.json`, the model card written from it, and the lines that the command prints."""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qlora_kit.adapters.base_record import TrainedBase
from qlora_kit.adapters.files import WEIGHTS_FILE
from qlora_kit.config.settings import DataConfig
from qlora_kit.model import source
from qlora_kit.release.factors import DEFAULT_ALPHA, DEFAULT_RANK, Adapter
from qlora_kit.release.files import side_files
from qlora_kit.release.files.folder import REPORT_FILE
from qlora_kit.release.proof.tensors import TensorProof, summary
from qlora_kit.release.proof.verify import ModelProof
from qlora_kit.release.request import MergeRequest, RunRecord
from qlora_kit.runs.folder import CARD_FILE
from qlora_kit.system import files
from qlora_kit.tasks import registry

MAX_TARGETS = 12  # names of layers on the card; full names of every layer would be too many
Report = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What a merge found out, beside what was asked."""

    base_hash: str
    base_licence: Mapping[str, Any]
    adapters: Sequence[Adapter]
    trained_bases: Sequence[TrainedBase | None]  # what each adapter says of its base
    records: Sequence[RunRecord]
    into: str
    left_out: Sequence[str]
    untied: bool
    tensors: Sequence[TensorProof]
    model: ModelProof | None
    choice: Mapping[str, Any] | None
    joins_pairs: bool  # with a newline, where its tokenizer puts nothing between two texts

    @property
    def base_is_theirs(self) -> bool | None:
        """Whether the adapters were trained on this base; None where not all of them say so."""
        hashes = [own.hash if own is not None else None for own in self.trained_bases]
        if any(known not in (None, self.base_hash) for known in hashes):
            return False
        return None if None in hashes else True


def make_report(request: MergeRequest, found: Findings) -> Report:
    """The content of `merge_report.json`. Paths in it are those that the user typed."""
    own_licences = [side_files.licence_of(adapter.folder) for adapter in found.adapters]
    return {
        "release": {
            "into": found.into,
            "asked_for": request.into,
            "dtype": request.dtype,
            "format": request.format,
            "left_out": list(found.left_out),
            "untied": found.untied,
            "task": registry.task_named(request.base.task).name,
            "joins_pairs": found.joins_pairs,
        },
        "base": {
            "model": request.base.model,
            "on_hub": not Path(source.model_source(request.base)).exists(),
            "revision": request.base.revision,
            "hash": found.base_hash,
            "is_that_of_the_run": found.base_is_theirs,
            "trained_on": [own.hash if own is not None else None for own in found.trained_bases],
            "seen_as": _seen_as(request),
            "license": dict(found.base_licence),
        },
        "adapters": [_adapter(*own) for own in zip(found.adapters, own_licences, strict=True)],
        "runs": [_run(record) for record in found.records],
        "licenses": {
            "base": side_files.licence_text(found.base_licence),
            "adapter": "; ".join(filter(None, map(side_files.licence_text, own_licences))) or None,
            "data": None,
        },
        "choice": dict(found.choice) if found.choice is not None else None,
        "proof": {
            "tensors": summary(found.tensors),
            "model": found.model.to_dict() if found.model is not None else None,
        },
        "command": command_of(request, found.records),
        "versions": files.versions(),
        "made": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _seen_as(request: MergeRequest) -> str:
    double = ", double quantization" if request.base.bits == 4 and request.base.double_quant else ""
    return request.held + double


def _adapter(adapter: Adapter, licence: Mapping[str, Any]) -> Report:
    settings = adapter.settings
    kinds = [kind for kind, key in (("rsLoRA", "use_rslora"), ("DoRA", "use_dora")) if settings.get(key)]
    targets = settings.get("target_modules")
    return {
        "folder": adapter.given,
        "hash": f"sha256:{source.file_digest(adapter.folder / WEIGHTS_FILE).hex()}",
        "weight": adapter.weight,
        "r": settings.get("r", DEFAULT_RANK),
        "alpha": settings.get("lora_alpha", DEFAULT_ALPHA),
        "kinds": kinds,
        "targets": sorted(targets) if isinstance(targets, list) else targets,
        "layers": len(adapter.factors),
        "whole_tensors": sorted(adapter.whole),
        "license": dict(licence),
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
        "seq_len": record.content["resolved"].get("seq_len"),
        "seed": settings.get("seed"),
        "settings": {group: settings[group] for group in ("base", "adapter", "optim") if group in settings},
        "versions": record.content.get("versions"),
    }


def command_of(request: MergeRequest, records: Sequence[RunRecord]) -> str:
    """The command that makes this release again. Of a run with `records` only what differs from it is said."""
    words = ["qlora-kit", "merge"]
    own = request.base
    if request.run is not None:
        words += ["--run", request.run]
        if (own.model, own.revision) != _base_of_run(records):
            words += ["--base", own.model, *_given("--revision", own.revision)]
    else:
        for given, weight in request.adapters:
            words += ["--adapter", given if weight == 1.0 else f"{given}:{weight!r}"]
        words += ["--base", own.model, *_given("--revision", own.revision), "--bits", str(own.bits)]
        words += ["--quant-type", own.quant_type, "--double-quant" if own.double_quant else "--no-double-quant"]
        words += _given("--source-prefix", own.source_prefix)
    words += ["--into", request.into, "--dtype", request.dtype, "--format", request.format, "--out", request.out]
    words += _given("--tokenizer", own.tokenizer)
    if request.data is not None:
        words += _data_words(request.data, request.data_given)
    words += ["--trust-remote-code"] if own.trust_remote_code else []
    words += ["--allow-other-base"] if request.allow_other_base else []
    return shlex.join(words)


def _base_of_run(records: Sequence[RunRecord]) -> tuple[str, str | None]:
    settings = records[0].content["settings"]["base"]  # the run's comes first
    return settings["model"], settings.get("revision")


def _data_words(data: DataConfig, given: bool) -> list[str]:
    words = ["--data", data.data] if given else []
    if data.columns:
        words += ["--columns", ",".join(f"{name}={column}" for name, column in data.columns.items())]
    return words + _given("--seq-len", data.seq_len)


def _given(flag: str, value: object) -> list[str]:
    return [] if value is None else [flag, str(value)]


def write_report(report: Report, folder: Path) -> None:
    """Write the report and the card into the release."""
    files.write_json(folder / REPORT_FILE, report)
    files.write_text(folder / CARD_FILE, card(report))


def card(report: Report) -> str:
    """The Markdown card of the release."""
    base, release = report["base"], report["release"]
    name = Path(base["model"].rstrip("/")).name
    lines = [
        "---",
        yaml.safe_dump(_front_matter(report), sort_keys=False, allow_unicode=True).rstrip(),
        "---",
        "",
        f"# {name}, fine-tuned and merged",
        "",
        f"- base: `{base['model']}`, hash `{base['hash']}`{_base_doubt(report)}, merged into {_base_text(report)}",
        *(f"- adapter: {_adapter_text(adapter)}" for adapter in report["adapters"]),
        *(f"- trained on `{run['data']}`{_run_text(run)}" for run in report["runs"]),
        f"- weights: {release['dtype']}" + (", then quantized to nf4" if release["format"] == "nf4" else ""),
        f"- licences: {_licence_text(report['licenses'])}",
        "",
        "```python",
        *_how_to_load(release["task"]),
        "```",
        "",
        *_how_to_pair(release),
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
    own = registry.task_named(task)
    if own.has_pipeline:
        return ["from transformers import pipeline", "", f'classify = pipeline("{task}", model="this folder")']
    kind = own.model.auto_class
    return [
        f"from transformers import {kind}, AutoTokenizer",
        "",
        f'model = {kind}.from_pretrained("this folder", dtype="auto")',
        'tokenizer = AutoTokenizer.from_pretrained("this folder")',
    ]


def _how_to_pair(release: Mapping[str, Any]) -> list[str]:
    """How two texts are given, where the tokenizer does not keep them apart."""
    if not release["joins_pairs"]:
        return []
    return [f"The tokenizer puts nothing between two texts. {registry.task_named(release['task']).pair_advice}", ""]


def _front_matter(report: Report) -> dict[str, Any]:
    """What the hub reads. A folder of this machine is no model there, so it is not named as one."""
    base = report["base"]
    fields: dict[str, Any] = {"library_name": "transformers", **base["license"]}
    others = [adapter["license"].get("license") for adapter in report["adapters"]]
    names = [own for other in (base["license"].get("license"), *others) for own in _as_list(other)]
    if len(set(names)) > 1:
        fields["license"] = list(dict.fromkeys(names))
    elif names:
        fields["license"] = names[0]
    if base["on_hub"]:
        fields["base_model"] = base["model"]
    return {**fields, "tags": ["lora", "merged", "qlora_kit"]}


def _as_list(value: str | list[str] | None) -> list[str]:
    return [] if value is None else value if isinstance(value, list) else [value]


def _base_doubt(report: Report) -> str:
    """What is to be said of a base that is not, or not known to be, the one that the adapter was trained on."""
    if report["base"]["is_that_of_the_run"] is None:
        return " (assumed to be the adapter's: it records no hash of its base)"
    if report["base"]["is_that_of_the_run"]:
        return ""
    own = ", ".join(f"`{known}`" for known in dict.fromkeys(report["base"]["trained_on"]) if known is not None)
    return f" (**not the base that the adapter was trained on**, which has the hash {own}; merged all the same)"


def _base_text(report: Report) -> str:
    own, seen_as = report["base"], report["base"]["seen_as"]
    recorded = None not in own["trained_on"]
    if report["release"]["into"] == "original":
        return f"its own weights ({'the adapter saw' if recorded else 'assumed: the adapter saw'} them as {seen_as})"
    if own["is_that_of_the_run"] is False:
        return f"these weights as the adapter saw those of its own base ({seen_as})"
    return f"the weights that the adapter saw ({'' if recorded else 'assumed: '}{seen_as})"


def _adapter_text(adapter: Mapping[str, Any]) -> str:
    parts = [f"`{adapter['folder']}`", f"r = {adapter['r']}, alpha = {adapter['alpha']:g}", *adapter["kinds"]]
    parts.append(f"{adapter['layers']} layers{_targets_text(adapter['targets'])}")
    if adapter["whole_tensors"]:
        parts.append(f"{len(adapter['whole_tensors'])} tensors trained whole")
    if adapter["weight"] != 1.0:
        parts.append(f"weight {adapter['weight']!r}")
    return ", ".join([*parts, f"`{adapter['hash']}`"])


def _targets_text(targets: str | list[str] | None) -> str:
    if isinstance(targets, list) and len(targets) <= MAX_TARGETS:
        return f" ({', '.join(targets)})"
    return f" ({targets})" if isinstance(targets, str) else ""


def _run_text(run: Mapping[str, Any]) -> str:
    parts = [f"{run['examples']:,} examples"] if run["examples"] else []
    if run["steps"]:
        parts.append(f"{run['steps']:,} steps")
    if run["eval_loss"] is not None:
        parts.append(f"held-out loss {run['eval_loss']:.4f}")
    optim = run["settings"].get("optim", {})
    if optim:
        batch = f"batch {optim['batch_size']} × {optim['grad_accum']}"
        parts.append(f"learning rate {optim['lr']:g}, {batch}, at most {run['seq_len']} tokens, seed {run['seed']}")
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
    said = registry.task_named(model["task"]).proof_terms
    blocks = "" if model["blocks"] == "all" else f", {model['blocks']} blocks (the whole does not fit into memory)"
    lines = [
        f"loaded by stock transformers as {model['loaded_as']}{blocks}, on {exact['tokens']:,} {said.unit}s of "
        f"{model['source']}",
        f"logits differ from {model['reference']} by at most {exact['relative_max']:.1e} and on average "
        f"{exact['relative_mean']:.1e} of their scale",
        f"{_decision(model)} (allowed: {model['limit']['relative_max']:.1e}, {model['limit']['why']})",
        f"KL {_small(exact['kl'])} nats {said.each}, {exact['agreement']:.2%} of {said.answers} the same"
        f"{_losses(exact)}",
    ]
    if answer["same"]:
        lines.append(said.same)
    else:
        lines.append(
            f"{said.greedy} parts at {said.unit} {answer['parted_at']}, where the first two choices are "
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


def _decision(model: Mapping[str, Any]) -> str:
    if model["rounded"] is None:
        return f"the weights are the live model's: {model['exact']['relative_max']:.1e} of the scale at most"
    return (
        "the weights are the live model's own, merged by PEFT and rounded likewise: logits differ by at most "
        f"{model['rounded']['relative_max']:.1e} of their scale"
    )


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
        f"{into}: loss {own['loss']:.4f} ± {own['loss_error']:.4f} over {own['tokens']:,} tokens, "
        f"KL from the model that trained {_small(own['kl'])}"
        for into, own in choice["scores"].items()
    )
    return [f"the {choice['chosen']} base was chosen on {choice['source']} ({scores})"]


def closing(report: Report, out: str) -> list[str]:
    """What the command says at its end."""
    release = report["release"]
    lines = [f"{out}: merged into {_base_text(report)}, {release['dtype']}, {release['format']}"]
    if report["base"]["is_that_of_the_run"] is False:
        lines.append(f"the base {report['base']['model']} is not the one that the adapter was trained on")
    if None in report["base"]["trained_on"]:
        lines.append(
            f"assumed: nothing beside the adapter says how it saw its base; if not as {report['base']['seen_as']}, say "
            "so with --bits, --quant-type and --no-double-quant"
        )
    if release["left_out"]:
        lines.append(f"left out: {len(release['left_out'])} tensors of the base's files that the model does not use")
    model = report["proof"]["model"]
    if release["format"] == "nf4" and model is not None and model["exact"]["loss"] is not None:
        before, after = model["exact"]["reference_loss"], model["exact"]["loss"]
        lines.append(f"quantizing after the merge cost this: the loss was {before:.4f} and is {after:.4f} now")
    if release["untied"]:
        lines.append("the head and the embedding are no longer one tensor: the adapter changed them apart")
    return lines + [f"proof: {line}" for line in proof_lines(report)]
