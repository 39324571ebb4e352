"""What a task asks of a model: its class in transformers, whether it gets a new head, and the loss on that head.

In the shapes: B rows of a batch, T tokens, L labels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from qlora_kit.config.settings import BaseConfig

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig


class TaskModel:
    """The model that a task trains. A subclass names it in the attributes, and overrides what is not as usual.

    As usual: the task puts a new head on the base, which trains in full, with a loss of the task's own on its logits.
    """

    auto_class: ClassVar[str]  # of transformers
    mapping: ClassVar[str]  # in transformers' `modeling_auto`: the model types that have such a class
    endings: ClassVar[tuple[str, ...]]  # of the names of such classes, by which a config.json says what it is for
    peft_type: ClassVar[str]
    has_new_head: ClassVar[bool] = True
    replaces_loss: ClassVar[bool] = True  # the model's own loss, by `loss`
    num_labels: ClassVar[int | None] = None  # outputs of the head, where the data does not decide
    over_tokens: ClassVar[bool] = False  # whether a row's tokens are what is chosen among, so that padding must not be
    decodes: ClassVar[bool] = False  # an encoder and a decoder: the labels are what the decoder is to say
    proof_outputs: ClassVar[tuple[str, ...]] = ("logits",)  # of the model, each (1, …, choices) for one row

    @property
    def has_labels(self) -> bool:
        """Whether the choices of its head are labels, which the data names."""
        return self.has_new_head and self.num_labels is None

    @property
    def writes(self) -> bool:
        """Whether its answers are texts, token by token, with the model's own head."""
        return not self.has_new_head

    # ------------------------------------------------------------------------------------------ which models do it

    def has_class_for(self, architecture: PretrainedConfig) -> bool:
        """Whether transformers has a class for the task of this kind of model, which can do it."""
        from transformers.models.auto import modeling_auto

        return architecture.model_type in getattr(modeling_auto, self.mapping) and self.suits(architecture)

    def suits(self, architecture: PretrainedConfig) -> bool:
        """Whether models of this kind can do it, where transformers has a class."""
        return True

    def why_unable(self, architecture: PretrainedConfig, task: str) -> str:
        """What models lack that cannot do it, behind "a bert model"."""
        return f"has no head for {task} in transformers"

    def was_saved(self, architecture: PretrainedConfig) -> bool:
        """Whether a model with this config.json was saved with the head of the task."""
        return any(kind.endswith(self.endings) for kind in architecture.architectures or ())

    def is_usual_for(self, architecture: PretrainedConfig) -> bool:
        """Whether models of this kind are for the task, where neither their files nor the user say another."""
        return False

    def class_name(self, architecture: PretrainedConfig) -> str:
        """The name of the class that transformers has for the task of this kind of model."""
        from transformers.models.auto import modeling_auto

        found = getattr(modeling_auto, self.mapping)[architecture.model_type]
        return found if isinstance(found, str) else str(found[0])

    @property
    def transformers_class(self) -> Any:
        """The class of transformers that loads and builds its models."""
        import transformers

        return getattr(transformers, self.auto_class)

    def configure(self, architecture: PretrainedConfig, config: BaseConfig) -> None:
        """Write into `architecture` what every model of the task takes from there: the labels of the head.

        Raises `UserError` where the model cannot be used as it is.
        """
        if self.has_new_head and config.labels is not None:
            architecture.id2label = dict(enumerate(config.labels))
            architecture.label2id = {label: number for number, label in enumerate(config.labels)}
            kind = "multi_label_classification" if config.multi_label else "single_label_classification"
            architecture.problem_type = kind
        if self.num_labels is not None and architecture.num_labels != self.num_labels:
            architecture.num_labels = self.num_labels  # the model may have been saved for something else

    # --------------------------------------------------------------------------------------------------- its loss

    def logits(self, outputs: Any, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """Of the `outputs` of a model what the loss is over; the mask is (B, T)."""
        found: torch.Tensor = outputs.logits
        return found

    def loss(
        self, logits: torch.Tensor, labels: torch.Tensor, n_items: Any, weights_L: torch.Tensor | None
    ) -> torch.Tensor:
        """The loss summed over a batch and divided by `n_items`, an fp32 scalar; `weights_L` are those of the labels.

        Only where the task `replaces_loss`.
        """
        raise NotImplementedError(f"{type(self).__name__} keeps the model's own loss, or must say its own")

    def label_shape(self, rows: int, tokens: int, labels: int, several: bool) -> tuple[int, ...]:
        """The shape of a batch's labels; by default each token has one. `several`: a row may have several labels."""
        return (rows, tokens)

    def has_float_labels(self, several: bool) -> bool:
        """Whether the labels of a batch are numbers with a fraction, fp32, rather than int64."""
        return several

    def score_pass(self, model: Any, batch: dict[str, Any]) -> None:
        """The passes of `model` that scoring a `batch` takes, for the planner: without the figures that follow."""
        outputs = model(**{name: value for name, value in batch.items() if name != "labels"})
        self.logits(outputs, batch.get("attention_mask")).float()

    @property
    def call_options(self) -> dict[str, Any]:
        """How a model is called for the logits of a row, beside the row."""
        return {"use_cache": False} if self.writes else {}


def reads_both_ways(architecture: PretrainedConfig) -> bool:
    """Whether each token sees those after it too, as in BERT, so that the model cannot write."""
    from transformers.models.auto import modeling_auto

    kind = architecture.model_type
    masked = modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if kind not in masked or kind in modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        return False
    return not getattr(architecture, "is_decoder", False)
