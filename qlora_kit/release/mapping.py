"""Which tensor of the base's files is which weight of the model, and how the adapter saw it.

The model is built on `meta` by `model.load.load_base`, so that what is quantized, what is a `Conv1D` and what is tied
is read off the same structure that trained. The names are matched by transformers' own rules for loading.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qlora_kit.config.settings import BaseConfig
from qlora_kit.errors import Fault, UserError, named
from qlora_kit.model import load
from qlora_kit.release.factors import REMEDY, SETTING, Adapter, targeted
from qlora_kit.release.files.read import FETCH_REMEDY, Checkpoint
from qlora_kit.tasks import registry
from qlora_kit.tasks.task_model import TaskModel

if TYPE_CHECKING:
    import torch
    from torch import nn

BASE_SETTING = "base"
OTHER_ARCHITECTURE = "Give the base that it was trained on."


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A parameter of the live model as the adapter saw it."""

    name: str
    shape: tuple[int, ...]  # as the unquantized model has it
    dtype: torch.dtype  # what loading casts it to, before any quantization
    kept_in_fp32: bool  # although the model is loaded in 16 bits
    quantized: bool = False
    transposed: bool = False  # a Conv1D's, stored in × out
    embedding: bool = False
    linear: bool = False


@dataclass(frozen=True, kw_only=True)
class ModelLayout:
    """The base's files seen as the live model's weights."""

    weights: Mapping[str, Weight]  # by their names in the model
    file_names: Mapping[str, str]  # name in the model → name in the files, of those that are the same tensor
    converted: frozenset[str]  # names in the files of tensors that loading splits, joins or reshapes
    unknown: frozenset[str]  # names in the files that the model has no use for
    tied: tuple[tuple[str, ...], ...]  # names in the model that share one tensor
    modules: Mapping[str, str]  # module with a weight → the weight's name in the model
    vocabulary: frozenset[str]  # names in the model of the weights with a row for each token

    def weight_of(self, file_name: str) -> Weight | None:
        """The live weight that the file's tensor is; None where it is none, or only a part of one."""
        return self._by_file.get(file_name)

    @functools.cached_property
    def _by_file(self) -> dict[str, Weight]:
        return {file: self.weights[live] for live, file in self.file_names.items()}


def read_layout(config: BaseConfig, dtype: torch.dtype, checkpoint: Checkpoint) -> ModelLayout:
    """Match the tensors of `checkpoint` with the model that `config` describes, loaded in `dtype`.

    Raises `UserError` where a weight is missing or has another shape.
    """
    import torch

    model = load.load_base(config, torch.device("meta"), dtype=dtype)
    weights = {weight.name: weight for weight in _weights(model, dtype)}
    file_names, converted, unknown = _match_names(
        model, registry.task_of(config, model.config).model, set(weights), checkpoint.entries
    )
    tied = _tied(model)
    needed = {name: weight for name, weight in weights.items() if not _may_lack(model, name)}
    _check_complete(config, weights, needed, file_names, converted, tied, checkpoint)
    modules = {name.rpartition(".")[0]: name for name in weights if name.endswith(".weight")}
    return ModelLayout(
        weights=weights,
        file_names=file_names,
        converted=converted,
        unknown=unknown,
        tied=tied,
        modules=modules,
        vocabulary=_vocabulary(model),
    )


def _vocabulary(model: Any) -> frozenset[str]:
    ends = [end.weight for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None]
    named = model.named_parameters(remove_duplicate=False)
    return frozenset(name for name, parameter in named if any(parameter is end for end in ends))


def _weights(model: Any, dtype: torch.dtype) -> Iterable[Weight]:
    """Every parameter and saved buffer of the model on `meta`, tied ones under each of their names."""
    import torch
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    kept = _kept_in_fp32(model, dtype)
    for prefix, module in model.named_modules():
        quantized = type(module).__module__.startswith("bitsandbytes.")
        transposed = isinstance(module, Conv1D) or (quantized and issubclass(module.source_cls, Conv1D))
        for key, value in _own_tensors(module):
            name = f"{prefix}.{key}" if prefix else key
            in_fp32 = kept is not None and kept.search(name) is not None and value.is_floating_point()
            if key != "weight":
                yield Weight(
                    name=name,
                    shape=tuple(value.shape),
                    dtype=torch.float32 if in_fp32 else value.dtype,
                    kept_in_fp32=in_fp32,
                )
                continue
            yield Weight(
                name=name,
                shape=_dense_shape(module, transposed) if quantized else tuple(value.shape),
                dtype=torch.float32 if in_fp32 else dtype if quantized else value.dtype,
                kept_in_fp32=in_fp32,
                quantized=quantized,
                transposed=transposed,
                embedding=isinstance(module, nn.Embedding),
                linear=isinstance(module, (nn.Linear, Conv1D)),
            )


def _own_tensors(module: nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
    yield from ((key, value) for key, value in module._parameters.items() if value is not None)
    saved = ((k, v) for k, v in module._buffers.items() if k not in module._non_persistent_buffers_set)
    yield from ((key, value) for key, value in saved if value is not None)


def _dense_shape(layer: Any, transposed: bool) -> tuple[int, int]:
    """The shape of a quantized layer's weight in the files."""
    return (layer.in_features, layer.out_features) if transposed else (layer.out_features, layer.in_features)


def _kept_in_fp32(model: Any, dtype: torch.dtype) -> re.Pattern[str] | None:
    """A pattern of the weights that loading never rounds to 16 bits; None where there are none."""
    plan = model._get_dtype_plan(dtype)
    return re.compile("|".join(f"(?:{pattern.replace('*', '.*')})" for pattern in plan)) if plan else None


def _match_names(
    model: Any, task: TaskModel, known: set[str], files: Iterable[str]
) -> tuple[dict[str, str], frozenset[str], frozenset[str]]:
    """Names in the model → names in the files, those that are converted, and those that the model does not use."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    rules = get_model_conversion_mapping(model, key_mapping=load.base_renaming(task, model.config))
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    in_model = dict.fromkeys(known, True)
    names: dict[str, str] = {}
    converted, unknown = set(), set()
    for file_name in sorted(files):
        name, converter = rename_source_key(file_name, renamings, converters, model.base_model_prefix, in_model)
        if name not in known and file_name in known:
            name, converter = rename_source_key(file_name, [], [], model.base_model_prefix, in_model)
        if name not in known:
            unknown.add(file_name)
        elif converter is not None:
            converted.add(file_name)
        else:
            names[name] = file_name
    return names, frozenset(converted), frozenset(unknown)


def _tied(model: Any) -> tuple[tuple[str, ...], ...]:
    """Groups of names that stand for one parameter."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)


def _may_lack(model: Any, name: str) -> bool:
    """Whether files need not hold the weight `name`: transformers computes it, or it is zero (sines as positions)."""
    return any(re.search(pattern, name) for pattern in model._keys_to_ignore_on_load_missing or ())


def _check_complete(
    config: BaseConfig,
    weights: Mapping[str, Weight],
    needed: Iterable[str],
    file_names: Mapping[str, str],
    converted: frozenset[str],
    tied: tuple[tuple[str, ...], ...],
    checkpoint: Checkpoint,
) -> None:
    """Check that the files hold every weight that is `needed`, and all in their shapes. Raises `UserError`.

    If loading converts tensors, their results cannot be told from missing tensors by name; then loading the release, in
    the proof, decides.
    """
    stand_ins = {name: group for group in tied for name in group}
    absent = [
        name
        for name in needed
        if name not in file_names and not any(other in file_names for other in stand_ins.get(name, ()))
    ]
    faults = []
    if absent and not converted:
        faults.append(f"its files lack {len(absent)} of its weights: {', '.join(absent[:3])}")
    for name, file_name in file_names.items():
        shape = checkpoint.entries[file_name].shape
        if shape != weights[name].shape:
            faults.append(f"{file_name} has the shape {shape}, but the model needs {weights[name].shape}")
    if faults:
        raise UserError(Fault(BASE_SETTING, config.model, fault, FETCH_REMEDY) for fault in faults[:3])


def check_fits(adapter: Adapter, layout: ModelLayout) -> None:
    """Check that every tensor of the adapter has its place in the base, in its shape, and none is lacking.

    Raises `UserError` with the faults.
    """
    _check_vocabulary(adapter, layout)
    faults = [*_factor_faults(adapter, layout), *_whole_faults(adapter, layout)]
    layers = {module: name for module, name in layout.modules.items() if layout.weights[name].linear}
    lacking = [module for module in targeted(adapter.settings, layers) if not _covers(adapter, module)]
    if lacking and not faults:
        rule = f"lacks the factors of {len(lacking)} of the layers that it names: {', '.join(lacking[:3])}"
        raise UserError.of(SETTING, adapter.given, rule, REMEDY)
    if faults:
        shown = faults[:3] + ([f"and {len(faults) - 3} more such faults"] if len(faults) > 3 else [])
        raise UserError(Fault(SETTING, adapter.given, fault, OTHER_ARCHITECTURE) for fault in shown)


def _check_vocabulary(adapter: Adapter, layout: ModelLayout) -> None:
    """Check that the adapter was trained with as many tokens as the base has. Raises `UserError`."""
    for name in layout.vocabulary & {*adapter.whole, *(f"{module}.weight" for module in adapter.factors)}:
        rows, columns = layout.weights[name].shape
        found = _rows_and_columns(adapter, name)
        if found[1] == columns and found[0] != rows:
            rule = f"was trained after the vocabulary was resized: it has {found[0]} tokens, but this base has {rows}"
            remedy = (
                f"Resize the base with transformers (resize_token_embeddings({found[0]})), save it with the adapter's "
                f"tokenizer, and give that folder as {named(BASE_SETTING)}."
            )
            raise UserError.of(SETTING, adapter.given, rule, remedy)


def _rows_and_columns(adapter: Adapter, name: str) -> tuple[int, ...]:
    """The shape that the adapter gives the weight `name` of the vocabulary: tokens × width."""
    entries = adapter.checkpoint.entries
    if name in adapter.whole:
        return (*entries[adapter.whole[name]].shape, 0, 0)[:2]
    factor = adapter.factors[name.removesuffix(".weight")]
    inner, outer = entries[factor.a].shape[1], entries[factor.b].shape[0]
    return (inner, outer) if factor.embedding else (outer, inner)


def _covers(adapter: Adapter, module: str) -> bool:
    return module in adapter.factors or f"{module}.weight" in adapter.whole


def _factor_faults(adapter: Adapter, layout: ModelLayout) -> Iterable[str]:
    for module, factor in adapter.factors.items():
        name = layout.modules.get(module)
        if name is None or not (layout.weights[name].linear or layout.weights[name].embedding):
            yield f"was made for another architecture: this base has no layer {module}"
            continue
        weight = layout.weights[name]
        rows, columns = oriented(weight.shape, weight.transposed or weight.embedding)  # out × in
        a, b = adapter.checkpoint.entries[factor.a].shape, adapter.checkpoint.entries[factor.b].shape
        if (b[0], a[1]) != (rows, columns) or factor.embedding != weight.embedding:
            yield f"was made for another architecture: {module} is {columns} → {rows} here, and {a[1]} → {b[0]} there"
        if factor.bias is not None and f"{module}.bias" not in layout.weights:
            yield f"adds a bias to {module}, which has no bias in the base"
        if factor.magnitude is not None and weight.embedding:
            yield f"uses DoRA on the embedding {module}, which cannot be merged"


def oriented(shape: tuple[int, ...], transposed: bool) -> tuple[int, ...]:
    """`shape` the other way round where it is `transposed`."""
    return tuple(reversed(shape)) if transposed else shape


def _whole_faults(adapter: Adapter, layout: ModelLayout) -> Iterable[str]:
    for name, key in adapter.whole.items():
        weight, shape = layout.weights.get(name), adapter.checkpoint.entries[key].shape
        if weight is None:
            yield f"was made for another architecture: this base has no {name}"
        elif weight.quantized:
            yield f"holds {name} as a whole, in {shape} packed bytes"
        elif shape != weight.shape:
            yield f"holds {name} in the shape {shape}, but this base has {weight.shape}"


def check_mappable(adapters: Iterable[Adapter], layout: ModelLayout, quantized: bool) -> None:
    """Check that every weight to be changed is one whole tensor of the files. Raises `UserError`.

    `quantized` says that layers without factors change too, for they are quantized and back.
    """
    changed = {layout.modules[module] for adapter in adapters for module in adapter.factors}
    changed |= {name for adapter in adapters for name in adapter.whole}
    changed |= {f"{f.module}.bias" for adapter in adapters for f in adapter.factors.values() if f.bias is not None}
    if quantized:
        changed |= {name for name, weight in layout.weights.items() if weight.quantized}
    reachable = set(layout.file_names)
    for group in layout.tied:
        if reachable & set(group):
            reachable |= set(group)
    astray = sorted(changed - reachable)
    if astray:
        rule = (
            f"its files store {len(astray)} of the weights to merge into in another form than the model "
            f"({', '.join(astray[:3])})"
        )
        other = f"merge with {named('into', 'original')}" if quantized else "serve the adapter unmerged"
        remedy = f"Load it with transformers and save it in the model's own form, if possible, or {other}."
        raise UserError.of(BASE_SETTING, "", rule, remedy)
