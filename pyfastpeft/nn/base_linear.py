"""BaseLinear: what a method (LoRA, (IA)³, …) may know of the linear layer it adapts. Methods × bases never multiply.

`as_base_linear(module)` gives the view of a module, or None where there is nothing to adapt. A view holds the module
and nothing else: make one whenever it is needed (about a microsecond), do not store it. Kinds of base:

    torch.nn.Linear                     weight [N, K]
    transformers' Conv1D (GPT-2)        weight [K, N], seen here as its transpose
    pyfastpeft.nn.NF4Linear             4-bit weight [N, K]
    whatever register_base_linear adds

Everything below speaks of W as [N, K] = [out_features, in_features], whatever way round the module stores it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from pyfastpeft import ops
from pyfastpeft.nn.dense import conv1d_class, first_non_finite, has_own_forward, is_conv1d, relative_error
from pyfastpeft.nn.nf4_linear import NF4Linear
from pyfastpeft.ops._linear import draw_seed
from pyfastpeft.reference import lora as reference


class BaseLinear:
    """A linear base y = x Wᵀ + bias as methods see it. Subclasses fill in where the weight comes from.

    in_features, out_features   K and N
    is_quantized                whether set_weight loses something
    fan_in_fan_out              whether the module stores Wᵀ [K, N] (Conv1D)
    """

    is_quantized = False
    fan_in_fan_out = False

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    @property
    def in_features(self) -> int:
        return self.module.in_features

    @property
    def out_features(self) -> int:
        return self.module.out_features

    @property
    def bias(self) -> torch.Tensor | None:
        return self.module.bias

    @property
    def weight_dtype(self) -> torch.dtype:
        """The dtype of get_weight(): the one the base computes in when x has it (a new adapter is drawn for this)."""
        return self.module.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.module.weight.device

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] -> x Wᵀ + bias [..., N]: the module alone, hooks included."""
        return self.module(x)

    def forward_lora(
        self,
        x: torch.Tensor,
        lora_a: torch.Tensor,
        lora_b: torch.Tensor,
        scaling: float,
        dropout_p: float = 0.0,
        seed: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x Wᵀ + bias + scaling · dropout(x) Aᵀ Bᵀ in one op, with x [..., K], A [R, K], B [N, R]; result in x's dtype.

        dropout_p is what to drop now (0 in eval); seed as in ops.linear_lora, drawn from torch's generator when None.
        A module with hooks or a forward of its own (offloading, subclasses) is called, and the rest added to it. fp64 on
        a dense base is computed by torch operations (reference.lora), for checking gradients.
        """
        if has_own_forward(self.module, self._known_class()):
            return self._add_lora(self.module(x), x, lora_a, lora_b, scaling, dropout_p, seed)
        return self._fused_lora(x, lora_a, lora_b, scaling, dropout_p, seed)

    def project(self, rows: torch.Tensor) -> torch.Tensor:
        """rows [R, K] -> rows Wᵀ [R, N] in the base's dtype, without the bias and without autograd."""
        weight = self._weight().detach()
        return nn.functional.linear(rows.to(weight.dtype), weight)

    def forward_scaled(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """(x Wᵀ + bias) · scale with scale [N] ((IA)³); result in the dtype the module gives."""
        return scaled(self.module(x), scale)

    def _known_class(self) -> type | None:
        return nn.Linear

    def _fused_lora(self, x, lora_a, lora_b, scaling, dropout_p, seed) -> torch.Tensor:
        if x.dtype == torch.float64:  # the kernels have no fp64; it is for checking gradients
            seed = draw_seed(x, dropout_p, seed)
            return reference.linear_lora(x, self._weight(), self.bias, lora_a, lora_b, scaling, dropout_p, seed)
        return ops.linear_lora(x, self._weight(), self.bias, lora_a, lora_b, scaling, dropout_p, seed)

    def _add_lora(self, y, x, lora_a, lora_b, scaling, dropout_p, seed) -> torch.Tensor:
        # S = dropout(x) Aᵀ [..., R] by the same op, so with the same dropout mask: base weight 0, B = identity
        x = x.to(y.dtype)
        zero = x.new_zeros(()).expand(lora_a.shape)
        s = ops.linear_lora(x, zero, None, lora_a, torch.eye(len(lora_a), device=x.device), 1.0, dropout_p, seed)
        return y + scaling * nn.functional.linear(s, lora_b.to(s.dtype))

    def _weight(self) -> torch.Tensor:
        """W [N, K] with its autograd history; dense bases only."""
        return self.module.weight

    def get_weight(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """W [N, K] without grad, in dtype (None: weight_dtype).

        A dense base gives a view where no cast is needed: do not write into it.
        """
        weight = self._weight().detach()
        return weight if dtype is None else weight.to(dtype)

    @torch.no_grad()
    def set_weight(self, weight: torch.Tensor) -> float:
        """Stores weight [N, K], any float dtype, in place (ties and optimizers keep seeing the same parameter).

        Returns the relative error of what is stored, ‖stored − weight‖ / ‖weight‖ (Frobenius, in fp64); 0.0 where the
        dtype holds the values. Raises TypeError / ValueError, with nothing written, on a wrong shape, an integer dtype,
        or NaN and infinities (named with their position).
        """
        self._check_new_weight(weight)
        if "weight" not in self.module._parameters:
            raise RuntimeError(
                f"{type(self.module).__name__}: its weight is computed (parametrised or weight-normed) and cannot be "
                "written; remove it first: torch.nn.utils.parametrize.remove_parametrizations(module, 'weight')"
            )
        target = self._weight().detach()
        target.copy_(weight)
        return relative_error(target, weight)

    def snapshot_weight(self, device: torch.device | str | None = None) -> Any:
        """A copy of the weight as it is stored, for restore_weight: N·K values (dense) or about N·K/2 bytes (4-bit).

        device   where to keep it; None: beside the weight, "cpu" spares the accelerator's memory
        """
        return self.module.weight.detach().to(device or self.device, copy=True)

    @torch.no_grad()
    def restore_weight(self, snapshot: Any) -> None:
        """Puts a snapshot back, bit for bit, in place: what adding and then subtracting an update does not do."""
        self.module.weight.detach().copy_(snapshot)

    @torch.no_grad()
    def to_dense(self, weight: torch.Tensor | None = None, dtype: torch.dtype | None = None) -> nn.Module:
        """A module like this one with a dense weight, its own memory and no hooks: nn.Linear, or Conv1D for a Conv1D.

        weight   the weight [N, K] it gets; None: this base's
        dtype    of weight and bias; None: weight_dtype
        """
        weight = self.get_weight() if weight is None else weight
        self._check_new_weight(weight)
        return self._build_dense(weight, dtype or self.weight_dtype)

    def _build_dense(self, weight: torch.Tensor, dtype: torch.dtype) -> nn.Module:
        with torch.device("meta"):
            dense = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        return self._fill_dense(dense, weight, dtype)

    def _fill_dense(self, dense: nn.Module, weight: torch.Tensor, dtype: torch.dtype) -> nn.Module:
        copy = weight.detach().to(self.device, dtype, copy=True, memory_format=torch.contiguous_format)
        dense.weight = nn.Parameter(copy, requires_grad=False)
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.detach().to(dtype, copy=True), requires_grad=self.bias.requires_grad)
        return dense.train(self.module.training)

    def _expected_shape(self) -> tuple[int, ...]:
        return self.out_features, self.in_features

    def _check_new_weight(self, weight: torch.Tensor) -> None:
        kind = type(self.module).__name__
        expected = self._expected_shape()
        if not weight.is_floating_point():
            raise TypeError(f"{kind}: the new weight has dtype {weight.dtype}, expected a floating-point dtype")
        if tuple(weight.shape) != expected:
            raise ValueError(
                f"{kind}: the new weight has shape {tuple(weight.shape)}, expected {expected} = "
                "(out_features, in_features)"
            )
        position = first_non_finite(weight)
        if position is not None:
            raise ValueError(
                f"{kind}: the new weight[{', '.join(map(str, position))}] is {weight[position].item()}, expected "
                "finite values; the weight was left as it is"
            )


class _Conv1DBase(BaseLinear):
    """transformers.pytorch_utils.Conv1D: y = x W + b with W [K, N]."""

    fan_in_fan_out = True

    @property
    def in_features(self) -> int:
        return self.module.weight.shape[0]

    @property
    def out_features(self) -> int:
        return self.module.weight.shape[1]

    def _known_class(self) -> type | None:
        return conv1d_class(type(self.module))

    def _weight(self) -> torch.Tensor:
        return self.module.weight.t()

    def _build_dense(self, weight: torch.Tensor, dtype: torch.dtype) -> nn.Module:
        with torch.device("meta"):
            dense = type(self.module)(self.out_features, self.in_features)
        return self._fill_dense(dense, weight.t(), dtype)


class _NF4Base(BaseLinear):
    """pyfastpeft.nn.NF4Linear: the fused 4-bit op; a new weight is quantised the way the old one was."""

    is_quantized = True
    module: NF4Linear

    @property
    def weight_dtype(self) -> torch.dtype:
        return self.module.compute_dtype or self.module.quantized_dtype

    def _known_class(self) -> type | None:
        return NF4Linear

    def _fused_lora(self, x, lora_a, lora_b, scaling, dropout_p, seed) -> torch.Tensor:
        return self.module.forward_lora(x, lora_a, lora_b, scaling, dropout_p, seed)

    def project(self, rows: torch.Tensor) -> torch.Tensor:
        """As for a dense base, by the 4-bit matmul."""
        return ops.linear_4bit(rows.detach().to(self.weight_dtype), self.module.quantized)

    def forward_scaled(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """As for a dense base, the scale multiplied in by the op of the 4-bit matmul."""
        if has_own_forward(self.module, self._known_class()):
            return super().forward_scaled(x, scale)
        return self.module.forward_scaled(x, scale)

    def _weight(self) -> torch.Tensor:
        return ops.dequantize_4bit(self.module.quantized, dtype=self.weight_dtype)

    def get_weight(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """W [N, K] dequantised, a new tensor: fp32 products rounded once to dtype (None: weight_dtype)."""
        return ops.dequantize_4bit(self.module.quantized, dtype=dtype or self.weight_dtype)

    @torch.no_grad()
    def set_weight(self, weight: torch.Tensor) -> float:
        """Quantises weight [N, K] with this layer's block size and type; returns and raises as for a dense base."""
        self._check_new_weight(weight)
        old = self.module.quantized
        dtype = torch.float32 if weight.dtype == torch.float64 else weight.dtype
        source = weight.detach().to(old.device, dtype)
        new = ops.quantize_4bit(source, old.blocksize, old.quant_type, double_quant=old.is_nested)
        new.dtype = old.dtype
        self.module.copy_quantized_(new)
        return relative_error(ops.dequantize_4bit(new, dtype=torch.float32), weight)

    def snapshot_weight(self, device: torch.device | str | None = None) -> Any:
        """A copy of the packed bytes and their statistics (about 4.13 bits a value), for restore_weight."""
        return {
            name: tensor.detach().to(device or self.device, copy=True)
            for name, tensor in self.module.quantized.tensors().items()
        }

    @torch.no_grad()
    def restore_weight(self, snapshot: Any) -> None:
        """Puts a snapshot back, bit for bit, in place."""
        for name, tensor in self.module.quantized.tensors().items():
            tensor.detach().copy_(snapshot[name])


def scaled(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """x [..., D] · scale [D] in x's dtype, the product taken in fp32 (fp64 for fp64) and rounded once."""
    if x.dtype == torch.float64:
        return x * scale
    return ops.ia3_scale(x, scale if scale.dtype in (torch.float32, x.dtype) else scale.float())


_KINDS: list[tuple[Callable[[nn.Module], bool], type[BaseLinear]]] = []


def register_base_linear(matches: Callable[[nn.Module], bool], view: type[BaseLinear]) -> None:
    """Adds a kind of base: modules for which matches(module) is true are seen through view(module). The latest is asked
    first, so a more specific kind may precede the ones here."""
    _KINDS.insert(0, (matches, view))


def as_base_linear(module: nn.Module) -> BaseLinear | None:
    """The view of a linear base, or None when the module is not one that a method can adapt.

    None too for a weight of another library's quantised class or an integer dtype, and for MultiheadAttention's
    out_proj, whose forward is never called.
    """
    for matches, view in _KINDS:
        if matches(module):
            return view(module)
    return None


def _is_dense_linear(module: nn.Module) -> bool:
    if not isinstance(module, nn.Linear) or isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return False
    weight = module.weight
    # a compiled forward has been looked at when it was built, and dynamo cannot trace the class of a tensor
    foreign = not torch.compiler.is_compiling() and type(weight).__module__.startswith(("bitsandbytes.", "torchao."))
    return not foreign and weight.is_floating_point() and weight.itemsize >= 2 and weight.dim() == 2


register_base_linear(_is_dense_linear, BaseLinear)
register_base_linear(is_conv1d, _Conv1DBase)
register_base_linear(lambda module: isinstance(module, NF4Linear), _NF4Base)
