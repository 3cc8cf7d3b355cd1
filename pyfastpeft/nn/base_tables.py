"""Embeddings, convolutions and attention as a method sees them: the linear map W [N, K] that merging an adapter writes into.

    nn.Embedding       y = onehot(x) Wᵀ       W = weightᵀ [D, V], so K = V tokens and N = D features
    nn.Conv1d, 2d, 3d  y = patches(x) Wᵀ      W = weight [N, K/groups · k], the kernel's positions in one row
    ConvTranspose1d-3d                        W [N, K/groups · k] of a weight [K, N/groups, k]: a row for each output channel

Both are dense: quantize_model leaves them alone. Only linear layers can be what "all-linear", quantisation and BitFit
mean, so as_base_linear() knows nothing of these; as_base_layer() does.
"""

from __future__ import annotations

import torch
from torch import nn

from pyfastpeft.nn.base_linear import BaseLinear, as_base_linear
from pyfastpeft.nn.dense import relative_error

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class BaseAttention(BaseLinear):
    """nn.MultiheadAttention: W [1, total] is all that its products use, one after the other (parts()).

    in_features E; out_features 3E, those of the packed projection; the biases are in W.
    """

    module: nn.MultiheadAttention
    bias = None

    def parts(self) -> dict[str, nn.Parameter]:
        """The projections' weights and biases by their names, those that the module has."""
        names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias")
        parts = {name: self.module._parameters[name] for name in names}
        parts |= {f"out_proj.{name}": value for name, value in self.module.out_proj._parameters.items()}
        return {name: part for name, part in parts.items() if part is not None}

    @property
    def in_features(self) -> int:
        return self.module.embed_dim

    @property
    def out_features(self) -> int:
        return 3 * self.module.embed_dim

    @property
    def weight_dtype(self) -> torch.dtype:
        return self.module.out_proj.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.module.out_proj.weight.device

    def _weight(self) -> torch.Tensor:
        return torch.cat([part.flatten() for part in self.parts().values()])[None]

    def _expected_shape(self) -> tuple[int, ...]:
        return 1, sum(part.numel() for part in self.parts().values())

    @torch.no_grad()
    def set_weight(self, weight: torch.Tensor) -> float:
        self._check_new_weight(weight)
        self.restore_weight(weight)
        return relative_error(self._weight(), weight)

    def snapshot_weight(self, device: torch.device | str | None = None) -> torch.Tensor:
        return self._weight().detach().to(device or self.device, copy=True)

    @torch.no_grad()
    def restore_weight(self, snapshot: torch.Tensor) -> None:
        parts = list(self.parts().values())
        for part, values in zip(parts, snapshot[0].split([part.numel() for part in parts]), strict=True):
            part.detach().copy_(values.view(part.shape))


class BaseEmbedding(BaseLinear):
    """nn.Embedding: in_features V, out_features D."""

    fan_in_fan_out = True
    module: nn.Embedding
    bias = None

    @property
    def in_features(self) -> int:
        return self.module.num_embeddings

    @property
    def out_features(self) -> int:
        return self.module.embedding_dim

    def _weight(self) -> torch.Tensor:
        return self.module.weight.t()


class BaseConv(BaseLinear):
    """nn.Conv1d, Conv2d, Conv3d: in_features K and out_features N are channels; W has a column per channel of a group and
    position of the kernel."""

    module: nn.Conv2d

    @property
    def in_features(self) -> int:
        return self.module.in_channels

    @property
    def out_features(self) -> int:
        return self.module.out_channels

    def _weight(self) -> torch.Tensor:
        return self.module.weight.flatten(1)  # a view: torch's convolutions keep their weights contiguous

    @torch.no_grad()
    def set_weight(self, weight: torch.Tensor) -> float:
        """As for a linear base; the weight may also lie in memory in another order (channels last)."""
        target = self.module.weight
        if target.is_contiguous() or "weight" not in self.module._parameters:
            return BaseLinear.set_weight(self, weight)
        self._check_new_weight(weight)
        target.detach().copy_(weight.view(target.shape))
        return relative_error(target.detach().flatten(1), weight)

    def _expected_shape(self) -> tuple[int, ...]:
        weight = self.module.weight
        return weight.shape[0], weight[0].numel()


class BaseConvTranspose(BaseConv):
    """nn.ConvTranspose1d, 2d, 3d: in_features K and out_features N are channels."""

    module: nn.ConvTranspose2d

    def _weight(self) -> torch.Tensor:
        weight, groups = self.module.weight, self.module.groups
        return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1).flatten(1)

    def _expected_shape(self) -> tuple[int, ...]:
        return self.out_features, self.module.weight.numel() // self.out_features

    @torch.no_grad()
    def set_weight(self, weight: torch.Tensor) -> float:
        self._check_new_weight(weight)
        module = self.module
        if "weight" not in module._parameters:
            return BaseLinear.set_weight(self, weight)  # which says why not
        parts = weight.view(module.groups, -1, module.in_channels // module.groups, *module.kernel_size)
        module.weight.detach().copy_(parts.transpose(1, 2).flatten(0, 1))
        return relative_error(self._weight().detach(), weight)


def as_base_layer(module: nn.Module) -> BaseLinear | None:
    """as_base_linear(), and the views of embeddings, convolutions and MultiheadAttention; None for anything else."""
    view = as_base_linear(module)
    if view is not None:
        return view
    if isinstance(module, nn.MultiheadAttention):
        return BaseAttention(module)
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point() or weight.itemsize < 2:
        return None
    if isinstance(module, nn.Embedding):
        return BaseEmbedding(module)
    if isinstance(module, TRANSPOSED):
        return BaseConvTranspose(module)
    return BaseConv(module) if isinstance(module, CONVOLUTIONS) else None
