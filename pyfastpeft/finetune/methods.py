"""What `method` means to a job: the adapter's config, and what happens between two steps beside the optimizer's."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pyfastpeft.finetune.config import FinetuneConfig
from pyfastpeft.finetune.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from pyfastpeft import PeftConfig


def adapter_config(config: FinetuneConfig, total_steps: int) -> PeftConfig:
    """The PeftConfig of the job's method, for a run of total_steps optimizer steps."""
    saved = [name.strip() for name in (config.modules_to_save or "").split(",") if name.strip()]
    common = {"task_type": "CAUSAL_LM", "modules_to_save": saved or None}
    return _CONFIGS[config.method](config, total_steps, common)


def _lora(config: FinetuneConfig, total_steps: int, common: dict[str, Any]) -> PeftConfig:
    from pyfastpeft import LoraConfig

    init = True if config.init == "default" else config.init
    return LoraConfig(r=config.rank, use_rslora=config.rslora, init_lora_weights=init, **_low_rank(config), **common)


def _adalora(config: FinetuneConfig, total_steps: int, common: dict[str, Any]) -> PeftConfig:
    """Half as much again as the rank at first; a tenth of the run before the pruning and a fifth after it."""
    from pyfastpeft import AdaLoraConfig

    return AdaLoraConfig(
        target_r=config.rank,
        init_r=config.rank + (config.rank + 1) // 2,
        tinit=total_steps // 10,
        tfinal=total_steps // 5,
        deltaT=max(1, total_steps // 100),
        total_step=total_steps,
        **_low_rank(config),
        **common,
    )


def _ia3(config: FinetuneConfig, total_steps: int, common: dict[str, Any]) -> PeftConfig:
    from pyfastpeft import IA3Config

    return IA3Config(target_modules=config.targets(), **common)


def _bitfit(config: FinetuneConfig, total_steps: int, common: dict[str, Any]) -> PeftConfig:
    from pyfastpeft import BitFitConfig

    return BitFitConfig(target_modules=config.targets(), **common)


def _prompt(config: FinetuneConfig, total_steps: int, common: dict[str, Any]) -> PeftConfig:
    from pyfastpeft import PromptTuningConfig, PromptTuningInit

    start: dict[str, Any] = {"prompt_tuning_init": PromptTuningInit.SAMPLE_VOCAB}
    if config.prompt_text is not None:
        start = {"prompt_tuning_init": PromptTuningInit.TEXT, "prompt_tuning_init_text": config.prompt_text}
        start["tokenizer_name_or_path"] = config.model
    return PromptTuningConfig(num_virtual_tokens=config.virtual_tokens, **start, **common)


def _p_tuning(config: FinetuneConfig, total_steps: int, common: dict[str, Any]) -> PeftConfig:
    from pyfastpeft import PromptEncoderConfig

    kind = config.prompt_encoder.upper()
    return PromptEncoderConfig(num_virtual_tokens=config.virtual_tokens, encoder_reparameterization_type=kind, **common)


def _prefix(config: FinetuneConfig, total_steps: int, common: dict[str, Any]) -> PeftConfig:
    from pyfastpeft import PrefixTuningConfig

    return PrefixTuningConfig(
        num_virtual_tokens=config.virtual_tokens, prefix_projection=config.prefix_projection, **common
    )


def _trainable_tokens(config: FinetuneConfig, total_steps: int, common: dict[str, Any]) -> PeftConfig:
    from pyfastpeft import TrainableTokensConfig

    if common["modules_to_save"]:
        raise ConfigError("--modules-to-save: --method trainable_tokens trains tokens alone; use lora for both")
    return TrainableTokensConfig(
        token_indices=config.tokens(), target_modules=config.targets(), task_type=common["task_type"]
    )


def _low_rank(config: FinetuneConfig) -> dict[str, Any]:
    alpha = int(config.alpha) if float(config.alpha).is_integer() else config.alpha
    return {"lora_alpha": alpha, "lora_dropout": config.dropout, "target_modules": config.targets()}


_CONFIGS: dict[str, Callable[[FinetuneConfig, int, dict[str, Any]], PeftConfig]] = {
    "adalora": _adalora,
    "bitfit": _bitfit,
    "ia3": _ia3,
    "lora": _lora,
    "p_tuning": _p_tuning,
    "prefix": _prefix,
    "prompt": _prompt,
    "qlora": _lora,
    "relora": _lora,
    "trainable_tokens": _trainable_tokens,
}


class Restarts:
    """ReLoRA's restarts and its schedule; for other methods nothing happens."""

    def __init__(self, config: FinetuneConfig, total_steps: int, warmup: int) -> None:
        self.every = 0
        if config.method == "relora":
            from pyfastpeft.methods.relora import JaggedCosine

            self.every = config.restart_every or max(1, total_steps // 5)
            self.total = total_steps
            self.factor = JaggedCosine(
                total_steps, self.every, min(warmup, total_steps - 1), self.every // 10, config.min_lr_ratio
            )

    def learning_rate(self, step: int, peak: float) -> float | None:
        """ReLoRA's rate of step `step` (0 is the first); None: the schedule is the job's."""
        return peak * self.factor(step) if self.every else None

    def after_step(self, done: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if self.every and done % self.every == 0 and done < self.total:
            from pyfastpeft.methods.relora.training import restart

            restart(model, optimizer, "magnitude", 0.9)
