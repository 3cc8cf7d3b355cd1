"""Which methods there are. A method is a folder here and one line below."""

from __future__ import annotations

from pyfastpeft.methods.adalora import AdaLoraMethod
from pyfastpeft.methods.base import Method, PeftConfig, PeftType
from pyfastpeft.methods.bitfit import BitFitMethod
from pyfastpeft.methods.ia3 import IA3Method
from pyfastpeft.methods.lora import LoraMethod
from pyfastpeft.methods.p_tuning import PTuningMethod
from pyfastpeft.methods.prefix_tuning import PrefixTuningMethod
from pyfastpeft.methods.prompt_tuning import PromptTuningMethod
from pyfastpeft.methods.trainable_tokens import TrainableTokensMethod

_METHODS = [
    AdaLoraMethod(),
    BitFitMethod(),
    IA3Method(),
    LoraMethod(),
    PTuningMethod(),
    PrefixTuningMethod(),
    PromptTuningMethod(),
    TrainableTokensMethod(),
]
METHODS: dict[PeftType, Method] = {method.peft_type: method for method in _METHODS}


def method_for(peft_type: PeftType | str | None) -> Method:
    """The method a config's peft_type names; ValueError lists what there is."""
    try:
        return METHODS[PeftType(peft_type)]
    except (KeyError, ValueError):
        names = ", ".join(sorted(t.value for t in METHODS))
        raise ValueError(f"peft_type is {peft_type!r}, expected one of {names}") from None


def config_class_for(peft_type: PeftType | str | None) -> type[PeftConfig]:
    return method_for(peft_type).config_class
