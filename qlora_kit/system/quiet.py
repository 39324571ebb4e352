"""Silences messages of the libraries underneath that a user can do nothing about, each by name.

The run itself reports what matters: the optimizer on a CPU, the dtype of 8-bit products, the cache.
"""

from __future__ import annotations

import logging
import warnings

# logger → beginnings of messages that are dropped
LOG_MESSAGES = {
    "bitsandbytes.backends.cpu.ops": ("Failed to load CPU gemm_4bit_forward",),
    "bitsandbytes.autograd._functions": ("MatMul8bitLt: inputs will be cast",),
    "transformers.modeling_utils": (
        "`loss_type=None` was set in the config",
        "`use_cache=True` is incompatible",
        "We strongly recommend passing in an `attention_mask`",  # `lean.mask` says why there is none
    ),
    "transformers.trainer": (
        "The tokenizer has new PAD/BOS/EOS tokens",
        "Could not estimate the number of tokens",
        "The best checkpoint",  # of a resumed run whose folder was renamed: `trainer` finds it, or says that it is gone
    ),
    "transformers.trainer_utils": (
        "Warning: The following arguments do not match",  # a resumed run obeys its own settings
        "mtime may not be reliable",
        "The tokenizer has new PAD/BOS/EOS tokens",
    ),
    "accelerate.utils.other": ("Detected kernel version",),
}
LOAD_REPORT = " LOAD REPORT"  # in the first line of what transformers says about missing weights: `load` checks them
# (category, beginning of the message) of Python warnings that are dropped
WARNINGS: tuple[tuple[type[Warning], str], ...] = (
    (UserWarning, "Paged optimizers are not supported on CPU"),
    (FutureWarning, "`is_gradient_checkpointing` is deprecated"),  # PEFT asks for it
    (UserWarning, "MatMul8bitLt: inputs will be cast"),
)


class _Drop(logging.Filter):
    """Drops the records that begin with one of `beginnings`, and reports on loaded weights."""

    def __init__(self, beginnings: tuple[str, ...]) -> None:
        super().__init__()
        self.beginnings = beginnings

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return not (message.startswith(self.beginnings) or LOAD_REPORT in message.partition("\n")[0])


def quiet_libraries() -> None:
    """Install the filters; call it before the libraries are imported. Calling it again changes nothing."""
    for name, beginnings in LOG_MESSAGES.items():
        logger = logging.getLogger(name)
        if not any(isinstance(f, _Drop) for f in logger.filters):
            logger.addFilter(_Drop(beginnings))
    for category, beginning in WARNINGS:
        warnings.filterwarnings("ignore", message=beginning.replace("(", r"\("), category=category)


def quiet_progress_bars() -> None:
    """Turn off the libraries' own progress bars: the run shows its own."""
    import datasets
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()
