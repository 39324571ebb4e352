"""How small and how fast is a training step? Ours (`lean`) beside the stock libraries' and Unsloth's.

    python benchmarks/step.py                                # every case of this machine
    python benchmarks/step.py --ablation                     # and each piece of the lean step off in turn
    python benchmarks/step.py --cases llama-3-8b:2x2048 --contenders stock,lean,unsloth,unsloth-offload

The same random weights, tokens and learning rate for every contender, each in a process of its own. On a GPU: the peak
of allocated and reserved memory, the median time of a step, and the loss after 20 steps, which must agree or the row is
void. Without a GPU: the peaks on CUDA by simulation on `meta` (not yet validated on hardware), and on the CPU live
bytes and the ratio of the times of two contenders that step in turn. Writes step_<GPU> or step_cpu, .json and .md.

`stock` is PEFT on `prepare_model_for_kbit_training` with the optimizer of transformers' Trainer's defaults, AdamW; the
others have paged 8-bit AdamW on CUDA.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import RESULTS, device_name, write_result

from qlora_kit.config import GROUPS, LeanConfig, RunConfig, default_of
from qlora_kit.runs import write_text

GB = 10**9
STEPS, WARM_UP = 20, 5
BATCHES = 4  # different ones, in turn, so that the loss falls
LOSS_NOISE = 0.01  # a contender whose first loss is off by more has other weights or another loss: bf16's rounding
FALL_NOISE = 0.2  # one whose loss falls by so much more or less than stock's did not train the same
CONTENDERS = ("stock", "lean", "lean-offload", "unsloth", "unsloth-offload")  # offload: also of the embedding
CUDA_CASES = ("llama-3-8b:2x2048", "gpt2-large:8x1024")
CPU_CASE = "gpt2-large:4x512"
CPU_ABLATION_CASE = "gpt2:2x128"


@dataclass(frozen=True)
class Case:
    """A model and a batch: `rows` examples of `tokens` each."""

    model: str
    rows: int
    tokens: int
    r: int = 16

    @classmethod
    def parse(cls, text: str) -> Case:
        """`llama-3-8b:2x2048` as a case."""
        model, _, shape = text.partition(":")
        rows, _, tokens = shape.partition("x")
        return cls(model, int(rows), int(tokens))

    def config(self, **changes: Any) -> RunConfig:
        """The settings of the run, with `changes`."""
        flat = {"model": self.model, "weights": "random", "bits": 4, "r": self.r, "batch_size": self.rows}
        return RunConfig.from_flat({**flat, "seq_len": self.tokens, **changes})


def build_stock(config: RunConfig, device: Any, architecture: Any = None) -> Any:
    """PEFT's model as its guides make it: fp32 for what is not quantized, fp32 factors, its own checkpointing."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    from qlora_kit import adapters, base

    model: Any = prepare_model_for_kbit_training(base.load_base(config.base, device, config.seed, architecture))
    settings = LoraConfig(
        r=config.adapter.r,
        lora_alpha=config.adapter.resolved_alpha,
        target_modules=adapters.choose_targets(model, None),
        task_type="CAUSAL_LM",
    )
    with device:
        return get_peft_model(model, settings)


def build_unsloth(config: RunConfig, offloads_embedding: bool) -> Any:
    """Unsloth's model of the same shape and seeded weights, which it reads from a folder."""
    from unsloth import FastLanguageModel  # type: ignore[import-not-found]  # isort: skip  # before transformers

    import torch

    from qlora_kit import adapters, base

    plain = dataclasses.replace(config.base, bits=16)
    with tempfile.TemporaryDirectory() as folder:
        source = base.load_base(plain, torch.device("cpu"), config.seed)
        targets = adapters.choose_targets(source, None)
        source.save_pretrained(folder)
        base.load_tokenizer(plain).save_pretrained(folder)
        del source
        model, _ = FastLanguageModel.from_pretrained(
            folder,
            max_seq_length=config.data.seq_len,
            dtype=torch.bfloat16,
            load_in_4bit=True,
            offload_embedding=offloads_embedding,
        )
    return FastLanguageModel.get_peft_model(
        model,
        r=config.adapter.r,
        lora_alpha=config.adapter.resolved_alpha,
        lora_dropout=0,
        bias="none",
        target_modules=targets,
        use_gradient_checkpointing="unsloth",
        random_state=config.seed,
    )


class Contender:
    """A model with its optimizer that takes one step at a time on `device`."""

    def __init__(self, name: str, config: RunConfig, device: Any) -> None:
        self.config, self.device = config, device
        self.model = self._build(name)  # first of all: Unsloth wants to be imported before transformers
        self.model.train()
        import torch

        from qlora_kit.trainer import make_optimizer, resolve_optim

        optim = "adamw" if name == "stock" else resolve_optim(config, device)
        self.optimizer = make_optimizer(self.model, config, optim)
        draw = torch.Generator().manual_seed(config.seed)
        shape = (BATCHES, config.optim.batch_size, config.data.seq_len)
        self.batches = torch.randint(0, self.model.config.vocab_size, shape, generator=draw)
        self.steps = 0

    def _build(self, name: str) -> Any:
        if name.startswith("unsloth"):
            return build_unsloth(self.config, name == "unsloth-offload")
        if name == "stock":
            return build_stock(self.config, self.device)
        from qlora_kit import assembly

        return assembly.build_model(self.config, self.device)

    def warm_up(self) -> None:
        """A step on a few tokens: the optimizer's states are born, and what is compiled or cached is there."""
        batches, self.batches = self.batches, self.batches[:, :1, :8]
        self.step()
        self.batches, self.steps = batches, 0

    def step(self) -> float:
        """One optimizer step; returns the loss, and so waits for the device."""
        from qlora_kit.memory.simulate import run_step
        from qlora_kit.memory.track import MemoryTracker

        ids = self.batches[self.steps % BATCHES].to(self.device)
        self.steps += 1
        losses: list[Any] = []
        with _loss_kept(self.model, losses):
            batch = {"input_ids": ids, "labels": ids.clone(), "attention_mask": ids.new_ones(ids.shape)}
            run_step(MemoryTracker(self.device.type), self.model, self.optimizer, [batch], self.config.optim.clip)
        return float(losses[0])


@contextmanager
def _loss_kept(model: Any, losses: list[Any]) -> Iterator[None]:
    """Note the loss of the forward pass."""

    def hook(module: Any, args: Any, output: Any) -> None:
        losses.append(output["loss"].detach())

    handle = model.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def measure_cuda(name: str, config: RunConfig) -> dict[str, Any]:
    """Peaks, median time and last loss of `STEPS` steps on the GPU."""
    import torch

    device = torch.device("cuda:0")
    contender = Contender(name, config, device)
    torch.cuda.reset_peak_memory_stats(device)
    times, losses = [], []
    for _ in range(STEPS):
        torch.cuda.synchronize(device)
        start_s = time.monotonic()
        losses.append(contender.step())
        torch.cuda.synchronize(device)
        times.append(time.monotonic() - start_s)
    step_s = statistics.median(times[WARM_UP:])
    return {
        "peak_bytes": torch.cuda.max_memory_allocated(device),
        "reserved_bytes": torch.cuda.max_memory_reserved(device),
        "step_s": step_s,
        "tokens_per_s": config.optim.batch_size * (config.data.seq_len or 0) / step_s,
        "steps": STEPS,
        "first_loss": losses[0],
        "loss": losses[-1],
    }


def measure_live_bytes(name: str, config: RunConfig) -> dict[str, Any]:
    """The live bytes of a CPU's second step at their peak: the same tracker as the profiler's."""
    import torch

    from qlora_kit.memory.profile_cpu import CpuTracker
    from qlora_kit.memory.track import overall_peak
    from qlora_kit.memory.watch import watch

    contender = Contender(name, config, torch.device("cpu"))
    contender.warm_up()
    tracker = CpuTracker()
    with watch(tracker, contender.model, contender.optimizer):
        for state in contender.optimizer.state.values():
            for value in state.values():
                if isinstance(value, torch.Tensor):
                    tracker.label(value, "optimizer states")
        with tracker:
            tracker.begin_step()
            contender.step()
    peak = overall_peak(tracker.events)
    return {"live_bytes": peak.n_bytes, "phase": peak.region.phase}


def simulate_cuda(name: str, case: Case, config: RunConfig) -> dict[str, Any]:
    """The predicted peak of `torch.cuda.max_memory_allocated`: ours is planned, the stock step simulated likewise."""
    from qlora_kit.memory import rules
    from qlora_kit.memory.plan import plan, resolve_architecture
    from qlora_kit.memory.simulate import Recipe, simulate
    from qlora_kit.memory.track import overall_peak

    if name != "stock":
        planned = plan(config)
        return {"peak_bytes": planned.peak_bytes, "phase": planned.phase, "components": planned.components}
    recipe = Recipe(case.tokens, "adamw")
    peak = overall_peak(simulate(config, recipe, resolve_architecture(config), build=build_stock).events)
    library_bytes = 2 * rules.cublas_workspace_bytes(recipe.capability)
    return {"peak_bytes": peak.n_bytes + library_bytes, "phase": peak.region.phase, "components": peak.components}


def _serve(connection: Connection, name: str, config: RunConfig) -> None:
    """In a process of its own: step when told, and answer with the loss and the seconds."""
    import torch

    _begin()
    contender = Contender(name, config, torch.device("cpu"))
    contender.warm_up()
    connection.send(None)
    while connection.recv():
        start_s = time.monotonic()
        loss = contender.step()
        connection.send((loss, time.monotonic() - start_s))


def _run_once(connection: Connection, function: Any, arguments: tuple[Any, ...]) -> None:
    _begin()
    try:
        connection.send(function(*arguments))
    # a peer's library fails in its own ways, and a contender that fails is a row that says so
    except (RuntimeError, ImportError, NotImplementedError, OSError, ValueError, TypeError) as error:
        connection.send({"status": f"failed: {type(error).__name__}: {str(error).splitlines()[0][:200]}"})


def _begin() -> None:
    import warnings

    from qlora_kit.quiet import quiet_libraries

    quiet_libraries()
    warnings.simplefilter("ignore")  # a process of a benchmark prints figures


def in_own_process(function: Any, *arguments: Any) -> dict[str, Any]:
    """What `function(*arguments)` returns in a fresh process; one that fails says so in its `status`."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_run_once, args=(theirs, function, arguments))
    process.start()
    theirs.close()
    try:
        found: dict[str, Any] = ours.recv()
    except EOFError:
        process.join()
        found = {"status": f"failed: exit code {process.exitcode}"}
    process.join()
    return {"status": "ok", **found}


def steps_in_turn(configs: dict[str, RunConfig], steps: int) -> dict[str, dict[str, Any]]:
    """Losses and times of contenders that step in turn, each in its own process, so that both see the same machine."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for name, config in configs.items():
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, name.split(" ")[0], config), daemon=True)
        process.start()
        ours.recv()  # ready: one is built at a time
        pipes[name] = ours
        processes.append(process)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in configs}
    for _ in range(steps):
        for name, pipe in pipes.items():
            pipe.send(True)
            found[name].append(pipe.recv())
    for pipe, process in zip(pipes.values(), processes, strict=True):
        pipe.send(False)
        process.join()
    return {
        name: {
            "step_s": statistics.median(s for _, s in pairs),
            "steps": steps,
            "first_loss": pairs[0][0],
            "loss": pairs[-1][0],
        }
        for name, pairs in found.items()
    }


def pieces() -> dict[str, dict[str, Any]]:
    """The settings that switch each piece of the lean step off, by name."""
    fields = [f for f in dataclasses.fields(GROUPS["lean"]) if f.name != "lean"]  # type: ignore[arg-type]
    return {f.name: {f.name: False if default_of(f) is True else "off"} for f in fields}


def cuda_rows(case: Case, names: list[str], ablation: bool) -> list[dict[str, Any]]:
    """A row a contender: measured on a GPU, else simulated; with `ablation` one for each piece off."""
    import torch

    rows = []
    host = {"offload_embedding": "on"}
    runs = [(name, name, host if name == "lean-offload" else {}) for name in names]
    if ablation:
        runs += [(f"lean-offload without {piece}", "lean-offload", {**host, **off}) for piece, off in pieces().items()]
        if not torch.cuda.is_available():  # the batches of a measured row are neither packed nor padded
            packed = {**host, "pack": True}
            runs.append(("lean-offload packed", "lean-offload", packed))
            runs.append(("lean-offload packed without varlen", "lean-offload", {**packed, "varlen": False}))
    for label, name, changes in runs:
        config = case.config(**changes)
        if torch.cuda.is_available():
            found = in_own_process(measure_cuda, name, config)
        elif name.startswith("unsloth"):
            found = {"status": "not yet measured: needs a GPU"}
        else:
            found = {"status": "ok", **simulate_cuda(name, case, config)}
        rows.append(_say({"case": dataclasses.asdict(case), "contender": label, **found}))
    return judged(rows) if torch.cuda.is_available() else rows


def judged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows that did not train as `stock` did are void: the first loss, or how far it fell, is another."""
    stock = next((row for row in rows if row["contender"] == "stock" and "loss" in row), None)
    return [row if stock is None or "loss" not in row else _judged(row, stock) for row in rows]


def _judged(row: dict[str, Any], stock: dict[str, Any]) -> dict[str, Any]:
    fall, stock_fall = (r["first_loss"] - r["loss"] for r in (row, stock))
    begins_alike = abs(row["first_loss"] - stock["first_loss"]) <= LOSS_NOISE * stock["first_loss"]
    noise = max(FALL_NOISE * abs(stock_fall), LOSS_NOISE * stock["loss"] if row["steps"] < STEPS else 0)
    if begins_alike and abs(fall - stock_fall) <= noise:
        return row
    return {**row, "status": f"void: loss {row['first_loss']:.3f} to {row['loss']:.3f}, and not as stock's"}


def cpu_rows(case: Case, steps: int, measures_bytes: bool, ablation: bool) -> list[dict[str, Any]]:
    """Times on a CPU as ratios to stock's in the same minutes; live bytes; with `ablation` each piece off in turn."""
    runs = {name: case.config(optim="adamw") for name in ("stock", "lean")}
    if ablation:
        for piece, off in pieces().items():
            if LeanConfig(**off).resolved("cpu") != LeanConfig().resolved("cpu"):
                runs[f"lean without {piece}"] = case.config(optim="adamw", **off)
    found = steps_in_turn(runs, steps)
    rows = []
    for label, config in runs.items():
        row = {"case": dataclasses.asdict(case), "contender": label, "status": "ok", **found[label]}
        row["tokens_per_s_of_stock"] = found["stock"]["step_s"] / row["step_s"]
        if measures_bytes:
            row |= in_own_process(measure_live_bytes, label, config)
        rows.append(row)
    for row in rows:
        if measures_bytes:
            row["live_bytes_of_stock"] = row["live_bytes"] / rows[0]["live_bytes"]
        _say(row)
    return judged(rows)


def markdown(result: dict[str, Any]) -> str:
    """The tables of a result."""
    lines = [f"Peaks on CUDA: {result['peaks']}.", ""]
    lines += _table(result["rows"], {"peak_bytes": "peak (GB)", "reserved_bytes": "reserved (GB)", "phase": "in"})
    if result.get("cpu_rows"):
        lines += ["", f"On {result['device']}:", ""]
        lines += _table(result["cpu_rows"], {"live_bytes": "live (GB)", "phase": "in"})
    where = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return "\n".join([*lines, "", f"{result['device']}; {where}; commit {result['commit']}, {result['date']}."]) + "\n"


def _table(rows: list[dict[str, Any]], bytes_and_phase: dict[str, str]) -> list[str]:
    heads = {
        **bytes_and_phase,
        "live_bytes_of_stock": "of stock",
        "tokens_per_s": "tokens/s",
        "tokens_per_s_of_stock": "tokens/s of stock",
        "loss": "last loss",
    }
    shown = {key: head for key, head in heads.items() if any(key in row for row in rows)}
    lines = [f"| case | contender | {' | '.join(shown.values())} | note |", "|---" * (len(shown) + 3) + "|"]
    for row in rows:
        case = row["case"]
        cells = [f"{case['model']}, {case['rows']} × {case['tokens']}", row["contender"]]
        cells += [_cell(key, row.get(key)) for key in shown]
        lines.append(f"| {' | '.join([*cells, '' if row['status'] == 'ok' else row['status']])} |")
    return lines


def _cell(key: str, value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return (
        f"{value / GB:.3f}" if key.endswith("_bytes") else f"{value:,.3g}" if key == "tokens_per_s" else f"{value:.3f}"
    )


def _say(row: dict[str, Any]) -> dict[str, Any]:
    case = row["case"]
    shown = {k: v for k, v in row.items() if k not in ("case", "contender", "components")}
    print(f"{case['model']} {case['rows']} x {case['tokens']} {row['contender']}: {json.dumps(shown)}", file=sys.stderr)
    return row


def main() -> int:
    """Run the cases that this machine can, and write the result."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CUDA_CASES), help="model:ROWSxTOKENS, comma-separated")
    parser.add_argument("--contenders", default=",".join(CONTENDERS))
    parser.add_argument("--cpu-case", default=CPU_CASE, help="measured where there is no GPU; 'none' for none")
    parser.add_argument("--cpu-steps", type=int, default=3, help="steps of each contender on the CPU")
    parser.add_argument("--ablation", action="store_true", help="also each piece of the lean step off in turn")
    parser.add_argument("--cpu-ablation", action="store_true", help=f"the same in time on the CPU, {CPU_ABLATION_CASE}")
    parser.add_argument("--name", default="step", help="name of the result")
    args = parser.parse_args()
    names = args.contenders.split(",")
    unknown = sorted(set(names) - set(CONTENDERS))
    if unknown:
        parser.error(f"unknown contenders {', '.join(unknown)}: known are {', '.join(CONTENDERS)}")
    _begin()
    rows = [row for text in args.cases.split(",") for row in cuda_rows(Case.parse(text), names, args.ablation)]
    on_gpu = torch.cuda.is_available()
    result: dict[str, Any] = {
        "peaks": "measured" if on_gpu else "simulated for CUDA, compute capability 8.0; not yet validated on hardware",
        "rows": rows,
    }
    if not on_gpu and args.cpu_case != "none":
        result["cpu_rows"] = cpu_rows(Case.parse(args.cpu_case), args.cpu_steps, True, False)
        if args.cpu_ablation:
            result["cpu_rows"] += cpu_rows(Case.parse(CPU_ABLATION_CASE), 3 * args.cpu_steps, False, True)
    file = write_result(args.name, result)
    write_text(file.with_suffix(".md"), markdown(json.loads(file.read_text(encoding="utf-8"))))
    print(f"on {device_name()}, written to {file.relative_to(RESULTS.parent)}, .md beside it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
