"""Writes the README's tables and pictures from the committed results, so that no figure in it is typed.

python benchmarks/readme.py            # rewrite README.md and docs/*.png
python benchmarks/readme.py --check    # exit with 1 where the README's tables differ from the results
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import mean, variance
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import RESULTS, error_of_difference
from gpu import tables

from qlora_kit.system.files import write_text

ROOT = RESULTS.parents[1]
METHOD_NAMES = {
    "full": "full fine-tuning",
    "lora16": "LoRA, 16 bits",
    "lora8": "LoRA, 8 bits",
    "qlora4": "QLoRA, 4 bits",
}


def read(name: str) -> dict[str, Any]:
    """A committed result."""
    content: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return content


def place(result: dict[str, Any]) -> str:
    """Where and with what a result was measured."""
    versions = result["versions"]
    with_ = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "peft", "bitsandbytes"))
    return f"{result['device']}; {with_}; commit {result['commit']}, {result['date']}"


def model_states() -> str:
    """The table of what a model holds all through training."""
    result = read("model_states_gpt2-large_cpu")
    held = {
        name: [row[f"{kind}_bytes"] / 2**20 for kind in ("weight", "gradient", "optimizer")]
        for name, row in result["rows"].items()
    }
    full = sum(held["full"])
    lines = [
        "| gpt2-large | recipe | weights | gradients | optimizer | in all (MiB) | of full |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for name, parts in held.items():
        cells = " | ".join(f"{part:,.1f}" for part in parts)
        lines.append(
            f"| {METHOD_NAMES[name]} | {result['rows'][name]['recipe']} | {cells} | {sum(parts):,.1f} "
            f"| {sum(parts) / full:.1%} |"
        )
    r = result["settings"]["r"]
    lines += ["", f"Weights, gradients and optimizer states after one real step, r = {r}, without activations."]
    lines += [f"Measured on {place(result)}."]
    return "\n".join(lines)


def memory() -> str:
    """The table of predicted peaks, method by method."""
    result = read("memory_cpu")
    cases = [("gpt2-large", 1, 512), ("gpt2-large", 8, 1024), ("llama-3-8b", 1, 512), ("llama-3-8b", 8, 1024)]
    peaks = {(r["model"], r["batch"], r["seq"], r["method"]): r["predicted_peak_bytes"] for r in result["rows"]}
    lines = [
        "| " + " | ".join(["predicted peak (GiB)", *(f"{m}, {b} × {s}" for m, b, s in cases)]) + " |",
        "|---" + "|--:" * len(cases) + "|",
    ]
    for method, name in METHOD_NAMES.items():
        cells = [f"{peaks[(*case, method)] / 2**30:,.2f}" for case in cases]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    settings = result["settings"]
    lines += [
        "",
        f"Of `torch.cuda.max_memory_allocated`, r = {settings['r']}, with gradient checkpointing, planned for",
    ]
    lines += [f"{tables.validated(settings['predicted_for'], RESULTS)}; full: {result['rows'][0]['recipe']}."]
    lines += ["At 8 bits bitsandbytes keeps every layer's input, which checkpointing cannot drop."]
    lines += [f"Made on {place(result)}."]
    return "\n".join(lines)


def parity() -> str:
    """The sentence that compares a run with the stock libraries."""
    result = read("stock_parity_cpu")
    stock, ours = (result["rows"][name]["eval_loss"] for name in ("stock", "ours"))
    settings = result["settings"]
    return (
        f"On GSM8K with a small pretrained GPT-2 ({settings['max_steps']} steps of {settings['batch_size']}, "
        f"r = {settings['r']}, one seed), the held-out loss is {ours:.4f}, and {stock:.4f} with stock PEFT, Trainer "
        f"and `Linear4bit` at equal settings: {result['difference']:+.3%} (the factors are "
        f"{settings['adapter_dtype']} here, fp32 there).\nMeasured on {place(result)}."
    )


def step() -> str:
    """The table of the step's peaks beside the stock one's."""
    result = read("step_cpu")
    names = {"stock": "stock PEFT and Trainer", "lean": "qlora_kit", "lean-offload": "qlora_kit, embedding on the host"}
    cases = list(dict.fromkeys(_case(row) for row in result["rows"]))
    peaks = {(_case(row), row["contender"]): row.get("peak_bytes") for row in result["rows"]}
    lines = ["| peak of the step (GB) | " + " | ".join(cases) + " |", "|---" + "|--:" * len(cases) + "|"]
    for name, shown in names.items():
        cells = [f"{peaks[case, name] / 10**9:.2f}" for case in cases]
        lines.append("| " + " | ".join([shown, *cells]) + " |")
    lines += ["", f"4 bits, r = {result['rows'][0]['case']['r']}; peaks {tables.validated(result['peaks'], RESULTS)}."]
    lines += [f"Made on {place(result)}.", "", _on_cpu()]
    return "\n".join(lines)


def _on_cpu() -> str:
    if not (RESULTS / "step_times_cpu.json").is_file():
        return "Bytes and speed on a CPU beside the stock step's are not yet measured."
    return times(read("step_times_cpu"))


def times(result: dict[str, Any]) -> str:
    """The tables of contenders that stepped in turn on a CPU, one for each case."""
    names = {"stock": "stock PEFT and Trainer", "peft-loop": "plain PEFT loop", "lean": "qlora_kit"}
    cases = dict.fromkeys(_case(row) for row in result["rows"])
    lines = []
    for case in cases:
        rows = [row for row in result["rows"] if _case(row) == case]
        if any(row["contender"] not in names for row in rows):
            continue  # of an ablation
        lines += [f"| on a CPU: {case} | s a step | tokens/s | of stock | live bytes of stock | resident (GB) |"]
        lines += ["|---|--:|--:|--:|--:|--:|"]
        lines += [f"| {names[row['contender']]} | {_time_cells(row)} |" for row in rows]
        lines += [""]
    lines += ["Each built by its own means in a process of its own, stepping in turn; the median step, and what the"]
    lines += [f"process holds at its peak beyond the libraries. Measured on {place(result)}."]
    return "\n".join(lines)


def _time_cells(row: dict[str, Any]) -> str:
    if row["status"] != "ok":
        return f"{row['status']} | | | |"
    held = (row["resident_bytes"] - row["libraries_bytes"]) / 10**9 if "resident_bytes" in row else None
    cells = [f"{row['step_s']:.2f}", f"{row['tokens_per_s']:.0f}", f"{row['tokens_per_s_of_stock']:.2f}"]
    cells += [f"{row['live_bytes_of_stock']:.2f}", "" if held is None else f"{held:.2f}"]
    return " | ".join(cells)


def _case(row: dict[str, Any]) -> str:
    case = row["case"]
    return f"{case['model']}, {case['rows']} × {case['tokens']}"


def fits() -> str:
    """The sentence on what trains in little memory."""
    result = read("fit_cpu")
    batch, longest = result["rows"]
    shown = tables.longest_context(RESULTS)
    planned = "Planned, and not yet shown on a GPU" if shown is None else f"{shown}\nPlanned"
    return (
        f"{planned}: {result['model']} at {batch['case']} takes "
        f"{batch['predicted_peak_bytes'] / 2**30:.2f} GiB of {batch['cap_bytes'] / 2**30:.0f}, and at batch 1, r = 32, "
        f"{longest['tokens']:,} tokens fit into {longest['cap_bytes'] / 2**30:.0f} GiB (embedding on the host).\n"
        f"Made on {place(result)}."
    )


def merges() -> str:
    """The table of what merges take beside the stock one, and whether they keep to their bounds."""
    results = [read(file.stem) for file in sorted(RESULTS.glob("merge_*_cpu.json"))]
    results.sort(key=lambda result: result["parameters"])
    names = {"trained": "`qlora-kit merge`, NF4 and back", "original": "`qlora-kit merge --into original`"}
    names |= {"stock": "stock `merge_and_unload`, 16 bits", "copy": "a plain copy of the files"}
    shapes = [f"{result['shape']} ({result['files_bytes'] / 10**9:.1f} GB)" for result in results]
    lines = ["| time, peak memory | " + " | ".join(shapes) + " |", "|---" + "|--:" * len(results) + "|"]
    for way, name in names.items():
        lines.append("| " + " | ".join([name, *(_taken(result["ways"].get(way)) for result in results)]) + " |")
    lines += [""]
    lines += [
        "Every tensor is read back and compared. The bounds of a merge are twice the plain copy and the arithmetic of"
    ]
    lines += ["NF4, and 3 times the largest tensor in fp32 and 600 MiB:"]
    for result in results:
        copy_s, arithmetic_s = (result["ways"][way]["seconds"] for way in ("copy", "arithmetic"))
        lines += [
            f"{result['shape']}: {2 * copy_s + arithmetic_s:,.0f} s and {result['bound_bytes'] / 2**20:,.0f} MiB "
            f"(measured on {place(result)})."
        ]
    return "\n".join(lines)


def _taken(way: dict[str, Any] | None) -> str:
    return "not measured" if way is None else f"{way['seconds']:,.0f} s, {way['peak_bytes'] / 2**20:,.0f} MiB"


def accuracy() -> str:
    """The sentences on how far predictions are from what was recorded."""
    result = read("planner_accuracy_profiler_cpu")
    families = ", ".join(sorted({row["family"] for row in result["rows"]}))
    lines = [
        f"Over {result['cases']} cases on a CPU ({families}; full, LoRA and QLoRA), the predicted peak and that of "
        f"torch's own profiler differ by at most {result['worst_error']:.2%} ({result['median_error']:.2%} at the "
        "median). Weights in 8 bits are not among them: their kernels on a CPU allocate otherwise than CUDA's, which "
        "a plan is for.",
        f"Measured on {place(result)}.",
    ]
    for file in sorted(RESULTS.glob("planner_accuracy_*.json")):
        if file.stem != "planner_accuracy_profiler_cpu":
            on_gpu = read(file.stem)
            lines += [
                f"Over {on_gpu['cases']} cases against `torch.cuda.max_memory_allocated`: at most "
                f"{on_gpu['worst_error']:.2%}, {on_gpu['median_error']:.2%} at the median.",
                f"Measured on {place(on_gpu)}.",
            ]
    return "\n".join(lines)


def tasks() -> str:
    """What the tasks reach beside the stock libraries, and what regularizing brings; as far as it is measured."""
    lines = []
    sst2 = {"accuracy": "accuracy, dev file", "accuracy_with_test": "accuracy, dev and test file"}
    wnut17 = {"f1": "F1 of whole entities, dev file"}
    for name, what, figures in (("sst2", "SST-2", sst2), ("wnut17", "WNUT-17", wnut17)):
        if (RESULTS / f"{name}_cpu.json").is_file():
            lines += [*_contest(read(f"{name}_cpu"), what, figures), ""]
    if (RESULTS / "regularizers_cpu.json").is_file():
        lines += _regularized(read("regularizers_cpu"))
    return "\n".join(lines).strip()


def _contest(result: dict[str, Any], what: str, figures: Mapping[str, str]) -> list[str]:
    """A contest of `common.run_contest` as a table; `figures` has the names of the rows' figures in words."""
    settings, rows = result["settings"], result["rows"]
    steps = f"{settings['max_steps']} steps of" if settings["max_steps"] else "one epoch in batches of"
    warmup = f", warmup {settings['warmup']:.0%}" if settings["warmup"] else ""
    lines = [
        f"{what}, a MiniLM encoder at {settings['bits']} bits, r = {settings['r']}, {steps} "
        f"{settings['batch_size']}, lr {settings['lr']:g}{warmup}, {len(settings['seeds'])} seeds:",
        "",
        "| | stock PEFT and Trainer | qlora_kit | difference |",
        "|---|--:|--:|--:|",
    ]
    for figure, said in figures.items():
        ours = {row["seed"]: row[figure] for row in rows["ours"]}
        stock = [row[figure] for row in rows["stock"]]
        gap = f"{mean(ours.values()) - mean(stock):+.2%} ± {error_of_difference([stock, list(ours.values())]):.2%}"
        lines.append(f"| {said} | {_spread(stock)} | {_spread(ours.values())} | {gap} |")
        if "same-start" in rows:
            paired = [(row[figure], ours[row["seed"]]) for row in rows["same-start"]]
            gaps = [own - other for other, own in paired]
            gap = f"{mean(gaps):+.2%} ± {(variance(gaps) / len(gaps)) ** 0.5:.2%}"
            said = f"the same, stock from the start of ours (seed by seed, {len(gaps)} seeds)"
            lines.append(
                f"| {said} | {_spread(pair[0] for pair in paired)} | {_spread(pair[1] for pair in paired)} | {gap} |"
            )
    return [*lines, "", f"± is the standard error over the seeds. Measured on {place(result)}."]


def _spread(values: Iterable[float]) -> str:
    each = list(values)
    return f"{mean(each):.2%} ({min(each):.1%} to {max(each):.1%})"


def _regularized(result: dict[str, Any]) -> list[str]:
    settings = result["settings"]
    lines = ["| | accuracy | beside plain | processor's time |", "|---|--:|--:|--:|"]
    for way, found in result["ways"].items():
        gain = "" if way == "plain" else f"{found['gain']:+.2%} ± {found['gain_error']:.2%}"
        lines.append(f"| {way} | {found['accuracy']:.2%} | {gain} | {found['cpu_ratio']:.2f} × |")
    lines += [
        "",
        f"SST-2 with {settings['examples']:,} examples, epochs: {settings['epochs']:g}, {len(settings['seeds'])} seeds "
        "(± is the standard error over them).",
        f"Measured on {place(result)}.",
    ]
    return lines


def draw_plan(file: Path) -> None:
    """The plan that the README shows, as `qlora-kit plan --plot` draws it."""
    from qlora_kit.system.quiet import quiet_libraries

    quiet_libraries()
    from qlora_kit.cli.plan import Request, make_report
    from qlora_kit.config.settings import RunConfig
    from qlora_kit.memory.picture import write_picture

    config = RunConfig.from_flat({"model": "llama-3-8b", "bits": 4, "r": 16, "batch_size": 2, "seq_len": 2048})
    request = Request(gpu=None, budget=None, fit=False, exact=False, baselines=True)
    write_picture(make_report(config, request, lambda early: None), file)


def draw_parity(file: Path) -> None:
    """The training curves of both contenders of the parity run, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = read("stock_parity_cpu")["rows"]
    figure, (curve, gap) = plt.subplots(2, 1, figsize=(8, 5), height_ratios=(3, 1), sharex=True, layout="constrained")
    steps = range(1, len(rows["ours"]["losses"]) + 1)
    curve.plot(steps, rows["stock"]["losses"], color="#d95f02", linewidth=3, alpha=0.5, label="PEFT + Trainer")
    curve.plot(steps, rows["ours"]["losses"], color="#1b6ca8", linewidth=1.2, label="qlora_kit")
    curve.set_ylabel("training loss")
    curve.set_title("GSM8K answers, small GPT-2 in NF4, r = 16, equal settings and seed")
    curve.legend(frameon=False)
    differences = [a - b for a, b in zip(rows["ours"]["losses"], rows["stock"]["losses"], strict=True)]
    gap.axhline(0, color="0.7", linewidth=0.8)
    gap.plot(steps, differences, color="#1b6ca8", linewidth=1)
    gap.set_ylabel("difference")
    gap.set_xlabel("optimizer step")
    for axes in (curve, gap):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def gpu() -> str:
    """What was measured on GPUs."""
    return tables.speed_and_promises(RESULTS)


def gpu_limits() -> str:
    """What was not."""
    return tables.limits(RESULTS)


BLOCKS = {
    "accuracy": accuracy,
    "gpu": gpu,
    "gpu-limits": gpu_limits,
    "memory": memory,
    "model-states": model_states,
    "parity": parity,
    "step": step,
    "fit": fits,
    "merge": merges,
    "tasks": tasks,
}


def filled(text: str) -> str:
    """`text` with every generated block made anew."""
    for name, make in BLOCKS.items():
        begin, end = f"<!-- {name}: generated by benchmarks/readme.py -->", f"<!-- end {name} -->"
        pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
        if not pattern.search(text):
            raise SystemExit(f"README.md has no block {name}")
        block = f"{begin}\n{make()}\n{end}"
        text = pattern.sub(lambda _, block=block: block, text)
    return text


def main() -> int:
    """Rewrite or check the README."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    if parser.parse_args().check:
        return int(filled(text) != text)
    write_text(readme, filled(text))
    draw_parity(ROOT / "docs" / "parity.png")
    draw_plan(ROOT / "docs" / "plan.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
