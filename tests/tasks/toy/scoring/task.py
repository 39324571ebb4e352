"""Text scoring: a text gets a number, such as how good a review is. In the shapes: B rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from qlora_kit.data.audit import audit_lengths
from qlora_kit.data.encode import IGNORED
from qlora_kit.data.fields import leave
from qlora_kit.data.problems import Problems
from qlora_kit.tasks.decoding import undisturbed
from qlora_kit.tasks.evaluation import Scores
from qlora_kit.tasks.proof import ProofRow, chosen
from qlora_kit.tasks.rows import RowCollator, model_inputs
from qlora_kit.tasks.task import Task
from qlora_kit.tasks.task_model import TaskModel


class ScoreModel(TaskModel):
    auto_class = "AutoModelForSequenceClassification"
    mapping = "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES"
    endings = ("ForSequenceClassification",)
    peft_type = "SEQ_CLS"
    num_labels = 1

    def was_saved(self, architecture):
        return super().was_saved(architecture) and architecture.problem_type == "regression"

    def configure(self, architecture, config):
        super().configure(architecture, config)
        architecture.problem_type = "regression"

    def loss(self, logits, labels, n_items, weights_L):
        return (logits.float() - labels).square().sum() / n_items

    def label_shape(self, rows, tokens, labels, several):
        return (rows, 1)

    def has_float_labels(self, several):
        return True


@dataclass(frozen=True)
class ScoredText:
    text: str
    score: float | None
    origin: str


@dataclass(frozen=True)
class ScoredRow:
    input_ids: list[int]
    token_type_ids: list[int] | None
    label: list[float] | None
    origin: str
    full_tokens: int
    truncated: bool


@dataclass(frozen=True)
class ScoredSet:
    rows: list[ScoredRow]
    report: object

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


class TextScoring(Task):
    name = "text-scoring"
    model = ScoreModel()
    metrics: ClassVar[Mapping[str, bool]] = {"mean_error": False, "loss": False}
    metric = "mean_error"
    proof_terms = chosen("text", "a text", "scores")

    def fits(self, columns):
        return {"text", "score"} <= columns

    def read(self, source, config):
        problems = Problems(source.setting, source.name, "Mend it.")
        for record in source.records:
            if not isinstance(record.values.get("score"), (int, float)):
                problems.add(record.origin, "has a score that is no number")
        problems.raise_if_any()
        return [ScoredText(r.values["text"], float(r.values["score"]), r.origin) for r in source.records]

    def read_unanswered(self, source):
        for record in source.records:
            leave(record.values, "score")
        return [ScoredText(record.values["text"], None, record.origin) for record in source.records]

    def resolve(self, config, examples, setting):
        return replace(config, task=self.name)

    def encode(self, config, examples, tokenizer, seq_len, setting):
        return self.encode_unanswered(examples, tokenizer, seq_len, config.base)

    def encode_unanswered(self, examples, tokenizer, seq_len, config):
        rows = []
        for example in examples:
            found = tokenizer(example.text)
            ids, types = found["input_ids"], found.get("token_type_ids")
            label = None if example.score is None else [example.score]
            cut = None if types is None else types[:seq_len]
            rows.append(ScoredRow(ids[:seq_len], cut, label, example.origin, len(ids), len(ids) > seq_len))
        lengths = [row.full_tokens for row in rows]
        cut = [row.truncated for row in rows]
        return ScoredSet(rows, audit_lengths(lengths, cut, [1] * len(rows), seq_len, empty=0, duplicates=0))

    def collator(self, tokenizer, seq_len):
        return RowCollator.of(tokenizer)

    def learned(self, example, row, show):
        return f"«{example.score:g}»"

    def score(self, model, asked, config):
        errors = []
        with undisturbed(model):
            for batch in asked.batches:
                labels = batch.pop("labels")
                errors += (model(**batch).logits.float() - labels).flatten().tolist()
        squares = sum(error**2 for error in errors) / len(errors)
        return Scores({"loss": squares, "mean_error": sum(map(abs, errors)) / len(errors), "examples": len(errors)})

    def said(self, metrics):
        return f"held-out loss {metrics['loss']:.4f}, off by {metrics['mean_error']:.4f} on average"

    def figures(self, metrics):
        return [f"off by {metrics['mean_error']:.4f}"] if metrics else []

    def answers(self, model, asked):
        for batch in asked.batches:
            batch.pop("labels", None)
            yield from ({"score": score} for score in model(**batch).logits.float().flatten().tolist())

    def question(self, example):
        return {"text": example.text}

    def proof_row(self, row):
        return ProofRow(model_inputs(row), [IGNORED, IGNORED])

    def built_in_rows(self, texts, tokenizer, seq_len, config, budget):
        examples = [ScoredText(text, None, "a built-in text") for text in texts]
        return self.proof_rows(self.encode_unanswered(examples, tokenizer, seq_len, config), budget)


TASK = TextScoring()
