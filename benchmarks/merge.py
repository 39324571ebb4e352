"""What a merge takes: time and peak memory beside stock `merge_and_unload` and beside a plain copy of the files.

    python benchmarks/merge.py --shape tinyllama-1.1b --folder /somewhere/with/room

A base of random bf16 weights in the named shape and an adapter off zero are written first. Then each way runs in a
process of its own, whose peak resident memory the system reports; the seconds are those of the work, without imports.
The merge must keep to 3 times its largest tensor in fp32 and 600 MiB, and to twice the copy plus the quantization.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import write_result

from qlora_kit import demo
from qlora_kit.model import architectures

WAYS = {
    "copy": "plain copy of the files",
    "arithmetic": "quantize and dequantize every layer, nothing written",
    "original": "qlora-kit merge --into original",
    "trained": "qlora-kit merge (NF4 and back)",
    "stock": "transformers + PEFT: load in bf16, merge_and_unload, save_pretrained",
}
RANK = 16
SPARE_BYTES = 600 << 20


def make_inputs(shape: str, folder: Path) -> dict[str, Any]:
    """Write base and adapter; returns their sizes."""
    import torch

    from qlora_kit.config.settings import BaseConfig
    from qlora_kit.model.load import load_base
    from qlora_kit.release.files.write import TensorPlan, plan_shards, writing

    base, adapter = folder / "base", folder / "adapter"
    base.mkdir(parents=True)
    architectures.config_from(shape).save_pretrained(base)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(demo.base_folder() / name, base / name)
    model = load_base(BaseConfig(model=shape, weights="random", bits=16), torch.device("meta"))
    plans = [TensorPlan(name, "BF16", tuple(p.shape)) for name, p in model.named_parameters()]
    draw = torch.Generator().manual_seed(0)
    with writing(base, plan_shards(plans)) as writer:
        for plan in plans:
            writer.write(plan.name, (torch.randn(plan.shape, generator=draw) * 0.02).bfloat16())
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    make_adapter(model, adapter, draw)
    sizes = [plan.n_bytes for plan in plans]
    return {"parameters": sum(sizes) // 2, "files_bytes": sum(sizes), "largest_tensor_fp32_bytes": 2 * max(sizes)}


def make_adapter(model: Any, folder: Path, draw: Any) -> None:
    """Factors on every linear layer of the blocks, in PEFT's format."""
    import torch
    from safetensors.torch import save_file

    from qlora_kit.adapters.targets import linear_layers

    folder.mkdir()
    tensors = {}
    layers = linear_layers(model)
    for name, layer in layers.items():
        rows, columns = layer.weight.shape if hasattr(layer, "in_features") else reversed(layer.weight.shape)
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(RANK, columns, generator=draw).bfloat16() * 0.02
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(rows, RANK, generator=draw).bfloat16() * 0.02
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    targets = sorted({name.rsplit(".", 1)[-1] for name in layers})
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": targets, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "task_type": "CAUSAL_LM"}))


def run(way: str, folder: Path) -> dict[str, float]:
    """Do the work of one way; returns its seconds on the clock and of all CPUs."""
    work = {"copy": copy, "arithmetic": arithmetic, "stock": stock}.get(way, lambda own: ours(own, way))
    start_s, start_cpu_s = work(folder)
    return {"seconds": time.monotonic() - start_s, "cpu_seconds": time.process_time() - start_cpu_s}


def now() -> tuple[float, float]:
    """The time on the clock, and that which this process took of all CPUs."""
    return time.monotonic(), time.process_time()


def copy(folder: Path) -> tuple[float, float]:
    """Copy the files and put them on the disk; each way returns when its work began."""
    start = now()
    (folder / "copy").mkdir()
    for file in (folder / "base").iterdir():
        shutil.copyfile(file, folder / "copy" / file.name)
        with (folder / "copy" / file.name).open("rb") as copied:
            os.fsync(copied.fileno())
    return start


def arithmetic(folder: Path) -> tuple[float, float]:
    """Quantize and dequantize every layer of the blocks."""
    import torch

    from qlora_kit.config.settings import BaseConfig
    from qlora_kit.release.files.read import open_base
    from qlora_kit.release.mapping import read_layout
    from qlora_kit.release.quantize import Quantization, as_seen

    config = BaseConfig(model=str(folder / "base"))
    _, checkpoint = open_base(config)
    layout = read_layout(config, torch.bfloat16, checkpoint)
    start = now()
    for name, file_name in layout.file_names.items():
        if layout.weights[name].quantized:
            weight = checkpoint.read(file_name)
            for _ in as_seen(
                weight.T.contiguous() if layout.weights[name].transposed else weight, weight.dtype, Quantization(4)
            ):
                pass
    return start


def ours(folder: Path, into: str) -> tuple[float, float]:
    """Merge with this package, each tensor proven; the whole model would be another process."""
    from qlora_kit.config.settings import BaseConfig
    from qlora_kit.release.merge import merge
    from qlora_kit.release.request import MergeRequest

    import_what_a_merge_needs(folder)
    start = now()
    chosen = ((str(folder / "adapter"), 1.0),)
    request = MergeRequest(
        base=BaseConfig(model=str(folder / "base")), adapters=chosen, out=str(folder / into), into=into
    )
    merge(request, whole_model=False)
    return start


def import_what_a_merge_needs(folder: Path) -> None:
    """Building a model on `meta` is what imports most."""
    import torch

    from qlora_kit.config.settings import BaseConfig
    from qlora_kit.model.load import load_base

    load_base(BaseConfig(model=str(folder / "base")), torch.device("meta"))


def stock(folder: Path) -> tuple[float, float]:
    """Merge as the libraries' documentation does, on 16-bit weights."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    start = now()
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
    PeftModel.from_pretrained(model, str(folder / "adapter")).merge_and_unload().save_pretrained(folder / "stock")
    return start


def in_a_process(*words: str) -> tuple[Any, int]:
    """Run this script with `words`; what its last line says, and its peak resident bytes.

    This process must stay small: the system counts what it holds at the start of another as the other's.
    """
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen([sys.executable, __file__, *words], stdout=said, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{words} failed with code {process.returncode}")
        said.seek(0)
        return json.loads(said.read().splitlines()[-1]), usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(way: str, folder: Path, repeats: int) -> dict[str, Any]:
    """The seconds of one way (the least of `repeats`, each in a process of its own) and its largest peak."""
    found, peaks = [], []
    for _ in range(repeats):
        times, peak = in_a_process("--folder", str(folder), "--way", way)
        shutil.rmtree(folder / way, ignore_errors=True)
        found.append(times)
        peaks.append(peak)
    least = {kind: min(times[kind] for times in found) for kind in ("seconds", "cpu_seconds")}
    print(
        f"{WAYS[way]}: {least['seconds']:.1f} s ({least['cpu_seconds']:.1f} s of CPUs), "
        f"peak {max(peaks) / 2**20:,.0f} MiB",
        flush=True,
    )
    return {"what": WAYS[way], **least, "peak_bytes": max(peaks)}


def main() -> None:
    """Measure every way and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="tinyllama-1.1b")
    parser.add_argument("--folder", type=Path, required=True, help="where to write; needs 3 times the base's size")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--repeats", type=int, default=1, help="runs of each way; the quickest counts")
    parser.add_argument("--way", help="run one way in this process, or `make` (what the script does for each)")
    arguments = parser.parse_args()
    if arguments.way:
        make = arguments.way == "make"
        found = make_inputs(arguments.shape, arguments.folder) if make else run(arguments.way, arguments.folder)
        print(json.dumps(found))
        return
    folder = arguments.folder / f"merge-{arguments.shape.replace('/', '-')}"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        inputs, _ = in_a_process("--folder", str(folder), "--way", "make", "--shape", arguments.shape)
        ways = {way: measure(way, folder, arguments.repeats) for way in arguments.ways.split(",")}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    bound = 3 * inputs["largest_tensor_fp32_bytes"] + SPARE_BYTES
    result = {"shape": arguments.shape, "r": RANK, **inputs, "bound_bytes": bound, "ways": ways}
    print(write_result(f"merge_{arguments.shape}", result))


if __name__ == "__main__":
    main()
