"""IA3Conv: a convolution and the vectors that rescale the channels of its input or its output; see layer.py."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from pyfastpeft.methods.ia3.config import IA3Config
from pyfastpeft.methods.ia3.layer import IA3Linear


class IA3Conv(IA3Linear):
    """nn.Conv1d, Conv2d or Conv3d with (IA)³ adapters: `ia3_l[name]` [1, K, 1…] (feed-forward) or [1, N, 1…], PEFT's shapes."""

    def vector_shape(self, config: IA3Config, path: str) -> tuple[int, ...]:
        channels = self.in_features if config.is_feedforward(path) else self.out_features
        return 1, channels, *[1] * len(self.base_layer.kernel_size)

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """x [..., K, positions…] -> y [..., N, positions…] in the dtype the base gives; products in fp32."""
        if not self.active or not self.enabled or self.merged_adapters:
            return self.base_layer(x, *args, **kwargs)
        of_input, of_output = self._scale(self.active, True), self._scale(self.active, False)
        ones = [1] * len(self.base_layer.kernel_size)
        if of_input is not None:
            x = (x * of_input.view(-1, *ones)).to(x.dtype)
        y = self.base_layer(x, *args, **kwargs)
        return y if of_output is None else (y * of_output.view(-1, *ones)).to(y.dtype)

    def _input_columns(self, of_input: torch.Tensor) -> torch.Tensor:
        """l_in [K] for the columns of W: every channel has its kernel's positions, and a row those of its group [N, K/g · k]."""
        base = self.base_layer
        groups, positions = base.groups, base.weight[0, 0].numel()
        by_group = of_input.view(groups, -1).repeat_interleave(positions, dim=1)
        return by_group.repeat_interleave(self.out_features // groups, dim=0)

    def merged_weights(self, names: Iterable[str]) -> tuple[torch.Tensor, torch.Tensor | None]:
        of_input, of_output = self._scale(names, True), self._scale(names, False)
        weight = self.base.get_weight(torch.promote_types(self.base.weight_dtype, torch.float32))
        bias = None
        if of_input is not None:
            weight = weight * self._input_columns(of_input)
        if of_output is not None:
            weight = weight * of_output[:, None]
            bias = None if self.base.bias is None else self.base.bias.detach() * of_output
        return weight, bias
