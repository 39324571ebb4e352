"""How much memory do full fine-tuning, LoRA and QLoRA take? Predicted, and measured as far as the device goes.

    python benchmarks/memory.py --models gpt2,gpt2-large,llama-3-8b --methods full,lora16,lora8,qlora4 \
        --batch 1,8 --seq 512,1024

On a GPU every case runs in a process of its own with random weights and batches of full length: two steps for the
peak of `torch.cuda.max_memory_allocated`, then some more for the time. Without a GPU the peaks on CUDA are
predicted only, and the models of `--measure-cpu` are measured on the CPU at a small batch: live bytes, beside what
is predicted for a CPU. Needs no network: put the repository on PYTHONPATH. Writes memory_<GPU> or memory_cpu .json,
.md and .png into benchmarks/results. `--report` makes the table and the picture again from the JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import RESULTS, device_name, write_result

from qlora_kit.config.settings import RunConfig
from qlora_kit.errors import UserError
from qlora_kit.system.files import write_text

GIB = 1 << 30
TIMED_STEPS = 5
HOPELESS = 1.1  # cases predicted to need this many times the GPU's memory are not tried


@dataclass(frozen=True)
class Method:
    """A way to train: in words, and the settings that make it."""

    name: str
    recipe: str
    settings: dict[str, Any]
    autocast: bool = False


STOCK = {"lean": "off", "optim": "adamw"}  # the step and the optimizer that one would otherwise run
METHODS = {
    "full": Method(
        "full fine-tuning",
        "fp32 weights under bf16 autocast, AdamW",
        {**STOCK, "full": True, "bits": 32},
        True,
    ),
    "full16": Method("full fine-tuning, bf16", "bf16 weights, AdamW", {**STOCK, "full": True, "bits": 16}),
    "lora16": Method("LoRA, 16 bits", "bf16 base, AdamW", {**STOCK, "bits": 16}),
    "lora8": Method("LoRA, 8 bits", "LLM.int8 base, AdamW", {**STOCK, "bits": 8}),
    "qlora4": Method("QLoRA, 4 bits", "NF4 base, paged 8-bit AdamW", {"bits": 4, "optim": "paged_adamw_8bit"}),
}


@dataclass(frozen=True)
class Case:
    """One run: `batch` examples of `seq` tokens."""

    model: str
    method: str
    batch: int
    seq: int
    r: int = 16
    checkpointing: bool = True

    @property
    def config(self) -> RunConfig:
        """The settings of the run."""
        flat = {
            "model": self.model,
            "weights": "random",
            "r": self.r,
            "batch_size": self.batch,
            "seq_len": self.seq,
            "gradient_checkpointing": self.checkpointing,
            **METHODS[self.method].settings,
        }
        return RunConfig.from_flat(flat)


def predict(case: Case, gpu: Any = None) -> dict[str, Any]:
    """What the plan says of `case` on `gpu` (any of compute capability 8 where there is none)."""
    from qlora_kit.memory.plan import plan

    start_s = time.monotonic()
    planned = plan(case.config, gpu=gpu, autocast=METHODS[case.method].autocast)
    return {
        "predicted_peak_bytes": planned.peak_bytes,
        "predicted_device_bytes": planned.device_bytes,
        "predicted_phase": planned.phase,
        "predicted_components": {name: n_bytes for name, n_bytes in planned.components.items() if n_bytes},
        "plan_s": round(time.monotonic() - start_s, 2),
    }


def full_batch(config: RunConfig, vocab: int, device: Any) -> dict[str, Any]:
    """Random tokens without padding."""
    import torch

    ids = torch.randint(0, vocab, (config.optim.batch_size, config.data.seq_len), device=device)
    return {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}


def measure_cuda(case: Case, timed_steps: int = TIMED_STEPS) -> dict[str, Any]:
    """Run `case` on the GPU: the peaks of two steps (and of loading), and the time of `timed_steps` more."""
    import torch

    from qlora_kit import build
    from qlora_kit.memory.simulate import run_step
    from qlora_kit.memory.track import MemoryTracker

    device, config = torch.device("cuda:0"), case.config
    before_bytes = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    built = build.build_model(config, device)
    model = built.model.train()
    optimizer = built.make_optimizer(config.optim, config.optim.optim or "adamw")
    load_peak_bytes = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    unused, autocast = MemoryTracker("cuda"), cuda_autocast if METHODS[case.method].autocast else None

    def step() -> None:
        batch = full_batch(config, model.config.vocab_size, device)
        run_step(unused, built, optimizer, [batch], config.optim.clip, autocast)

    step(), step()
    measured = {
        "before_bytes": before_bytes,
        "load_peak_bytes": load_peak_bytes,
        "peak_bytes": torch.cuda.max_memory_allocated(device),
        "reserved_bytes": torch.cuda.max_memory_reserved(device),
    }
    if not timed_steps:
        return measured
    torch.cuda.synchronize(device)
    start_s = time.monotonic()
    for _ in range(timed_steps):
        step()
    torch.cuda.synchronize(device)
    step_s = (time.monotonic() - start_s) / timed_steps
    return {**measured, "step_s": step_s, "tokens_per_s": case.batch * case.seq / step_s}


def error_of(row: dict[str, Any]) -> float:
    """Predicted over measured, less one; what was allocated before the case is not its own."""
    error: float = row["predicted_peak_bytes"] / (row["peak_bytes"] - row["before_bytes"]) - 1
    return error


def cuda_autocast(recomputes: bool) -> Any:
    """bf16 on CUDA; the backward pass brings its own context where it recomputes."""
    import torch

    return torch.autocast("cuda", torch.bfloat16, enabled=not recomputes)


def measure_cpu(case: Case) -> dict[str, Any]:
    """Two steps on the CPU: live bytes by the tracker, beside the same steps predicted as a CPU runs them."""
    import torch

    from qlora_kit import build
    from qlora_kit.memory.profile.profiler import Profiler
    from qlora_kit.memory.simulate import run_step
    from qlora_kit.memory.track import MemoryTracker

    optim = {"optim": case.config.optim.optim.removeprefix("paged_")}  # type: ignore[union-attr]
    config = dataclasses.replace(case.config, optim=dataclasses.replace(case.config.optim, **optim))
    device = torch.device("cpu")
    built = build.build_model(config, device)
    model = built.model.train()
    optimizer = built.make_optimizer(config.optim, optim["optim"])
    unused, step_s = MemoryTracker("cpu"), 0.0
    with Profiler(config, device, steps=2) as profiler:
        profiler.begin(model, optimizer)
        for _ in range(2):
            batch = full_batch(config, model.config.vocab_size, device)
            profiler.begin_step()
            start_s = time.monotonic()
            run_step(unused, built, optimizer, [batch], config.optim.clip)
            step_s = time.monotonic() - start_s
            profiler.end_step()
    profile = profiler.profile
    assert profile is not None and profile.predicted is not None, "two steps ran"  # noqa: PT018
    recipe = {"recipe": "fp32 weights, AdamW"} if METHODS[case.method].autocast else {}
    return {
        **recipe,
        "live_peak_bytes": profile.peak_bytes,
        "predicted_for_cpu_bytes": profile.predicted.peak_bytes,
        "error": profile.error,
        "step_s_with_tracker": step_s,
        "phase": profile.phase,
    }


def run_case(case: Case, on_cuda: bool) -> None:
    """In a process of its own: print what is predicted, then what was measured, as lines of JSON."""
    from qlora_kit.system.quiet import quiet_libraries

    quiet_libraries()
    if not on_cuda:
        print(json.dumps(measure_cpu(case)), flush=True)
        return
    import torch

    from qlora_kit.memory.profile.profiler import present_gpu

    gpu = present_gpu(torch.device("cuda:0"))
    predicted = predict(case, gpu)
    print(json.dumps(predicted), flush=True)
    if predicted["predicted_device_bytes"] > HOPELESS * gpu.memory_bytes:
        print(json.dumps({"status": f"does not fit: not tried on {gpu.memory_bytes / GIB:.0f} GiB"}))
        return
    measured = measure_cuda(case)
    print(json.dumps({**measured, "error": error_of({**predicted, **measured}), "status": "measured"}))


def in_own_process(case: Case, timeout_s: float) -> dict[str, Any]:
    """The row of a case that runs in a process of its own; one that fails is a row that says so."""
    command = [sys.executable, "-W", "ignore", __file__, "--case", json.dumps(dataclasses.asdict(case))]
    root = str(Path(__file__).resolve().parents[1])
    paths = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            env={**os.environ, "PYTHONPATH": paths},
        )
    except subprocess.TimeoutExpired:
        return {"status": f"failed: not done in {timeout_s:.0f} s"}
    row: dict[str, Any] = {}
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            row |= json.loads(line)
    if done.returncode == 0:
        return {"status": "measured", **row}
    if "OutOfMemory" in done.stderr:
        return {**row, "status": "does not fit: out of memory"}
    return {**row, "status": f"failed: {why(done)}"}


def why(done: subprocess.CompletedProcess[str]) -> str:
    """What a process failed of: the last line of its traceback (remedies below it are indented), or its exit code."""
    lines = [line for line in done.stderr.splitlines() if line and not line[0].isspace()]
    return lines[-1] if lines else f"exit code {done.returncode}"


def row_of(case: Case) -> dict[str, Any]:
    """What a row says of its case."""
    return {**dataclasses.asdict(case), "recipe": METHODS[case.method].recipe}


def collect(args: argparse.Namespace) -> dict[str, Any]:
    """Every row: on a GPU measured, else predicted, with the small ones measured on the CPU."""
    import torch

    from qlora_kit.system.quiet import quiet_libraries

    quiet_libraries()
    cases = [
        Case(model, method, batch, seq, args.r, args.checkpointing)
        for model in args.models
        for method in args.methods
        for batch in args.batch
        for seq in args.seq
    ]
    settings = {"r": args.r, "gradient_checkpointing": args.checkpointing}
    if torch.cuda.is_available():
        return {"settings": settings, "rows": [_say({**row_of(c), **in_own_process(c, args.timeout)}) for c in cases]}
    small = [
        Case(model, method, 1, args.cpu_seq, args.r, args.checkpointing)
        for model in args.measure_cpu
        for method in args.methods
    ]
    return {
        "settings": {**settings, "predicted_for": "CUDA, compute capability 8.0; not yet validated on hardware"},
        "rows": [_say({**row_of(case), **_predicted(case)}) for case in cases],
        "cpu_rows": [_say({**row_of(case), **in_own_process(case, args.timeout)}) for case in small],
    }


def _predicted(case: Case) -> dict[str, Any]:
    try:
        return {**predict(case), "status": "predicted"}
    except UserError as error:
        return {"status": f"failed: {error}"}


def _say(row: dict[str, Any]) -> dict[str, Any]:
    sizes = [row.get(name) for name in ("predicted_peak_bytes", "peak_bytes", "live_peak_bytes")]
    shown = ", ".join(f"{size / GIB:.2f} GiB" for size in sizes if size is not None)
    print(f"{row['model']} {row['method']} {row['batch']} x {row['seq']}: {row['status']} {shown}", file=sys.stderr)
    return row


def markdown(result: dict[str, Any]) -> str:
    """The tables of a result."""
    measured = any("peak_bytes" in row for row in result["rows"])
    heads = ["model", "batch × tokens", "method", "predicted peak"]
    heads += ["measured", "error", "reserved", "step", "tokens/s"] if measured else []
    lines = [f"| {' | '.join([*heads, 'of full', 'note'])} |", "|" + "---|" * (len(heads) + 2)]
    lines += [_line(row, result["rows"], measured) for row in result["rows"]]
    where = f"{result['device']}, torch {result['versions']['torch']}, commit {result['commit']}, {result['date']}"
    basis = result["settings"].get("predicted_for")
    switch = "with" if result["settings"]["gradient_checkpointing"] else "without"
    lines += [
        "",
        f"LoRA r = {result['settings']['r']}, {switch} gradient checkpointing, batches of full length. On {where}.",
    ]
    lines += [f"Predicted for {basis}." if basis else "Predicted for this GPU."]
    return "\n".join([*lines, *_cpu_lines(result.get("cpu_rows", []))]) + "\n"


def _line(row: dict[str, Any], rows: list[dict[str, Any]], measured: bool) -> str:
    cells = [
        row["model"],
        f"{row['batch']} × {row['seq']}",
        METHODS[row["method"]].name,
        _gib(row.get("predicted_peak_bytes")),
    ]
    if measured:
        error = f"{row['error']:+.2%}" if "error" in row else ""
        step = f"{row['step_s'] * 1000:.0f} ms" if "step_s" in row else ""
        speed = f"{row['tokens_per_s']:,.0f}" if "tokens_per_s" in row else ""
        cells += [_gib(row.get("peak_bytes")), error, _gib(row.get("reserved_bytes")), step, speed]
    note = "" if row["status"] in ("measured", "predicted") else row["status"].splitlines()[0]
    return f"| {' | '.join([*cells, _share_of_full(row, rows), note])} |"


def _share_of_full(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    same = ("model", "batch", "seq")
    full = [r for r in rows if r["method"] == "full" and all(r[name] == row[name] for name in same)]
    if not full or "predicted_peak_bytes" not in row or "predicted_peak_bytes" not in full[0]:
        return ""
    return f"{row['predicted_peak_bytes'] / full[0]['predicted_peak_bytes']:.1%}"


def _cpu_lines(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    lines = ["", "Live bytes of two real steps on the CPU, beside the same steps predicted as a CPU runs them:", ""]
    lines += ["| model | batch × tokens | method | predicted for a CPU | measured | error | note |", "|" + "---|" * 7]
    for row in rows:
        cells = [row["model"], f"{row['batch']} × {row['seq']}", METHODS[row["method"]].name]
        cells += [_gib(row.get("predicted_for_cpu_bytes")), _gib(row.get("live_peak_bytes"))]
        cells += [
            f"{row['error']:+.2%}" if "error" in row else "",
            "" if row["status"] == "measured" else row["status"],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _gib(n_bytes: int | None) -> str:
    return "" if n_bytes is None else f"{n_bytes / GIB:.2f} GiB"


COLOURS = {"full": "#882255", "full16": "#CC6677", "lora16": "#DDAA33", "lora8": "#88CCEE", "qlora4": "#117733"}


def draw(result: dict[str, Any], file: Path) -> None:
    """The peaks as bars, a panel a model: measured where they were, else predicted (hatched)."""
    from matplotlib.figure import Figure

    rows = [row for row in result["rows"] if "predicted_peak_bytes" in row]
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(5 * max(len(models), 2), 4.6), dpi=130, layout="constrained")
    panels = figure.subplots(1, max(len(models), 1), squeeze=False)[0]
    for axes, model in zip(panels, models, strict=False):
        _draw_model(axes, [row for row in rows if row["model"] == model])
        axes.set_title(model)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("peak memory (GiB)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    measured = any("peak_bytes" in row for row in rows)
    kind = (
        f"measured on {result['device']} (hatched: predicted)"
        if measured
        else "predicted for CUDA, not yet validated on hardware"
    )
    figure.suptitle(f"Peak of torch.cuda.max_memory_allocated, {kind}", fontsize=11)
    figure.savefig(file, format="png")


def _draw_model(axes: Any, rows: list[dict[str, Any]]) -> None:
    shapes = list(dict.fromkeys((row["batch"], row["seq"]) for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    width = 0.84 / len(methods)
    for index, method in enumerate(methods):
        for row in (row for row in rows if row["method"] == method):
            x = shapes.index((row["batch"], row["seq"])) + (index - (len(methods) - 1) / 2) * width
            n_bytes = row.get("peak_bytes", row["predicted_peak_bytes"])
            label = METHODS[method].name if (row["batch"], row["seq"]) == shapes[0] else None
            hatch = None if "peak_bytes" in row else "//"
            axes.bar(
                x, n_bytes / GIB, width, color=COLOURS[method], hatch=hatch, edgecolor="white", linewidth=0, label=label
            )
            axes.text(x, n_bytes / GIB, f" {n_bytes / GIB:.3g}", ha="center", va="bottom", fontsize=7.5, rotation=90)
    axes.set_xticks(range(len(shapes)), [f"{batch} × {seq}" for batch, seq in shapes])
    axes.margins(y=0.12)


def report(file: Path) -> None:
    """Make the table and the picture from the JSON `file`."""
    result = json.loads(file.read_text(encoding="utf-8"))
    write_text(file.with_suffix(".md"), markdown(result))
    draw(result, file.with_suffix(".png"))


def main() -> int:
    """Run every case, and write the result, its table and its picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=_names, default=["gpt2", "gpt2-large", "llama-3-8b"])
    parser.add_argument("--methods", type=_methods, default=["full", "lora16", "lora8", "qlora4"])
    parser.add_argument("--batch", type=_numbers, default=[1, 8])
    parser.add_argument("--seq", type=_numbers, default=[512, 1024])
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--no-checkpointing", dest="checkpointing", action="store_false")
    parser.add_argument("--measure-cpu", type=_names, default=["gpt2"], help="models measured where there is no GPU")
    parser.add_argument("--cpu-seq", type=int, default=128, help="tokens of the one example measured on a CPU")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds that a case may take")
    parser.add_argument("--name", default="memory", help="name of the result")
    parser.add_argument("--report", type=Path, help="only make table and picture from this result")
    parser.add_argument("--case", type=lambda text: Case(**json.loads(text)), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case is not None:
        import torch

        run_case(args.case, torch.cuda.is_available())
    elif args.report is not None:
        report(args.report)
    else:
        file = write_result(args.name, collect(args))
        report(file)
        print(f"on {device_name()}, written to {file.relative_to(RESULTS.parent)}, .md and .png beside it")
    return 0


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name and name != "none"]


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _methods(text: str) -> list[str]:
    names = _names(text)
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: known are {', '.join(METHODS)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
