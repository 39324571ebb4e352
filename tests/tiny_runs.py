"""Finished runs of a few steps on tiny models, for the tests of what reads a run."""

from __future__ import annotations

import io
import json
from pathlib import Path

from families import save_tiny
from rich.console import Console

from qlora_kit import AdapterConfig, BaseConfig, DataConfig, EvalConfig, OptimConfig, RunConfig, train

PAIRS = [{"prompt": f"add {i} and {i + 1}", "completion": f"{2 * i + 1}"} for i in range(12)]
TEXTS = [{"text": f"{i} and {i + 1} make {2 * i + 1}"} for i in range(12)]
KINDS = {  # of a run: family, bits, data, and other settings of the base and of evaluation
    "adapter": ("llama", 4, PAIRS, {}, {"exact_match": 3}),
    "fp32": ("gpt2", 32, PAIRS, {}, {}),
    "full": ("gpt2", 32, PAIRS, {"full": True}, {}),
    "text": ("llama", 16, TEXTS, {}, {}),
}


class TinyRuns:
    """Runs by kind, each trained once, and the bases and data that they were made of."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def base(self, family: str) -> Path:
        folder = self.root / family
        return folder if folder.exists() else save_tiny(folder, family)

    def data(self, rows: list[dict[str, str]], name: str = "data") -> Path:
        file = self.root / f"{name}-{'-'.join(rows[0])}.jsonl"
        file.write_text("\n".join(json.dumps(row) for row in rows))
        return file

    def __getitem__(self, kind: str) -> Path:
        out = self.root / "runs" / kind
        if not out.exists():
            family, bits, rows, base, evaluation = KINDS[kind]
            config = RunConfig(
                base=BaseConfig(model=str(self.base(family)), bits=bits, device="cpu", **base),
                adapter=AdapterConfig(r=4, adapter_dtype="fp32" if bits == 32 else "bf16"),
                data=DataConfig(data=str(self.data(rows)), eval_data=str(self.data(rows[:6], "held-out")), seq_len=64),
                optim=OptimConfig(lr=5e-3, schedule="constant", warmup=0.0, max_steps=3, batch_size=4),
                evaluation=EvalConfig(**evaluation),
                out=str(out),
                preflight=False,
            )
            train(config, Console(file=io.StringIO()))
        return out
