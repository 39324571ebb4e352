"""A contender of `step.py`: a model built by its own means that takes one training step at a time when it is told.

    python benchmarks/contenders.py '{"name": "stock", "folder": "folder with config.json", "device": "cpu", …}'

A process of its own, started by this file's path: nothing of a peer's comes from qlora_kit, which `Lean` alone imports,
so that no setting of ours reaches it. The weights are the same all the same: each layer is drawn on the device by its
name, as ours are, and handed to transformers' own loading in the place of a checkpoint. Reads a line from its input for
each step and ends with it; each answer is a line of JSON. What libraries print goes to the standard error.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import sys
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

IGNORED = -100
BATCHES = 4  # different ones, in turn, so that the loss falls
# a contender that fails is a row that says so, and a library fails in its own ways
FAILURES = (RuntimeError, ImportError, NotImplementedError, OSError, ValueError, TypeError, AttributeError, KeyError)


@dataclass(frozen=True)
class Job:
    """What a contender trains: `rows` × `tokens` of the model whose config.json and tokenizer are in `folder`."""

    name: str
    folder: str
    device: str
    rows: int
    tokens: int
    r: int
    alpha: float
    lr: float
    clip: float
    seed: int
    settings: dict[str, Any]  # all of a run, for ours

    @property
    def model_class(self) -> Any:
        """The class of the contender, which says how it is built."""
        return KINDS[self.name.split("-offload")[0]]


# --------------------------------------------------------------------------- the weights


def drawn_weights(architecture: Any, device: Any, seed: int, dtype: Any) -> tuple[Any, dict[str, Any]]:
    """The class of the model and its weights by name, on `device`: drawn as transformers would, layer by layer."""
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(architecture, dtype=dtype)
    weights = {}
    for name, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is None:
            continue
        module.to_empty(device=device, recurse=False)
        with _drawn_by(seed, name, device):
            for parameter in module.parameters(recurse=False):
                parameter.zero_()
            model._init_weights(module)
        for key, parameter in module.named_parameters(recurse=False):
            weights[f"{name}.{key}"] = parameter.detach().to(dtype)
        module.to_empty(device=torch.device("meta"), recurse=False)
    for tied in getattr(model, "all_tied_weights_keys", None) or ():
        weights.pop(tied, None)
    return type(model), weights


@contextmanager
def _drawn_by(seed: int, name: str, device: Any) -> Iterator[None]:
    import torch

    layer_seed = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "big")
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        torch.manual_seed(layer_seed)
        yield


# --------------------------------------------------------------------------- the contenders


class Contender(ABC):
    """A model with its optimizer on `device`."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.prepare()
        import torch

        self.device = torch.device(job.device, 0) if job.device == "cuda" else torch.device(job.device)
        self.libraries_bytes = resident_bytes("VmRSS:")
        torch.manual_seed(job.seed)
        self.model = self.build()
        self.model.train()
        self.optimizer = self.make_optimizer()
        draw = torch.Generator().manual_seed(job.seed)
        self.batches = torch.randint(0, self.model.config.vocab_size, (BATCHES, job.rows, job.tokens), generator=draw)
        self.steps = 0

    @abstractmethod
    def prepare(self) -> None:
        """Import what it is made of."""

    @abstractmethod
    def build(self) -> Any:
        """The model, ready to train."""

    @abstractmethod
    def make_optimizer(self) -> Any:
        """The optimizer of what trains."""

    @abstractmethod
    def take_step(self, batch: dict[str, Any]) -> Any:
        """One optimizer step on `batch`; returns the loss before it."""

    def warm_up(self) -> None:
        """A step on a few tokens: the optimizer's states are born, and what is compiled or cached is there."""
        batches, self.batches = self.batches, self.batches[:, :1, :8]
        self.step()
        self.batches, self.steps = batches, 0

    def step(self) -> float:
        """One optimizer step; returns the loss, and so waits for the device."""
        ids = self.batches[self.steps % BATCHES].to(self.device)
        self.steps += 1
        labels = ids.clone()
        labels[:, 0] = IGNORED  # nothing predicts it; so every contender divides by the same number
        loss = self.take_step({"input_ids": ids, "labels": labels, "attention_mask": ids.new_ones(ids.shape)})
        return float(loss)

    def trained(self) -> list[Any]:
        """The parameters that train."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]


class Peer(Contender):
    """The plain loop of the libraries underneath; subclasses say which model and optimizer."""

    def prepare(self) -> None:
        """Import the libraries."""
        import bitsandbytes  # noqa: F401
        import peft  # noqa: F401
        import transformers

        transformers.utils.logging.disable_progress_bar()

    def base(self) -> Any:
        """The random weights, which transformers loads and bitsandbytes quantizes."""
        import torch
        from transformers import AutoConfig, BitsAndBytesConfig

        architecture = AutoConfig.from_pretrained(self.job.folder)
        kind, weights = drawn_weights(architecture, self.device, self.job.seed, torch.bfloat16)
        quantized = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        return kind.from_pretrained(
            None,
            config=architecture,
            state_dict=weights,
            dtype=torch.bfloat16,
            quantization_config=quantized,
            device_map={"": str(self.device)},
        )

    def with_factors(self, model: Any, **options: Any) -> Any:
        """PEFT's model with factors on every linear layer of the blocks."""
        from peft import LoraConfig, get_peft_model

        settings = LoraConfig(
            r=self.job.r, lora_alpha=self.job.alpha, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        return get_peft_model(model, settings, **options)

    def make_optimizer(self) -> Any:
        """Paged 8-bit AdamW on CUDA, torch's elsewhere."""
        import bitsandbytes
        import torch

        if self.device.type == "cuda":
            return bitsandbytes.optim.PagedAdamW8bit(self.trained(), lr=self.job.lr, weight_decay=0.0)
        return torch.optim.AdamW(self.trained(), lr=self.job.lr, weight_decay=0.0, fused=True)

    def take_step(self, batch: dict[str, Any]) -> Any:
        """Forward, backward, clip, step, in the order of transformers' Trainer."""
        import torch

        loss = self.model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained(), self.job.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


class Stock(Peer):
    """As PEFT's guides make it: fp32 for what is not quantized, fp32 factors, checkpoints, the Trainer's AdamW."""

    def build(self) -> Any:
        """`prepare_model_for_kbit_training` and `get_peft_model`."""
        from peft import prepare_model_for_kbit_training

        return self.with_factors(prepare_model_for_kbit_training(self.base()))

    def make_optimizer(self) -> Any:
        """The Trainer's default."""
        import torch

        return torch.optim.AdamW(self.trained(), lr=self.job.lr, weight_decay=0.0, fused=True)


class PeftLoop(Peer):
    """As somebody writes it who knows the costs: nothing cast up, bf16 factors, checkpoints without reentrance."""

    def build(self) -> Any:
        """The base as it is loaded, and factors in its dtype."""
        import torch

        model = self.base()
        model.requires_grad_(False)
        model.config.use_cache = False
        options = {"use_reentrant": False}
        if hasattr(model, "activation_checkpointing_enable"):  # its name from transformers 5.20 on
            model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
        else:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        model = self.with_factors(model, autocast_adapter_dtype=False)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)
        return model


class Unsloth(Peer):
    """Unsloth's own model of the same weights, which are drawn on the device and written nowhere."""

    def prepare(self) -> None:
        """Import it first of all, as it wants to be; says what does not fit before it crashes on it."""
        problem = unsloth_problem()
        if problem is not None:
            raise ImportError(problem)
        import unsloth  # type: ignore[import-not-found]  # noqa: F401  # isort: skip

        super().prepare()

    def build(self) -> Any:
        """`FastLanguageModel`, with its checkpointing."""
        import torch
        from transformers import AutoConfig
        from unsloth import FastLanguageModel

        architecture = AutoConfig.from_pretrained(self.job.folder)
        kind, weights = drawn_weights(architecture, self.device, self.job.seed, torch.bfloat16)
        targets = sorted({name.split(".")[-2] for name, w in weights.items() if ".layers." in name and w.ndim == 2})
        with _weights_for_files(kind, architecture, weights):
            model, _ = FastLanguageModel.from_pretrained(
                self.job.folder,
                max_seq_length=self.job.tokens,
                dtype=torch.bfloat16,
                load_in_4bit=True,
                offload_embedding=self.job.name.endswith("-offload"),
            )
        return FastLanguageModel.get_peft_model(
            model,
            r=self.job.r,
            lora_alpha=self.job.alpha,
            lora_dropout=0,
            bias="none",
            target_modules=targets,
            use_gradient_checkpointing="unsloth",
            random_state=self.job.seed,
        )


@contextmanager
def _weights_for_files(kind: Any, architecture: Any, weights: dict[str, Any]) -> Iterator[None]:
    """Meanwhile `AutoModelForCausalLM.from_pretrained` takes `weights` in the place of a folder's files."""
    from transformers import AutoModelForCausalLM

    stock = AutoModelForCausalLM.from_pretrained

    def from_pretrained(name: str, *args: Any, config: Any = None, **options: Any) -> Any:
        for field in ("max_position_embeddings", "rope_scaling"):  # of the configuration, as Unsloth hands them over
            value = options.pop(field, None)
            if value is not None:
                setattr(config or architecture, field, value)
        return kind.from_pretrained(None, *args, config=config or architecture, state_dict=weights, **options)

    AutoModelForCausalLM.from_pretrained = from_pretrained
    try:
        yield
    finally:
        AutoModelForCausalLM.from_pretrained = stock


def unsloth_problem(package: str = "unsloth") -> str | None:
    """Why Unsloth cannot run here, in a line: it is not installed, or what is here its own metadata exclude."""
    from importlib import metadata

    from packaging.requirements import Requirement

    try:
        version, wanted = metadata.version(package), metadata.requires(package) or []
    except metadata.PackageNotFoundError:
        return f"{package} is not installed"
    unfit = []
    for requirement in map(Requirement, wanted):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            here = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            unfit.append(f"{requirement.name} (not installed)")
            continue
        if not requirement.specifier.contains(here, prereleases=True):
            unfit.append(f"{requirement.name}{requirement.specifier} (here {here})")
    return f"{package} {version} needs {', '.join(unfit)}" if unfit else None


class Lean(Contender):
    """Ours, as a run builds it and steps."""

    def prepare(self) -> None:
        """Import the package from beside this folder."""
        root = str(Path(__file__).resolve().parents[1])
        if root not in sys.path:
            sys.path.insert(0, root)
        from qlora_kit.config.settings import RunConfig
        from qlora_kit.memory import simulate  # noqa: F401
        from qlora_kit.system.quiet import quiet_libraries
        from qlora_kit.training import trainer  # noqa: F401

        quiet_libraries()
        self.config = RunConfig.from_flat(self.job.settings)

    def build(self) -> Any:
        """The model of a run."""
        from qlora_kit.build import build_model

        self.built = build_model(self.config, self.device)
        return self.built.model

    def make_optimizer(self) -> Any:
        """The optimizer of a run."""
        from qlora_kit.optim.optimizers import resolve_optim

        return self.built.make_optimizer(self.config.optim, resolve_optim(self.config, self.device))

    def take_step(self, batch: dict[str, Any]) -> Any:
        """The step that the planner simulates, and the Trainer takes."""
        from qlora_kit.memory.simulate import run_step
        from qlora_kit.memory.track import MemoryTracker

        losses: list[Any] = []
        handle = self.model.register_forward_hook(lambda _, __, output: losses.append(output["loss"].detach()))
        try:
            run_step(MemoryTracker(self.device.type), self.built, self.optimizer, [batch], self.job.clip)
        finally:
            handle.remove()
        return losses[0]


KINDS: dict[str, Any] = {"stock": Stock, "peft-loop": PeftLoop, "lean": Lean, "unsloth": Unsloth}


# --------------------------------------------------------------------------- the process


class Meter:
    """The most memory from now on: of torch's allocator on CUDA, resident in this process elsewhere."""

    def __init__(self, contender: Contender) -> None:
        import gc

        import torch

        self.contender, self.cuda = contender, torch.cuda if contender.device.type == "cuda" else None
        gc.collect()
        if self.cuda is not None:
            self.cuda.empty_cache()  # the weights that were drawn in 16 bits
            self.cuda.reset_peak_memory_stats(contender.device)
        else:
            give_back()  # likewise
            clear_peak()

    def timed_step(self) -> dict[str, float]:
        """A step, and the seconds that it took."""
        self._wait()
        start_s = time.monotonic()
        loss = self.contender.step()
        self._wait()
        return {"loss": loss, "seconds": time.monotonic() - start_s}

    def _wait(self) -> None:
        if self.cuda is not None:
            self.cuda.synchronize(self.contender.device)

    def peaks(self) -> dict[str, int | None]:
        """The peaks in bytes."""
        if self.cuda is None:
            libraries_bytes = self.contender.libraries_bytes
            return {"resident_bytes": resident_bytes("VmHWM:"), "libraries_bytes": libraries_bytes}
        device = self.contender.device
        return {
            "peak_bytes": self.cuda.max_memory_allocated(device),
            "reserved_bytes": self.cuda.max_memory_reserved(device),
        }


def resident_bytes(kind: str) -> int | None:
    """Resident memory of this process, now (`VmRSS:`) or at its peak (`VmHWM:`); None where /proc does not say."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(kind)), None)


def give_back() -> None:
    """Give free memory back to the system once, which changes nothing of how the C library goes on."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None  # glibc's
    if trim is not None:
        trim(0)


def clear_peak() -> None:
    """Let the peak of resident memory begin anew, where the system lets it."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        print("the peak of resident memory includes the building: /proc/self/clear_refs cannot be written")


def serve(job: Job, orders: TextIO, answers: TextIO) -> None:
    """Build the contender, say so, and take a step for each line of `orders`; a failure is the last answer."""

    def say(**answer: Any) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    try:
        start_s = time.monotonic()
        contender: Contender = job.model_class(job)
        contender.warm_up()
        meter = Meter(contender)
        n_trained = sum(parameter.numel() for parameter in contender.trained())
        say(build_s=time.monotonic() - start_s, trained=n_trained)
        for _ in orders:
            say(**meter.timed_step(), **meter.peaks(), ours="qlora_kit" in sys.modules)
    except FAILURES as error:
        said = (str(error).splitlines() or [""])[0]
        say(status=f"failed: {type(error).__name__}: {said[:300]}")


def main() -> int:
    """Serve the job that the first argument describes."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints
    warnings.simplefilter("ignore")  # a process of a benchmark prints figures
    serve(Job(**json.loads(sys.argv[1])), sys.stdin, answers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
