"""Embeddings, convolutions and packed attention as a method sees them: the linear map W [N, K] that merging an adapter writes into.

    nn.Embedding       y = onehot(x) Wᵀ       W = weightᵀ [D, V], so K = V tokens and N = D features
    nn.Conv1d, 2d, 3d  y = patches(x) Wᵀ      W = weight [N, K/groups · k], the kernel's positions in one row

Both are dense: quantize_model leaves them alone. Only linear layers can be what "all-linear", quantisation and BitFit
mean, so as_base_linear() knows nothing of these; as_base_layer() does.
"""

from __future__ import annotations

import torch
from torch import nn

from pyfastpeft.nn.base_linear import BaseLinear, as_base_linear
from pyfastpeft.nn.dense import relative_error

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class BaseAttention(BaseLinear):
    """nn.MultiheadAttention with a packed projection: W [4E, E] is in_proj_weight [3E, E] above out_proj.weight [E, E].

    in_features E; out_features 3E, those of the packed projection; the biases are not a method's to write.
    """

    module: nn.MultiheadAttention
    bias = None

    @property
    def in_features(self) -> int:
        return self.module.embed_dim

    @property
    def out_features(self) -> int:
        return 3 * self.module.embed_dim

    @property
    def weight_dtype(self) -> torch.dtype:
        return self.module.in_proj_weight.dtype

    @property
    def device(self) -> torch.device:
        return self.module.in_proj_weight.device

    def _weight(self) -> torch.Tensor:
        return torch.cat((self.module.in_proj_weight, self.module.out_proj.weight))

    def _expected_shape(self) -> tuple[int, ...]:
        return 4 * self.module.embed_dim, self.module.embed_dim

    @torch.no_grad()
    def set_weight(self, weight: torch.Tensor) -> float:
        self._check_new_weight(weight)
        self.restore_weight(weight)
        return relative_error(self._weight(), weight)

    def snapshot_weight(self, device: torch.device | str | None = None) -> torch.Tensor:
        return self._weight().detach().to(device or self.device, copy=True)

    @torch.no_grad()
    def restore_weight(self, snapshot: torch.Tensor) -> None:
        packed, out = snapshot.split((self.out_features, self.in_features))
        self.module.in_proj_weight.detach().copy_(packed), self.module.out_proj.weight.detach().copy_(out)


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
            return super().set_weight(weight)
        self._check_new_weight(weight)
        target.detach().copy_(weight.view(target.shape))
        return relative_error(target.detach().flatten(1), weight)

    def _expected_shape(self) -> tuple[int, ...]:
        weight = self.module.weight
        return weight.shape[0], weight[0].numel()


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
    return BaseConv(module) if isinstance(module, CONVOLUTIONS) else None
