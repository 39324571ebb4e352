"""Which device a process of tests may see.

Many tests leave the device to what is there, as users do, so that on a machine with a GPU they would test something
else than they say. So CUDA is hidden from them, and from what they start; those marked `gpu` run by themselves, with
`-m gpu`. One process cannot do both: CUDA is hidden before it is first asked for, and for good.
"""

from __future__ import annotations

HIDES = "CUDA_VISIBLE_DEVICES"


def shows_cuda(markers: str) -> bool:
    """Whether `-m markers` asks for the tests marked `gpu`: it begins with that word."""
    return markers.split()[:1] == ["gpu"]
