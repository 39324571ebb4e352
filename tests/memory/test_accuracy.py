"""The tracker against an independent record: torch's profiler on the same real steps."""

from __future__ import annotations

import pytest
from memory_cases import BATCH, TOKENS, record, settings, small_config

from qlora_kit.memory.profile.cpu import BatchShape, predict
from qlora_kit.memory.track import overall_peak

FAMILIES = ("gpt2", "llama", "opt", "gpt_neox")
PLAIN = {"gradient_checkpointing": False}
WAYS = {
    "full": {"full": True, **PLAIN},
    "full, checkpoints": {"full": True},
    "lora": PLAIN,
    "lora, checkpoints": {},
    "qlora": {"bits": 4, **PLAIN},
    "qlora, checkpoints": {"bits": 4},
}
CASES = [(family, way, 0.0, False) for family in FAMILIES for way in WAYS.values()]
CASES += [
    ("gpt2", {"dropout": 0.1}, 0.1, False),
    ("llama", {"bits": 4, "dropout": 0.1}, 0.0, False),
    ("opt", {"full": True, **PLAIN}, 0.1, False),
    ("llama", {"optim": "adamw_8bit"}, 0.0, False),
    ("llama", {"optim": "adamw_8bit", "full": True}, 0.0, False),
    ("gpt2", {"optim": "paged_adamw_8bit", "bits": 4}, 0.0, False),
    ("opt", {"optim": "paged_adamw_32bit", "full": True}, 0.0, False),
    ("llama", {"full": True}, 0.0, True),
    ("gpt2", {"full": True, **PLAIN}, 0.0, True),
    ("llama", {"bits": 8}, 0.0, False),
    ("llama", {"grad_accum": 2}, 0.0, False),
    ("gpt2", {"dora": True}, 0.0, False),
]


def name_of(case):
    family, way, dropout, autocast = case
    words = [f"{key}={value}" for key, value in way.items()]
    return ",".join([family, *words, *(["dropout"] if dropout else []), *(["autocast"] if autocast else [])])


@pytest.mark.accuracy
@pytest.mark.filterwarnings("ignore")  # those of the libraries underneath are their own tests' concern
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_the_peak_is_that_of_the_profilers_own_record(case):
    """Within 0.5 %; what is missing is the state of the random generator, 5 KB a checkpoint."""
    family, way, dropout, autocast = case
    recorded = record(settings(**way), small_config(family, dropout=dropout), autocast)
    assert abs(recorded.error) < 0.005
    assert recorded.tracked_bytes > 1.5 * recorded.static_bytes  # the step, not the weights, is what is compared


@pytest.mark.accuracy
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "case",
    [
        ("opt", {"dropout": 0.1}, 0.1, False),
        ("llama", {"bits": 4, "dropout": 0.1}, 0.0, False),
        ("gpt2", {"bits": 4, "seq_len": 2 * TOKENS}, 0.1, False),  # attention by row keeps more states of 5 KB
    ],
    ids=name_of,
)
def test_the_prediction_is_that_of_the_profilers_own_record(case):
    """Within 0.5 %. Not predicted for a CPU: 8-bit weights (their kernels differ from CUDA's) and autocast."""
    family, way, dropout, _ = case
    config, architecture = settings(**way), small_config(family, dropout=dropout)
    architecture.max_position_embeddings = config.data.seq_len
    shapes = [[BatchShape(rows=BATCH, tokens=config.data.seq_len)]] * 2
    predicted = overall_peak(predict(config, architecture, shapes)).n_bytes
    assert predicted == pytest.approx(record(config, architecture).profiled_bytes, rel=0.005)


@pytest.mark.accuracy
@pytest.mark.filterwarnings("ignore")
def test_in_bf16_only_the_scratch_of_onednn_is_missing():
    """A CPU's bf16 products repack their inputs in buffers that no dispatcher sees; CUDA has none of them."""
    recorded = record(settings(bits=16, adapter_dtype="bf16"), small_config("llama"))
    assert -0.15 < recorded.error <= 0.005
