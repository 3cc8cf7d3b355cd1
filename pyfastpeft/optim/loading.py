"""How state dicts come in, and what a report says, for every optimizer here: states are converted, never cast."""

from __future__ import annotations

from collections import defaultdict
from itertools import chain
from typing import Any

import torch

from pyfastpeft.optim.small_states import SmallStates


class LoadsStates:
    """Beside a torch.optim.Optimizer in the bases of a class, which has

    _own_options        names of options that a state dict does not decide
    _check_options(group)   ValueError for options that cannot be used
    _converted(p, group, key, saved)    the state of p from what was saved as `key`, as copies
    """

    _own_options: tuple[str, ...] = ()

    @property
    def _small_states(self) -> SmallStates:
        return self.__dict__.setdefault("_small", SmallStates())

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict of this class or of those that its docstring names.

        States keep the precision that the options ask for, never the parameter's dtype (torch's own loader would cast
        8-bit codes to it). Options that the state dict's groups lack stay what they are. Tensors are copied. ValueError,
        before anything has changed, where groups, sizes or keys do not fit.
        """
        state_dict = state_dict.copy()
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        saved = state_dict["param_groups"]
        sizes, saved_sizes = ([len(g["params"]) for g in groups] for groups in (self.param_groups, saved))
        if sizes != saved_sizes:
            raise ValueError(
                f"{type(self).__name__}.load_state_dict: the saved groups have {saved_sizes} parameters, expected {sizes}; build the "
                "optimizer with the same groups as the saved one"
            )
        groups = []
        for ours, theirs in zip(self.param_groups, saved, strict=True):
            kept = {"params": ours["params"]} | {k: ours[k] for k in ("param_names",) if k in ours}
            groups.append({**ours, **theirs, **kept})
            groups[-1].update({k: ours[k] for k in self._own_options if k in ours})
            self._check_options(groups[-1])
        owners = [(p, g) for g in groups for p in g["params"]]
        by_id = dict(zip(chain.from_iterable(g["params"] for g in saved), owners, strict=True))
        known = {key: value for key, value in state_dict["state"].items() if key in by_id}
        state = self._adopt([(*by_id[key], key, value) for key, value in known.items()])
        state.update({key: value for key, value in state_dict["state"].items() if key not in known})
        self.__setstate__({"state": state, "param_groups": groups})
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def _adopt(self, saved: list[tuple[torch.Tensor, dict[str, Any], Any, dict[str, Any]]]) -> dict[Any, Any]:
        """The new `state` from (parameter, its group, key in the state dict, what was saved)."""
        state: dict[Any, Any] = defaultdict(dict)
        for p, group, key, value in saved:
            state[p] = self._small_states.placed(p, self._converted(p, group, key, value))
        return state

    def memory_report(self) -> dict[str, int | float | None]:
        """Bytes of the state (maps shared between parameters count once). Nothing is paged here: all of it is resident."""
        tensors = {
            t.data_ptr(): t.numel() * t.element_size()
            for state in self.state.values()
            for t in state.values()
            if isinstance(t, torch.Tensor)
        }
        total = sum(tensors.values())
        return {
            "state_bytes": total, "resident_bytes": total, "host_bytes": 0, "spilled_bytes": 0, "budget_bytes": None,
            "pages_in": 0, "pages_out": 0, "seconds_waited": 0.0,
        }  # fmt: skip
