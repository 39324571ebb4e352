from __future__ import annotations

import pytest
import torch
from checkpoint_cases import adapted, assert_same, gradients, padded_batch, plain_batch
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_cases import settings as run_settings
from memory_cases import small_config
from safetensors.torch import load_file
from torch import nn

from qlora_kit import build
from qlora_kit.lean import apply, embedding
from qlora_kit.memory.simulate import Simulation, simulate
from qlora_kit.memory.track import MemoryTracker, overall_peak
from qlora_kit.memory.watch import label_model
from qlora_kit.model.quantize import count_parameters

UNTIED = {"tie_word_embeddings": False}
META = torch.device("meta")


def moved(variant="llama", **changes):
    model = adapted(variant, **{**UNTIED, **changes})
    embedding.move_to_host(model.get_input_embeddings())
    return model


@pytest.mark.parametrize("variant", ["gpt2", "llama", "gemma", "gemma2", "opt", "gpt_neox", "phi"])
def test_a_step_and_its_answers_are_those_of_an_embedding_on_the_device(variant):
    model = adapted(variant, **UNTIED)
    ids = plain_batch()["input_ids"]
    before = gradients(model, padded_batch())
    with torch.no_grad():
        logits = model(ids).logits
    embedding.move_to_host(model.get_input_embeddings())
    assert_same(gradients(model, padded_batch()), before)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, logits)


def test_it_generates_the_same():
    ids = plain_batch()["input_ids"]
    told = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "use_cache": True}
    plain = adapted("llama", **UNTIED).eval().generate(**told, do_sample=False)
    assert torch.equal(moved().eval().generate(**told, do_sample=False), plain)


@settings(max_examples=20, deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    ids_dtype=st.sampled_from([torch.int64, torch.int32]),
)
def test_a_lookup_gives_the_rows_themselves(shape, dtype, ids_dtype):
    table = nn.Embedding(11, 6, padding_idx=3, dtype=dtype).requires_grad_(False)
    ids = torch.randint(0, 11, shape, dtype=ids_dtype)
    expected = table(ids)
    embedding.move_to_host(table)
    assert torch.equal(table(ids), expected)
    assert table(ids).is_contiguous()


def test_who_asks_the_model_hears_the_same_as_before():
    plain, model = adapted("llama", **UNTIED), moved()
    table = model.get_input_embeddings()
    assert count_parameters(model) == count_parameters(plain)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert next(model.parameters()) is table.weight
    assert (model.device, model.dtype) == (plain.device, plain.dtype)
    assert table.weight.untyped_storage().nbytes() == 4
    assert bool(table.weight.isnan().all())  # whoever computes with it will notice


def test_the_weights_that_are_saved_are_the_real_ones(tmp_path):
    plain, model = adapted("gemma", **UNTIED), moved("gemma")
    saved, expected = model.state_dict(), plain.state_dict()
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], value) for name, value in expected.items())
    for each, folder in ((model, "ours"), (plain, "theirs")):
        each.save_pretrained(str(tmp_path / folder), save_embedding_layers=False)
    ours, theirs = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_moving_and_casting_the_model_leave_it_on_the_host():
    model, plain = moved("gemma"), adapted("gemma", **UNTIED)
    ids = plain_batch()["input_ids"]
    model.to("cpu")
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(ids).logits)
        assert torch.equal(model.to(torch.bfloat16)(ids).logits, plain.to(torch.bfloat16)(ids).logits)
    table = model.get_input_embeddings()
    assert table.on_host.dtype == table.weight.dtype == torch.bfloat16
    table.to(META)
    assert table.weight.device.type == "meta"
    assert table.on_host.device.type == "cpu"
    assert table.weight.untyped_storage().nbytes() == 2


def test_hooks_stay():
    model = adapted("llama", **UNTIED)
    rows = []
    model.get_input_embeddings().register_forward_hook(lambda module, args, out: rows.append(out))
    embedding.move_to_host(model.get_input_embeddings())
    model(**plain_batch())
    assert len(rows) == 1


def on_meta(**changes):
    config = small_config("llama")
    for name, value in {**UNTIED, **changes}.items():
        setattr(config, name, value)
    return build.build_model(run_settings(bits=4, lean="off"), META, config).model


def test_put_on_says_how_much_it_moved():
    outcome = embedding.put_on(on_meta(vocab_size=6400))
    assert (outcome.done, outcome.left) == (f"{6400 * 128 * 2 / 2**20:,.1f} MiB", "")


def test_put_on_leaves_what_it_must_not_move():
    assert embedding.put_on(adapted("llama", **UNTIED)).left == "the model is on the host already"
    tied = on_meta(tie_word_embeddings=True)
    assert embedding.put_on(tied).left == "it is tied to the head"
    trained = on_meta()
    trained.get_input_embeddings().weight.requires_grad_(True)
    assert embedding.put_on(trained).left == "it trains"
    rescaled = on_meta()
    rescaled.get_input_embeddings().max_norm = 1.0
    assert embedding.put_on(rescaled).left == "it rescales its rows"

    class Doubled(nn.Embedding):
        def forward(self, ids):
            return 2 * super().forward(ids)

    odd = on_meta()
    odd.set_input_embeddings(Doubled(640, 128, device=META).requires_grad_(False))
    assert embedding.put_on(odd).left == "a Doubled is not a plain lookup"
    for model in (tied, trained, rescaled, odd):
        assert not isinstance(model.get_input_embeddings(), embedding.HostEmbedding)


def test_on_meta_its_bytes_are_not_counted():
    model = on_meta()
    counts = []
    for _ in range(2):
        tracker = MemoryTracker("meta")
        label_model(tracker, model)
        counts.append(tracker.live_bytes)
        embedding.put_on(model)
    assert counts[0] - counts[1] == 640 * 128 * 2 - 512  # one block for the stand-in


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_planned_step_takes_less_by_the_embedding(family, monkeypatch):
    architecture = small_config(family)
    architecture.tie_word_embeddings = False
    config = run_settings(bits=4, offload_embedding="on")
    peaks = []
    for pieces in ((), (apply.Piece(name="embedding", put_on=embedding.put_on, setting="offload_embedding"),)):
        monkeypatch.setattr(apply, "PIECES", pieces)
        record = simulate(config, Simulation(seq_len=96, optim="adamw"), architecture)
        peaks.append(overall_peak(record.events).n_bytes)
    assert peaks[0] - peaks[1] == 640 * 128 * 2 - 512


@pytest.mark.gpu
def test_on_a_gpu_the_weight_stays_on_the_host_and_the_answers_are_the_same():
    cuda = torch.device("cuda")
    for variant in ("llama", "gemma2"):
        model = adapted(variant, **UNTIED).eval().to(cuda)
        ids = plain_batch()["input_ids"].to(cuda)
        with torch.no_grad():
            expected, n_bytes = model(ids).logits, torch.cuda.memory_allocated()
            assert embedding.put_on(model).done
            assert torch.cuda.memory_allocated() < n_bytes
            model.to(cuda)
            for _ in range(3):
                assert torch.equal(model(ids).logits, expected)
        table = model.get_input_embeddings()
        assert (table.on_host.device.type, table.weight.device.type) == ("cpu", "cuda")
