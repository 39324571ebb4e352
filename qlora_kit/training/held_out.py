"""What a run does with its held-out examples beside scoring them: it answers prompts, and its plan needs lengths."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from qlora_kit.config.settings import RunConfig
from qlora_kit.memory import preflight
from qlora_kit.runs.inputs import Inputs
from qlora_kit.system.progress import GENERATING
from qlora_kit.tasks import decoding
from qlora_kit.tasks.task import SampledPrompt

if TYPE_CHECKING:
    from qlora_kit.training.prepare import Prepared

Sampler = Callable[[], dict[str, str]]  # gives one generated answer: prompt, expected, generated


def lengths(config: RunConfig, inputs: Inputs) -> decoding.HeldOut:
    """What the run does with its held-out data, in lengths."""
    if inputs.evaluation is None:
        return decoding.NOTHING_HELD_OUT
    found, sampled = _sampled(inputs), None
    if found is not None:
        sampled = decoding.AnswerLengths(1, len(found.input_ids), decoding.SAMPLE_TOKENS)
    asked = inputs.task.scored_answers(inputs.evaluation.rows)
    if config.evaluation.exact_match is not None:
        asked = inputs.task.prompt_lengths(inputs.tokenizer, inputs.held_out[: config.evaluation.exact_match])
        asked = asked if sampled is None else asked.also(sampled)
    longest = preflight.padded(inputs.longest_held_out)
    return decoding.HeldOut(
        rows=len(inputs.evaluation), row_tokens=min(longest, inputs.seq_len), sampled=sampled, asked=asked
    )


def prompts_at_once(prepared: Prepared) -> int:
    """How many held-out prompts are answered at once: as the plan has it, or as fit now where there is none."""
    config, inputs, planned = prepared.config, prepared.inputs, prepared.planned
    if config.evaluation.exact_match is None:
        return 1
    if planned is not None and planned.plan is not None and planned.plan.answers is not None:
        return preflight.prompts_at_once(planned.plan, prepared.device)
    asked = inputs.task.prompt_lengths(inputs.tokenizer, inputs.held_out[: config.evaluation.exact_match])
    return preflight.prompts_in_free(config, prepared.device, asked)


def exact_match(prepared: Prepared, at_once: int) -> float | None:
    """The share of held-out prompts that the model answers to the letter; None unless asked for."""
    inputs, wanted = prepared.inputs, prepared.config.evaluation.exact_match
    if wanted is None:
        return None
    with prepared.peaks.during(GENERATING):
        asked = inputs.held_out[:wanted]
        return inputs.task.exact_match(prepared.built.model, inputs.tokenizer, asked, at_once=at_once)


def sampler(model: Any, inputs: Inputs) -> Sampler | None:
    """Answers the first held-out prompt that leaves room for an answer; None where there is none."""
    found = _sampled(inputs)
    if found is None:
        return None

    def sample() -> dict[str, str]:
        prompt = found.input_ids
        generated = decoding.answer(model, inputs.tokenizer, [prompt], decoding.SAMPLE_TOKENS)[0]
        return {"prompt": inputs.tokenizer.decode(prompt), "expected": found.expected, "generated": generated}

    return sample


def _sampled(inputs: Inputs) -> SampledPrompt | None:
    """The prompt that is answered at each evaluation; None where there is none."""
    return inputs.task.sampled(inputs.held_out, inputs.tokenizer, inputs.seq_len)
