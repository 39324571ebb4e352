"""A merge holds a few tensors at a time, whatever the model's size."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from children import in_a_child
from releases import make_adapter, release
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the peak of resident memory is reset in /proc"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]
SLACK_BYTES = 32 << 20  # pieces of rows, the plan of the files, what Python keeps
CONFIGS = {
    "llama": LlamaConfig(
        hidden_size=384, intermediate_size=1024, num_hidden_layers=14, num_attention_heads=6, vocab_size=512
    ),
    "gpt2": GPT2Config(n_embd=384, n_layer=14, n_head=6, vocab_size=512, n_positions=64),
}


def resident(kind: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(kind))


@pytest.mark.slow
@pytest.mark.parametrize(("family", "dtype"), [("llama", "bf16"), ("gpt2", "fp32")])
def test_the_peak_is_that_of_a_few_tensors(tmp_path, family, dtype):
    from families import tiny_tokenizer

    base = tmp_path / "base"
    AutoModelForCausalLM.from_config(CONFIGS[family]).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    adapter = make_adapter(base, tmp_path / "adapter")
    weights = load_file(base / "model.safetensors").values()
    largest, total = max(w.numel() * 4 for w in weights), sum(w.numel() * 4 for w in weights)
    del weights
    bound = 3 * largest + SLACK_BYTES
    assert total > 2 * bound  # or the test could not fail

    def task() -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = resident("VmRSS:")
        release(base, [(adapter, 1.0)], tmp_path / "out", dtype=dtype)
        (tmp_path / "grown").write_text(str(resident("VmHWM:") - before))

    release(base, [(adapter, 1.0)], tmp_path / "warm", dtype=dtype)
    os.waitpid(in_a_child(task), 0)
    grown = int((tmp_path / "grown").read_text())
    assert grown < bound
