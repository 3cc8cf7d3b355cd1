"""EVA: A from the data (Paischer et al. 2024, "Parameter Efficient Fine-tuning via Explained Variance Adaptation",
arXiv:2410.07170). A's rows are the directions in which a layer's inputs vary most, and ranks go where they explain most.

    X [tokens, K], a layer's inputs over batches, centred:  X ≈ U S V,  A = V[:r]   (whiten: V[:r] / sqrt(S[:r]))
    ratio_i = S_i² / Σ variance; the Σ r largest ratios of all layers say how many rows each gets, at most rho · r

The decomposition is incremental (Ross et al. 2008, "Incremental Learning for Robust Visual Tracking", section 2.2): a batch
is decomposed together with S V of what came before and one row for the shift of the mean. A layer is done when the directions
it would get have a cosine of at least tau with those of the batch before. Layers with one input share one decomposition.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from pyfastpeft.inject import find_targets, remove_hollow_holders
from pyfastpeft.methods.base import KEY_PREFIX
from pyfastpeft.methods.lora.config import LoraConfig
from pyfastpeft.methods.lora.eva_directions import IncrementalDirections
from pyfastpeft.methods.lora.eva_processes import Processes
from pyfastpeft.methods.lora.layer import LoraLinear

_MOST_PASSES = 100


def forward_fn_dict(model: nn.Module, inputs: Mapping) -> Any:
    return model(**inputs)


def prepare_model_inputs_fn_language_modeling(model_input: Mapping, peft_config: LoraConfig) -> torch.Tensor:
    """The positions [tokens, 2] that count: those the attention mask has, and with use_label_mask those with a label."""
    if not isinstance(model_input, Mapping):
        raise TypeError(f"EVA: a batch is a {type(model_input).__name__}, expected a dict with input_ids")
    mask = model_input.get("attention_mask")
    mask = torch.ones_like(model_input["input_ids"]).bool() if mask is None else mask.bool()
    eva = peft_config.eva_config
    if eva.use_label_mask and "labels" in model_input:
        mask = mask & (model_input["labels"] != eva.label_mask_value)
    return mask.nonzero()


def prepare_layer_inputs_fn_language_modeling(
    layer_input: Any, model_input: torch.Tensor, layer_name: str
) -> torch.Tensor:
    """A layer's inputs [tokens, K] at these positions."""
    x = _first(layer_input, layer_name)
    try:
        return x[model_input.T.unbind()]
    except IndexError as error:
        raise ValueError(
            f"EVA: the inputs {tuple(x.shape)} of {layer_name} do not have the batch's positions ({error}); give a "
            "prepare_layer_inputs_fn of your own, or None to take all"
        ) from None


def _first(layer_input: Any, layer_name: str) -> torch.Tensor:
    x = layer_input[0] if isinstance(layer_input, (tuple, list)) and layer_input else layer_input
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"EVA: the input of {layer_name} is a {type(x).__name__}, expected a tensor")
    return x


def get_eva_state_dict(
    model: nn.Module,
    dataloader: Iterable,
    peft_config: LoraConfig | None = None,
    forward_fn: Callable = forward_fn_dict,
    prepare_model_inputs_fn: Callable | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: Callable | Mapping[str, Callable] | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> dict[str, torch.Tensor]:
    """EVA's A [rank, K] of every target layer, by the layer's name; rank 0 where it gets none. PEFT's arguments and names.

    model                     a PeftModel (its adapters are off meanwhile), or a plain model with peft_config
    dataloader                batches, gone through again until every layer has settled; the model answers in eval mode
    forward_fn                (model, batch) -> anything
    prepare_model_inputs_fn   (batch, config) -> what the next is given: here the positions that count
    prepare_layer_inputs_fn   (a layer's arguments, that, its name) -> [tokens, K]; one for all, or by name; None: all rows

    gather_distributed_inputs   with torch.distributed initialised the processes' batches count as one, so that all get the same;
                              False: each is alone with its own

    Raises ValueError: no batches; none of them with as many tokens as a layer may get ranks; inputs that are not finite.
    An error in one process is a RuntimeError in the others.
    """
    adapted = getattr(model, "base_model", None)
    adapted = adapted if hasattr(adapted, "peft_config") and hasattr(adapted, "layers") else None
    if adapted is None and peft_config is None:
        raise ValueError("get_eva_state_dict: give peft_config with a model that is not a PeftModel")
    config = peft_config or adapted.peft_config[adapted.check_known(adapter_name)]
    if config.eva_config is None:
        raise ValueError("get_eva_state_dict: the config has no eva_config; use init_lora_weights='eva'")
    if adapted is None:
        layers, prefix = find_targets(model, config), ""
    else:
        layers, prefix = _adapted_layers(adapted, adapter_name), KEY_PREFIX
    if iter(dataloader) is dataloader:
        raise TypeError("EVA: the dataloader can be gone through only once; give a DataLoader or a list of batches")
    processes = Processes(gather_distributed_inputs)
    first = processes.agreed(lambda: _first_batch(dataloader))
    collector = _Collector(
        model, config, layers, prefix, forward_fn, prepare_model_inputs_fn, prepare_layer_inputs_fn, processes
    )
    training = model.training
    with contextlib.ExitStack() as stack:
        stack.callback(model.train, training)
        stack.enter_context(torch.no_grad())
        if adapted is not None:
            stack.enter_context(model.disable_adapter())
        model.eval()
        found = collector.run(first, dataloader, show_progress_bar)
    return {prefix + path: a for path, a in found.items()}


def _first_batch(dataloader: Iterable) -> Any:
    first = next(iter(dataloader), None)
    if first is None:
        raise ValueError("EVA: the dataloader is empty")
    return first


class _Collector:
    """Runs the batches and feeds each distinct input's decomposition, which is the first process's alone."""

    def __init__(
        self, model, config, layers, prefix, forward_fn, prepare_batch, prepare_layer, processes: Processes
    ) -> None:
        self.model, self.config, self.layers, self.processes = model, config, layers, processes
        self.forward_fn, self.prepare_batch = forward_fn, prepare_batch
        named = (
            prepare_layer
            if isinstance(prepare_layer, Mapping)
            else dict.fromkeys((prefix + path for path in layers), prepare_layer)
        )
        unknown = sorted(set(named) - {prefix + path for path in layers})
        if unknown:
            raise ValueError(f"prepare_layer_inputs_fn names {unknown}, which are no target layers")
        self.prepare = {path: (prefix + path, named.get(prefix + path)) for path in layers}
        self.device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))

    def run(self, first: Any, dataloader: Iterable, progress: bool) -> dict[str, torch.Tensor]:
        config, eva = self.config, self.config.eva_config
        leader, width = self.processes.from_first(lambda: self._leaders(first))
        most = {path: round(config.rank_for(path) * eva.rho) for path in self.layers}
        budget = sum(config.rank_for(path) for path in self.layers)
        for path, other in leader.items():
            most[other] = max(most[other], most[path])
        most = {path: min(most[leader[path]], width[path]) for path in self.layers}
        found = {path: IncrementalDirections(most[path], eva.tau) for path in dict.fromkeys(leader.values())}
        ranks = dict(most)

        def unsettled_now() -> list[str]:
            return [path for path, each in found.items() if not each.settled(ranks[path])]

        def learn(inputs: dict[str, torch.Tensor]) -> None:
            nonlocal ranks
            for path, x in inputs.items():
                if not torch.isfinite(x).all():
                    raise ValueError(f"EVA: the inputs of {path} have NaN or infinities")
                if x.shape[0] >= most[path]:
                    found[path].add(x.to(self.device))
            if all(each.directions is not None for each in found.values()):
                ranks = self._ranks(found, leader, most, budget)

        def check_pass() -> None:
            short = [path for path, each in found.items() if each.directions is None]
            if short:
                raise ValueError(
                    f"EVA: no batch has the {most[short[0]]} tokens that the rank of {short[0]} may need (r · rho); use "
                    "larger batches, a smaller rho, or use_label_mask=False"
                )

        def result() -> dict[str, torch.Tensor]:
            return {path: self._rows(found[leader[path]], ranks[path]).cpu() for path in self.layers}

        share = self.processes
        with _progress(len(self.layers), progress) as report:
            for _ in range(_MOST_PASSES):
                for batch in share.batches(dataloader):
                    unsettled = share.from_first(unsettled_now)
                    report(sum(leader[path] not in unsettled for path in self.layers))
                    if not unsettled:
                        return {path: a.to(self.device) for path, a in share.from_first(result).items()}
                    inputs = share.agreed(lambda b=batch, u=unsettled: {} if b is None else self._inputs(b, u))
                    inputs = share.gathered(inputs)
                    share.agreed(lambda i=inputs: learn(i))
                share.from_first(check_pass)
        raise ValueError(
            f"EVA: after {_MOST_PASSES} passes over the data {len(unsettled)} layers have not settled (first: "
            f"{unsettled[0]}); use larger batches or a tau below {eva.tau}"
        )

    def _rows(self, found: IncrementalDirections, rank: int) -> torch.Tensor:
        rows = found.directions[:rank]
        return rows / found.singular[:rank, None].sqrt() if self.config.eva_config.whiten else rows.clone()

    def _ranks(self, found, leader, most, budget) -> dict[str, int]:
        """The budget's largest shares of variance, counted by layer."""
        shares = [(path, found[leader[path]].ratio[: most[path]]) for path in self._order(leader)]
        owners = [path for path, ratio in shares for _ in range(len(ratio))]
        # of equal shares, those of layers with one input, the first path's count first: its convergence is what is watched
        chosen = torch.cat([ratio for _, ratio in shares]).argsort(descending=True, stable=True)[:budget]
        counts = Counter(owners[i] for i in chosen.tolist())
        return {path: counts.get(path, 0) for path in self.layers}

    @staticmethod
    def _order(leader: dict[str, str]) -> list[str]:
        return [p for p in leader if leader[p] == p] + [p for p in leader if leader[p] != p]

    def _leaders(self, batch: Any) -> tuple[dict[str, str], dict[str, int]]:
        """{path: the first path with the same input}, from one batch, and how wide each is."""
        seen, leader, width = {}, {}, {}
        for path, x in self._inputs(batch, list(self.layers)).items():
            width[path] = x.shape[1]
            values = x.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
            key = x.shape, x.dtype, hashlib.sha256(values).digest()
            leader[path] = seen.setdefault(key, path)
        silent = sorted(set(self.layers) - set(leader))
        if silent:
            raise ValueError(
                f"EVA: forward_fn does not reach {silent[:5]}, which therefore have no inputs to decompose"
            )
        return {path: leader[path] for path in self.layers}, width

    def _inputs(self, batch: Any, paths: list[str]) -> dict[str, torch.Tensor]:
        """The prepared inputs [tokens, K] of these layers in one forward pass."""
        batch, inputs, handles = _moved(batch, self.device), {}, []
        given = self.prepare_batch(batch, self.config) if self.prepare_batch is not None else batch
        for path in paths:
            name, prepare = self.prepare[path]

            def hook(module, args, kwargs, path=path, name=name, prepare=prepare):
                args = args or tuple(kwargs.values())
                x = _first(args, name) if prepare is None else prepare(args, given, name)
                inputs[path] = x.reshape(-1, x.shape[-1])

            handles.append(self.layers[path].register_forward_pre_hook(hook, with_kwargs=True))
        try:
            self.forward_fn(self.model, batch)
        finally:
            for handle in handles:
                handle.remove()
        return inputs


def initialize_lora_eva_weights(
    model: nn.Module,
    dataloader: Iterable | None = None,
    eva_state_dict: Mapping[str, torch.Tensor] | None = None,
    forward_fn: Callable = forward_fn_dict,
    prepare_model_inputs_fn: Callable | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: Callable | Mapping[str, Callable] | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> None:
    """Gives an adapter with init_lora_weights="eva" its A's, and every layer its rank; B stays 0. Before training.

    A layer that gets no rank loses the adapter. The adapter's config says the ranks (rank_pattern), the layers
    (target_modules) and with adjust_scaling_factors the alphas that keep alpha / r.
    model, dataloader, …   as in get_eva_state_dict
    eva_state_dict         its result, in place of a dataloader
    Raises TypeError / ValueError with the model as it was.
    """
    adapted = getattr(model, "base_model", None)
    if not (hasattr(adapted, "peft_config") and hasattr(adapted, "layers")):
        raise TypeError(f"initialize_lora_eva_weights: the model is a {type(model).__name__}, expected a PeftModel")
    config = adapted.peft_config[adapted.check_known(adapter_name)]
    if getattr(config, "init_lora_weights", None) != "eva":
        raise ValueError(
            f"adapter {adapter_name!r} has init_lora_weights={getattr(config, 'init_lora_weights', None)!r}, expected 'eva'"
        )
    if (dataloader is None) == (eva_state_dict is None):
        raise ValueError("initialize_lora_eva_weights: give either a dataloader or an eva_state_dict")
    layers = _adapted_layers(adapted, adapter_name)
    for path, layer in layers.items():
        if layer.merged_adapters:
            raise ValueError(f"{path}: adapters {list(layer.merged_adapters)} are merged; unmerge_adapter() first")
    if eva_state_dict is None:
        eva_state_dict = get_eva_state_dict(
            model, dataloader, None, forward_fn, prepare_model_inputs_fn, prepare_layer_inputs_fn, adapter_name,
            gather_distributed_inputs, show_progress_bar,
        )  # fmt: skip
    rows = {name.removeprefix(KEY_PREFIX): a for name, a in eva_state_dict.items()}
    _check_rows(rows, layers)
    ranks, alphas, kept = {}, {}, set()
    for path, layer in layers.items():
        if path in rows and len(rows[path]) == 0:
            continue
        rank, alpha = config.rank_for(path), config.alpha_for(path)
        if path in rows:
            former, rank = rank, len(rows[path])
            alpha = alpha * rank / former if config.eva_config.adjust_scaling_factors else alpha
            _set_rows(layer, adapter_name, rows[path], config.scaling(rank, alpha), alpha)
        kept.add(path)
        ranks |= {path: rank} if rank != config.r else {}
        alphas |= {path: alpha} if alpha != config.lora_alpha else {}
    for path in set(layers) - kept:
        layers[path].remove_adapter(adapter_name)
    remove_hollow_holders(adapted.model)
    # embeddings and convolutions keep what they were drawn with, as in PEFT
    others = [path for path, m in adapted.layers() if isinstance(m, LoraLinear) and adapter_name in m.held_adapters()]
    kept |= set(others)
    config.target_modules, config.rank_pattern, config.alpha_pattern = kept, ranks, alphas
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    missing = sorted(kept - set(rows))
    if missing:
        warnings.warn(f"EVA: {missing} are not in eva_state_dict and keep their random A", stacklevel=2)


def _adapted_layers(adapted: Any, name: str) -> dict[str, LoraLinear]:
    return {path: layer for path, layer in adapted.layers() if type(layer) is LoraLinear and name in layer.lora_A}


def _check_rows(rows: Mapping[str, torch.Tensor], layers: Mapping[str, LoraLinear]) -> None:
    unknown = sorted(set(rows) - set(layers))
    if unknown:
        raise ValueError(f"eva_state_dict has {unknown[:5]}, which the adapter does not adapt")
    for path, a in rows.items():
        if a.dim() != 2 or a.shape[1] != layers[path].in_features or not torch.isfinite(a).all():
            raise ValueError(
                f"eva_state_dict: {path} has shape {tuple(a.shape)}, expected finite values [rank, {layers[path].in_features}]"
            )
    if not any(len(a) for a in rows.values()) and set(rows) >= set(layers):
        raise ValueError("eva_state_dict: every layer has rank 0")


@torch.no_grad()
def _set_rows(layer: LoraLinear, name: str, rows: torch.Tensor, scaling: float, alpha: float) -> None:
    a, b = layer.lora_A[name], layer.lora_B[name]
    if len(rows) != len(a.weight):
        for module, shape in ((a, rows.shape), (b, (layer.out_features, len(rows)))):
            module.weight = nn.Parameter(module.weight.new_empty(shape), requires_grad=module.weight.requires_grad)
        a.out_features = b.in_features = len(rows)
    a.weight.copy_(rows)
    b.weight.zero_()
    layer.r[name], layer.lora_alpha[name], layer.scaling[name] = len(rows), alpha, scaling
    if name in layer.lora_magnitude_vector:
        layer.reset_magnitude(name)


def _moved(inputs: Any, device: torch.device) -> Any:
    """The batch's tensors on the device, whatever holds them."""
    if hasattr(inputs, "to"):
        return inputs.to(device)
    if isinstance(inputs, Mapping):
        return {key: _moved(value, device) for key, value in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return type(inputs)(_moved(value, device) for value in inputs)
    return inputs


@contextlib.contextmanager
def _progress(total: int, show: bool) -> Iterator[Callable[[int], None]]:
    """A function that is told how many layers have settled."""
    if not (show and sys.stderr.isatty()):
        yield lambda done: None
        return
    from rich.progress import Progress

    with Progress(transient=True) as bar:
        task = bar.add_task("EVA: layers that have settled", total=total)
        yield lambda done: bar.update(task, completed=done)
