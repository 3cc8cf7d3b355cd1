"""The fine-tuning methods: one folder each, all listed in registry.py."""

from pyfastpeft.methods.base import PeftConfig, PeftType, TaskType
from pyfastpeft.methods.lora import LoraConfig

__all__ = ["LoraConfig", "PeftConfig", "PeftType", "TaskType"]
