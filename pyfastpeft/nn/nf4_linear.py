"""NF4Linear: a frozen linear layer whose weight is stored in 4 bits (QLoRA, Dettmers et al. 2023, arXiv:2305.14314)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from pyfastpeft import ops
from pyfastpeft._nf4_state_dict import to_state_dict
from pyfastpeft.nn.dense import conv1d_class, has_own_forward, is_conv1d
from pyfastpeft.nn.nf4_load import copied, quantized_from_state_dict
from pyfastpeft.quantized_tensor import DTYPES, QuantizedTensor
from pyfastpeft.reference.nf4 import NESTED_BLOCKSIZE, dynamic_map

_STATISTICS = ("absmax", "nested_absmax", "nested_map", "offset")


class NF4Linear(nn.Module):
    """y = x Wᵀ + bias with W [N, K] in 4 bits; x [..., K] -> y [..., N] in x's dtype, gradients to x and bias.

    weight         uint8 Parameter [(N·K+1)//2, 1] without grad: two codes a byte
    absmax, nested_absmax, nested_map, offset    its statistics: plain tensors that follow the module to a device and
                   into the state dict (bitsandbytes' keys, both ways) and that no cast of the module ever touches
    blocksize, quant_type ("nf4" or "fp4"), double_quant    how it was quantised
    quantized_dtype    the dtype the weight had before; dequantize() gives it back
    compute_dtype  None: compute in x's dtype. Given: x is cast to it, the result back to x's dtype.
                   Under autocast neither counts: the result has autocast's dtype, as F.linear's would.
    bias           an ordinary Parameter [N], or None

    NF4Linear(K, N) alone holds a zero weight, to be loaded into; on the meta device it holds nothing and
    load_state_dict(..., assign=True) gives it its tensors. It is not an nn.Linear: code that takes one for dense would
    compute with the bytes.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        blocksize: int = 64,
        double_quant: bool = True,
        compute_dtype: torch.dtype | None = None,
        quant_type: str = "nf4",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        dtype = dtype or torch.get_default_dtype()
        empty = _zero_weight(out_features, in_features, blocksize, quant_type, double_quant, dtype, device)
        self._set_up(empty, compute_dtype)
        zeros = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device)) if bias else None
        self.register_parameter("bias", zeros)  # None as well: the place for one that an adapter brings

    def _set_up(self, q: QuantizedTensor, compute_dtype: torch.dtype | None) -> None:
        if compute_dtype is not None and compute_dtype not in DTYPES:
            raise TypeError(f"NF4Linear: compute_dtype is {compute_dtype}, expected None, float32, float16 or bfloat16")
        if len(q.shape) != 2:
            raise ValueError(f"NF4Linear: the quantised weight has shape {tuple(q.shape)}, expected [N, K]")
        self.out_features, self.in_features = q.shape
        self.compute_dtype = compute_dtype
        self.adopt_quantized(q)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        blocksize: int = 64,
        double_quant: bool = True,
        compute_dtype: torch.dtype | None = None,
        quant_type: str = "nf4",
    ) -> NF4Linear:
        """The quantised form of an nn.Linear, or of transformers' Conv1D (whose weight is transposed to [N, K]).

        The bias Parameter is shared with the original, not copied. Raises TypeError for another module or a dtype that
        is not float32, float16 or bfloat16; ValueError for NaN and infinities (with their position), a wrong blocksize
        or quant_type, a weight on the meta device, or a module with hooks, which would be lost.
        """
        kind = type(linear).__name__
        if isinstance(linear, NF4Linear):
            raise ValueError("NF4Linear.from_linear: the layer is an NF4Linear: already quantised")
        conv1d = is_conv1d(linear)
        if type(linear) is not nn.Linear and not conv1d:
            raise TypeError(f"NF4Linear.from_linear: got {kind}, expected torch.nn.Linear or transformers' Conv1D")
        if linear.weight.is_meta:
            raise ValueError(
                "NF4Linear.from_linear: the weight is on the meta device and holds no data; load it before quantising"
            )
        if has_own_forward(linear, conv1d_class(type(linear)) or nn.Linear):
            raise ValueError(
                f"NF4Linear.from_linear: this {kind} has hooks or a forward of its own, which would be lost; remove "
                "them before quantising"
            )
        weight = linear.weight.detach()
        q = ops.quantize_4bit(weight.t() if conv1d else weight, blocksize, quant_type, double_quant)
        return cls.from_quantized(q, linear.bias, compute_dtype).train(linear.training)

    @classmethod
    def from_quantized(
        cls, q: QuantizedTensor, bias: nn.Parameter | None = None, compute_dtype: torch.dtype | None = None
    ) -> NF4Linear:
        """A layer around an existing 4-bit weight [N, K] and bias [N]; nothing is copied."""
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self._set_up(q, compute_dtype)
        if bias is not None and tuple(bias.shape) != (self.out_features,):
            raise ValueError(f"NF4Linear: bias has shape {tuple(bias.shape)}, expected ({self.out_features},)")
        self.register_parameter("bias", bias)
        return self

    @property
    def quantized(self) -> QuantizedTensor:
        """The weight as the ops take it; its tensors are the module's own."""
        q = self._quantized
        if q.packed is self.weight and all(getattr(q, name) is getattr(self, name) for name in _STATISTICS):
            return q
        return self._collect()  # somebody put another tensor in place: functional_call, offloading

    def _collect(self) -> QuantizedTensor:
        return QuantizedTensor(
            packed=self.weight, absmax=self.absmax, blocksize=self.blocksize, quant_type=self.quant_type,
            shape=(self.out_features, self.in_features), dtype=self.quantized_dtype,
            nested_absmax=self.nested_absmax, nested_map=self.nested_map, offset=self.offset,
        )  # fmt: skip

    @property
    def double_quant(self) -> bool:
        return self.nested_map is not None

    def adopt_quantized(self, q: QuantizedTensor) -> None:
        """Takes over q's tensors and its block size, type and dtype; the shape [N, K] must be the layer's."""
        self._check_shape(q)
        self.weight = nn.Parameter(q.packed, requires_grad=False)
        for name in _STATISTICS:
            setattr(self, name, getattr(q, name))
        self.blocksize, self.quant_type, self.quantized_dtype = q.blocksize, q.quant_type, q.dtype
        self._quantized = self._collect()  # kept, because checking it costs more than a small matmul

    @torch.no_grad()
    def copy_quantized_(self, q: QuantizedTensor) -> None:
        """Writes q's bytes and statistics into the layer's own tensors (whoever holds these sees the new weight)."""
        self._check_shape(q)
        mine, theirs = self.quantized, q
        for name in ("blocksize", "quant_type", "is_nested"):
            if getattr(mine, name) != getattr(theirs, name):
                raise ValueError(f"NF4Linear: {name} is {getattr(theirs, name)}, expected {getattr(mine, name)}")
        for name, tensor in mine.tensors().items():
            tensor.copy_(getattr(theirs, name))
        self.quantized_dtype = q.dtype
        self._quantized = self._collect()

    def _check_shape(self, q: QuantizedTensor) -> None:
        expected = (self.out_features, self.in_features)
        if tuple(q.shape) != expected:
            raise ValueError(
                f"NF4Linear: the quantised weight has shape {tuple(q.shape)}, expected {expected} = "
                "(out_features, in_features)"
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K], float32 / float16 / bfloat16 -> x Wᵀ + bias [..., N] (dtypes: see the class)."""
        return self._compute(x)

    def forward_lora(
        self,
        x: torch.Tensor,
        lora_a: torch.Tensor,
        lora_b: torch.Tensor,
        scaling: float,
        dropout_p: float = 0.0,
        seed: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """forward(x) + scaling · dropout(x) Aᵀ Bᵀ in one op; arguments as in ops.linear_4bit."""
        return self._compute(x, lora_a, lora_b, scaling, dropout_p, seed)

    def forward_scaled(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """forward(x) · scale in one op; scale [N] as in ops.linear_4bit_ia3."""
        return self._compute(x, scale=scale)

    def _compute(self, x: torch.Tensor, *lora, scale: torch.Tensor | None = None) -> torch.Tensor:
        if not x.is_floating_point():
            raise TypeError(
                f"NF4Linear: x has dtype {x.dtype}, expected float32, float16 or bfloat16; a model that casts its "
                "input to weight.dtype needs this layer unquantised (quantize_model(..., skip=...))"
            )
        autocast = not x.is_meta and torch.is_autocast_enabled(x.device.type)  # which knows no meta device
        given = x.dtype if self.compute_dtype is not None and not autocast else None
        x = x if given is None else x.to(self.compute_dtype)
        if scale is None:
            y = ops.linear_4bit(x, self.quantized, self.bias, *lora)
        else:
            y = ops.linear_4bit_ia3(x, self.quantized, scale, self.bias)
        return y if given is None else y.to(given)

    def dequantize(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """The dense layer this one stands for, its weight frozen, in dtype (None: the one the weight had); a copy."""
        dtype = dtype or self.quantized_dtype
        with torch.device("meta"):
            linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        linear.weight = nn.Parameter(ops.dequantize_4bit(self.quantized, dtype=dtype), requires_grad=False)
        if self.bias is not None:
            bias = self.bias.detach().to(dtype, copy=True)
            linear.bias = nn.Parameter(bias, requires_grad=self.bias.requires_grad)
        return linear.train(self.training)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self.quant_type}, blocksize={self.blocksize}, double_quant={self.double_quant}, "
            f"compute_dtype={self.compute_dtype}"
        )

    def _apply(self, fn: Callable, recurse: bool = True):
        """Device moves, to_empty and share_memory reach the bytes and the statistics; casts reach only the bias."""

        def bytes_only(tensor: torch.Tensor) -> torch.Tensor:
            flat = tensor.detach().reshape(-1).view(torch.uint8)
            moved = fn(flat)
            if moved.dtype != torch.uint8:  # module.type(dtype) casts integers too
                moved = flat.to(moved.device)
            return moved.view(tensor.dtype).reshape(tensor.shape)

        super()._apply(lambda tensor: bytes_only(tensor) if tensor.dtype == torch.uint8 else fn(tensor), recurse)
        for name in _STATISTICS:
            if (tensor := getattr(self, name)) is not None:
                setattr(self, name, bytes_only(tensor))
        self._quantized = self._collect()
        return self

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        key = prefix + "weight"
        for name, tensor in to_state_dict(self.quantized, key).items():
            if name != key:
                destination[name] = tensor if keep_vars else tensor.detach()

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        """The weight is loaded whole (bytes, statistics, block size, type) or not at all; every problem is named."""
        arguments = (local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        for hook in self._load_state_dict_pre_hooks.values():
            hook(state_dict, prefix, *arguments)
        key = prefix + "weight"
        mine = {k: v for k, v in state_dict.items() if k == key or k.startswith(key + ".")}
        q = quantized_from_state_dict(mine, key, missing_keys, unexpected_keys if strict else [], error_msgs)
        if q is not None:
            self._load_quantized(q, key, local_metadata.get("assign_to_params_buffers", False), error_msgs)
        # bias and the rest as torch does it: without the weight, and without running the hooks again
        rest = {k: v for k, v in state_dict.items() if k not in mine}
        hooks, self._load_state_dict_pre_hooks = self._load_state_dict_pre_hooks, {}
        others: list[str] = []
        try:
            super()._load_from_state_dict(rest, prefix, local_metadata, strict, others, unexpected_keys, error_msgs)
        finally:
            self._load_state_dict_pre_hooks = hooks
        missing_keys += [k for k in others if k != key]

    def _load_quantized(self, q: QuantizedTensor, key: str, assign: bool, error_msgs: list[str]) -> None:
        expected = (self.out_features, self.in_features)
        if tuple(q.shape) != expected:
            error_msgs.append(f"size mismatch for {key}: the file holds {tuple(q.shape)}, expected {expected}.")
        elif assign:
            self.adopt_quantized(q)
        elif self.weight.is_meta:
            error_msgs.append(
                f"{key} is on the meta device, which holds no data: use load_state_dict(..., assign=True), or "
                "to_empty(device=...) first."
            )
        else:
            mine = self.quantized
            if (q.blocksize, q.quant_type, q.is_nested) == (mine.blocksize, mine.quant_type, mine.is_nested):
                self.copy_quantized_(q)
            else:
                self.adopt_quantized(copied(q, self.weight.device))


def _zero_weight(n, k, blocksize, quant_type, double_quant, dtype, device) -> QuantizedTensor:
    """Codes and statistics that decode to zeros, with the shapes of a quantised [n, k]."""
    blocks = -(n * k // -max(blocksize, 1))  # a wrong blocksize is QuantizedTensor's to name
    code = 0x77 if quant_type == "nf4" else 0x00
    packed = torch.full(((n * k + 1) // 2, 1), code, dtype=torch.uint8, device=device)
    nested = {}
    if double_quant:
        nested = {
            "nested_absmax": torch.zeros(-(blocks // -NESTED_BLOCKSIZE), dtype=torch.float32, device=device),
            "nested_map": dynamic_map().to(packed.device),  # the default device where none is given
            "offset": torch.zeros((), dtype=torch.float32, device=device),
        }
    return QuantizedTensor(
        packed=packed,
        absmax=torch.zeros(blocks, dtype=torch.uint8 if double_quant else torch.float32, device=device),
        blocksize=blocksize, quant_type=quant_type, shape=(n, k), dtype=dtype, **nested,
    )  # fmt: skip
