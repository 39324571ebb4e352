"""What each task asks of a model: its class in transformers, whether it gets a new head, and the loss on that head.

The data of a task, and how its answers are scored, are in `tasks`.
In the shapes: B rows of a batch, T tokens, L labels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_kit.errors import UserError

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

Loss = Callable[["torch.Tensor", "torch.Tensor", Any, "torch.Tensor | None"], "torch.Tensor"]
"""(logits, labels, items that the sum is divided by, weights of the labels or None) → an fp32 scalar."""

Logits = Callable[[Any, "torch.Tensor | None"], "torch.Tensor"]
"""(outputs of a model, its attention mask (B, T) or None) → what the loss is over."""

GENERATION, CLASSIFICATION, TAGGING = "text-generation", "text-classification", "token-classification"
QUESTION_ANSWERING, TEXT2TEXT = "question-answering", "text2text-generation"


def _label_a_token(rows: int, tokens: int, labels: int, several: bool) -> tuple[int, ...]:
    return (rows, tokens)


def _label_a_row(rows: int, tokens: int, labels: int, several: bool) -> tuple[int, ...]:
    return (rows, labels) if several else (rows,)


def _two_places_a_row(rows: int, tokens: int, labels: int, several: bool) -> tuple[int, ...]:
    return (rows, 2)


def _own_logits(outputs: Any, attention_mask: torch.Tensor | None) -> torch.Tensor:
    return outputs.logits  # type: ignore[no-any-return]


def span_logits(outputs: Any, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """The logits of the first and of the last token of an answer, fp32 (B, 2, T); padding gets the lowest there is.

    So the loss and the answer of a row do not depend on the rows beside it (transformers' own loss is over padding
    too, and agrees where there is none).
    """
    import torch

    logits_B2T = torch.stack([outputs.start_logits, outputs.end_logits], dim=1).float()
    if attention_mask is None:
        return logits_B2T
    return logits_B2T.masked_fill(attention_mask[:, None, :] == 0, torch.finfo(torch.float32).min)


@dataclass(frozen=True)
class TaskModel:
    """What a task asks of a model."""

    auto_class: str  # of transformers
    mapping: str  # in transformers' `modeling_auto`: the model types that have such a class
    endings: tuple[str, ...]  # of the names of such classes, by which a config.json says what it was saved for
    peft_type: str
    loss: Loss | None = None  # ours, on the logits; None: the model's own
    label_shape: Callable[[int, int, int, bool], tuple[int, ...]] = _label_a_token
    # of a batch's labels, from its rows and tokens, the number of labels, and whether a row may have several
    logits: Logits = _own_logits  # of its outputs, for `loss`
    over_tokens: bool = False  # whether a row's tokens are what is chosen among, so that padding must not be
    num_labels: int | None = None  # of the head, where the data does not decide
    decodes: bool = False  # an encoder and a decoder: the labels are what the decoder is to say, with the model's head

    @property
    def has_new_head(self) -> bool:
        """Whether the task puts a head of its own on the base, which then trains in full."""
        return self.loss is not None and not self.decodes

    @property
    def has_labels(self) -> bool:
        """Whether the choices of its head are labels, which the data names."""
        return self.has_new_head and self.num_labels is None

    @property
    def writes(self) -> bool:
        """Whether its answers are texts, token by token, with the model's own head."""
        return not self.has_new_head


def classification_loss(
    logits_BL: torch.Tensor, labels: torch.Tensor, n_items: Any, weights_L: torch.Tensor | None
) -> torch.Tensor:
    """The summed cross-entropy over `n_items`, in fp32.

    Labels of shape (B,) are numbers of classes: softmax, each example's loss times the weight of its class. Labels of
    shape (B, L) are 0 or 1 for each label: a sigmoid each, the loss of a 1 times the weight of its label.
    """
    from torch.nn import functional

    logits_BL = logits_BL.float()
    if labels.dim() == 1:
        loss = functional.cross_entropy(logits_BL, labels, weights_L, reduction="sum")
    else:
        loss = functional.binary_cross_entropy_with_logits(
            logits_BL, labels.float(), reduction="sum", pos_weight=weights_L
        )
    scaled: torch.Tensor = loss / n_items
    return scaled


def tagging_loss(
    logits_BTL: torch.Tensor, labels_BT: torch.Tensor, n_items: Any, weights_L: torch.Tensor | None
) -> torch.Tensor:
    """The summed cross-entropy of the tokens with a label (−100: none) over `n_items`, in fp32.

    Each token's loss counts times the weight of its label.
    """
    return classification_loss(logits_BTL.flatten(0, 1), labels_BT.flatten(), n_items, weights_L)


def span_loss(
    logits_B2T: torch.Tensor, labels_B2: torch.Tensor, n_items: Any, weights: torch.Tensor | None
) -> torch.Tensor:
    """The summed cross-entropy of the first and of the last token over `n_items`, which counts both."""
    from torch.nn import functional

    loss: torch.Tensor = functional.cross_entropy(logits_B2T.flatten(0, 1), labels_B2.flatten(), reduction="sum")
    scaled: torch.Tensor = loss / n_items
    return scaled


def sequence_loss(
    logits_BTV: torch.Tensor, labels_BT: torch.Tensor, n_items: Any, weights_L: torch.Tensor | None
) -> torch.Tensor:
    """The summed cross-entropy of the tokens that a decoder is to say over `n_items`, in fp32; labels of −100 are none.

    transformers' own losses of encoder-decoders are means over a batch, whatever batches it is accumulated with.
    """
    from torch.nn import functional

    summed = functional.cross_entropy(logits_BTV.float().flatten(0, 1), labels_BT.flatten(), reduction="sum")
    scaled: torch.Tensor = summed / n_items
    return scaled


TASK_MODELS: dict[str, TaskModel] = {
    GENERATION: TaskModel(
        "AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", ("ForCausalLM", "LMHeadModel"), "CAUSAL_LM"
    ),
    CLASSIFICATION: TaskModel(
        "AutoModelForSequenceClassification",
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
        ("ForSequenceClassification",),
        "SEQ_CLS",
        classification_loss,
        _label_a_row,
    ),
    TAGGING: TaskModel(
        "AutoModelForTokenClassification",
        "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
        ("ForTokenClassification",),
        "TOKEN_CLS",
        tagging_loss,
    ),
    QUESTION_ANSWERING: TaskModel(
        "AutoModelForQuestionAnswering",
        "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
        ("ForQuestionAnswering", "ForQuestionAnsweringSimple"),
        "QUESTION_ANS",
        span_loss,
        _two_places_a_row,
        span_logits,
        over_tokens=True,
        num_labels=2,
    ),
    TEXT2TEXT: TaskModel(
        "AutoModelForSeq2SeqLM",
        "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
        ("ForConditionalGeneration", "MTModel"),
        "SEQ_2_SEQ_LM",
        sequence_loss,
        decodes=True,
    ),
}

# encoder-decoders that start their answers from something else than `decoder_start_token_id` of their config.json
STARTS_OTHERWISE = ("fsmt", "mbart", "plbart", "t5gemma", "t5gemma2")


def task_of(task: str | None, architecture: PretrainedConfig) -> str:
    """`task`, or where it is unset what the model was saved for, or else what models of its kind are for."""
    if task is not None:
        return task
    saved_as = architecture.architectures or ()
    for name, own in TASK_MODELS.items():
        if own.has_new_head and any(kind.endswith(own.endings) for kind in saved_as):
            return name
    if can_do(TEXT2TEXT, architecture):
        return TEXT2TEXT
    return CLASSIFICATION if reads_both_ways(architecture) else GENERATION


def can_do(task: str, architecture: PretrainedConfig) -> bool:
    """Whether transformers has a class for `task` of this kind of model.

    It has some that go on with a text by the decoder of an encoder-decoder, whose files they do not read whole.
    """
    from transformers.models.auto import modeling_auto

    if architecture.model_type not in getattr(modeling_auto, TASK_MODELS[task].mapping):
        return False
    if TASK_MODELS[task].decodes:  # models that hear are in the same table, and some of them have no encoder of texts
        return bool(architecture.is_encoder_decoder)
    return task != GENERATION or not (reads_both_ways(architecture) or architecture.is_encoder_decoder)


def serves_any_task(model_type: str) -> bool:
    """Whether there is a task that models of this type can do."""
    from transformers.models.auto import modeling_auto

    return any(model_type in getattr(modeling_auto, own.mapping) for own in TASK_MODELS.values())


def reads_both_ways(architecture: PretrainedConfig) -> bool:
    """Whether each token sees those after it too, as in BERT, so that the model cannot write."""
    from transformers.models.auto import modeling_auto

    kind = architecture.model_type
    masked = modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if kind not in masked or kind in modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        return False
    return not getattr(architecture, "is_decoder", False)


def check_starts(architecture: PretrainedConfig, model: str) -> None:
    """Check that an encoder with a decoder knows what its answers start from and are padded with. Raises `UserError`.

    Without, transformers fails at the first step.
    """
    if architecture.model_type in STARTS_OTHERWISE:
        return
    needed = ("decoder_start_token_id", "pad_token_id")
    missing = [name for name in needed if getattr(architecture, name, None) is None]
    if missing:
        rule = f"its config.json has no {' and no '.join(missing)}, which its decoder needs"
        raise UserError.of("--model", model, rule, "Set it there, as the model was trained: often both are the same.")


def check_can_do(task: str, architecture: PretrainedConfig, model: str) -> None:
    """Check that the model can do `task`. Raises `UserError` with what it can do."""
    if can_do(task, architecture):
        return
    able = [name for name in TASK_MODELS if can_do(name, architecture)]
    if TASK_MODELS[task].decodes:
        what = f"has no encoder with a decoder, as {task} needs"
    elif task == GENERATION:
        decodes = architecture.is_encoder_decoder
        what = "answers a text, and does not go on with it" if decodes else "generates no text"
    else:
        what = f"has no head for {task} in transformers"
    remedy = (
        f"It can do: --task {' | '.join(able)}." if able else "Give another model, such as a causal language model."
    )
    raise UserError.of("--model", model, f"a {architecture.model_type} model {what}", remedy)


def class_name(task: str, architecture: PretrainedConfig) -> str:
    """The name of the class of transformers that a model of this kind has for `task`."""
    from transformers.models.auto import modeling_auto

    found = getattr(modeling_auto, TASK_MODELS[task].mapping)[architecture.model_type]
    return found if isinstance(found, str) else str(found[0])


def transformers_class(task: str) -> Any:
    """The class of transformers that loads and builds models for `task`."""
    import transformers

    return getattr(transformers, TASK_MODELS[task].auto_class)


def reading_part(model: Any) -> Any:
    """What the inputs of `model` (which may be PEFT's) go through first: of an encoder and a decoder the encoder.

    Its embedding is the one that is called; T5 and BART have another module with the same weight, which is not.
    """
    own = model.get_base_model() if hasattr(model, "get_base_model") else model
    return own.get_encoder() if own.config.is_encoder_decoder else own
