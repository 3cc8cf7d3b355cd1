"""ReLoRA (Lialin et al. 2023, arXiv:2307.05695): LoRA whose updates are merged and started again, many times over.

It is a way of training LoRA adapters, not a kind of adapter: it works on any model with LoraConfig adapters.
"""

from pyfastpeft.methods.relora.merging import merge_and_reinit
from pyfastpeft.methods.relora.optimizer_state import reset_optimizer_state
from pyfastpeft.methods.relora.schedule import JaggedCosine, JaggedCosineLR
from pyfastpeft.methods.relora.training import ReLora, relora_callback

__all__ = ["JaggedCosine", "JaggedCosineLR", "ReLora", "merge_and_reinit", "relora_callback", "reset_optimizer_state"]
