"""Forgetting most of Adam's moments at a restart: they belong to updates that are merged."""

from __future__ import annotations

from collections.abc import Iterable

import torch

MODES = ("reset", "random", "magnitude")
_MOMENTS = (("exp_avg", "state1", "absmax1", "qmap1"), ("exp_avg_sq", "state2", "absmax2", "qmap2"))


@torch.no_grad()
def reset_optimizer_state(
    optimizer: torch.optim.Optimizer,
    parameters: Iterable[torch.nn.Parameter],
    mode: str = "magnitude",
    fraction: float = 0.9,
) -> None:
    """Zeroes `fraction` of each parameter's moments, the first and the second at the same places.

    mode       "magnitude": where the first moment of each tensor is smallest; "random": each place with probability
               `fraction`; "reset": everywhere, whatever the fraction
    optimizer  one with exp_avg and exp_avg_sq (torch.optim.Adam, AdamW, …) or pyfastpeft.optim's, in 32 and 8 bits, paged
               or not; the step counts stay, as in the paper's code, which warms the learning rate up again instead

    The paper's code thins out the two moments apart. A first moment that stays where the second one went is then divided
    by eps alone, as soon as the gradient there is zero, and A's is in the first steps after a restart, B being zero: seen
    to move weights by 100 in a step. Here a first moment never outlives its second.

    Parameters without state yet are passed over. Raises ValueError for another mode or fraction, or state of another
    kind, with nothing changed.
    """
    if mode not in MODES:
        raise ValueError(f"reset_optimizer_state: mode is {mode!r}, expected one of {', '.join(MODES)}")
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"reset_optimizer_state: fraction is {fraction}, expected 0 to 1")
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
    states = [optimizer.state[p] for p in parameters if p in optimizer.state and len(optimizer.state[p])]
    for state in states:
        for names in _MOMENTS:
            if names[0] not in state and names[1] not in state:
                raise ValueError(
                    f"reset_optimizer_state: the optimizer's state has {sorted(state)}, expected exp_avg and exp_avg_sq "
                    "(Adam's moments)"
                )
    for state in states:
        plain, codes, absmax, qmap = _MOMENTS[0]
        first = state[plain] if plain in state else _decoded(state[codes], state[absmax], state[qmap])
        forgotten = _forgotten(first, mode, fraction)
        for plain, codes, _, qmap in _MOMENTS:
            key = plain if plain in state else codes
            zero = 0 if key == plain else int(state[qmap].abs().argmin())
            state[key] = state[key].masked_fill_(forgotten, zero)  # assigned, because a paged state gives copies


def _decoded(codes: torch.Tensor, absmax: torch.Tensor, qmap: torch.Tensor) -> torch.Tensor:
    """The values of 8-bit codes, whose blocks run over them as they lie in memory."""
    from pyfastpeft.reference.adamw import dequantize_moment

    flat = codes.as_strided((codes.numel(),), (1,))
    return dequantize_moment(flat, absmax, qmap).as_strided(codes.shape, codes.stride())


def _forgotten(moment: torch.Tensor, mode: str, fraction: float) -> torch.Tensor:
    if mode == "reset":
        return torch.ones_like(moment, dtype=torch.bool)
    if mode == "random":
        return (torch.rand(moment.shape, device="cpu") < fraction).to(moment.device)
    count = int(fraction * moment.numel())
    forgotten = torch.zeros(moment.numel(), dtype=torch.bool, device=moment.device)
    order = torch.argsort(moment.abs().flatten(), stable=True)
    forgotten[order[:count]] = True
    return forgotten.view(moment.shape)
