"""Reads a release as any user of transformers does, and writes down what it answers. Run as a script of its own.

    python release_side.py RELEASE ROWS OUT [--trust-remote-code]

It imports nothing of qlora_kit (but for `watch_parent`, beside it), so that what it finds is what the stock libraries
find. ROWS is a JSON file of token ids and what they are asked for, with the class that loads the model and where its
logits are; it may still be in the making. Into the folder OUT
go `release.json` and the logits in fp32 of every row: `served.safetensors` in the arithmetic of the release's dtype,
`exact.safetensors` in fp32.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    from watch_parent import end_with_parent  # type: ignore[import-not-found]  # it lies beside this script

    end_with_parent()  # before the imports that take seconds
    sys.path.pop(0)  # this folder: its modules must not stand for others of the same name

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoTokenizer, GenerationConfig

NEW_TOKENS = 32  # of the greedy answer
POLL_S = 0.05


def row_logits(model: Any, asked: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The logits of each row, run one by one, as a matrix of questions × choices: T × V of a text, 1 × L of a row that
    gets a label, 2 × T of one in which an answer begins and ends; fp32.
    """
    found = {}
    for number, row in enumerate(asked["rows"]):
        inputs = {name: torch.tensor([numbers], device=model.device) for name, numbers in row.items()}
        with torch.no_grad():
            outputs = model(**inputs, **asked["options"])
        logits = torch.cat([outputs[name] for name in asked["outputs"]]).flatten(0, -2)
        found[f"row.{number}"] = logits.float().cpu().contiguous()
    return found


def answer(model: Any, asked: dict[str, Any]) -> dict[str, Any]:
    """The most likely answer to the prompt (see `greedy`); without one the likeliest choice in each row of logits."""
    if asked["prompt"]:
        return greedy(model, asked["prompt"], asked["end"])
    logits = [own for of_row in row_logits(model, asked).values() for own in of_row]
    best = [own.topk(min(2, len(own))).values for own in logits]
    leads = [float(two[0] - two[1]) if len(two) > 1 else float(two[0].abs()) for two in best]
    return {"tokens": [int(own.argmax()) for own in logits], "leads": leads}


def greedy(model: Any, prompt: list[int], end: int | None) -> dict[str, Any]:
    """The most likely answer to `prompt`: its tokens, and by how much each one's logit leads the next.

    To an encoder and a decoder the prompt is the source.
    """
    settings = GenerationConfig(
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        eos_token_id=end,
        pad_token_id=end if end is not None else 0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    _forget_own_settings(model)
    ids = torch.tensor([prompt], device=model.device)
    with torch.no_grad():
        answer = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    leads = []
    for logits in answer.logits:
        best = logits[0].float().topk(2).values
        leads.append(float(best[0] - best[1]))
    return {"tokens": answer.sequences[0, -len(leads) :].tolist(), "leads": leads}


def _forget_own_settings(model: Any) -> None:
    """Let an encoder and a decoder answer by nothing but what it is given and where its answers start.

    The release comes with other settings than the base, without beams and the like.
    """
    own = model.get_base_model() if hasattr(model, "get_base_model") else model
    if own.config.is_encoder_decoder:
        start, bos = own.generation_config.decoder_start_token_id, own.generation_config.bos_token_id
        start = own.config.decoder_start_token_id if start is None else start
        own.generation_config = GenerationConfig(decoder_start_token_id=start, bos_token_id=bos)


def load(folder: Path, auto_class: str, with_code: bool) -> tuple[Any, dict[str, list[str]]]:
    """The model as transformers' class of that name loads it from `folder`, in the dtype of its files, and the keys
    that did not match.

    Python code that lies in the folder runs only where `with_code`.
    """
    model, info = getattr(transformers, auto_class).from_pretrained(
        folder,
        dtype="auto",
        device_map={"": "cpu"},
        local_files_only=True,
        output_loading_info=True,
        trust_remote_code=with_code,
    )
    wrong = {key: sorted(str(name) for name in info.get(key) or ()) for key in WRONG_KEYS}
    return model.eval(), wrong


WRONG_KEYS = ("missing_keys", "unexpected_keys", "mismatched_keys")


def wait_for(file: Path) -> dict[str, Any]:
    """The content of a JSON file that another process is about to put in its place."""
    while not file.exists():
        time.sleep(POLL_S)
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content


def main(release: Path, rows_file: Path, out: Path, with_code: bool = False) -> None:
    """Answer the rows with the release, and write it all to `out`."""
    asked = wait_for(rows_file)
    auto_class = asked["auto_class"]
    model, wrong = load(release, auto_class, with_code)
    quantized = getattr(model, "is_quantized", False)
    if not quantized:
        save_file(row_logits(model, asked), out / "served.safetensors")
        served = answer(model, asked)
        model = model.float()
    else:
        model = model.dequantize().float()  # before any answer: on some CPUs the first one repacks the weights
    save_file(row_logits(model, asked), out / "exact.safetensors")
    exact = answer(model, asked)
    if quantized:
        model, _ = load(release, auto_class, with_code)
        save_file(row_logits(model, asked), out / "served.safetensors")
        served = answer(model, asked)
    tokenizer = AutoTokenizer.from_pretrained(release, local_files_only=True, trust_remote_code=with_code)
    probe = {"ids": tokenizer(asked["probe"]["text"])["input_ids"], "template": tokenizer.chat_template}
    found = {"class": type(model).__name__, **wrong, "served": served, "exact": exact, "probe": probe}
    (out / "release.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    RELEASE, ROWS, OUT = (Path(place) for place in sys.argv[1:4])
    main(RELEASE, ROWS, OUT, with_code=sys.argv[4:] == ["--trust-remote-code"])
