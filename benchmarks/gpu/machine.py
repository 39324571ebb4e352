"""Prints where this is: device, compute capability, memory, versions, commit."""

from __future__ import annotations

import json

import torch
from common import commit, device_name

from qlora_kit.system.files import versions


def main() -> None:
    """Print one line of JSON; `capability` is None without a CUDA device."""
    there = torch.cuda.is_available()
    where = {
        "device": device_name(),
        "capability": torch.cuda.get_device_capability() if there else None,
        "memory_bytes": torch.cuda.get_device_properties(0).total_memory if there else None,
        "commit": commit(),
        "versions": versions(),
    }
    print(json.dumps(where))


if __name__ == "__main__":
    main()
