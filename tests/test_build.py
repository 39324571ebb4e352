"""What training puts on the model beside the lean step; the rest of `build_model` is tested where its parts are."""

from __future__ import annotations

import math

import pytest
import torch
from families import HIDDEN, save_tiny

from qlora_kit.build import build_model
from qlora_kit.config.settings import RunConfig

IDS = torch.arange(40).reshape(2, 20)


@pytest.mark.parametrize("full", [False, True])
def test_neftune_adds_noise_within_its_bound_in_training_only(tmp_path, full):
    """NEFTune (arXiv 2310.05914): uniform between ±α/√(tokens · features)."""
    flat = {"model": str(save_tiny(tmp_path, "llama")), "bits": 16, "full": full, "neftune": 5.0, "device": "cpu"}
    model = build_model(RunConfig.from_flat(flat), torch.device("cpu")).model
    embedding = model.get_input_embeddings()
    plain = embedding.weight[IDS].detach()
    bound = 5 / math.sqrt(20 * HIDDEN)
    torch.manual_seed(0)
    noise = (model.train().get_input_embeddings()(IDS) - plain).detach().float()
    assert float(noise.abs().max()) <= bound * 1.01 + 0.01  # bf16 rounds the sum
    assert float(noise.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert torch.equal(model.eval().get_input_embeddings()(IDS), plain)
