"""What one adapter changes: its settings and tensors, read from PEFT's files and checked.

Everything in an adapter's file is either a factor on a module (LoRA's A and B, DoRA's magnitude, a bias of B) or a
whole tensor that takes the place of the base's (`modules_to_save`, trained biases, saved embeddings).
Source of the names: `peft.get_peft_model_state_dict`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.adapters.files import CONFIG_FILE, WEIGHTS_FILE
from qlora_kit.errors import Fault, UserError, named
from qlora_kit.release.files.read import BadFileError, Checkpoint, read_json

if TYPE_CHECKING:
    import torch

PREFIX = "base_model.model."
SETTING = "adapter"
FACTOR = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector(?:\.weight)?)"
)
# settings of PEFT that change what the factors mean in a way that no merge of B·A could follow
UNMERGEABLE = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "megatron_config",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)
DEFAULT_RANK = DEFAULT_ALPHA = 8  # PEFT's defaults
REMEDY = "Save or fetch it again."
# initialisations after which the base under the factors is still the published one; the others change it
HARMLESS_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True, kw_only=True)
class Factor:
    """One adapter's low-rank change of a module's weight: the names of its tensors, and s = alpha / r or alpha / √r."""

    module: str
    a: str
    b: str
    scaling: float
    magnitude: str | None = None
    bias: str | None = None
    embedding: bool = False


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter: its folder (as the user typed it), its share in the merge, its settings and tensors."""

    given: str
    folder: Path
    weight: float
    settings: Mapping[str, Any]
    checkpoint: Checkpoint
    factors: Mapping[str, Factor]  # by the module's name in the model
    whole: Mapping[str, str]  # tensors that replace the base's: the name in the model → the name in the file

    @property
    def uses_dora(self) -> bool:
        """Whether magnitudes were trained apart from directions."""
        return bool(self.settings.get("use_dora"))

    def read(self, name: str) -> torch.Tensor:
        """The tensor `name` of the file, in fp32."""
        return self.checkpoint.read(name).float()


def parse_adapter(text: str) -> tuple[str, float]:
    """The folder and the weight in `DIR` or `DIR:weight`. Raises `UserError` if the weight is not a number."""
    folder, colon, weight = text.rpartition(":")
    if not colon or Path(text).exists():
        return text, 1.0
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value == 0:
        rule = "must be a folder, or a folder and its weight"
        raise UserError.of(SETTING, text, rule, f"For example {named(SETTING, 'runs/a/adapter:0.7')}.")
    return folder, value


def open_adapter(given: str, weight: float = 1.0) -> Adapter:
    """Open the adapter in the folder `given` and check all that can be checked without its base. Raises `UserError`."""
    folder = Path(given)
    if not (folder / WEIGHTS_FILE).is_file():
        raise _no_weights(given, folder)
    settings = read_json(folder / CONFIG_FILE, SETTING, given)
    _check_settings(given, settings)
    try:
        checkpoint = Checkpoint.open([folder / WEIGHTS_FILE])
    except (BadFileError, OSError) as error:
        raise UserError.of(SETTING, given, f"cannot be read ({error})", "Save or fetch it again.") from None
    factors, whole = _sorted_out(given, settings, checkpoint)
    adapter = Adapter(
        given=given,
        folder=folder,
        weight=weight,
        settings=settings,
        checkpoint=checkpoint,
        factors=factors,
        whole=whole,
    )
    _check_values(adapter)
    return adapter


def _no_weights(given: str, folder: Path) -> UserError:
    if any(folder.glob("adapter_model*.bin")):
        rule = "its weights are a pickle file (.bin), which can run code when opened"
        return UserError.of(SETTING, given, rule, "Save it with PEFT's safe_serialization=True first.")
    if (folder / "adapter" / WEIGHTS_FILE).is_file():
        remedy = f"Give {named('run', given)}, or {named(SETTING, given + '/adapter')}."
        return UserError.of(SETTING, given, "is a run", remedy)
    return UserError.of(SETTING, given, f"has no {WEIGHTS_FILE}", "Give the adapter/ folder of a run.")


def _check_settings(given: str, settings: Mapping[str, Any]) -> None:
    """Check that the adapter is one that adds s·B·A to the published base. Raises `UserError`."""
    wrong = list(_wrong_types(settings))
    if wrong:
        raise UserError(Fault(SETTING, given, f"its {CONFIG_FILE} has {fault}", REMEDY) for fault in wrong)
    faults = []
    if settings.get("peft_type") != "LORA":
        faults.append(f"has peft_type {settings.get('peft_type')!r}, and only LoRA can be merged")
    used = [name for name in UNMERGEABLE if settings.get(name)]
    faults += [f"uses {name}, which cannot be merged" for name in used]
    start = settings.get("init_lora_weights")
    if start not in HARMLESS_INITS:
        faults.append(f"began with init_lora_weights={start!r}, which changed the base under it")
    try:
        _choice_of_layers(settings)
    except ValueError as error:
        faults.append(f"chooses its layers in a way that PEFT does not accept ({str(error).rstrip('.')})")
    if settings.get("ensure_weight_tying"):
        faults.append("ties its factors (ensure_weight_tying), which cannot be merged")
    if faults:
        remedy = "Convert it to plain LoRA with PEFT (save_pretrained's path_initial_model_for_weight_conversion)."
        raise UserError(Fault(SETTING, given, fault, remedy) for fault in faults)


def _wrong_types(settings: Mapping[str, Any]) -> Iterator[str]:
    """What in the settings is not what PEFT writes there."""
    kinds: tuple[tuple[str, Callable[[Any], bool], tuple[str, ...]], ...] = (
        ("a whole number from 1", _is_rank, ("r",)),
        ("a number", _is_number, ("lora_alpha",)),
        ("true or false", lambda v: v is None or isinstance(v, bool), ("use_dora", "use_rslora", "fan_in_fan_out")),
        ("names of layers, or a pattern of them", _are_names, ("target_modules", "exclude_modules")),
        ("patterns of names", _are_patterns, ("modules_to_save", "layers_pattern")),
        ("numbers of layers", _are_numbers, ("layers_to_transform",)),
        ("a mapping from patterns to ranks", lambda v: _is_pattern(v, _is_rank), ("rank_pattern",)),
        ("a mapping from patterns to numbers", lambda v: _is_pattern(v, _is_number), ("alpha_pattern",)),
    )
    for kind, holds, names in kinds:
        for name in names:
            if name in settings and not holds(settings[name]):
                yield f"{name} = {settings[name]!r}, which is not {kind}"


def _is_rank(value: object) -> bool:
    return type(value) is int and value >= 1


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _are_names(value: object) -> bool:
    if isinstance(value, str):
        return _compiles(value)
    return value is None or (isinstance(value, list) and all(isinstance(name, str) for name in value))


def _are_patterns(value: object) -> bool:
    return value is None or all(isinstance(own, str) and _compiles(own) for own in _as_list(value))


def _as_list(value: object) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _are_numbers(value: object) -> bool:
    return value is None or all(type(number) is int for number in _as_list(value))


def _is_pattern(value: object, holds: Callable[[Any], bool]) -> bool:
    if value is None:
        return True
    return isinstance(value, dict) and all(_compiles(name) and holds(own) for name, own in value.items())


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


def _sorted_out(
    given: str, settings: Mapping[str, Any], checkpoint: Checkpoint
) -> tuple[dict[str, Factor], dict[str, str]]:
    """The factors by module, and the whole tensors by name. Raises `UserError` for keys that lack their partner."""
    parts: dict[str, dict[str, str]] = {}
    whole: dict[str, str] = {}
    for key in checkpoint.entries:
        if not key.startswith(PREFIX):
            rule = f"has a tensor {key!r}, which is not a name that PEFT gives"
            raise UserError.of(SETTING, given, rule, "Save it with PEFT.")
        name = key.removeprefix(PREFIX)
        match = FACTOR.fullmatch(name)
        if match is None:
            whole[name.replace(".base_layer.", ".")] = key
        else:
            part = match["part"].removesuffix(".weight").replace("lora_embedding_", "lora_")
            parts.setdefault(match["module"], {})[part] = key
    _check_partners(given, settings, parts)
    factors = {module: _factor(given, settings, module, own, checkpoint) for module, own in parts.items()}
    if not factors and not whole:
        raise UserError.of(SETTING, given, "has no tensors", "Give the adapter/ folder of a run.")
    return factors, whole


def _check_partners(given: str, settings: Mapping[str, Any], parts: Mapping[str, Mapping[str, str]]) -> None:
    needed = ["lora_A", "lora_B", *(["lora_magnitude_vector"] if settings.get("use_dora") else [])]
    lacking = [f"{module}.{part}" for module, own in parts.items() for part in needed if part not in own]
    if lacking:
        rule = f"lacks {len(lacking)} of its tensors: {', '.join(lacking[:3])}"
        raise UserError.of(SETTING, given, rule, "Save or fetch it again.")


def _factor(
    given: str, settings: Mapping[str, Any], module: str, parts: Mapping[str, str], checkpoint: Checkpoint
) -> Factor:
    a, b = parts["lora_A"], parts["lora_B"]
    shapes = checkpoint.entries[a].shape, checkpoint.entries[b].shape
    rank = int(_by_pattern(settings.get("rank_pattern"), module, settings.get("r", DEFAULT_RANK)))
    if any(len(shape) != 2 for shape in shapes) or not shapes[0][0] == shapes[1][1] == rank:
        rule = f"{module} has factors of shapes {shapes[0]} and {shapes[1]}, but its rank is {rank}"
        raise UserError.of(SETTING, given, rule, "Save or fetch it again.")
    alpha = float(_by_pattern(settings.get("alpha_pattern"), module, settings.get("lora_alpha", DEFAULT_ALPHA)))
    scaling = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    embedding = a.endswith("lora_embedding_A")
    return Factor(
        module=module,
        a=a,
        b=b,
        scaling=scaling,
        magnitude=parts.get("lora_magnitude_vector"),
        bias=parts.get("lora_B.bias"),
        embedding=embedding,
    )


def _by_pattern(patterns: Mapping[str, Any] | None, module: str, otherwise: Any) -> Any:
    """The value of the first pattern that the end of the module's name matches, as PEFT chooses it."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return otherwise


def _check_values(adapter: Adapter) -> None:
    """Check that every number is finite and no factor is all zero. Raises `UserError` with every fault."""
    faults = []
    never_zero = {name for factor in adapter.factors.values() for name in (factor.a, factor.b)}
    for name in adapter.checkpoint.entries:
        value = adapter.checkpoint.read(name)
        if not value.is_floating_point():
            faults.append((name, f"has the dtype {value.dtype}, which is not a dtype of factors"))
        elif not bool(value.isfinite().all()):
            faults.append((name, "has values that are not finite"))
        elif name in never_zero and not bool(value.any()):
            faults.append((name, "is all zero, so the adapter changes nothing there"))
    if faults:
        remedy = "Give an adapter that was trained to the end, and check its losses."
        shown = faults[:5]
        raise UserError(Fault(SETTING, adapter.given, f"{name} {rule}", remedy) for name, rule in shown)


def targeted(settings: Mapping[str, Any], modules: Iterable[str]) -> Iterator[str]:
    """Those of `modules` that the adapter's settings say carry factors, by PEFT's own rule."""
    from peft.tuners.tuners_utils import check_target_module_exists

    if not settings.get("target_modules") or settings["target_modules"] == "all-linear":
        return
    config = _choice_of_layers(settings)
    for module in modules:
        if bool(check_target_module_exists(config, module)):
            yield module


def _choice_of_layers(settings: Mapping[str, Any]) -> Any:
    """PEFT's own settings with those that choose layers. Raises `ValueError` for a choice that PEFT cannot make."""
    from peft import LoraConfig

    names = ("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern")
    return LoraConfig(**{name: settings[name] for name in names if settings.get(name) is not None})
