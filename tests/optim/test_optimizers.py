"""The table of optimizers: each of its names is made, for a run and for a plan."""

from __future__ import annotations

import pytest
import torch
from families import tiny_model

from qlora_kit import OptimConfig, RunConfig, UserError
from qlora_kit.adapters.inject import inject
from qlora_kit.build import Built
from qlora_kit.config.settings import AdapterConfig
from qlora_kit.lean import flat
from qlora_kit.memory.simulate import nothing_left_behind
from qlora_kit.optim import bnb, paged_states
from qlora_kit.optim.kind import OptimizerKind, PlannedDevice
from qlora_kit.optim.optimizers import OPTIMIZERS, check_optim, optimizer_named, resolve_optim

IDS = torch.arange(16).reshape(2, 8)


def built(flat_buffer=True, **settings):
    model = inject(tiny_model("llama"), AdapterConfig(r=4, **settings)).train()
    return Built(model=model, outcomes={"buffer": flat.put_on(model)} if flat_buffer else {})


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.filterwarnings("ignore:Paged optimizers")
def test_every_name_trains(name):
    one = built()
    assert isinstance(optimizer_named(name), OptimizerKind)
    optimizer = one.make_optimizer(OptimConfig(lr=1e-2), name)
    before = [p.detach().clone() for p in one.model.parameters() if p.requires_grad]
    losses = []
    for _ in range(3):
        loss = one.model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        one.clip(1.0)
        optimizer.step()
        losses.append(loss.item())
    after = [p for p in one.model.parameters() if p.requires_grad]
    assert losses[-1] < losses[0]
    assert not all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.filterwarnings("ignore:Paged optimizers")
def test_every_name_has_the_states_in_a_plan_that_it_has_in_a_run(name, device):
    sizes = []
    for where in ("cpu", "meta"):
        with nothing_left_behind():
            one = built(False)
            if where == "meta":
                one.model.to("meta")
                planned = PlannedDevice(type=device)
                optimizer = one.plan_optimizer(OptimConfig(), name, planned)
                assert planned.paged == []  # of too few elements
            else:
                optimizer = one.make_optimizer(OptimConfig(), name)
            for parameter in one.model.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            states = [v for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v)]
            sizes.append(sorted((v.numel(), str(v.dtype)) for v in states if v.numel() > 1))
    assert sizes[0] == sizes[1]


def test_on_cuda_a_plan_pages_what_is_large_enough_there_at_full_depth():
    for growth, pages in ((1.0, 0), (paged_states.MIN_ELEMENTS / 256, 2 * 28)):
        with nothing_left_behind():
            one = built(False)
            one.model.to("meta")
            planned = PlannedDevice(type="cuda", growth=growth)
            optimizer = one.plan_optimizer(OptimConfig(), "paged_adamw_32bit", planned)
            for parameter in one.model.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            assert len(planned.paged) == pages


def test_trained_embeddings_keep_fp32_states_as_under_transformers_trainer():
    """Only those of one optimizer: bitsandbytes' own register would outlive it."""
    model = tiny_model("gpt2")
    made = Built(model=model).make_optimizer(OptimConfig(), "adamw_8bit")
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    made.step()
    dtypes = {name: made.state[p]["state1"].dtype for name, p in model.named_parameters() if p.numel() >= 4096}
    assert dtypes.pop("transformer.wte.weight") == torch.float32
    assert dtypes.pop("transformer.wpe.weight") == torch.float32
    assert set(dtypes.values()) == {torch.uint8}
    assert bnb.bitsandbytes.optim.GlobalOptimManager.get_instance().index2config == {}


def test_a_name_that_is_none_is_refused_where_it_is_resolved():
    config = RunConfig.from_flat({"optim": "adam"})
    with pytest.raises(UserError, match="optim = 'adam': is not a known optimizer") as caught:
        resolve_optim(config, torch.device("cpu"))
    assert all(name in caught.value.faults[0].remedy for name in OPTIMIZERS)
    check_optim(None)
