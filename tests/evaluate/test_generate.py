"""`qlora-kit generate`: what is asked, what is answered, and how it comes."""

from __future__ import annotations

import io
import json
import logging
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from data_tokenizers import CHATML, byte_level, sentence_piece
from families import EOS_ID, POSITIONS, tiny_model, tiny_tokenizer
from safetensors.torch import load_file, save_file
from tiny_runs import PAIRS, TEXTS

from qlora_kit import data
from qlora_kit.adapters import files
from qlora_kit.cli.main import main
from qlora_kit.config.settings import BaseConfig
from qlora_kit.evaluate.generate import Prompt, _Streamer, encode_prompts, seeded, stream, typed_prompt
from qlora_kit.model import quantize
from qlora_kit.model.load import load_base
from qlora_kit.runs import finished
from qlora_kit.tasks import decoding
from qlora_kit.tasks.decoding import Sampling

CPU = torch.device("cpu")
QUESTION = PAIRS[7]["prompt"]


def generate(capsys, *args: object) -> str:
    """What the command prints on standard output."""
    main(["generate", "--device", "cpu", "--max-new-tokens", "12", *map(str, args)])
    return capsys.readouterr().out


def fails(capsys, *args: object, printed: str = "") -> str:
    with pytest.raises(SystemExit) as caught:
        main(["generate", "--device", "cpu", *map(str, args)])
    out, err = capsys.readouterr()
    assert caught.value.code == 2, err
    assert "Traceback" not in err
    assert out == printed
    return err


def live(run: Path):
    """The model and tokenizer of a run, put together here from the base and the adapter's files."""
    settings = json.loads((run / "run.json").read_text())["settings"]["base"]
    model = load_base(BaseConfig(**{**settings, "device": "cpu"}), CPU)
    return files.load_adapter(model, run / "adapter"), data.prepare_tokenizer(tiny_tokenizer())


def as_trained(text: str, tokenizer) -> list[int]:
    """The tokens before the first supervised one of a training example with this prompt."""
    encoded = data.encode_example(
        data.Example(prompt=text, completion="yes", messages=None, origin="f:1"), tokenizer, 10_000, "answer"
    )
    return encoded.input_ids[: encoded.supervised.index(True)]


def opened(tokenizer, positions=None):
    return finished.Opened(
        title="a model",
        tokenizer=tokenizer,
        positions=positions,
        is_plain_text=False,
        load=lambda: None,
        config=BaseConfig(),
    )


# ------------------------------------------------------------------------------------------------------ prompts


@pytest.mark.parametrize(
    "tokenizer",
    [
        byte_level(),
        byte_level(bos="<s>"),
        byte_level(chat_template=CHATML),
        sentence_piece("first"),
        sentence_piece("always"),
    ],
    ids=["plain", "bos", "chatml", "sentencepiece", "old-sentencepiece"],
)
def test_a_prompt_is_laid_out_as_in_training(tokenizer):
    tokenizer = data.prepare_tokenizer(tokenizer)
    for text in ("How many?", "a\n", " 1 + 2 "):
        typed = encode_prompts([typed_prompt(text)], opened(tokenizer), False, "--prompt")
        assert typed[0].input_ids == as_trained(text, tokenizer)


def test_a_conversation_goes_on_after_its_last_turn_as_in_training():
    tokenizer = data.prepare_tokenizer(byte_level(chat_template=CHATML))
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    messages = tuple(data.Message(role, text) for role, text in turns)
    whole = data.encode_example(
        data.Example(prompt="a", completion="b", messages=messages, origin="f:1"), tokenizer, 10_000, "answer"
    )
    answer_starts = [i for i, learn in enumerate(whole.supervised) if learn and not whole.supervised[i - 1]]
    asked = data.Example(prompt="a", completion="", messages=messages[:3], origin="f:1")
    assert data.encode_conversation(asked, tokenizer) == whole.input_ids[: answer_starts[1]]


def test_prompts_need_no_answers(tmp_path):
    rows = {
        "pairs.jsonl": [{"prompt": "a"}, {"prompt": "b", "completion": None}],
        "questions.jsonl": [{"question": "a", "answer": "x"}, {"question": "b"}],
        "instructions.jsonl": [{"instruction": "a"}, {"instruction": "b", "input": ""}],
        "chats.jsonl": [
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "x"}]},
            {"messages": [{"role": "user", "content": "b"}]},
        ],
        "lines.txt": ["a", "b"],
    }
    for name, lines in rows.items():
        file = tmp_path / name
        file.write_text("\n".join(line if name.endswith("txt") else json.dumps(line) for line in lines))
        prompts = data.read_prompts(str(file), {})
        assert [example.prompt for example in prompts] == ["a", "b"], name
        assert [example.messages for example in prompts] == [(data.Message("user", text),) for text in "ab"], name
    file = tmp_path / "own.csv"
    file.write_text("q,other\na,1\nb,2\n")
    assert [example.prompt for example in data.read_prompts(str(file), {"prompt": "q"})] == ["a", "b"]
    with_system = tmp_path / "system.jsonl"
    with_system.write_text(json.dumps({"prompt": "a", "system": "be brief"}))
    assert [m.role for m in data.read_prompts(str(with_system), {})[0].messages] == ["system", "user"]


# ------------------------------------------------------------------------------------------------------ answers


def test_the_greedy_answers_are_those_of_scoring(capsys, tiny_runs):
    model, tokenizer = live(tiny_runs["adapter"])
    prompts = [as_trained(row["prompt"], tokenizer) for row in PAIRS[:3]]
    expected = [decoding.answer(model, tokenizer, [prompt], 12)[0] for prompt in prompts]
    flags = [flag for row in PAIRS[:3] for flag in ("--prompt", row["prompt"])]
    assert generate(capsys, "--run", tiny_runs["adapter"], *flags) == "".join(text + "\n" for text in expected)
    bare = model.unload()
    assert [decoding.answer(bare, tokenizer, [prompt], 12)[0] for prompt in prompts] != expected


def test_each_piece_comes_with_its_token_and_breaking_off_gives_what_there_is():
    model, tokenizer = tiny_model("llama"), data.prepare_tokenizer(tiny_tokenizer())
    prompt = Prompt("hello", list(b"hello"))
    steps, pieces = [], []
    hook = model.register_forward_hook(lambda *_: steps.append(1))
    came = []
    with seeded(model, 0):
        whole = stream(
            model, tokenizer, prompt, Sampling(30), lambda text: (pieces.append(text), came.append(len(steps)))
        )
    assert "".join(pieces) == whole.text == decoding.answer(model, tokenizer, [prompt.input_ids], 30)[0]
    assert len(set(came)) > 10
    assert came[0] < 5
    hook.remove()

    def interrupt(text):
        pieces.append(text)
        if len(pieces) == 3:
            raise KeyboardInterrupt

    pieces.clear()
    with pytest.raises(KeyboardInterrupt), seeded(model, 0):
        stream(model, tokenizer, prompt, Sampling(30), interrupt)
    assert whole.text.startswith("".join(pieces))
    assert 0 < len("".join(pieces)) < len(whole.text)


@pytest.mark.parametrize(
    "tokenizer",
    [tiny_tokenizer(), byte_level(), sentence_piece("first"), sentence_piece("always")],
    ids=["bytes", "byte-level", "sentencepiece", "old-sentencepiece"],
)
def test_the_pieces_make_the_text_that_is_decoded_at_once(tokenizer):
    texts = ["It is  4 °C — naïve: 日本 🙂!\n    indented\n\n x", "🙂🙂", " a b", "."]
    cases = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    cases.append([*cases[0][:9], *cases[1][:2], *cases[2], tokenizer.eos_token_id])  # a character broken off
    for ids in cases:
        pieces: list[str] = []
        streamer = _Streamer(tokenizer, pieces.append)
        streamer.put(torch.tensor([[1, 2, 3]]))  # the prompt
        for token in ids:
            streamer.put(torch.tensor([token]))
        streamer.end()
        assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)
        assert all(pieces)


def test_what_is_drawn_follows_the_seed(capsys, tiny_runs):
    flags = ["--run", tiny_runs["adapter"], "--prompt", "a", "--prompt", "a", "--temperature", "2"]
    one, same, other = (generate(capsys, *flags, "--json", "--seed", seed) for seed in (1, 1, 2))
    assert one == same != other
    first, second = one.splitlines()
    assert first != second  # the same prompt again is drawn again
    nearly_greedy = generate(capsys, *flags, "--top-p", "1e-6", "--json").splitlines()
    assert nearly_greedy[0] == nearly_greedy[1] == generate(capsys, *flags[:4], "--json").strip()


def test_sampling_is_from_all_tokens_whatever_the_model_came_with():
    """What we leave unset transformers fills from the model's own generation config, and top_k is 50 by default."""
    model, tokenizer = tiny_model("llama"), data.prepare_tokenizer(tiny_tokenizer())
    model.generation_config.top_k = 1
    model.generation_config.temperature = 0.1
    with seeded(model, 0):
        answers = {stream(model, tokenizer, Prompt("a", [97]), Sampling(4, 5.0), str).text for _ in range(8)}
    assert len(answers) == 8


def test_a_file_is_answered_in_order_as_json_lines(capsys, tmp_path, tiny_runs):
    file = tmp_path / "prompts.txt"
    texts = ["add 1 and 2", "a much longer question than the others", "b", "„ünï“"]
    file.write_text("\n\n".join(texts), encoding="utf-8")
    lines = generate(capsys, "--run", tiny_runs["fp32"], "--data", file, "--batch-size", 3).splitlines()
    found = [json.loads(line) for line in lines]
    assert [line["prompt"] for line in found] == texts
    flags = [flag for text in texts for flag in ("--prompt", text)]
    assert generate(capsys, "--run", tiny_runs["fp32"], "--json", *flags).splitlines() == lines
    assert all(set(line) == {"prompt", "generated"} for line in found)


def test_the_lines_of_a_pipe_are_prompts(capsys, monkeypatch, tiny_runs):
    expected = generate(capsys, "--run", tiny_runs["adapter"], "--prompt", "a", "--prompt", "b")
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\n\r\n  \nb"))
    assert generate(capsys, "--run", tiny_runs["adapter"]) == expected


def test_at_a_terminal_a_bad_line_is_said_and_the_next_one_answered(capsys, monkeypatch, tiny_runs):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    expected = generate(capsys, "--run", tiny_runs["adapter"], "--prompt", "a")
    monkeypatch.setattr(sys, "stdin", Terminal(f"\n{'x' * 200}\na\n"))
    main(["generate", "--run", str(tiny_runs["adapter"]), "--device", "cpu", "--max-new-tokens", "12"])
    out, err = capsys.readouterr()
    assert out == expected
    assert err.count("> ") == 4
    assert "Ctrl-D" in err
    assert f"{POSITIONS} positions" in err


def test_ctrl_c_ends_with_130_and_what_there_is(capsys, monkeypatch, tiny_runs):
    flags = ["--run", tiny_runs["adapter"], "--prompt", QUESTION, "--temperature", "9"]
    whole = generate(capsys, *flags)
    assert len(whole) > 8
    load = finished.load_run_model
    calls = []

    def interrupted(run, device):
        model = load(run, device)
        inner = model.get_base_model()
        inner.register_forward_pre_hook(lambda *_: calls.append(1))
        inner.register_forward_pre_hook(lambda *_: signal.raise_signal(signal.SIGINT) if len(calls) == 6 else None)
        return model

    monkeypatch.setattr(finished, "load_run_model", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a worker of pytest-xdist ignores it
    try:
        with pytest.raises(SystemExit) as caught:
            generate(capsys, *flags)
    finally:
        signal.signal(signal.SIGINT, before)
    out, err = capsys.readouterr()
    assert caught.value.code == 130
    assert "Traceback" not in err
    assert out.endswith("\n")
    assert 0 < len(out.strip()) < len(whole.strip())
    assert whole.startswith(out[:-1])


def test_what_cuts_an_answer_is_said(capsys, tiny_runs):
    run = tiny_runs["adapter"]
    for prompt, most, message in ((QUESTION, "3", "after 3 tokens"), ("x" * 120, "50", "128 positions end")):
        main(["generate", "--device", "cpu", "--run", str(run), "--prompt", prompt, "--max-new-tokens", most])
        out, err = capsys.readouterr()
        assert message in err
        assert len(out) <= 9


# ------------------------------------------------------------------------------------------------- what answers


def test_a_run_on_plain_text_goes_on_with_the_text_itself(capsys, tiny_runs):
    run = finished.find_run(str(tiny_runs["text"]), {"device": "cpu"})
    assert run.is_plain_text
    assert not finished.find_run(str(tiny_runs["adapter"]), {}).is_plain_text
    model, tokenizer = live(tiny_runs["text"])
    texts = [row["text"][:6] for row in TEXTS]
    trained = data.encode_example(
        data.Example(prompt=None, completion=TEXTS[0]["text"], messages=None, origin="f:1"), tokenizer, 100, "answer"
    )
    assert trained.input_ids[:6] == data.encode_text(texts[0], tokenizer)  # a token is a byte here
    raw, laid_out = (
        [decoding.answer(model, tokenizer, [ids], 12)[0] for ids in prompts]
        for prompts in ([data.encode_text(t, tokenizer) for t in texts], [as_trained(t, tokenizer) for t in texts])
    )
    assert raw != laid_out
    flags = ["--run", run.folder, "--json", *(flag for text in texts for flag in ("--prompt", text))]
    for more, expected in (([], raw), (["--no-raw"], laid_out)):
        assert [json.loads(line)["generated"] for line in generate(capsys, *flags, *more).splitlines()] == expected


def test_a_model_that_was_trained_whole_answers(capsys, tiny_runs):
    answer = generate(capsys, "--run", tiny_runs["full"], "--prompt", QUESTION)
    assert generate(capsys, "--model", tiny_runs["full"] / "model", "--prompt", QUESTION) == answer
    assert generate(capsys, "--model", tiny_runs.base("gpt2"), "--prompt", QUESTION) != answer


def test_a_model_folder_keeps_its_dtype_unless_bits_are_given(tmp_path):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        tiny_model("gpt2", dtype=dtype).save_pretrained(tmp_path)
        tiny_tokenizer().save_pretrained(tmp_path)
        settings = BaseConfig(model=str(tmp_path), bits=4)
        saved = finished.open_model(settings, CPU, as_saved=True).load()
        assert {weight.dtype for weight in saved.parameters()} == {dtype}
        weights = load_file(tmp_path / "model.safetensors")
        live_weights = saved.state_dict()
        assert all(torch.equal(live_weights[name], weight) for name, weight in weights.items())
        quantized = finished.open_model(settings, CPU, as_saved=False).load()
        assert quantize.count_parameters(quantized).total == quantize.count_parameters(saved).total
        assert quantized.transformer.h[0].attn.c_attn.weight.dtype == torch.uint8


def test_a_run_and_its_base_may_move(capsys, tmp_path, tiny_runs):
    expected = generate(capsys, "--run", tiny_runs["adapter"], "--prompt", QUESTION)
    moved = shutil.copytree(tiny_runs["adapter"], tmp_path / "elsewhere")
    assert generate(capsys, "--run", moved, "--prompt", QUESTION) == expected
    record = json.loads((moved / "run.json").read_text())
    record["settings"]["base"]["model"] = str(tmp_path / "gone")
    (moved / "run.json").write_text(json.dumps(record))
    assert "--base MODEL" in fails(capsys, "--run", moved, "--prompt", QUESTION)
    flags = ["--run", moved, "--base", tiny_runs.base("llama"), "--prompt", QUESTION]
    assert generate(capsys, *flags) == expected


def test_a_base_that_changed_is_warned_of(capsys, tmp_path, tiny_runs):
    other = shutil.copytree(tiny_runs.base("llama"), tmp_path / "base")
    main(["generate", "--run", str(tiny_runs["adapter"]), "--base", str(other), "--prompt", "a", "--device", "cpu"])
    assert "warning" not in capsys.readouterr().err
    weights = load_file(other / "model.safetensors")
    save_file({k: v + 0.5 for k, v in weights.items()}, other / "model.safetensors", {"format": "pt"})
    main(["generate", "--run", str(tiny_runs["adapter"]), "--base", str(other), "--prompt", "a", "--device", "cpu"])
    assert "its hash differs" in capsys.readouterr().err


def test_a_run_folder_does_not_decide_to_run_code_or_where(tmp_path, tiny_runs):
    run = shutil.copytree(tiny_runs["adapter"], tmp_path / "run")
    record = json.loads((run / "run.json").read_text())
    record["settings"]["base"] |= {"trust_remote_code": True, "device": "cuda"}
    (run / "run.json").write_text(json.dumps(record))
    found = finished.find_run(str(run), {}).config.base
    assert (found.trust_remote_code, found.device) == (False, "auto")
    assert finished.find_run(str(run), {"trust_remote_code": True}).config.base.trust_remote_code


# ------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("flags", "messages"),
    [
        ([], ["--run", "--model MODEL"]),
        (["--run", "{run}", "--model", "x", "--bits", "4"], ["--model", "--bits", "cannot go with --run"]),
        (["--run", "{run}", "--prompt", ""], ["is empty"]),
        (["--run", "{run}", "--prompt", "ok", "--prompt", "x" * 128], ["129 tokens", "128 positions"]),
        (["--run", "{run}", "--prompt", "a", "--data", "b"], ["--prompt", "--data"]),
        (["--run", "{run}", "--data", "none.jsonl"], ["--data = 'none.jsonl'", "no such file"]),
        (["--run", "{run}", "--data", "{base}/model.safetensors"], ["--data", "jsonl"]),
        (["--run", "{run}", "--prompt", "\udcff"], ["UTF-8"]),
        (["--run", "{run}", "--base", "no/such/base/anywhere", "--prompt", "a"], ["--base MODEL"]),
        (["--run", "{runs}/adaptor"], ["--run", "Did you mean {run}"]),
        (["--run", "{run}/adapter"], ["--run {run}"]),
        (["--run", "{base}"], ["--model {base}"]),
        (["--run", "{runs}"], ["holds no run.json"]),
        (["--model", "{run}"], ["--run {run}"]),
        (["--model", "{run}/adapter"], ["is an adapter"]),
        (["--model", "no/such/model/anywhere"], ["--model", "Give a model folder."]),
        (["--model", "{base}", "--base", "x"], ["--base", "there is no --run"]),
        (
            ["--run", "{run}", "--temperature", "-0.1", "--top-p", "0", "--max-new-tokens", "0"],
            ["temp", "top-p", "max"],
        ),
        (["--run", "{run}", "--temperature", "nan"], ["--temperature"]),
        (["--run", "{run}", "--top-p", "0.9"], ["--top-p", "--temperature 0"]),
        (["--run", "{run}", "--seed", "-1", "--prompt", "a"], ["--seed"]),
        (["--run", "{run}", "--lr", "3"], ["--lr"]),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_two(capsys, tiny_runs, flags, messages):
    names = {"run": tiny_runs["adapter"], "runs": tiny_runs.root / "runs", "base": tiny_runs.base("llama")}
    err = fails(capsys, *(flag.format(**names) for flag in flags))
    for message in messages:
        assert message.format(**names) in err


def test_no_prompt_in_a_pipe_is_said_and_a_bad_one_after_those_before_it(capsys, monkeypatch, tiny_runs):
    run = tiny_runs["adapter"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    assert "--prompt TEXT" in fails(capsys, "--run", run)
    first = generate(capsys, "--run", run, "--prompt", "a")
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"a\n{'x' * 200}\nb\n"))
    assert "200" not in fails(capsys, "--run", run, "--max-new-tokens", "12", printed=first).replace("x" * 40, "")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\xff\n"), encoding="utf-8"))
    assert "UTF-8" in fails(capsys, "--run", run)


def test_every_bad_prompt_of_a_file_is_named(capsys, tmp_path, tiny_runs):
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": text}) for text in ("a", " ", "x" * 128, "b")))
    err = fails(capsys, "--run", tiny_runs["adapter"], "--data", file)
    assert f"{file}:2': is empty" in err
    assert f"{file}:3': has 129 tokens" in err


def test_unfinished_and_broken_runs_are_refused(capsys, tmp_path, tiny_runs):
    partial = shutil.copytree(tiny_runs["adapter"], tmp_path / "x.partial")
    for path in (tmp_path / "x", partial):
        assert f"qlora-kit train --resume {tmp_path / 'x'}" in fails(capsys, "--run", path, "--prompt", "a")
    shutil.rmtree(partial / "checkpoints")
    assert "Run it again" in fails(capsys, "--run", tmp_path / "x", "--prompt", "a")
    run = partial.rename(tmp_path / "y")
    weights = run / "adapter" / files.WEIGHTS_FILE
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    assert "cannot be read" in fails(capsys, "--run", run, "--prompt", "a")
    weights.unlink()
    assert "holds no trained weights" in fails(capsys, "--run", run, "--prompt", "a")
    (run / "run.json").write_text('{"settings":')
    assert "run.json cannot be read" in fails(capsys, "--run", run, "--prompt", "a")
    (run / "run.json").write_text("[]")
    assert "no record of a run" in fails(capsys, "--run", run, "--prompt", "a")


def test_an_adapter_for_another_base_is_refused(capsys, tiny_runs):
    flags = ["--run", tiny_runs["adapter"], "--base", tiny_runs.base("gpt2"), "--prompt", "a"]
    assert "does not fit this base" in fails(capsys, *flags)


def test_a_full_device_is_one_message(capsys, monkeypatch, tiny_runs):
    load = finished.load_run_model

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    def loaded(run, device):
        model = load(run, device)
        model.get_base_model().register_forward_pre_hook(full)
        return model

    monkeypatch.setattr(finished, "load_run_model", loaded)
    err = fails(capsys, "--run", tiny_runs["adapter"], "--prompt", "a", printed="\n")
    assert "Tried to allocate 2.00 GiB" in err
    assert "--batch-size 1" in err


def test_a_model_may_bring_more_tokens_that_end_an_answer(caplog, monkeypatch):
    model, tokenizer = tiny_model("llama"), data.prepare_tokenizer(tiny_tokenizer())
    whole = decoding.generate_ids(model, tokenizer, [[97]], 9, Sampling(9))[1][0, 1:].tolist()
    model.generation_config.update(eos_token_id=[EOS_ID, whole[4]], do_sample=True, temperature=0.6, top_k=20)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with caplog.at_level("WARNING"):
        cut = decoding.generate_ids(model, tokenizer, [[97]], 9, Sampling(9))[1][0, 1:].tolist()
    assert cut == whole[: whole.index(whole[4]) + 1]
    assert not decoding.answer_all(model, tokenizer, [[97]], Sampling(9))[0].is_cut
    assert "may be ignored" not in caplog.text


def test_an_answer_that_ends_by_itself_is_not_cut():
    model, tokenizer = tiny_model("llama"), data.prepare_tokenizer(tiny_tokenizer())
    model.lm_head.weight.data[EOS_ID] = model.lm_head.weight.data.abs().sum(0)  # it may or may not win; both are told
    for prompt in (b"a", b"bc", b"hello"):
        ids = torch.tensor([list(prompt)])
        with torch.no_grad():
            ends = int(model(ids).logits[0, -1].argmax()) == EOS_ID
        answer = decoding.answer_all(model, tokenizer, [list(prompt)], Sampling(1))[0]
        assert answer.is_cut is not ends
