"""PeftModel and get_peft_model: adapters on any model, with the names and the files of Hugging Face PEFT."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from pyfastpeft import checkpoint, mixed_batch, prompt_model, status
from pyfastpeft.adapted_model import AdaptedModel, check_config
from pyfastpeft.adapter_files import load_adapter_files, save_adapter
from pyfastpeft.integrations.trainer import teach_trainer
from pyfastpeft.methods.base import AdapterHolder, PeftConfig, TaskType
from pyfastpeft.nn import as_base_linear


class PeftModel(nn.Module):
    """A model with adapters: `base_model` is the AdaptedModel, `base_model.model` the model itself, changed in place.

    model                   any nn.Module; transformers' models get checkpointing, generation and so on passed through
    peft_config             a config such as LoraConfig; copied, what was found out is in `self.peft_config[name]`
    autocast_adapter_dtype  adapter weights in fp32 whatever the base has (computed in the base's dtype); False: in the
                            base's dtype
    Calls and unknown attributes go to the model. On an error the model is left as it was.
    """

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        super().__init__()
        adapted = AdaptedModel(_check_bare(model))
        adapted.add_adapter(adapter_name, _named(peft_config, model), fp32=autocast_adapter_dtype)
        self._finish(adapted)

    def _finish(self, adapted: AdaptedModel) -> None:
        self.base_model = adapted
        self._show_signature()
        flag = "is_activation_checkpointing"  # transformers < 5 has it under the older name
        flag = flag if hasattr(adapted.model, flag) else "is_gradient_checkpointing"
        if getattr(adapted.model, flag, False):
            self._make_inputs_require_grad()
        teach_trainer()

    def _show_signature(self) -> None:
        """forward with the model's own signature: trainers look there for the columns to keep."""
        adapted = self.base_model

        def forward(*args, **kwargs):
            return adapted(*args, **kwargs)

        forward.__signature__ = inspect.signature(adapted.model.forward)
        self.forward = forward

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        state.pop("forward", None)  # bound to this base_model; a copy gets its own
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._show_signature()

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)

    def get_base_model(self) -> nn.Module:
        return self.base_model.model

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        return self.base_model.peft_config

    @property
    def active_adapters(self) -> list[str]:
        return list(self.base_model.active_adapters)

    @property
    def active_adapter(self) -> str | list[str]:
        names = self.active_adapters
        return names[0] if len(names) == 1 else names

    @property
    def active_peft_config(self) -> PeftConfig:
        return self.peft_config[self.active_adapters[0]]

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Adds an adapter, frozen and inactive until set_adapter(); arguments as for the first one."""
        config = _named(peft_config, self.get_base_model())
        self.base_model.add_adapter(adapter_name, config, fp32=autocast_adapter_dtype)

    def set_adapter(self, adapter_name: str | Iterable[str], inference_mode: bool = False) -> None:
        """Makes one adapter, or the sum of several, the active and trainable one (frozen with inference_mode)."""
        self.base_model.set_adapter(adapter_name, inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        self.base_model.delete_adapter(adapter_name)

    def disable_adapter(self):
        """`with model.disable_adapter():` answers as without adapters inside."""
        return self.base_model.disable_adapter()

    def generate(self, *args, adapter_names: list[str] | None = None, **kwargs) -> Any:
        """The model's own generate(), with the active adapter's virtual tokens where it has some.

        adapter_names   the adapter of each sample of the batch, in place of the active ones; "__base__" for none. With beams
                        or several sequences a sample's all have its adapter.
        """
        model = self.get_base_model()
        with mixed_batch.mixed(self.base_model, adapter_names, mixed_batch.expansion(model, args, kwargs)):
            return prompt_model.generate(model, *args, **kwargs)

    def nearest_tokens(
        self, k: int = 5, metric: str = "cosine", tokenizer: Any = None, adapter_name: str | None = None
    ) -> list[list[tuple[Any, float]]]:
        """For each virtual token the k nearest tokens of the vocabulary; see prompt_model.nearest_tokens."""
        name = self.active_adapters[0] if adapter_name is None else self.base_model.check_known(adapter_name)
        return prompt_model.nearest_tokens(self.get_base_model(), name, k, metric, tokenizer)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None, **kwargs) -> None:
        """The model's own, and what reentrant checkpointing needs: inputs of the first layer that require grad."""
        model = self.get_base_model()
        if hasattr(model, "activation_checkpointing_enable"):  # transformers >= 5 renamed it
            model.activation_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)
        else:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)
        self._make_inputs_require_grad()

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs: dict | None = None, **kwargs) -> None:
        """gradient_checkpointing_enable under transformers' new name."""
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs, **kwargs)

    def _make_inputs_require_grad(self) -> None:
        model = self.get_base_model()
        if hasattr(model, "enable_input_require_grads") and getattr(model, "_require_grads_hook", None) is None:
            model.enable_input_require_grads()

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all) parameters; a 4-bit weight counts as the N · K values it stands for."""
        logical = {}
        for module in self.modules():
            view = as_base_linear(module)
            if view is not None and view.is_quantized:
                logical[id(module.weight)] = view.in_features * view.out_features
        trainable = total = 0
        for parameter in self.parameters():
            count = logical.get(id(parameter), parameter.numel())
            total += count
            trainable += count if parameter.requires_grad else 0
        return trainable, total

    def print_trainable_parameters(self) -> None:
        trainable, total = self.get_nb_trainable_parameters()
        share = 100 * trainable / total if total else 0.0
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")

    def get_layer_status(self) -> list[status.TunerLayerStatus]:
        """The state of every adapted layer: see pyfastpeft.status."""
        return status.get_layer_status(self)

    def get_model_status(self) -> status.TunerModelStatus:
        """The state of the model's adapters: see pyfastpeft.status."""
        return status.get_model_status(self)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: bool | str = "auto",
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        path_initial_model_for_weight_conversion: str | os.PathLike | None = None,
    ) -> None:
        """Writes adapters (None: all): "default" into the folder itself, others into `<folder>/<name>/`.

        safe_serialization     safetensors; False: adapter_model.bin
        save_embedding_layers  also the weights of input and output embedding; "auto": when the vocabulary was resized
        state_dict             values gathered elsewhere (FSDP), by the model's own keys
        path_initial_model_for_weight_conversion   where a PiSSA or OLoRA adapter was saved before training: it is written
                               as plain LoRA of twice the rank, for the original base (methods/lora/plain.py)
        Raises ValueError where there is no such conversion, with nothing written.
        Raises OSError when it cannot be written; the former files are then untouched.
        """
        names = list(self.peft_config) if selected_adapters is None else list(selected_adapters)
        for name in names:
            self.base_model.check_known(name)
        if not is_main_process:
            return
        gathered = {id(t): k for k, t in self.state_dict(keep_vars=True).items()} if state_dict is not None else {}

        def value_of(tensor: torch.Tensor) -> torch.Tensor:
            # what is not in state_dict was computed from the live values
            return state_dict[gathered[id(tensor)]] if id(tensor) in gathered else tensor

        for name in names:
            save_adapter(
                self.base_model,
                name,
                save_directory if name == "default" else os.path.join(save_directory, name),
                safe_serialization=safe_serialization,
                save_embedding_layers=save_embedding_layers,
                value_of=value_of,
                initial=path_initial_model_for_weight_conversion,
            )

    def create_or_update_model_card(self, output_dir: str | os.PathLike) -> None:
        """Gives the README.md of a folder what the hub reads of an adapter; transformers' Trainer calls this after its own."""
        checkpoint.update_model_card(output_dir, self.active_peft_config)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        subfolder: str | None = None,
        **hub_kwargs,
    ) -> PeftModel:
        """The model with the adapter of a folder (or hub repository) that save_pretrained, ours or PEFT's, wrote.

        is_trainable   go on training it; otherwise it is frozen and the model put into eval mode
        config         instead of the folder's adapter_config.json
        Raises ValueError, naming the file and what is wrong with it; the model is then left as it was.
        """
        adapted = AdaptedModel(_check_bare(model))
        config = load_adapter_files(
            adapted, model_id, adapter_name, is_trainable, config, autocast_adapter_dtype, subfolder, hub_kwargs
        )
        kind = _BY_TASK.get(config.task_type, PeftModel) if cls is PeftModel else cls
        self = kind.__new__(kind)
        nn.Module.__init__(self)
        self._finish(adapted)
        return self.train(model.training) if is_trainable else self.eval()

    def load_adapter(
        self,
        model_id: str | os.PathLike,
        adapter_name: str,
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        subfolder: str | None = None,
        **hub_kwargs,
    ) -> None:
        """Loads a further adapter, inactive until set_adapter(); arguments and errors as in from_pretrained.

        A name that exists already gets the values of the file.
        """
        load_adapter_files(
            self.base_model, model_id, adapter_name, is_trainable, config, autocast_adapter_dtype, subfolder, hub_kwargs
        )
        if not is_trainable:
            self.eval()


# An instance answers through a forward of its own, with the model's signature (_show_signature); transformers' Trainer
# looks at the class's for the names of labels, without which it evaluates no loss.


class PeftModelForCausalLM(PeftModel):
    """The class of task_type CAUSAL_LM."""

    def forward(self, *args, labels=None, **kwargs) -> Any:
        return self.base_model(*args, labels=labels, **kwargs)


class PeftModelForSeq2SeqLM(PeftModel):
    """The class of task_type SEQ_2_SEQ_LM."""

    def forward(self, *args, labels=None, **kwargs) -> Any:
        return self.base_model(*args, labels=labels, **kwargs)


class PeftModelForSequenceClassification(PeftModel):
    """The class of task_type SEQ_CLS; the head ("classifier" or "score") is trained and saved with the adapter."""

    def forward(self, *args, labels=None, **kwargs) -> Any:
        return self.base_model(*args, labels=labels, **kwargs)


class PeftModelForTokenClassification(PeftModel):
    """The class of task_type TOKEN_CLS; the head ("classifier" or "score") is trained and saved with the adapter."""

    def forward(self, *args, labels=None, **kwargs) -> Any:
        return self.base_model(*args, labels=labels, **kwargs)


class PeftModelForQuestionAnswering(PeftModel):
    """The class of task_type QUESTION_ANS."""

    def forward(self, *args, start_positions=None, end_positions=None, **kwargs) -> Any:
        return self.base_model(*args, start_positions=start_positions, end_positions=end_positions, **kwargs)


class PeftModelForFeatureExtraction(PeftModel):
    """The class of task_type FEATURE_EXTRACTION."""


_BY_TASK: dict[TaskType | None, type[PeftModel]] = {
    TaskType.CAUSAL_LM: PeftModelForCausalLM,
    TaskType.SEQ_2_SEQ_LM: PeftModelForSeq2SeqLM,
    TaskType.SEQ_CLS: PeftModelForSequenceClassification,
    TaskType.TOKEN_CLS: PeftModelForTokenClassification,
    TaskType.QUESTION_ANS: PeftModelForQuestionAnswering,
    TaskType.FEATURE_EXTRACTION: PeftModelForFeatureExtraction,
}


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """Adds adapters to a model, in place, freezes the rest and returns the PeftModel of the config's task_type.

    model                   any nn.Module, dense or quantised (quantize_model)
    peft_config             LoraConfig, …; not changed
    autocast_adapter_dtype  True: adapter weights are stored and updated in fp32 and computed in the base's dtype;
                            False: stored in the base's dtype
    revision                noted in the config: which revision of the base model this is
    low_cpu_mem_usage       accepted for PEFT's sake, without effect: loading from files never draws initial values

    Raises TypeError / ValueError for a config that does not fit the model; the model is then left as it was.
    """
    check_config(peft_config)
    if revision is not None:
        peft_config = peft_config.copy()
        peft_config.revision = revision
    kind = _BY_TASK.get(peft_config.task_type, PeftModel)
    return kind(model, peft_config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)


def prepare_model_for_kbit_training(
    model: nn.Module, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: dict | None = None
) -> nn.Module:
    """Freezes a quantised model and turns gradient checkpointing on; returns the model.

    PEFT's function of this name also casts every 16-bit parameter to fp32, which makes norms, embeddings and head
    compute in fp32 and costs memory; here they keep their dtype, because adapters are kept in fp32 anyway.
    """
    model.requires_grad_(False)
    if use_gradient_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable(gradient_checkpointing_kwargs)
        if hasattr(model, "enable_input_require_grads") and getattr(model, "_require_grads_hook", None) is None:
            model.enable_input_require_grads()
    return model


def _check_bare(model: nn.Module) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model is a {type(model).__name__}, expected a torch.nn.Module")
    if isinstance(model, PeftModel):
        raise ValueError("the model is a PeftModel already; use its add_adapter() or load_adapter()")
    if any(isinstance(module, AdapterHolder) for module in model.modules()):
        raise ValueError(
            "the model has adapters in it already; use add_adapter() of its PeftModel, or take them out with unload()"
        )
    return model


def _named(config: PeftConfig, model: nn.Module) -> PeftConfig:
    """A copy of the config that says which model it is for."""
    check_config(config)
    name = getattr(model, "name_or_path", None) or getattr(getattr(model, "config", None), "_name_or_path", None)
    config = config.copy()
    if name and config.base_model_name_or_path not in (None, name):
        warnings.warn(
            f"the config's base_model_name_or_path was {config.base_model_name_or_path!r}, the model is {name!r}",
            stacklevel=4,
        )
    config.base_model_name_or_path = name or config.base_model_name_or_path
    return config
