"""The fine-tuning methods: one folder each, all listed in registry.py."""

from pyfastpeft.methods.adalora import AdaLoraConfig
from pyfastpeft.methods.base import PeftConfig, PeftType, TaskType
from pyfastpeft.methods.bitfit import BitFitConfig
from pyfastpeft.methods.ia3 import IA3Config
from pyfastpeft.methods.lora import LoraConfig
from pyfastpeft.methods.p_tuning import PromptEncoderConfig, PromptEncoderReparameterizationType
from pyfastpeft.methods.prefix_tuning import PrefixTuningConfig
from pyfastpeft.methods.prompt_tuning import PromptTuningConfig, PromptTuningInit
from pyfastpeft.methods.trainable_tokens import TrainableTokensConfig

__all__ = [
    "AdaLoraConfig",
    "BitFitConfig",
    "IA3Config",
    "LoraConfig",
    "PeftConfig",
    "PeftType",
    "PrefixTuningConfig",
    "PromptEncoderConfig",
    "PromptEncoderReparameterizationType",
    "PromptTuningConfig",
    "PromptTuningInit",
    "TaskType",
    "TrainableTokensConfig",
]
