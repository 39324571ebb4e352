"""How small and how fast is a training step? Ours (`lean`) beside the stock libraries' and Unsloth's.

    python benchmarks/step.py                                # every case of this machine
    python benchmarks/step.py --ablation                     # and each piece of the lean step off in turn
    python benchmarks/step.py --cases llama-3-8b:2x2048 --contenders stock,lean,unsloth,unsloth-offload

The same random weights, tokens and learning rate for every contender, each in a process of its own. On a GPU: the peak
of allocated and reserved memory, the median time of a step, and the loss after 20 steps, which must agree or the row is
void. Without a GPU: the peaks on CUDA by simulation on `meta` (not yet validated on hardware), and on the CPU live
bytes and the ratio of the times of two contenders that step in turn. Writes step_<GPU>.json or step_cpu.json.

`stock` is PEFT on `prepare_model_for_kbit_training` with the optimizer of transformers' Trainer's defaults.
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

from common import RESULTS, device_name, real_optimizer, write_result

from qlora_kit.config import GROUPS, LeanConfig, RunConfig, default_of

GB = 10**9
STEPS, WARM_UP = 20, 5
BATCHES = 4  # different ones, in turn, so that the loss falls
LOSS_NOISE = 0.02  # a contender whose loss is off by more after the last step did not train the same
CONTENDERS = ("stock", "lean", "unsloth", "unsloth-offload")
CUDA_CASES = ("llama-3-8b:2x2048", "gpt2-large:8x1024")
CPU_CASE = "gpt2-large:4x512"


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
        import torch

        from qlora_kit import assembly
        from qlora_kit.trainer import resolve_optim

        self.config, self.device = config, device
        if name == "stock":
            self.model = build_stock(config, device)
        elif name == "lean":
            self.model = assembly.build_model(config, device)
        else:
            self.model = build_unsloth(config, name == "unsloth-offload")
        self.model.train()
        self.optimizer = real_optimizer(
            self.model, config, resolve_optim(config, device) if name == "lean" else "adamw"
        )
        draw = torch.Generator().manual_seed(config.seed)
        shape = (BATCHES, config.optim.batch_size, config.data.seq_len)
        self.batches = torch.randint(0, self.model.config.vocab_size, shape, generator=draw)
        self.steps = 0

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
    times = []
    for _ in range(STEPS):
        torch.cuda.synchronize(device)
        start_s = time.monotonic()
        loss = contender.step()
        torch.cuda.synchronize(device)
        times.append(time.monotonic() - start_s)
    step_s = statistics.median(times[WARM_UP:])
    return {
        "peak_bytes": torch.cuda.max_memory_allocated(device),
        "reserved_bytes": torch.cuda.max_memory_reserved(device),
        "step_s": step_s,
        "tokens_per_s": config.optim.batch_size * (config.data.seq_len or 0) / step_s,
        "loss": loss,
    }


def measure_live_bytes(name: str, config: RunConfig) -> dict[str, Any]:
    """The live bytes of a CPU's second step at their peak: the same tracker as the profiler's."""
    import torch

    from qlora_kit.memory.profile_cpu import CpuTracker
    from qlora_kit.memory.track import overall_peak
    from qlora_kit.memory.watch import watch

    contender = Contender(name, config, torch.device("cpu"))
    contender.step()  # the states are born
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
    """The peak of `torch.cuda.max_memory_allocated`, every layer simulated on `meta`."""
    from qlora_kit import assembly
    from qlora_kit.memory import rules
    from qlora_kit.memory.plan import resolve_architecture
    from qlora_kit.memory.simulate import Recipe, resolve_cuda_optim, simulate
    from qlora_kit.memory.track import overall_peak

    optim = "adamw" if name == "stock" else resolve_cuda_optim(config)
    build = build_stock if name == "stock" else assembly.build_model
    record = simulate(config, Recipe(case.tokens, optim), resolve_architecture(config), build=build)
    peak = overall_peak(record.events)
    library_bytes = 2 * rules.cublas_workspace_bytes(rules.DEFAULT_CAPABILITY)
    return {"peak_bytes": peak.n_bytes + library_bytes, "phase": peak.region.phase, "components": peak.components}


def _serve(connection: Connection, name: str, config: RunConfig) -> None:
    """In a process of its own: step when told, and answer with the loss and the seconds."""
    import torch

    _begin()
    contender = Contender(name, config, torch.device("cpu"))
    connection.send(None)
    while connection.recv():
        start_s = time.monotonic()
        loss = contender.step()
        connection.send((loss, time.monotonic() - start_s))


def _run_once(connection: Connection, function: Any, arguments: tuple[Any, ...]) -> None:
    _begin()
    try:
        connection.send(function(*arguments))
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


def steps_in_turn(configs: dict[str, RunConfig], steps: int, warm_up: int) -> dict[str, dict[str, Any]]:
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
        name: {"step_s": statistics.median(s for _, s in pairs[warm_up:]), "loss": pairs[-1][0]}
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
    runs: list[tuple[str, str, dict[str, Any]]] = [(name, name, {}) for name in names]
    if ablation:
        runs += [(f"lean without {piece}", "lean", off) for piece, off in pieces().items()]
    for label, name, changes in runs:
        config = case.config(**changes)
        if torch.cuda.is_available():
            found = in_own_process(measure_cuda, name, config)
        elif name.startswith("unsloth"):
            found = {"status": "not yet measured: needs a GPU"}
        else:
            found = in_own_process(simulate_cuda, name, case, config)
        rows.append(_say({"case": dataclasses.asdict(case), "contender": label, **found}))
    return judged(rows) if torch.cuda.is_available() else rows


def judged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows whose loss is not that of `stock` are void: they did not train the same."""
    stock = next((row["loss"] for row in rows if row["contender"] == "stock" and "loss" in row), None)
    if stock is None:
        return rows
    return [
        {**row, "status": f"void: loss {row['loss']:.3f}, stock {stock:.3f}"}
        if "loss" in row and abs(row["loss"] - stock) > LOSS_NOISE * stock
        else row
        for row in rows
    ]


def cpu_rows(case: Case, steps: int, warm_up: int, ablation: bool) -> list[dict[str, Any]]:
    """Live bytes and times on a CPU; the time of each contender is a ratio to stock's in the same minutes."""
    runs: dict[str, tuple[str, RunConfig]] = {name: (name, case.config(optim="adamw")) for name in ("stock", "lean")}
    if ablation:
        for piece, off in pieces().items():
            if LeanConfig(**off).resolved("cpu") != LeanConfig().resolved("cpu"):
                runs[f"lean without {piece}"] = ("lean", case.config(optim="adamw", **off))
    live = {label: in_own_process(measure_live_bytes, name, config) for label, (name, config) in runs.items()}
    timed = steps_in_turn({label: runs[label][1] for label in ("stock", "lean")}, steps, warm_up)
    rows = []
    for label, found in live.items():
        row = {"case": dataclasses.asdict(case), "contender": label, **found, **timed.get(label, {})}
        if "live_bytes" in found:
            row["live_bytes_of_stock"] = found["live_bytes"] / live["stock"]["live_bytes"]
        if label in timed:
            row["tokens_per_s_of_stock"] = timed["stock"]["step_s"] / timed[label]["step_s"]
        rows.append(_say(row))
    return judged(rows)


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
    parser.add_argument(
        "--cpu-steps", type=int, default=4, help="steps of each contender on the CPU, the first to warm up"
    )
    parser.add_argument("--ablation", action="store_true", help="also each piece of the lean step off in turn")
    parser.add_argument("--name", default="step", help="name of the result")
    args = parser.parse_args()
    names = args.contenders.split(",")
    unknown = sorted(set(names) - set(CONTENDERS))
    if unknown:
        parser.error(f"unknown contenders {', '.join(unknown)}: known are {', '.join(CONTENDERS)}")
    rows = [row for text in args.cases.split(",") for row in cuda_rows(Case.parse(text), names, args.ablation)]
    on_gpu = torch.cuda.is_available()
    result: dict[str, Any] = {
        "peaks": "measured" if on_gpu else "simulated for CUDA, compute capability 8.0; not yet validated on hardware",
        "rows": rows,
    }
    if not on_gpu and args.cpu_case != "none":
        result["cpu_rows"] = cpu_rows(Case.parse(args.cpu_case), args.cpu_steps, 1, args.ablation)
    file = write_result(args.name, result)
    print(f"on {device_name()}, written to {file.relative_to(RESULTS.parent)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
