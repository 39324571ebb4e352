"""What a model holds in memory all through training: weights, gradients and optimizer states, method by method.

    python benchmarks/model_states.py --model gpt2-large

Each method is built by the toolkit's own code with random weights on the CPU (bytes do not depend on the device),
its optimizer takes one real step, and the tensors that then exist are counted. Activations, which depend on the
batch, are not among them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import write_result

from qlora_kit.config.settings import AdapterConfig, BaseConfig, RunConfig

METHODS = {  # name → base settings, adapter dtype, and what a reader is told
    "full": ({"bits": 32, "full": True}, "fp32", "every weight in fp32, AdamW"),
    "lora16": ({"bits": 16}, "fp32", "bf16 base, fp32 factors, AdamW"),
    "lora8": ({"bits": 8}, "bf16", "LLM.int8 base, bf16 factors, AdamW with fp32 states"),
    "qlora4": ({"bits": 4}, "bf16", "NF4 base with double quantization, bf16 factors, AdamW with fp32 states"),
}


def measure(model_name: str, method: str, r: int) -> dict[str, Any]:
    """Bytes of weights, gradients and optimizer states of `method` after one step."""
    import torch

    from qlora_kit.adapters.inject import inject, trainable
    from qlora_kit.build import Built
    from qlora_kit.model.load import load_base
    from qlora_kit.model.quantize import count_parameters

    base_settings, adapter_dtype, recipe = METHODS[method]
    config = BaseConfig(model=model_name, weights="random", **base_settings)
    model: Any = load_base(config, torch.device("cpu"))
    if not config.full:
        model = inject(model, AdapterConfig(r=r, adapter_dtype=adapter_dtype))
    parameters = [p for _, p in trainable(model)]
    for p in parameters:
        p.grad = torch.zeros_like(p)
    optimizer = Built(model=model).make_optimizer(RunConfig().optim, "adamw")
    optimizer.step()
    states = [t for state in optimizer.state.values() for t in state.values()]
    return {
        "recipe": recipe,
        "parameters": count_parameters(model).total,
        "trainable": count_parameters(model).trainable,
        "weight_bytes": tensor_bytes(model),
        "gradient_bytes": sum(p.grad.nbytes for p in parameters if p.grad is not None),
        "optimizer_bytes": sum(t.nbytes for t in states),
    }


def tensor_bytes(model: Any) -> int:
    """Bytes of every parameter and buffer, and of what quantization keeps beside them."""
    total = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    for p in model.parameters():
        state = getattr(p, "quant_state", None)
        if state is not None:
            total += sum(t.nbytes for t in state.as_dict(packed=False).values() if hasattr(t, "nbytes"))
        if getattr(p, "SCB", None) is not None:
            total += p.SCB.nbytes
    return total


def main() -> int:
    """Measure every method on one model and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gpt2-large")
    parser.add_argument("--r", type=int, default=16)
    args = parser.parse_args()
    from qlora_kit.system.quiet import quiet_libraries

    quiet_libraries()
    rows = {}
    for method in METHODS:
        rows[method] = measure(args.model, method, args.r)
        held = sum(rows[method][f"{kind}_bytes"] for kind in ("weight", "gradient", "optimizer"))
        print(f"{method:8} {held / 2**20:10.1f} MiB", flush=True)
    file = write_result(f"model_states_{args.model}", {"settings": vars(args), "rows": rows})
    print(f"written to {file.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
