"""(IA)³ scaling in plain torch: the specification of csrc/ia3.

Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning", arXiv:2205.05638,
section 3.3: activations are rescaled elementwise by a learned vector.
"""

import torch


def ia3_scale(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """y = x · scale: x [..., D], scale [D]; the product in fp32, rounded once to x's dtype."""
    return (x.float() * scale.float()).to(x.dtype)


def ia3_scale_backward(
    grad_output: torch.Tensor, x: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """grad_x = grad_output · scale (x's dtype); grad_scale[d] = Σ over tokens of grad_output · x (scale's dtype).

    From y[m, d] = x[m, d] · s[d]: ∂L/∂x[m, d] = ∂L/∂y[m, d] · s[d] and ∂L/∂s[d] = Σ_m ∂L/∂y[m, d] · x[m, d].
    """
    grad_x = (grad_output.float() * scale.float()).to(x.dtype)
    products = (grad_output.float() * x.float()).reshape(-1, x.shape[-1])
    return grad_x, products.double().sum(0).to(scale.dtype)
