"""IA3Linear: a linear base and the vectors that rescale its input or its output.

    y = base(x · l)      feed-forward layers, l [K]
    y = base(x) · l      the others, l [N], the bias included

Vectors are kept in fp32 and multiplied in fp32 with one rounding, so a bf16 activation stays bf16. On a 4-bit base the
output's scale is part of the matmul's op (ops.linear_4bit_ia3). Several active adapters multiply.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from torch import nn

from pyfastpeft.methods.base import MethodLayer
from pyfastpeft.methods.ia3.config import IA3Config
from pyfastpeft.nn.base_linear import scaled


class IA3Linear(MethodLayer):
    """A linear layer with (IA)³ adapters: `ia3_l[name]` [1, K] (feed-forward) or [N, 1], PEFT's shapes.

    base_layer   anything as_base_linear has a view of: nn.Linear, Conv1D, NF4Linear
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.in_features, self.out_features = self.base.in_features, self.base.out_features
        self.ia3_l = nn.ParameterDict()
        self.feedforward: dict[str, bool] = {}

    def add_adapter(self, name: str, config: IA3Config, path: str, *, fp32: bool, init: bool) -> None:
        """Adds an adapter, frozen until it is activated; feed-forward or not as the config says of this path."""
        base, feedforward = self.base, config.is_feedforward(path)
        shape = self.vector_shape(config, path)
        # on the CPU and drawn even when it is ones, as PEFT does: a seed gives the same adapters everywhere
        vector = torch.randn(shape, device="cpu") if init else torch.empty(shape, device="cpu")
        if init and config.init_ia3_weights:
            vector.fill_(1.0)
        wide = torch.promote_types(base.weight_dtype, torch.float32) if fp32 else base.weight_dtype
        self.ia3_l[name] = nn.Parameter(vector.to(base.device, wide), requires_grad=False)
        self.feedforward[name] = feedforward

    def vector_shape(self, config: IA3Config, path: str) -> tuple[int, ...]:
        """What shape PEFT's files have for the vector of this path."""
        return (1, self.in_features) if config.is_feedforward(path) else (self.out_features, 1)

    def held_adapters(self) -> list[str]:
        return list(self.ia3_l)

    def adapter_tensors(self, name: str) -> dict[str, torch.Tensor]:
        return {"ia3_l": self.ia3_l[name]} if name in self.ia3_l else {}

    def remove_adapter(self, name: str) -> None:
        if name in self.merged_adapters:
            self.unmerge()
        if name in self.ia3_l:
            del self.ia3_l[name]
        self.feedforward.pop(name, None)
        self.active = tuple(other for other in self.active if other != name)

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """x [..., K] -> y [..., N] in the dtype the base gives."""
        if not self.active or not self.enabled or self.merged_adapters:
            return self.base_layer(x, *args, **kwargs)
        of_input, of_output = self._scale(self.active, True), self._scale(self.active, False)
        if of_input is not None:
            x = scaled(x, of_input)
        return self.base_layer(x) if of_output is None else self.base.forward_scaled(x, of_output)

    def _scale(self, names: Iterable[str], feedforward: bool) -> torch.Tensor | None:
        """The product of the vectors of the input (feedforward) or of the output; None where there is none."""
        vectors = [self.ia3_l[name].reshape(-1) for name in names if self.feedforward[name] is feedforward]
        return functools.reduce(torch.mul, vectors) if vectors else None

    def merged_weights(self, names: Iterable[str]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """diag(l_out) W diag(l_in) in fp32, and bias · l_out."""
        of_input, of_output = self._scale(names, True), self._scale(names, False)
        weight = self.base.get_weight(torch.promote_types(self.base.weight_dtype, torch.float32))
        bias = None
        if of_input is not None:
            weight = weight * of_input
        if of_output is not None:
            weight = weight * of_output[:, None]
            if self.base.bias is not None:
                bias = self.base.bias.detach() * of_output
        return weight, bias

    def extra_repr(self) -> str:
        kinds = ", ".join(f"{name}: {'input' if at else 'output'}" for name, at in self.feedforward.items())
        return f"in_features={self.in_features}, out_features={self.out_features}, {{{kinds}}}, active={self.active}"
