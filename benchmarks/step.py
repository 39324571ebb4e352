"""How small and how fast is a training step? Ours (`lean`) beside the stock libraries', a PEFT loop's and Unsloth's.

    python benchmarks/step.py                                # every case of this machine
    python benchmarks/step.py --ablation                     # and each piece of the lean step off in turn
    python benchmarks/step.py --cases none --rounds 10       # without a GPU: the measured cases alone
    python benchmarks/step.py --cases llama-3-8b:2x2048 --contenders stock,lean,unsloth,unsloth-offload

The same random weights, tokens and learning rate for every contender, each in a process of its own that builds the
model by its own means (`contenders.py`). Peaks of memory (allocated and reserved on a GPU, resident on a CPU), the
median time of a step, and the losses, which must be those of `stock` or the row is void. On a GPU one contender runs
after the other; on a CPU they step in turn, so that all see the same minutes of a shared machine. Without a GPU also
the peaks on CUDA, by simulation on `meta` (not yet validated on hardware). Results are written as soon as they are
there: step_<GPU>, or step_cpu (simulated) and step_times_cpu (measured), each .json and .md.

`stock` is PEFT on `prepare_model_for_kbit_training` with the optimizer of transformers' Trainer's defaults, AdamW;
`peft-loop` has bf16 factors and casts nothing up; on CUDA all but `stock` have paged 8-bit AdamW.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import RESULTS, device_name, write_result
from contenders import Job

from qlora_kit.config.rules import default_of
from qlora_kit.config.settings import GROUPS, LeanConfig, RunConfig
from qlora_kit.system.files import write_json, write_text

CHILD = Path(__file__).resolve().parent / "contenders.py"
GB = 10**9
GPU_ROUNDS, GPU_WARM_UP = 20, 5
CPU_ROUNDS, CPU_WARM_UP = 5, 1
LOSS_NOISE = 0.01  # a contender whose first loss is off by more has other weights or another loss: bf16's rounding
FALL_NOISE = 0.2  # one whose loss falls by so much more or less than stock's did not train the same
CONTENDERS = ("stock", "peft-loop", "lean", "lean-offload", "unsloth", "unsloth-offload")  # offload: of the embedding
SIMULATED = ("stock", "lean", "lean-offload")
ON_CPU = ("stock", "peft-loop", "lean")
CUDA_CASES = ("llama-3-8b:2x2048", "gpt2-large:8x1024")
CPU_CASES = ("llama-12x768:4x512", "gpt2-large:4x512")
CPU_ABLATION_CASE = "gpt2:2x128"
OWN_SHAPES = {  # beside the named architectures of the package
    "llama-12x768": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "max_position_embeddings": 2048,
    }
}
FOR_THE_ALLOCATOR = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")  # what a contender's environment is free of
NO_GPU = "not yet measured: needs a GPU"

Row = dict[str, Any]


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

    def flat(self, folder: Path, **changes: Any) -> dict[str, Any]:
        """The settings of the run on the model described in `folder`, with `changes`."""
        flat = {"model": str(folder), "weights": "random", "bits": 4, "r": self.r, "batch_size": self.rows}
        return {**flat, "seq_len": self.tokens, **changes}

    def job(self, name: str, folder: Path, device: str, **changes: Any) -> Job:
        """What the contender `name` is told."""
        return job_of(name, self.flat(folder, **changes), device)

    @contextmanager
    def described(self) -> Iterator[Path]:
        """A folder with the model's config.json and a tokenizer, and no weights."""
        from qlora_kit.model import architectures, tokenizer

        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            if self.model in OWN_SHAPES:
                write_json(folder / "config.json", OWN_SHAPES[self.model])
            else:
                architectures.config_from(self.model).save_pretrained(folder)
            tokenizer.load_tokenizer(RunConfig.from_flat(self.flat(folder)).base).save_pretrained(folder)
            yield folder


def job_of(name: str, flat: dict[str, Any], device: str) -> Job:
    """What the contender `name` is told for a run with the settings `flat`, on random weights."""
    config = RunConfig.from_flat(flat)
    adapter, optim = config.adapter, config.optim
    return Job(
        name,
        config.base.model,
        device,
        optim.batch_size,
        config.data.seq_len or 0,
        adapter.r,
        adapter.resolved_alpha,
        optim.lr,
        optim.clip,
        config.seed,
        flat,
    )


def build_stock(config: RunConfig, device: Any, architecture: Any = None) -> Any:
    """`contenders.Stock`'s model on `meta`, where nothing is loaded: for the simulation."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    from qlora_kit.adapters import targets
    from qlora_kit.build import Built
    from qlora_kit.model import load

    model: Any = prepare_model_for_kbit_training(load.load_base(config.base, device, config.seed, architecture))
    settings = LoraConfig(
        r=config.adapter.r,
        lora_alpha=config.adapter.resolved_alpha,
        target_modules=targets.choose_targets(model, None),
        task_type="CAUSAL_LM",
    )
    with device:
        return Built(model=get_peft_model(model, settings))


# --------------------------------------------------------------------------- contenders in processes of their own


def plain(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` without what sets glibc's allocator."""
    return {name: value for name, value in environment.items() if not name.startswith(FOR_THE_ALLOCATOR)}


class Child:
    """A contender in its own process; one that fails says so in its `status`."""

    def __init__(self, job: Job) -> None:
        command = [sys.executable, str(CHILD), json.dumps(dataclasses.asdict(job))]
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115  # until `end`
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=plain(os.environ),
        )
        self.built = self._answer()

    def step(self) -> Row:
        """Let it take a step: the loss before it, the seconds, and the peaks so far."""
        assert self._process.stdin is not None, "it is a pipe"
        with contextlib.suppress(BrokenPipeError):  # it has ended, and what it printed says how
            self._process.stdin.write("step\n")
            self._process.stdin.flush()
        return self._answer()

    def end(self) -> None:
        """Let it end, and wait for it."""
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate()
        self._errors.close()

    def _answer(self) -> Row:
        assert self._process.stdout is not None, "it is a pipe"
        line = self._process.stdout.readline()
        if line:
            answer: Row = json.loads(line)
            return answer
        code = self._process.wait()
        self._errors.seek(0)
        last = (self._errors.read().strip().splitlines() or [""])[-1]
        return {"status": f"failed: exit code {code}: {last[:200]}"}


def steps_in_turn(jobs: Mapping[str, Job], rounds: int, warm_up: int, save: Callable[[dict[str, Row]], None]) -> None:
    """Let the contenders step in turn, `warm_up` + `rounds` times, and `save` what is known after each of `rounds`."""
    children: dict[str, Child] = {}
    found: dict[str, list[Row]] = {label: [] for label in jobs}
    failed: dict[str, Row] = {}
    try:
        for label, job in jobs.items():  # one is built at a time
            children[label] = Child(job)
            if "status" in children[label].built:
                failed[label] = children[label].built
        for number in range(warm_up + rounds):
            for label in [name for name in jobs if name not in failed]:
                answer = children[label].step()
                if "status" in answer:
                    failed[label] = answer
                found[label].append(answer)
            no_more = len(failed) == len(jobs)
            if number >= warm_up or no_more:
                save({n: failed.get(n) or _measured(job, children[n], found[n], warm_up) for n, job in jobs.items()})
            if no_more:
                break
    finally:
        for child in children.values():
            child.end()


def _measured(job: Job, child: Child, answers: list[Row], warm_up: int) -> Row:
    step_s = statistics.median(answer["seconds"] for answer in answers[warm_up:])
    peaks = {key: v for key, v in answers[-1].items() if key.endswith("_bytes") and v is not None}
    assert job.name.startswith("lean") or not answers[-1]["ours"], "a peer's process has nothing of ours"
    return {
        "status": "ok",
        **peaks,
        "step_s": step_s,
        "tokens_per_s": job.rows * job.tokens / step_s,
        "steps": len(answers),
        "first_loss": answers[0]["loss"],
        "loss": answers[-1]["loss"],
        **child.built,
    }


def in_own_process(function: Any, *arguments: Any) -> Row:
    """What `function(*arguments)` returns in a fresh process; one that fails says so in its `status`."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_run_once, args=(theirs, function, arguments))
    process.start()
    theirs.close()
    try:
        found: Row = ours.recv()
    except EOFError:
        process.join()
        found = {"status": f"failed: exit code {process.exitcode}"}
    process.join()
    return {"status": "ok", **found}


def _run_once(connection: Connection, function: Any, arguments: tuple[Any, ...]) -> None:
    _begin()
    try:
        connection.send(function(*arguments))
    # a peer's library fails in its own ways, and a contender that fails is a row that says so
    except (RuntimeError, ImportError, NotImplementedError, OSError, ValueError, TypeError) as error:
        connection.send({"status": f"failed: {type(error).__name__}: {str(error).splitlines()[0][:200]}"})


def _begin() -> None:
    import warnings

    from qlora_kit.system.quiet import quiet_libraries

    quiet_libraries()
    warnings.simplefilter("ignore")  # a process of a benchmark prints figures


def measure_live_bytes(job: Job) -> Row:
    """The live bytes of a CPU's second step at their peak: the same tracker as the profiler's, and no time."""
    import torch

    from qlora_kit.memory.profile.cpu import CpuTracker
    from qlora_kit.memory.track import overall_peak
    from qlora_kit.memory.watch import watch

    contender = job.model_class(job)
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


def simulate_cuda(name: str, case: Case, config: RunConfig) -> Row:
    """The predicted peak of `torch.cuda.max_memory_allocated`: ours is planned, the stock step simulated likewise."""
    from qlora_kit.memory import rules
    from qlora_kit.memory.plan import plan, resolve_architecture
    from qlora_kit.memory.simulate import Simulation, simulate
    from qlora_kit.memory.track import overall_peak

    if name != "stock":
        planned = plan(config)
        return {"peak_bytes": planned.peak_bytes, "phase": planned.phase, "components": planned.components}
    simulation = Simulation(seq_len=case.tokens, optim="adamw")
    peak = overall_peak(simulate(config, simulation, resolve_architecture(config), build=build_stock).events)
    library_bytes = 2 * rules.cublas_workspace_bytes(simulation.capability)
    return {"peak_bytes": peak.n_bytes + library_bytes, "phase": peak.region.phase, "components": peak.components}


# --------------------------------------------------------------------------- rows


def pieces() -> dict[str, dict[str, Any]]:
    """The settings that switch each piece of the lean step off, by name."""
    fields = [f for f in dataclasses.fields(GROUPS["lean"]) if f.name != "lean"]  # type: ignore[arg-type]
    return {f.name: {f.name: False if default_of(f) is True else "off"} for f in fields}


def cuda_runs(names: list[str], ablation: bool, simulated: bool) -> dict[str, tuple[str, dict[str, Any]]]:
    """The rows of a case on CUDA: label → contender and settings; with `ablation` one for each piece off."""
    host = {"offload_embedding": "on"}
    runs: dict[str, tuple[str, dict[str, Any]]] = {
        name: (name, host if name == "lean-offload" else {}) for name in names
    }
    if ablation:
        for piece, off in pieces().items():
            runs[f"lean-offload without {piece}"] = ("lean-offload", {**host, **off})
    if ablation and simulated:  # the batches of a measured row are neither packed nor padded
        packed = {**host, "pack": True}
        runs["lean-offload packed"] = ("lean-offload", packed)
        runs["lean-offload packed without varlen"] = ("lean-offload", {**packed, "varlen": False})
    return runs


def measured_on_gpu(case: Case, args: argparse.Namespace, add: Callable[[list[Row]], None]) -> None:
    """Give `add` the rows of `case` each time that one is done: one contender after the other."""
    rows: list[Row] = []
    with case.described() as folder:
        for label, (name, changes) in cuda_runs(args.contenders, args.ablation, False).items():
            job = case.job(name, folder, "cuda", **changes)
            kept: dict[str, Row] = {}
            steps_in_turn({label: job}, args.rounds or GPU_ROUNDS, GPU_WARM_UP, kept.update)
            rows.append(_say({"case": dataclasses.asdict(case), "contender": label, **kept[label]}))
            add(judged(rows))


def simulated(case: Case, args: argparse.Namespace, add: Callable[[list[Row]], None]) -> None:
    """Give `add` the rows of `case` as they are on CUDA, predicted without one."""
    rows: list[Row] = []
    with case.described() as folder:
        for label, (name, changes) in cuda_runs(args.contenders, args.ablation, True).items():
            found: Row = {"status": NO_GPU}
            if name in SIMULATED:
                config = RunConfig.from_flat(case.flat(folder, **changes))
                found = {"status": "ok", **simulate_cuda(name, case, config)}
            rows.append(_say({"case": dataclasses.asdict(case), "contender": label, **found}))
            add(rows)


def measured_on_cpu(case: Case, args: argparse.Namespace, add: Callable[[list[Row]], None], ablation: bool) -> None:
    """Give `add` the rows of `case` after each round: the contenders, or with `ablation` ours with each piece off."""
    runs: dict[str, dict[str, Any]] = {name: {} for name in ON_CPU if name in args.contenders}
    if ablation:
        runs = {"stock": {}, "lean": {}}
        for piece, off in pieces().items():
            if LeanConfig(**off).resolved("cpu") != LeanConfig().resolved("cpu"):
                runs[f"lean without {piece}"] = off
    with case.described() as folder:
        jobs = {n: case.job(n.split(" ")[0], folder, "cpu", optim="adamw", **off) for n, off in runs.items()}
        live = {} if ablation else {name: in_own_process(measure_live_bytes, job) for name, job in jobs.items()}
        latest: dict[str, Row] = {}

        def save(found: dict[str, Row]) -> None:
            latest.update(found)
            add(_beside_stock(case, found, live))

        steps_in_turn(jobs, args.rounds or CPU_ROUNDS, CPU_WARM_UP, save)
        for row in _beside_stock(case, latest, live):
            _say(row)


def _beside_stock(case: Case, found: dict[str, Row], live: dict[str, Row]) -> list[Row]:
    """The rows of contenders that stepped in turn, with their ratios to `stock`."""
    rows = [{"case": dataclasses.asdict(case), "contender": n, **live.get(n, {}), **row} for n, row in found.items()]
    stock = next((row for row in rows if row["contender"] == "stock"), {})
    for row in rows:
        for key in ("tokens_per_s", "live_bytes", "resident_bytes"):
            if key in row and key in stock:
                row[f"{key}_of_stock"] = row[key] / stock[key]
    return judged(rows)


def judged(rows: list[Row]) -> list[Row]:
    """Rows that did not train as `stock` did are void: the first loss, or how far it fell, is another."""
    stock = next((row for row in rows if row["contender"] == "stock" and "loss" in row), None)
    return [row if stock is None or "loss" not in row else _judged(row, stock) for row in rows]


def _judged(row: Row, stock: Row) -> Row:
    fall, stock_fall = (r["first_loss"] - r["loss"] for r in (row, stock))
    begins_alike = abs(row["first_loss"] - stock["first_loss"]) <= LOSS_NOISE * stock["first_loss"]
    noise = max(FALL_NOISE * abs(stock_fall), LOSS_NOISE * stock["loss"] if row["steps"] < GPU_ROUNDS else 0)
    if begins_alike and abs(fall - stock_fall) <= noise:
        return row
    return {**row, "status": f"void: loss {row['first_loss']:.3f} to {row['loss']:.3f}, and not as stock's"}


def markdown(result: Row) -> str:
    """The tables of a result."""
    lines = [f"Peaks on CUDA: {result['peaks']}.", ""] if "peaks" in result else []
    lines += _table(result["rows"])
    where = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return "\n".join([*lines, "", f"{result['device']}; {where}; commit {result['commit']}, {result['date']}."]) + "\n"


def _table(rows: list[Row]) -> list[str]:
    heads = {
        "peak_bytes": "peak (GB)",
        "reserved_bytes": "reserved (GB)",
        "phase": "in",
        "live_bytes": "live (GB)",
        "live_bytes_of_stock": "of stock",
        "resident_bytes": "resident (GB)",
        "libraries_bytes": "libraries (GB)",
        "step_s": "s a step",
        "tokens_per_s": "tokens/s",
        "tokens_per_s_of_stock": "of stock",
        "first_loss": "first loss",
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


def _say(row: Row) -> Row:
    case = row["case"]
    shown = {k: v for k, v in row.items() if k not in ("case", "contender", "components")}
    print(f"{case['model']} {case['rows']} x {case['tokens']} {row['contender']}: {json.dumps(shown)}", file=sys.stderr)
    return row


class Result:
    """A file of results that is written anew whenever rows of a case are there."""

    def __init__(self, name: str, out: Path, about: Mapping[str, Any]) -> None:
        self.name, self.out, self.about = name, out, about
        self.rows: dict[str, list[Row]] = {}

    def add(self, case: str, rows: list[Row]) -> None:
        """Write the file with `rows` as those of `case`."""
        self.rows[case] = rows
        every = [row for of_case in self.rows.values() for row in of_case]
        file = write_result(self.name, {**self.about, "rows": every}, self.out)
        write_text(file.with_suffix(".md"), markdown(json.loads(file.read_text(encoding="utf-8"))))
        self.file = file


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cases", default=",".join(CUDA_CASES), help="model:ROWSxTOKENS, comma-separated, on CUDA; or 'none'"
    )
    parser.add_argument("--contenders", default=",".join(CONTENDERS))
    parser.add_argument(
        "--cpu-cases", default=",".join(CPU_CASES), help="likewise, measured where there is no GPU; or 'none'"
    )
    parser.add_argument("--rounds", type=int, help=f"steps of each: unset {GPU_ROUNDS} on a GPU, {CPU_ROUNDS} on a CPU")
    parser.add_argument("--ablation", action="store_true", help="also each piece of the lean step off in turn")
    parser.add_argument("--cpu-ablation", action="store_true", help=f"the same in time on the CPU, {CPU_ABLATION_CASE}")
    parser.add_argument("--name", default="step", help="name of the result")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for it")
    return parser


def _cases(text: str) -> list[Case]:
    return [] if text == "none" else [Case.parse(one) for one in text.split(",")]


def main() -> int:
    """Run the cases that this machine can, and write the results."""
    import torch

    parser = _parser()
    args = parser.parse_args()
    args.contenders = args.contenders.split(",")
    unknown = sorted(set(args.contenders) - set(CONTENDERS))
    if unknown:
        parser.error(f"unknown contenders {', '.join(unknown)}: known are {', '.join(CONTENDERS)}")
    _begin()
    on_gpu = torch.cuda.is_available()
    how = "measured" if on_gpu else "simulated for CUDA, compute capability 8.0; not yet validated on hardware"
    results = [Result(args.name, args.out, {"peaks": how}), Result(f"{args.name}_times", args.out, {})]
    for case in _cases(args.cases):
        run = measured_on_gpu if on_gpu else simulated
        run(case, args, lambda rows, case=case: results[0].add(str(case), rows))  # type: ignore[misc]
    asked = [] if on_gpu else [(case, False) for case in _cases(args.cpu_cases)]
    asked += [(Case.parse(CPU_ABLATION_CASE), True)] * (args.cpu_ablation and not on_gpu)
    for case, ablation in asked:
        measured_on_cpu(case, args, lambda rows, key=f"{case}{ablation}": results[1].add(key, rows), ablation)  # type: ignore[misc]
    written = [result.file.name for result in results if result.rows]
    print(f"on {device_name()}, written to {args.out}: {', '.join(written) or 'nothing'}, .md beside each")
    return 0


if __name__ == "__main__":
    sys.exit(main())
