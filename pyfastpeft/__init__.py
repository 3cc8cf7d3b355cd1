"""pyfastpeft: parameter-efficient fine-tuning at the speed of the hardware."""

from pyfastpeft import integrations, nn, ops, optim
from pyfastpeft.build_info import build_info
from pyfastpeft.methods import (
    AdaLoraConfig,
    BitFitConfig,
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftType,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptEncoderReparameterizationType,
    PromptTuningConfig,
    PromptTuningInit,
    TaskType,
    TrainableTokensConfig,
)
from pyfastpeft.methods.lora.config import EvaConfig
from pyfastpeft.methods.lora.eva import get_eva_state_dict, initialize_lora_eva_weights
from pyfastpeft.methods.lora.hotswap import (
    hotswap_adapter,
    hotswap_adapter_from_state_dict,
    prepare_model_for_compiled_hotswap,
)
from pyfastpeft.nn.load_quantized import load_quantized_state_dict
from pyfastpeft.peft_model import (
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from pyfastpeft.quantize_model import dequantize_model, quantize_model
from pyfastpeft.quantized_tensor import QuantizedTensor
from pyfastpeft.status import get_layer_status, get_model_status

__all__ = [
    "AdaLoraConfig",
    "BitFitConfig",
    "EvaConfig",
    "IA3Config",
    "LoraConfig",
    "PeftConfig",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftType",
    "PrefixTuningConfig",
    "PromptEncoderConfig",
    "PromptEncoderReparameterizationType",
    "PromptTuningConfig",
    "PromptTuningInit",
    "QuantizedTensor",
    "TaskType",
    "TrainableTokensConfig",
    "build_info",
    "dequantize_model",
    "get_eva_state_dict",
    "get_layer_status",
    "get_model_status",
    "get_peft_model",
    "hotswap_adapter",
    "hotswap_adapter_from_state_dict",
    "initialize_lora_eva_weights",
    "integrations",
    "load_quantized_state_dict",
    "nn",
    "ops",
    "optim",
    "prepare_model_for_compiled_hotswap",
    "prepare_model_for_kbit_training",
    "quantize_model",
]
__version__ = build_info()["version"]
