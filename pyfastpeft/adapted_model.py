"""AdaptedModel: a model with adapters in it, whatever the methods. PeftModel is this plus files and the familiar names."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from pyfastpeft import mixed_batch
from pyfastpeft.inject import remove_hollow_holders, sharing_weights, tied_targets
from pyfastpeft.methods.base import AdapterHolder, MethodLayer, PeftConfig, adapter_holders
from pyfastpeft.methods.registry import method_for
from pyfastpeft.quantize_model import dequantize_model
from pyfastpeft.replicate_layers import keep_layers, restore_layers


class AdaptedModel(nn.Module):
    """`model` with adapters; calls and unknown attributes go to it. `peft_config` has a config per adapter."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.peft_config: dict[str, PeftConfig] = {}
        self.active_adapters: list[str] = []
        self._apart: list[
            tuple[MethodLayer, dict, bool]
        ] = []  # layers that share a weight when nothing is merged: untie()

    def forward(self, *args, adapter_names: list[str] | None = None, **kwargs):
        """The model's output. In training a method's penalty (AdaLoRA's) is added to a loss that the output has.

        adapter_names   the adapter of each sample of the batch, in place of the active ones; "__base__" for none. In
                        training all of them train that require gradients (set_requires_grad). See pyfastpeft.mixed_batch.
        """
        with mixed_batch.mixed(self, adapter_names):
            output = self.model(*args, **kwargs)
        if self.training and isinstance(getattr(output, "loss", None), torch.Tensor):
            penalty = self.penalty()
            if penalty is not None:
                output.loss = output.loss + penalty.to(output.loss.device)
        return output

    def penalty(self) -> torch.Tensor | None:
        """What the active adapters' methods add to the loss in training; None: nothing. forward() adds it to a loss that
        the model computes; a loss computed outside needs it added there."""
        terms = []
        for name in self.active_adapters:
            config = self.peft_config[name]
            terms.append(method_for(config.peft_type).penalty(self.model, config, name))
        terms = [term for term in terms if term is not None]
        return sum(terms[1:], start=terms[0]) if terms else None

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """Adds an adapter made of others, frozen and inactive, with PEFT's arguments.

        (IA)³ adapters: their vectors are summed, and the other arguments count for nothing. LoRA:

        combination_type      linear, cat, svd, ties, dare_linear, dare_ties, magnitude_prune, and these four with _svd
                              behind them; what each does: methods/lora/combine.py
        svd_rank, svd_clamp   of the _svd ones: the new rank (None: the highest of the adapters'), and the quantile at
                              which its values are cut off
        density               the share of entries that pruning keeps
        majority_sign_method  of the ties ones: "total" of the values or "frequency" of their signs
        svd_full_matrices, svd_driver   accepted for PEFT's sake, without effect

        Raises ValueError, with nothing added, for arguments or adapters that do not go together.
        """
        for name in adapters:
            self.check_known(name)
        check_adapter_name(adapter_name)
        if adapter_name in self.peft_config:
            raise ValueError(f"there is an adapter {adapter_name!r} already; choose another name or delete it first")
        methods = {self.peft_config[name].peft_type for name in adapters}
        if len(methods) != 1:
            raise ValueError(f"add_weighted_adapter: the adapters are of {sorted(methods)}, expected one method")
        method_for(methods.pop()).add_weighted_adapter(
            self, adapters, weights, adapter_name, combination_type, svd_rank, svd_clamp, density, majority_sign_method
        )

    def update_and_allocate(self, global_step: int) -> None:
        """AdaLoRA's allocation by hand, after backward() and before zero_grad(), as in PEFT. From the first call on
        nothing is allocated by itself any more."""
        for name in self.active_adapters:
            method_for(self.peft_config[name].peft_type).update_and_allocate(self.model, name, global_step)

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)

    def holders(self) -> list[tuple[str, AdapterHolder]]:
        return list(adapter_holders(self.model))

    def layers(self) -> list[tuple[str, MethodLayer]]:
        return [(path, holder) for path, holder in self.holders() if isinstance(holder, MethodLayer)]

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """The adapter's live tensors by their keys in the file."""
        config = self.peft_config[self.check_known(name)]
        return method_for(config.peft_type).tensors(self.model, config, name)

    def check_known(self, name: str) -> str:
        if name not in self.peft_config:
            raise ValueError(f"there is no adapter {name!r}, expected one of {sorted(self.peft_config)}")
        return name

    def add_adapter(
        self, name: str, config: PeftConfig, *, fp32: bool = True, init: bool = True, strict: bool = True
    ) -> None:
        """Adds an adapter, frozen and inactive (the first one becomes the active one). On an error the model is as before."""
        check_adapter_name(name)
        if name in self.peft_config:
            raise ValueError(f"there is an adapter {name!r} already; choose another name or delete_adapter() it first")
        check_config(config)
        method = method_for(config.peft_type)
        self._check_biases(config)
        try:
            resolved = method.inject(self.model, config, name, fp32=fp32, init=init, strict=strict)
        except BaseException:
            self._take_out(name)
            raise
        first = not self.peft_config
        self.peft_config[name] = resolved
        if first:
            self.model.requires_grad_(False)
            self.set_adapter(name, resolved.inference_mode)

    def _check_biases(self, config: PeftConfig) -> None:
        biased = [n for n, other in self.peft_config.items() if getattr(other, "bias", "none") != "none"]
        if biased and getattr(config, "bias", "none") != "none":
            raise ValueError(
                f"adapter {biased[0]!r} trains biases already, and the model has only one set of them; use bias='none'"
            )

    def _take_out(self, name: str) -> None:
        for _, holder in self.holders():
            holder.remove_adapter(name)
        remove_hollow_holders(self.model)

    def set_adapter(self, names: str | Iterable[str], inference_mode: bool = False) -> None:
        """Makes these adapters the active ones (their updates add up), and the only trainable ones unless inference_mode."""
        names = [names] if isinstance(names, str) else list(dict.fromkeys(names))
        for name in names:
            self.check_known(name)
        holders = self.holders()
        merged = {n for _, h in holders if isinstance(h, MethodLayer) for n in h.merged_adapters}
        if merged - set(names):
            raise RuntimeError(f"adapters {sorted(merged)} are merged into the weights; unmerge_adapter() first")
        for path, holder in holders:
            holder.check_together([name for name in names if name in holder.held_adapters()], path)
        for _, holder in holders:
            holder.activate(names, not inference_mode)
        for name in self.peft_config:
            self._set_biases(name, name in names and not inference_mode)
        self.active_adapters = names

    def set_requires_grad(self, names: str | Iterable[str], requires_grad: bool = True) -> None:
        """Freezes or unfreezes adapters without activating them."""
        for name in [names] if isinstance(names, str) else names:
            self.check_known(name)
            for _, holder in self.holders():
                for parameter in holder.adapter_parameters(name):
                    parameter.requires_grad_(requires_grad)
            self._set_biases(name, requires_grad)

    def _set_biases(self, name: str, requires_grad: bool) -> None:
        if getattr(self.peft_config[name], "bias", "none") != "none":
            for key, parameter in self.tensors(name).items():
                if key.endswith(".bias") and isinstance(parameter, nn.Parameter):
                    parameter.requires_grad_(requires_grad)

    def delete_adapter(self, name: str) -> None:
        """Removes an adapter. When it was the only active one, the oldest remaining one takes over."""
        self.check_known(name)
        self._set_biases(name, False)
        self._take_out(name)
        del self.peft_config[name]
        active = [other for other in self.active_adapters if other != name]
        if self.active_adapters != active:
            self.set_adapter(active or list(self.peft_config)[:1])
        if not self.peft_config:
            restore_layers(self.model)

    def enable_adapter_layers(self) -> None:
        for _, holder in self.holders():
            holder.enabled = True

    def disable_adapter_layers(self) -> None:
        """Makes the model answer as without adapters, until enable_adapter_layers(); merged ones are unmerged."""
        self._warn_biases()
        for _, holder in self.holders():
            if isinstance(holder, MethodLayer):
                holder.unmerge()
            holder.enabled = False
        self._tie_again()

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Inside, the model answers as without adapters; afterwards everything is as it was, merged adapters too."""
        before = [(path, h, h.enabled, getattr(h, "merged_adapters", ())) for path, h in self.holders()]
        self.disable_adapter_layers()
        try:
            yield
        finally:
            merged_layers = [(path, holder) for path, holder, _, merged in before if merged]
            names = dict.fromkeys(name for *_, merged in before for name in merged)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # said when they were merged
                self.untie(merged_layers, names, keep=True)
            for _, holder, enabled, merged in before:
                holder.enabled = enabled
                if merged:
                    holder.merge(merged, keep_snapshot=True)

    def _warn_biases(self) -> None:
        biased = [name for name in self.active_adapters if getattr(self.peft_config[name], "bias", "none") != "none"]
        if biased:
            warnings.warn(
                f"adapter {biased[0]!r} trains the model's own biases; with adapters disabled they keep their trained "
                "values",
                stacklevel=4,
            )

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Folds adapters (None: the active ones) into the weights, until unmerge_adapter() restores these bit for bit.

        Costs a copy of every adapted weight. Raises ValueError, with nothing merged, for NaN or infinities in an
        adapter; safe_merge also looks at the merged weights.
        """
        self._merge(adapter_names, safe_merge, keep_snapshot=True, progressbar=False)

    def unmerge_adapter(self) -> None:
        for _, layer in self.layers():
            layer.unmerge()
        self._tie_again()

    def _merge(
        self,
        names: list[str] | None,
        safe: bool,
        keep_snapshot: bool,
        progressbar: bool,
        dtype: torch.dtype | None = None,
    ) -> dict[str, float]:
        """Merges; returns {path: relative error} of the layers that had to be quantised again."""
        names = self.active_adapters if names is None else [self.check_known(name) for name in names]
        for _, holder in self.holders():
            holder.check_mergeable(names)
        layers = self.layers()
        for path, layer in layers:
            try:
                layer.check_merge(names, safe)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
        self.untie(layers, names, keep_snapshot)
        errors = {}
        for path, layer in _progress(layers, "merging", progressbar):
            quantized = layer.merges_weight and layer.base.is_quantized and dtype is None
            held = any(name in layer.held_adapters() for name in names)
            error = layer.merge(names, keep_snapshot, dtype)
            if quantized and held:
                errors[path] = error
        if errors:
            worst = max(errors, key=errors.get)
            warnings.warn(
                f"merged into {len(errors)} quantised layers: quantising again changed the merged weights by "
                f"{sum(errors.values()) / len(errors):.2%} on average and {errors[worst]:.2%} at most ({worst}), "
                "relative to their norm; merge_and_unload(dtype=torch.bfloat16) merges into 16-bit layers instead",
                stacklevel=4,
            )
        return errors

    def untie(self, layers: list[tuple[str, MethodLayer]], names: Iterable[str], keep: bool = False) -> None:
        """Gives layers whose weight is another module's too a weight of their own, before these adapters are written into it;
        but for those that share the adapters as well. keep: until nothing is merged into them any more."""
        written = {path: layer for path, layer in layers if layer.merges_weight and not layer.follows(names)}
        tied = tied_targets(self.model, written)
        for path in [path for path, _ in tied] + sharing_weights(written):
            if written[path].merged_adapters:  # into a weight that others go on sharing
                raise RuntimeError(
                    f"{path} is to have a weight of its own, and adapters {sorted(written[path].merged_adapters)} are merged "
                    "into the shared one; unmerge_adapter() first"
                )
        config = getattr(self.model, "config", None)
        flagged = bool(getattr(config, "tie_word_embeddings", False))

        def separate(path: str, flag: bool) -> None:
            if keep:
                self._apart.append((written[path], dict(written[path].base_layer._parameters), flag))
            _own_weight(written[path].base_layer)
            if flag:
                config.tie_word_embeddings = False

        for path, other in tied:
            separate(path, flagged)
            warnings.warn(f"{path} has now a weight of its own, apart from {other}'s", stacklevel=5)
        shared = sharing_weights(written)
        head = getattr(self.model, "get_output_embeddings", lambda: None)() if shared else None
        of_head = head is not None and any(written[path] is head for path in shared)
        for path in shared:
            separate(path, flagged and of_head)
        if shared:
            warnings.warn(
                f"{len(shared)} layers that shared their weights ({shared[0]}, …) have now their own", stacklevel=5
            )

    def _tie_again(self) -> None:
        """Puts shared weights back where nothing is merged any more."""
        for layer, parameters, flag in reversed(self._apart):
            if not layer.merged_adapters:
                layer.base_layer._parameters.update(parameters)
                if flag:
                    self.model.config.tie_word_embeddings = True
        self._apart = [entry for entry in self._apart if entry[0].merged_adapters]

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        dtype: torch.dtype | None = None,
    ) -> nn.Module:
        """Folds adapters (None: the active ones) into the weights for good and returns the plain model.

        safe_merge   look at every merged weight for NaN and infinities before the first is written
        dtype        turn all quantised layers into dense ones of this dtype, the adapters merged in 16 (or 32) bit;
                     None: quantise again, and say what that cost (a warning, and {path: relative error} in the
                     returned model's `merge_report`)
        """
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"merge_and_unload: dtype is {dtype}, expected None or a floating-point dtype")
        errors = self._merge(adapter_names, safe_merge, False, progressbar, dtype)
        model = self._unwrap(merged=True)
        if dtype is not None:
            dequantize_model(model, dtype)
        if errors:
            model.merge_report = errors
        return model

    def unload(self) -> nn.Module:
        """Takes the adapters out, unmerged, and returns the plain model."""
        self.unmerge_adapter()
        return self._unwrap(merged=False)

    def _unwrap(self, merged: bool) -> nn.Module:
        for _, holder in self.holders():
            holder.leave(self.model, merged)
        keep_layers(self.model)
        for config in self.peft_config.values() if merged else ():
            method_for(config.peft_type).merged(self.model, config)
        return self.model


def _own_weight(base: nn.Module) -> None:
    """Gives a layer that shares its weight (and its frozen bias) a copy; a 4-bit weight's statistics are its own."""
    for name, parameter in base._parameters.items():
        if name == "weight" or (parameter is not None and not parameter.requires_grad):
            base._parameters[name] = nn.Parameter(parameter.detach().clone(), requires_grad=False)


def check_adapter_name(name: str) -> None:
    """An adapter's name is part of module names and of a folder's name."""
    if not isinstance(name, str):
        raise TypeError(f"the adapter's name is {name!r}, expected a string")
    if not name or name in (".", "..") or any(c in name for c in "./\\\0:") or hasattr(nn.ModuleDict, name):
        raise ValueError(
            f"the adapter's name is {name!r}; expected one without dots, slashes and colons that is not an attribute of "
            "torch.nn.ModuleDict"
        )


def check_config(config: PeftConfig) -> None:
    if not isinstance(config, PeftConfig):
        raise TypeError(f"the config is a {type(config).__name__}, expected a pyfastpeft config such as LoraConfig")


def _progress(items: list, title: str, show: bool):
    if not show:
        return items
    from rich.progress import track

    return track(items, title)
