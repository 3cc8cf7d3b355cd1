"""LoraConfig: every field of Hugging Face PEFT's, with its default, so that files and keyword arguments fit both ways."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

from pyfastpeft.methods.base import PeftConfig, PeftType
from pyfastpeft.methods.checks import (
    check_finite,
    check_flags,
    check_integers,
    check_names,
    check_pattern,
    check_strings,
    names_to_set,
)
from pyfastpeft.methods.lora.initial import check_init
from pyfastpeft.replicate_layers import check_ranges
from pyfastpeft.trainable_tokens import check_token_indices

BIAS_MODES = ("none", "all", "lora_only")


@dataclasses.dataclass
class EvaConfig:
    """Configuration of EVA (methods/lora/eva.py), with PEFT's fields.

    rho                     a layer gets at most rho · r ranks (1: all keep r)
    tau                     the cosine at which a direction counts as settled from one batch to the next
    use_label_mask          leave out the positions whose label is label_mask_value
    label_mask_value        the value that means "no label"
    whiten                  rows of A over the square root of their singular values
    adjust_scaling_factors  change lora_alpha with the rank, so that alpha / r stays
    """

    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True

    def __post_init__(self) -> None:
        check_finite(self, rho=self.rho, tau=self.tau)
        if self.rho < 1.0:
            raise ValueError(f"EvaConfig: rho is {self.rho}, expected at least 1")
        if not 0.0 <= self.tau <= 1.0:
            raise ValueError(f"EvaConfig: tau is {self.tau}, expected 0 to 1")
        check_flags(self, "use_label_mask", "whiten", "adjust_scaling_factors")


@dataclasses.dataclass
class LoraConfig(PeftConfig):
    """Configuration of LoRA: y = base(x) + s · B A dropout(x), with s = lora_alpha / r.

    r                  rank R of A [R, K] and B [N, R]
    target_modules     which linear layers, embeddings, convolutions, nn.MultiheadAttention: names, matched whole or as
                       the end of a path ("q_proj", "layers.0.mlp.up_proj"); a regular expression that must match the whole path; "all-linear"
                       (every linear layer but the output head, nothing else); None: the usual ones of the architecture
    exclude_modules    names or a regular expression, taken out of the targets
    lora_alpha         the numerator of s
    lora_dropout       probability of dropping an input of A, in training only
    fan_in_fan_out     whether the weight is stored [K, N] (GPT-2's Conv1D); found out by itself
    bias               which biases train: "none", "all" of the model's, "lora_only": those of the adapted layers
    use_rslora         s = lora_alpha / sqrt(r) (Kalajdzievski 2023, arXiv:2312.03732)
    modules_to_save    modules trained whole and saved with the adapter; SEQ_CLS and TOKEN_CLS add "classifier", "score"
    init_lora_weights  True: A kaiming_uniform(a=sqrt(5)), B = 0; "gaussian": A ~ N(0, 1/r), B = 0; False: both random;
                       "orthogonal"; "pissa", "pissa_niter_N", "olora", "loftq": from the base's weight, which gives up
                       its share (methods/lora/initial.py)
    loftq_config       {"loftq_bits": 4, "loftq_iter": number of alternations} for "loftq"
    lora_bias          B has a bias [N] of its own, scaled by s like the rest; merging needs a base with a bias
    use_dora           DoRA: lengths and directions of the rows of W + s B A train apart (methods/lora/layer.py)
    layers_to_transform   indices of the layers to adapt, for a list of target_modules
    layers_pattern     the name before the index ("layers", "h"); None: any
    rank_pattern, alpha_pattern   {name or regular expression: r or lora_alpha} for some of the layers
    layer_replication  [start, end) pairs: the model's layers stacked anew, sharing their weights (replicate_layers.py)
    target_parameters  Parameters of 2 or 3 dimensions (stacked experts), by their path or its end
                       ("mlp.experts.down_proj"); without dropout, DoRA and lora_bias (methods/lora/parameters.py)
    trainable_token_indices   tokens whose rows of the input embedding train too, or {module: tokens}; a head that shares
                       the embedding's weight follows (trainable_tokens.py)

    ensure_weight_tying   one adapter, or one trained copy (modules_to_save), for an embedding and all that share its weight
                       (methods/lora/tied.py); without it an adapter changes the named module's use of the weight alone,
                       with a warning, and merging separates them

    The other fields are PEFT's for variants that are not here yet; a value other than the default raises
    NotImplementedError with the field's name.
    """

    r: int = 8
    target_modules: list[str] | set[str] | str | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    lora_alpha: int | float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = False
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict | None = dataclasses.field(default_factory=dict)
    alpha_pattern: dict | None = dataclasses.field(default_factory=dict)
    megatron_config: dict | None = None
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    loftq_config: dict = dataclasses.field(default_factory=dict)
    eva_config: EvaConfig | dict | None = None
    corda_config: Any = None
    lora_ga_config: Any = None
    use_dora: bool = False
    velora_config: Any = None
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: Any = None
    layer_replication: list[tuple[int, int]] | None = None
    runtime_config: Any = None
    lora_bias: bool = False
    target_parameters: list[str] | None = None
    use_bdlora: Any = None
    arrow_config: Any = None
    kasa_config: Any = None
    ensure_weight_tying: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.LORA
        self.rank_pattern = {} if self.rank_pattern is None else self.rank_pattern
        self.alpha_pattern = {} if self.alpha_pattern is None else self.alpha_pattern
        self._refuse_unsupported()
        self._check_names()
        self._check_numbers()
        self._check_layers()
        check_token_indices(self)
        check_ranges(self)
        self._check_parameters()
        names_to_set(self, "target_modules", "exclude_modules")

    def to_dict(self) -> dict[str, Any]:
        fields = super().to_dict()
        del fields["runtime_config"]  # PEFT's files never hold it
        return fields

    def scaling(self, rank: int, alpha: float) -> float:
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def rank_for(self, path: str) -> int:
        return self.rank_pattern.get(_pattern_of(self.rank_pattern, path), self.r)

    def alpha_for(self, path: str) -> float:
        return self.alpha_pattern.get(_pattern_of(self.alpha_pattern, path), self.lora_alpha)

    def unused_patterns(self, paths: list[str]) -> dict[str, list[str]]:
        """The keys of rank_pattern and alpha_pattern that no path matches."""
        unused = {}
        for name in ("rank_pattern", "alpha_pattern"):
            keys = [key for key in getattr(self, name) if not any(_pattern_matches(key, path) for path in paths)]
            if keys:
                unused[name] = keys
        return unused

    def _refuse_unsupported(self) -> None:
        for field in dataclasses.fields(self):
            if field.name not in self._unsupported():
                continue
            default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
            value = getattr(self, field.name)
            if field.name == "runtime_config" and not _changes_anything(value):
                value = None
            if value != default and not (value is None and not default):
                raise NotImplementedError(
                    f"{type(self).__name__}: {field.name}={value!r} is not supported yet, only {default!r}; leave the "
                    "field out"
                )
        init = self.init_lora_weights
        if not check_init(init):
            raise NotImplementedError(
                f"{type(self).__name__}: init_lora_weights={init!r} is not supported yet, only True, False, 'gaussian', "
                "'orthogonal', 'pissa', 'pissa_niter_N', 'olora', 'loftq' and 'eva'"
            )
        check_flags(self, "use_dora", "lora_bias", "ensure_weight_tying")
        if self.lora_bias and (self.use_dora or not isinstance(init, bool)):
            raise ValueError(
                f"{type(self).__name__}: lora_bias goes with init_lora_weights True or False and without use_dora; "
                f"these are {init!r} and {self.use_dora}"
            )
        self._check_loftq()
        self._check_eva()

    def _check_eva(self) -> None:
        owner = type(self).__name__
        if self.init_lora_weights != "eva":
            if self.eva_config is not None:
                raise ValueError(f"{owner}: eva_config goes with init_lora_weights='eva', which is not set")
            return
        if self.eva_config is None or isinstance(self.eva_config, dict):
            try:
                self.eva_config = EvaConfig(**(self.eva_config or {}))
            except TypeError as error:
                raise TypeError(f"{owner}: eva_config is {self.eva_config!r}: {error}") from None
        elif not isinstance(self.eva_config, EvaConfig):
            raise TypeError(
                f"{owner}: eva_config is {self.eva_config!r}, expected an EvaConfig or a dict of its fields"
            )

    def _check_loftq(self) -> None:
        config, owner = self.loftq_config, type(self).__name__
        if self.init_lora_weights != "loftq":
            if config:
                raise ValueError(f"{owner}: loftq_config goes with init_lora_weights='loftq', which is not set")
            return
        config = dataclasses.asdict(config) if dataclasses.is_dataclass(config) else dict(config or {})
        self.loftq_config = config = {"loftq_bits": 4, "loftq_iter": 1} | config
        if set(config) - {"loftq_bits", "loftq_iter"} or config["loftq_bits"] != 4:
            raise ValueError(f"{owner}: loftq_config is {config}, expected loftq_bits=4 (NF4) and loftq_iter")
        check_integers(self, 1, **{"loftq_config['loftq_iter']": config["loftq_iter"]})

    def _unsupported(self) -> frozenset[str]:
        return _UNSUPPORTED

    def _check_ranks(self) -> None:
        check_integers(self, 1, r=self.r, **{f"rank_pattern[{k!r}]": v for k, v in self.rank_pattern.items()})

    def _check_numbers(self) -> None:
        self._check_ranks()
        alphas = (
            ("lora_alpha", self.lora_alpha),
            *((f"alpha_pattern[{k!r}]", v) for k, v in self.alpha_pattern.items()),
        )
        check_finite(self, **dict(alphas), lora_dropout=self.lora_dropout)
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(f"{type(self).__name__}: lora_dropout is {self.lora_dropout}, expected 0 <= p < 1")
        if self.bias not in BIAS_MODES:
            raise ValueError(f"{type(self).__name__}: bias is {self.bias!r}, expected one of {', '.join(BIAS_MODES)}")
        check_flags(self, "fan_in_fan_out", "use_rslora", "inference_mode")

    def _check_names(self) -> None:
        check_names(self, "target_modules", "exclude_modules")
        check_strings(self, "modules_to_save", self.modules_to_save)
        for name in ("rank_pattern", "alpha_pattern"):
            patterns = getattr(self, name)
            if not isinstance(patterns, dict):
                raise TypeError(f"{type(self).__name__}: {name} is {patterns!r}, expected a dict of names to numbers")
            for key in patterns:
                check_pattern(self, name, key)

    def _check_layers(self) -> None:
        indices = self.layers_to_transform
        if indices is not None and not isinstance(indices, int):
            if not isinstance(indices, (list, tuple, set)) or not all(isinstance(i, int) for i in indices):
                raise TypeError(
                    f"{type(self).__name__}: layers_to_transform is {indices!r}, expected an integer or a list of them"
                )
            self.layers_to_transform = list(indices)
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{type(self).__name__}: {name} goes with a list of target_modules, not with the string "
                        f"{self.target_modules!r}; put the layers into the regular expression"
                    )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                f"{type(self).__name__}: layers_pattern is given without layers_to_transform; say which layers"
            )
        for pattern in self.pattern_list():
            check_pattern(self, "layers_pattern", pattern)

    def _check_parameters(self) -> None:
        check_strings(self, "target_parameters", self.target_parameters)
        wrong = [name for name in ("lora_dropout", "fan_in_fan_out", "lora_bias", "use_dora") if getattr(self, name)]
        if not isinstance(self.init_lora_weights, bool) and self.init_lora_weights != "gaussian":
            wrong.append("init_lora_weights")
        if self.target_parameters and wrong:
            raise ValueError(
                f"{type(self).__name__}: target_parameters goes without {wrong[0]}={getattr(self, wrong[0])!r}: its input is "
                "not a layer's, and its product not a layer's output"
            )

    def pattern_list(self) -> list[str]:
        """layers_pattern as a list; empty for any."""
        pattern = self.layers_pattern
        return ([pattern] if pattern else []) if isinstance(pattern, str) else list(pattern or [])


_UNSUPPORTED = frozenset(
    """megatron_config megatron_core corda_config lora_ga_config
    velora_config alora_invocation_tokens use_qalora qalora_group_size monteclora_config runtime_config
    use_bdlora arrow_config kasa_config""".split()
)


def _changes_anything(runtime_config: Any) -> bool:
    """Whether a runtime_config (PEFT's object, a dict, or None) asks for something other than its defaults."""
    fields = runtime_config if isinstance(runtime_config, dict) else getattr(runtime_config, "__dict__", {})
    return any(fields.values())


def _pattern_matches(pattern: str, path: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", path) is not None


def _pattern_of(patterns: dict, path: str) -> str | None:
    """The first key that matches the path's end."""
    return next((key for key in patterns if _pattern_matches(key, path)), None)
