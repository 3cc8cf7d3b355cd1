"""PeftConfig: the fields that the configs of all methods share, and their file, adapter_config.json."""

from __future__ import annotations

import copy
import dataclasses
import enum
import inspect
import warnings
from typing import Any

# the release of Hugging Face PEFT whose fields, defaults and files these are; written where a config says none
PEFT_VERSION = "0.21.2"


class TaskType(str, enum.Enum):
    """What the adapted model is for. SEQ_CLS and TOKEN_CLS train and save the classification head as well."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


class PeftType(str, enum.Enum):
    """The methods by the names that `peft_type` has in adapter_config.json; registry.py says which are here."""

    PROMPT_TUNING = "PROMPT_TUNING"
    P_TUNING = "P_TUNING"
    PREFIX_TUNING = "PREFIX_TUNING"
    LORA = "LORA"
    ADALORA = "ADALORA"
    IA3 = "IA3"
    TRAINABLE_TOKENS = "TRAINABLE_TOKENS"
    BITFIT = "BITFIT"  # not one of PEFT's


@dataclasses.dataclass
class PeftConfig:
    """Fields common to all methods, in PEFT's order.

    task_type                 a TaskType or its name; None for any nn.Module
    peft_type                 set by the method's own class
    auto_mapping              base model class and library, written when there is no task_type
    peft_version              of the file's layout
    base_model_name_or_path, revision   where the base came from; filled in by get_peft_model
    inference_mode            whether the adapter is frozen when it is added
    """

    task_type: TaskType | str | None = None
    peft_type: PeftType | str | None = None
    auto_mapping: dict | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    def __post_init__(self) -> None:
        if self.task_type is not None:
            try:
                self.task_type = TaskType(self.task_type)
            except ValueError:
                names = ", ".join(TaskType.__members__)
                raise ValueError(
                    f"{type(self).__name__}: task_type is {self.task_type!r}, expected None or one of {names}"
                ) from None
        if self.peft_version is None:
            self.peft_version = PEFT_VERSION

    def to_dict(self) -> dict[str, Any]:
        """The fields as adapter_config.json has them."""
        return dataclasses.asdict(self)

    def copy(self) -> PeftConfig:
        return copy.deepcopy(self)

    def save_pretrained(self, save_directory: str, **kwargs) -> None:
        """Writes `<save_directory>/adapter_config.json` (atomically: a failure leaves the former file).

        auto_mapping_dict=   what to write as auto_mapping
        """
        from pyfastpeft.checkpoint import write_config

        write_config(save_directory, self, kwargs.get("auto_mapping_dict"))

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **hub_kwargs
    ) -> PeftConfig:
        """Reads adapter_config.json of a folder, or of a repository of the Hugging Face hub.

        Called on PeftConfig it gives the class that the file's peft_type names. Raises ValueError for JSON that is
        broken or not a config, naming the file and the place; keys that the class does not know are named and dropped.
        """
        from pyfastpeft.checkpoint import read_config

        return read_config(pretrained_model_name_or_path, subfolder, expected=cls, **hub_kwargs)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> PeftConfig:
        """A config of this class from the fields of a file; unknown ones are warned about and dropped."""
        known = set(inspect.signature(cls).parameters)
        unknown = sorted(set(fields) - known - {"runtime_config"})
        if unknown:
            warnings.warn(
                f"{cls.__name__}: the config has {unknown}, which this class does not know; ignored. A newer release "
                "may have written the file.",
                stacklevel=3,
            )
        return cls(**{key: value for key, value in fields.items() if key in known and key != "runtime_config"})

    @property
    def is_prompt_learning(self) -> bool:
        """Whether the method adds virtual tokens rather than changing layers."""
        return False
