"""Releases of every family at every number of bits, against stock PEFT on the weights of the live base."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, save_tiny
from releases import IDS, check_release, difference, expected_model, logits_of, make_adapter, release, stock


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_release_answers_as_the_live_model_does(tmp_path, family, bits):
    base = save_tiny(tmp_path / "base", family)
    adapter = make_adapter(base, tmp_path / "adapter", bits)
    model = check_release(base, [(adapter, 1.0)], tmp_path / "fp32", bits)
    expected = expected_model(base, [(adapter, 1.0)], bits)
    answer = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(IDS, **answer), expected.generate(IDS, **answer))

    release(base, [(adapter, 1.0)], tmp_path / "bf16", bits)
    served = stock(tmp_path / "bf16")
    assert served.dtype == torch.bfloat16
    exact = logits_of(expected)
    by_rounding = difference(logits_of(expected.merge_and_unload().to(torch.bfloat16).float()), exact)
    found = difference(logits_of(served.float()), exact)
    assert 0 < found <= 1.25 * by_rounding
