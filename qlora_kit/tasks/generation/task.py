"""Text generation: a model learns what to say next."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from qlora_kit import data
from qlora_kit.config.settings import BaseConfig, RunConfig
from qlora_kit.data.audit import AuditReport
from qlora_kit.data.columns import SHAPES, TARGETS, examples_from
from qlora_kit.tasks import decoding
from qlora_kit.tasks.decoding import AnswerLengths
from qlora_kit.tasks.evaluation import Evaluation, ModelScores, Scores
from qlora_kit.tasks.generation.report import evaluation_lines
from qlora_kit.tasks.proof import WRITTEN, ProofRow, is_learned
from qlora_kit.tasks.task import Asked, Collate, Lines, SampledPrompt, Source, Task
from qlora_kit.tasks.task_model import TaskModel, reads_both_ways

if TYPE_CHECKING:
    from rich.console import RenderableType
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

MAX_ROW_TOKENS = 512  # of a row of the proof
BUILT_IN_PROMPT_TOKENS = 8


class LanguageModel(TaskModel):
    """A model that goes on with a text, by its own head and its own loss."""

    auto_class = "AutoModelForCausalLM"
    mapping = "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"
    endings = ("ForCausalLM", "LMHeadModel")
    peft_type = "CAUSAL_LM"
    has_new_head = False
    replaces_loss = False

    def suits(self, architecture: PretrainedConfig) -> bool:
        """Transformers has some that go on by the decoder of an encoder-decoder, whose files they do not read whole."""
        return not (reads_both_ways(architecture) or architecture.is_encoder_decoder)

    def why_unable(self, architecture: PretrainedConfig, task: str) -> str:
        """What it does instead."""
        answers = architecture.is_encoder_decoder
        return "answers a text, and does not go on with it" if answers else "generates no text"

    def is_usual_for(self, architecture: PretrainedConfig) -> bool:
        """What is for nothing else is for it; `check_can_do` then says what it lacks."""
        return True

    def score_pass(self, model: Any, batch: dict[str, Any]) -> None:
        """The loss is the model's own."""
        model(**batch)


class TextGeneration(Task):
    """A prompt is answered, a conversation or a text goes on."""

    name = "text-generation"
    model = LanguageModel()
    metrics: ClassVar[Mapping[str, bool]] = {"loss": False}
    metric = "loss"
    settings = frozenset({"pack", "exact_match"})
    is_predicted = False
    is_announced = False  # it is what one expects
    scores_base = True
    has_report = False  # the run says it all
    proof_terms = WRITTEN
    preview_title = "Supervised tokens stand in «angle quotes», the others between bars."

    # ----------------------------------------------------------------------------------------------------- reading

    def fits(self, columns: Set[str]) -> bool:
        """Whether there are texts, prompts with their completions, or conversations."""
        return bool(columns) and (columns <= set(TARGETS) or any(set(shape.required) <= columns for shape in SHAPES))

    def read(self, source: Source, config: BaseConfig) -> list[data.Example]:
        """Texts, prompts with their completions, or conversations. Raises `UserError`."""
        return examples_from(source.records, source.columns, source.name, source.setting, source.learns_all)

    def read_unanswered(self, source: Source) -> list[data.Example]:
        """Prompts; completions may be there. Raises `UserError`."""
        return data.prompts_from(source.records, source.columns, source.name, source.setting)

    def resolve(self, config: BaseConfig, examples: Sequence[data.Example], setting: str) -> BaseConfig:
        """`config` with the task."""
        return replace(config, task=self.name)

    # ---------------------------------------------------------------------------------------------------- encoding

    def prepare(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
        """With a chat template, and a token that ends an answer."""
        return data.prepare_tokenizer(tokenizer)

    def encode(
        self,
        config: RunConfig,
        examples: Sequence[data.Example],
        tokenizer: PreTrainedTokenizerBase,
        seq_len: int,
        setting: str,
    ) -> data.EncodedSet:
        """The tokens of each example that has something to learn. Raises `UserError`."""
        return data.encode_set(examples, tokenizer, seq_len=seq_len, train_on=config.data.train_on, setting=setting)

    def encode_unanswered(
        self, examples: Sequence[data.Example], tokenizer: PreTrainedTokenizerBase, seq_len: int, config: BaseConfig
    ) -> data.EncodedSet:
        """All tokens of the examples, as if each was learned."""
        return data.encode_set(examples, tokenizer, seq_len=seq_len, train_on="all")

    def collator(self, tokenizer: PreTrainedTokenizerBase, seq_len: int) -> Collate:
        """See `data.Collator`."""
        return data.Collator(tokenizer.pad_token_id, max_tokens=seq_len)

    def is_plain_text(self, examples: Sequence[data.Example]) -> bool:
        """Whether no example has a prompt."""
        return not self.prompted(examples)

    def summary(self, encoded: data.EncodedSet, seq_len: int) -> Lines:
        """Lengths, answers that are empty or cut away, and the share of the tokens that is learned."""
        report: AuditReport = encoded.report
        share = report.supervised_tokens / report.input_tokens
        return [
            *self.length_lines(encoded, seq_len),
            ("empty answers", f"{report.empty}"),
            ("nothing supervised (dropped)", f"{report.unsupervised}"),
            ("duplicates", f"{report.duplicates}"),
            ("supervised tokens", f"{report.supervised_tokens} of {report.input_tokens} ({share:.1%})"),
        ]

    def encode_to_show(
        self,
        config: RunConfig,
        examples: Sequence[data.Example],
        tokenizer: PreTrainedTokenizerBase,
        seq_len: int,
        setting: str,
    ) -> data.EncodedSet:
        """As for training."""
        return self.encode(config, examples, tokenizer, seq_len, setting)

    def rows_to_show(
        self, config: RunConfig, example: data.Example, tokenizer: PreTrainedTokenizerBase, seq_len: int
    ) -> Sequence[data.Encoded]:
        """Its row, also where nothing in it is learned."""
        return [data.encode_example(example, tokenizer, seq_len, config.data.train_on)]

    def learned_tokens(self, row: data.Encoded) -> Sequence[bool]:
        """Those that are supervised."""
        return row.supervised

    def learned(self, example: data.Example, row: data.Encoded, show: Callable[[int], str]) -> str:
        """Nothing beside tokens of the row."""
        return ""

    # ----------------------------------------------------------------------------------------------------- scoring

    def score(self, model: Any, asked: Asked, config: BaseConfig) -> Scores:
        """The mean loss over the supervised tokens."""
        loss = decoding.mean_loss(model, asked.batches)
        return Scores({"loss": loss.mean, "perplexity": loss.perplexity, "tokens": loss.tokens})

    def said(self, metrics: Mapping[str, float]) -> str:
        """Loss and perplexity."""
        return f"held-out loss {metrics['loss']:.4f}, perplexity {metrics['perplexity']:.2f}"

    def evaluation_lines(self, evaluation: Evaluation) -> list[RenderableType]:
        """The models side by side in a table."""
        return evaluation_lines(evaluation)

    def evaluation_dict(self, evaluation: Evaluation) -> dict[str, Any]:
        """The figures of each model; what is no finite number is None."""
        report: AuditReport = evaluation.encoded.report
        return {
            "data": evaluation.source,
            "examples": report.examples,
            "dropped": report.examples - report.kept,
            "truncated": report.truncated,
            "seq_len": evaluation.seq_len,
            "tokens": report.supervised_tokens,
            "exact_match_prompts": evaluation.prompts,
            "warning": evaluation.warning,
            "models": {name: _plain(own) for name, own in evaluation.models.items()},
        }

    # ------------------------------------------------------------------------------------------ answers to prompts

    def prompted(self, examples: Sequence[data.Example]) -> list[data.Example]:
        """Those that have a prompt, or a conversation."""
        return [example for example in examples if example.prompt is not None or example.messages is not None]

    def exact_match(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[data.Example],
        tick: Callable[[int], None] = lambda count: None,
        at_once: int = 1,
    ) -> float:
        """See `decoding.count_exact_matches`."""
        return decoding.count_exact_matches(model, tokenizer, examples, tick, at_once)

    def prompt_lengths(self, tokenizer: PreTrainedTokenizerBase, examples: Sequence[data.Example]) -> AnswerLengths:
        """See `decoding.answers_to`."""
        return decoding.answers_to(tokenizer, examples)

    def sampled(
        self, examples: Sequence[data.Example], tokenizer: PreTrainedTokenizerBase, seq_len: int
    ) -> SampledPrompt | None:
        """The first that leaves room for an answer."""
        prompts = ((example, data.encode_prompt(example, tokenizer)) for example in examples)
        return next((SampledPrompt(own.completion, ids) for own, ids in prompts if len(ids) < seq_len), None)

    # -------------------------------------------------------------------------------------------------- the release

    def config_fields(self, config: BaseConfig, architecture: PretrainedConfig) -> dict[str, Any]:
        """The base's stay."""
        return {}

    def proof_row(self, row: data.Encoded) -> ProofRow:
        """What comes after each supervised token's predecessor is right."""
        return ProofRow({"input_ids": row.input_ids}, row.labels)

    def proof_rows(self, encoded: data.EncodedSet, budget: int) -> list[ProofRow]:
        """Rows in which something is learned, cut where they are long."""
        return list(_cut_within([self.proof_row(row) for row in encoded.rows], budget))

    def built_in_rows(
        self, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, seq_len: int, config: BaseConfig, budget: int
    ) -> list[ProofRow]:
        """All of each text is learned."""
        every = [ids[:seq_len] for ids in tokenizer(list(texts))["input_ids"]]
        return list(_cut_within([ProofRow({"input_ids": ids}, ids) for ids in every], budget))

    def proof_prompt(
        self, example: data.Example | None, rows: Sequence[ProofRow], tokenizer: PreTrainedTokenizerBase, most: int
    ) -> list[int]:
        """The end of the first example's prompt, or the beginning of the first row."""
        if example is None:
            return rows[0].inputs["input_ids"][:BUILT_IN_PROMPT_TOKENS]
        return data.encode_prompt(example, tokenizer)[-most:]


TASK = TextGeneration()


def _plain(own: ModelScores) -> dict[str, Any]:
    loss, perplexity = own.scores.metrics["loss"], own.scores.metrics["perplexity"]
    numbers = {"loss": loss, "perplexity": perplexity, "exact_match": own.exact_match}
    finite = {name: n if n is not None and math.isfinite(n) else None for name, n in numbers.items()}
    return {"model": own.model, **finite}


def _cut_within(rows: Sequence[ProofRow], budget: int) -> Iterator[ProofRow]:
    """The first rows in which something is learned, each cut at `MAX_ROW_TOKENS`, and the last where `budget` ends.

    Where no row has anything to learn within that, the first rows as they are.
    """
    some_learn = any(is_learned(row.labels[: min(MAX_ROW_TOKENS, budget)]) for row in rows)
    for row in rows:
        ids = row.inputs["input_ids"]
        length = min(len(ids), MAX_ROW_TOKENS, budget)
        if length < 2:
            return
        if some_learn and not is_learned(row.labels[:length]):
            continue
        yield ProofRow({"input_ids": ids[:length]}, row.labels[:length])
        budget -= length
