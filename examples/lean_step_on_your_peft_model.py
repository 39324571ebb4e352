"""Put the lean step on your own PEFT model, in your own loop: the same losses, less memory.

    python examples/lean_step_on_your_peft_model.py
    python examples/lean_step_on_your_peft_model.py --model meta-llama/Llama-3.2-1B --bits 4 --tokens 2048

Trains the same model twice from the same start, as it is and with the lean step on it, and compares. Without `--model`
it is a small Llama with random weights, so that nothing is downloaded. Batches must be padded on the right, and a call
with labels returns the loss without logits.
"""

from __future__ import annotations

import argparse
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from qlora_kit import RunConfig
from qlora_kit.lean.apply import make_lean

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32


def main() -> None:
    """Train both, and print what they did."""
    args = parse_args()
    stock = train(build(args), args)

    model = build(args)
    outcomes = make_lean(model, RunConfig().lean.resolved(DEVICE.type))  # the one line to add to a loop of your own
    lean = train(model, args)

    for piece, outcome in outcomes.items():
        print(f"{piece:28} {outcome.done or f'({outcome.left})'}")
    print(f"\n{'step':>6} {'stock loss':>12} {'lean loss':>12}")
    for step, (one, other) in enumerate(zip(stock.losses, lean.losses, strict=True), start=1):
        print(f"{step:>6} {one:>12.6f} {other:>12.6f}")
    print(f"\npeak of a step beyond the model: {stock.peak_bytes / 2**20:.1f} MiB stock, ", end="")
    print(f"{lean.peak_bytes / 2**20:.1f} MiB lean ({lean.peak_bytes / stock.peak_bytes:.0%})")


def build(args: argparse.Namespace) -> Any:
    """A plain PEFT model with checkpointing, always with the same factors."""
    torch.manual_seed(0)
    if args.model is None:
        shape = LlamaConfig(
            vocab_size=8192, hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4
        )
        model = AutoModelForCausalLM.from_config(shape, dtype=DTYPE).to(DEVICE)
    else:
        quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=DTYPE)
        model = AutoModelForCausalLM.from_pretrained(
            args.model, dtype=DTYPE, device_map=DEVICE, quantization_config=quantized if args.bits == 4 else None
        )
    model.config.use_cache = False
    factors = LoraConfig(r=args.r, lora_alpha=2 * args.r, target_modules="all-linear", task_type="CAUSAL_LM")
    peft_model = get_peft_model(model.requires_grad_(False), factors)
    checkpoint(peft_model)
    return peft_model.train()


def checkpoint(model: Any) -> None:
    """Recompute activations in the backward pass; transformers renamed the switch in 5.20."""
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


@dataclass(frozen=True)
class Trained:
    """The loss of each step, and the most bytes that were alive in one beside the model."""

    losses: list[float]
    peak_bytes: int


def train(model: Any, args: argparse.Namespace) -> Trained:
    """A plain loop over random tokens, of which the second half is learned."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    draw = torch.Generator().manual_seed(1)
    losses, peak_bytes = [], 0
    for _ in range(args.steps):
        ids = torch.randint(0, model.config.vocab_size, (args.rows, args.tokens), generator=draw).to(DEVICE)
        labels = ids.clone()
        labels[:, : args.tokens // 2] = -100
        with LiveBytes() as live:
            loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        peak_bytes = max(peak_bytes, live.peak_bytes)
    return Trained(losses, peak_bytes)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors on `DEVICE` that are made in it and alive; `peak_bytes` is the most of them."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.bytes = self.peak_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and count the storages that are new."""
        result = func(*args, **(kwargs or {}))
        old = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)}
        for leaf in tree_leaves(result):
            if torch.is_tensor(leaf) and leaf.device.type == DEVICE.type:
                storage = leaf.untyped_storage()
                if storage._cdata not in old and storage._cdata not in self.live:
                    self._count(storage)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        self.live[key] = storage.nbytes()
        self.bytes += storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self.bytes)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.bytes -= self.live.pop(key)


def parse_args() -> argparse.Namespace:
    """The flags; without them it takes seconds on a CPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id; unset: a small Llama with random weights")
    parser.add_argument("--bits", type=int, choices=(4, 16), default=16, help="of a --model's weights")
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=3)
    return parser.parse_args()


if __name__ == "__main__":
    main()
