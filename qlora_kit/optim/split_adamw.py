"""AdamW that trains bf16 parameters as if they were fp32.

    fp32 bits of w = (bf16 bits of value << 16) + remainder        w, value: (N,); remainder: (N,) int16
    w ← AdamW(w, ∂w, m, v);    value, remainder ← w                m, v: (N,) fp32

torch's AdamW keeps its moments in the dtype of the parameters. In bf16, 0.999 times a second moment rounds back to the
same number: after one large gradient it never falls again, and the parameter hardly moves any more. And an update of
less than 1/512 of a parameter is rounded away.

Here the moments are fp32, and so are the parameters: the bf16 tensor holds the upper half of each number, rounded, and
`remainder` what the rounding took. Both together are the fp32 number, bit for bit. For a parameter that is 14 bytes
with its gradient and states, where fp32 ones take 16, and bf16 ones with moments in bf16 take 8.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.optim.adamw import adamw

PIECE = 2**20
"""Elements that are updated at once: so large are the fp32 copies."""

HALF = 1 << 15  # of the last bit of a bf16 number, in the bits of the fp32 one


def join(values_N: torch.Tensor, remainder_N: torch.Tensor) -> torch.Tensor:
    """The fp32 numbers of which `values_N` (bf16) and `remainder_N` (int16) are the halves."""
    return ((values_N.view(torch.int16).to(torch.int32) << 16) + remainder_N).view(torch.float32)


def split(numbers_N: torch.Tensor, values_N: torch.Tensor, remainder_N: torch.Tensor) -> None:
    """Write the fp32 `numbers_N`, rounded to the nearest, into `values_N` (bf16), and the rest into `remainder_N`.

    What lies in the middle between two is rounded away from zero: so the rest fits 16 bits with a sign.
    """
    bits_N = numbers_N.view(torch.int32)
    upper_N = (bits_N + HALF) >> 16
    values_N.view(torch.int16).copy_(upper_N)
    remainder_N.copy_(bits_N - (upper_N << 16))


class SplitAdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101), on a CPU and on CUDA by torch's fused kernel; fp32 parameters are updated as they are.

    States of a parameter: `step`, `exp_avg` and `exp_avg_sq` in fp32, and `remainder` where it is bf16.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state.update(_first_state(parameter))
        parameter.data = parameter.data.contiguous()
        tensors = [parameter.data, parameter.grad, state["exp_avg"], state["exp_avg_sq"], state.get("remainder")]
        for values_N, gradient_N, exp_avg_N, exp_avg_sq_N, remainder_N in _pieces(tensors):
            numbers_N = values_N if remainder_N is None else join(values_N, remainder_N)
            _fused_step(numbers_N, gradient_N.float(), exp_avg_N, exp_avg_sq_N, state["step"].clone(), group)
            if remainder_N is not None:
                split(numbers_N, values_N, remainder_N)
        state["step"] += 1

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over saved states in their own dtypes: torch casts them to those of the parameters.

        Raises `ValueError` for the states of another optimizer or other parameters.
        """
        super().load_state_dict(state_dict)
        parameters = [p for group in self.param_groups for p in group["params"]]
        for index, saved in state_dict["state"].items():
            parameter = parameters[index]
            first = _first_state(parameter)
            if {k: (v.shape, v.dtype) for k, v in saved.items()} != {k: (v.shape, v.dtype) for k, v in first.items()}:
                raise ValueError(f"the states of parameter {index} have other names, shapes or dtypes")
            self.state[parameter] = {name: value.to(first[name].device) for name, value in saved.items()}


def _first_state(parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    state = {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
        "exp_avg": torch.zeros_like(parameter, dtype=torch.float32, memory_format=torch.contiguous_format),
        "exp_avg_sq": torch.zeros_like(parameter, dtype=torch.float32, memory_format=torch.contiguous_format),
    }
    if parameter.dtype == torch.bfloat16:
        state["remainder"] = torch.zeros_like(parameter, dtype=torch.int16, memory_format=torch.contiguous_format)
    return state


def _pieces(tensors: list[torch.Tensor | None]) -> Iterator[tuple[Any, ...]]:
    """The same `PIECE` elements of each tensor at a time; None stays None."""
    flat = [None if tensor is None else tensor.reshape(-1) for tensor in tensors]
    n_elements = flat[0].numel() if flat[0] is not None else 0
    for start in range(0, n_elements, PIECE):
        yield tuple(None if tensor is None else tensor[start : start + PIECE] for tensor in flat)


def _fused_step(
    numbers_N: torch.Tensor,
    gradient_N: torch.Tensor,
    exp_avg_N: torch.Tensor,
    exp_avg_sq_N: torch.Tensor,
    steps_before: torch.Tensor,
    group: dict[str, Any],
) -> None:
    beta1, beta2 = group["betas"]
    adamw(
        [numbers_N],
        [gradient_N],
        [exp_avg_N],
        [exp_avg_sq_N],
        [],
        [steps_before],
        fused=True,
        amsgrad=False,
        maximize=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
    )
