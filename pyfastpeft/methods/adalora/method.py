"""How AdaLoRA enters a model, its share of the loss, and the files, which hold the triplets that were kept."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from pyfastpeft.methods.adalora.allocation import RankAllocator
from pyfastpeft.methods.adalora.config import AdaLoraConfig
from pyfastpeft.methods.adalora.layer import AdaLoraLinear, adalora_layers
from pyfastpeft.methods.adalora.targets import default_target_modules
from pyfastpeft.methods.base import KEY_PREFIX, PeftType
from pyfastpeft.methods.layer_method import LayerMethod


class AdaLoraMethod(LayerMethod):
    peft_type = PeftType.ADALORA
    config_class = AdaLoraConfig
    layer_class = AdaLoraLinear
    resume_name = "adalora_state.safetensors"  # where the allocation stands

    def fill_targets(self, model: nn.Module, config: AdaLoraConfig, strict: bool) -> None:
        if config.target_modules is None:
            config.target_modules = default_target_modules(model)

    def check_targets(self, config: AdaLoraConfig, targets: dict[str, nn.Module], strict: bool) -> None:
        for key, kept in (config.rank_pattern or {}).items():
            if len(kept) != config.init_r:
                raise ValueError(
                    f"AdaLoraConfig: rank_pattern[{key!r}] has {len(kept)} entries, expected init_r = {config.init_r}"
                )

    def inject(self, model: nn.Module, config: AdaLoraConfig, adapter_name: str, **how) -> AdaLoraConfig:
        config = super().inject(model, config, adapter_name, **how)
        layers = adalora_layers(model, adapter_name)
        allocator = RankAllocator(layers, config, adapter_name)
        for layer in layers.values():
            layer.allocators[adapter_name] = allocator
        return config

    def penalty(self, model: nn.Module, config: AdaLoraConfig, adapter_name: str) -> torch.Tensor | None:
        """orth_reg_weight · mean of ‖A Aᵀ − I‖_F and ‖Bᵀ B − I‖_F over the layers in training."""
        norms = []
        for layer in adalora_layers(model, adapter_name).values():
            a, b = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
            if layer.enabled and layer.r[adapter_name] and a.requires_grad:
                identity = torch.eye(len(a), dtype=a.dtype, device=a.device)
                norms += [torch.linalg.matrix_norm(a @ a.T - identity), torch.linalg.matrix_norm(b.T @ b - identity)]
        if not norms or not config.orth_reg_weight:
            return None
        return config.orth_reg_weight * sum(norm.to(norms[0].device) for norm in norms) / len(norms)

    def update_and_allocate(self, model: nn.Module, adapter_name: str, step: int) -> None:
        allocator = _allocator(model, adapter_name)
        if allocator is not None:
            allocator.update_and_allocate(step)

    def to_file(self, tensors: Mapping[str, torch.Tensor], config: AdaLoraConfig) -> dict[str, torch.Tensor]:
        """The rows of A and E and the columns of B that the rank pattern keeps. A triplet that has come back since the last
        masking, with an E that is not zero, is part of the model: config, the file's, gets it into its pattern."""
        tensors = dict(tensors)
        for name, kept in (config.rank_pattern or {}).items():
            e = tensors.get(KEY_PREFIX + name)
            if e is not None and len(e) == len(kept):
                config.rank_pattern[name] = [k or bool(value) for k, value in zip(kept, e[:, 0], strict=True)]
        for (key, dim), kept in _kept(tensors, config):
            if tensors[key].shape[dim] == len(kept):
                tensors[key] = tensors[key].detach().index_select(dim, kept.nonzero()[:, 0].to(tensors[key].device))
        return tensors

    def from_file(
        self, found: Mapping[str, torch.Tensor], live: Mapping[str, torch.Tensor], config: AdaLoraConfig
    ) -> dict[str, torch.Tensor]:
        """The file's triplets among new ones with E = 0 where the adapter is to be trained on with all init_r of them."""
        found = dict(found)
        for (key, dim), kept in _kept(found, config):
            mine, file = live.get(key), found[key]
            if mine is None or mine.shape[dim] != len(kept) or file.dim() != 2 or file.shape[dim] != int(kept.sum()):
                continue
            shape = [len(kept) if d == dim else size for d, size in enumerate(file.shape)]
            whole = torch.zeros(shape) if key.endswith("lora_E") else torch.randn(shape) * 0.02
            found[key] = whole.to(file.dtype).index_copy(dim, kept.nonzero()[:, 0], file)
        return found

    def resume_tensors(self, model: nn.Module, config: AdaLoraConfig, adapter_name: str) -> dict[str, torch.Tensor]:
        """Of an adapter in training: all triplets, the averages of their importance, and the step."""
        allocator = _allocator(model, adapter_name)
        if allocator is None or not allocator.step:
            return {}
        tensors: dict[str, torch.Tensor] = {"step": torch.tensor(allocator.step)}
        for key, parameter in allocator.parameters().items():
            tensors[key] = parameter
            if key in allocator.averages:
                tensors[f"{key}.mean"], tensors[f"{key}.uncertainty"] = allocator.averages[key]
        return tensors

    def loading_tensors(self, model: nn.Module, config: AdaLoraConfig, adapter_name: str, resume) -> dict:
        live = self.tensors(model, config, adapter_name)
        if resume and not config.inference_mode:
            parameters = _allocator(model, adapter_name).parameters()
            shapes = {key: tensor.shape for key, tensor in resume.items() if key != "step"}
            kinds = ("", ".mean", ".uncertainty") if any(key.endswith(".mean") for key in shapes) else ("",)
            expected = {f"{key}{kind}": p.shape for key, p in parameters.items() for kind in kinds}
            if "step" not in resume or shapes != expected:
                raise ValueError(
                    f"{self.resume_name} does not fit the model, nothing was loaded; without that file the adapter loads "
                    "with the triplets that were kept"
                )
        return live

    def finish_loading(self, model: nn.Module, config: AdaLoraConfig, adapter_name: str, live, resume) -> None:
        """For training: everything is where it was. What is loaded for inference holds the kept triplets only."""
        if not resume or config.inference_mode:
            return
        allocator = _allocator(model, adapter_name)
        allocator.step = int(resume["step"])
        with torch.no_grad():
            for key, parameter in allocator.parameters().items():
                parameter.copy_(resume[key])
                if f"{key}.mean" in resume:  # there are none once the ranks are final
                    pair = (resume[f"{key}.mean"], resume[f"{key}.uncertainty"])
                    allocator.averages[key] = tuple(each.to(parameter.device, copy=True) for each in pair)


def _allocator(model: nn.Module, adapter_name: str) -> RankAllocator | None:
    layers = adalora_layers(model, adapter_name).values()
    return next((layer.allocators[adapter_name] for layer in layers if adapter_name in layer.allocators), None)


def _kept(tensors: Mapping[str, torch.Tensor], config: AdaLoraConfig):
    """((key, the dimension of the triplets), which are kept) of the tensors that the rank pattern speaks of."""
    for name, kept in (config.rank_pattern or {}).items():
        for part, dim in (("lora_A", 0), ("lora_E", 0), ("lora_B", 1)):
            key = KEY_PREFIX + name.removesuffix("lora_E") + part
            if key in tensors:
                yield (key, dim), torch.tensor(kept, dtype=torch.bool)
