"""Loads the base model and its tokenizer, chooses device and dtype, quantises, and puts the adapter on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pyfastpeft.finetune.config import DEFAULT_SEQUENCE_LENGTH, FinetuneConfig
from pyfastpeft.finetune.errors import ConfigError, ModelError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Base:
    """A base model as loaded, its tokenizer and what was decided about it."""

    model: torch.nn.Module
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype
    notes: list[str]


def choose_device(name: str = "auto") -> tuple[torch.device, list[str]]:
    """(device, notes). "auto": the GPU where there is one and this build has kernels for it, else the CPU."""
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu"), []
        if _has_cuda_kernels():
            return torch.device("cuda"), []
        return torch.device("cpu"), ["running on the CPU: this build of pyfastpeft has no CUDA kernels for training"]
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"--device: expected auto, cpu, cuda or cuda:N, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device: expected auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise ConfigError(f"--device {name}: torch sees {count} GPUs; `pyfastpeft doctor` says why")
        if not _has_cuda_kernels():
            raise ConfigError(
                f"--device {name}: this build of pyfastpeft has no CUDA kernels for training; use --device cpu"
            )
    return device, []


def _has_cuda_kernels() -> bool:
    import pyfastpeft.ops  # noqa: F401  (registers them)

    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return all(has(f"pyfastpeft::{op}", "CUDA") for op in ("quantize_4bit", "linear_4bit", "linear_lora", "adamw_"))


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """ "auto": bfloat16 on a GPU or a CPU that computes in it, float16 on an older GPU, else float32."""
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    from pyfastpeft._native import _C

    return torch.bfloat16 if _C.cpu_isa() in ("avx512", "amx") else torch.float32


def read_model_config(model: str) -> Any:
    """transformers' config of a folder or an id; ModelError where there is none or the weights are quantised
    already."""
    from transformers import AutoConfig

    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            found = ", ".join(sorted(p.name for p in path.iterdir())[:6]) or "nothing"
            hint = "; this is an adapter: give its base model here" if (path / "adapter_config.json").is_file() else ""
            raise ModelError(f"model folder {path} has no config.json (it holds: {found}){hint}")
    elif path.exists():
        raise ModelError(f"model {path} is a file, expected the folder that holds config.json and the weights")
    elif model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise ModelError(f"model folder {path} does not exist; check the path (it was looked for from {Path.cwd()})")
    try:
        config = AutoConfig.from_pretrained(str(path) if path.is_dir() else model)
    except (OSError, ValueError) as error:
        if path.is_dir():
            raise ModelError(f"model folder {path}: config.json cannot be used: {first_line(error)}") from error
        raise ModelError(
            f"model {model!r} is no folder here, and as a Hugging Face id it could not be loaded: {first_line(error)}"
        ) from error
    quantization = getattr(config, "quantization_config", None)
    if quantization:
        kind = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
        raise ModelError(
            f"the weights of {model} are already quantised (quantization_config in config.json: "
            f"{getattr(kind, 'value', kind)});"
            " pyfastpeft quantises the 16-bit model itself while loading it: give the original model, or write one by "
            "transformers' AutoModelForCausalLM.from_pretrained(...).dequantize() and save_pretrained"
        )
    return config


def maximum_length(config: Any) -> int | None:
    """The longest sequence the model's positions reach, or None where it names none."""
    value = getattr(config.get_text_config(), "max_position_embeddings", None)
    return value if isinstance(value, int) and value > 0 else None


def sequence_length(requested: int | None, config: Any, added: int = 0) -> int:
    """The sequence length to train with, without `added` virtual tokens; ConfigError where both together go beyond the
    model's."""
    longest = maximum_length(config)
    if longest is not None and added:
        longest -= added
        if longest < 2:
            raise ConfigError(f"--virtual-tokens: {added} leave no room in the model's {longest + added} positions")
    if requested is None:
        return min(DEFAULT_SEQUENCE_LENGTH, longest or DEFAULT_SEQUENCE_LENGTH)
    if longest is not None and requested > longest:
        raise ConfigError(
            f"--sequence-length: expected at most {longest}, the model's max_position_embeddings"
            f"{f' less {added} virtual tokens' if added else ''}, got {requested}"
        )
    return requested


def load_tokenizer(model: str) -> Any:
    """The tokenizer that lies with the model."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            str(Path(model).expanduser()) if Path(model).expanduser().is_dir() else model
        )
    except Exception as error:  # tokenizer loaders raise whatever their file format raises
        raise ModelError(f"model {model}: its tokenizer cannot be loaded: {first_line(error)}") from error


def load_base(model: str, *, device: str = "auto", dtype: str | torch.dtype = "auto") -> Base:
    """Loads the dense model in `dtype`, on the CPU (`place` moves it), with its tokenizer."""
    from transformers import AutoModelForCausalLM

    config = read_model_config(model)
    chosen, notes = choose_device(device)
    kind = dtype if isinstance(dtype, torch.dtype) else choose_dtype(dtype, chosen)
    tokenizer = load_tokenizer(model)
    path = Path(model).expanduser()
    with quiet_transformers():
        try:
            network, loading = AutoModelForCausalLM.from_pretrained(
                str(path) if path.is_dir() else model, config=config, dtype=kind, output_loading_info=True
            )
        except Exception as error:  # missing, truncated or mismatched weights: each library has its own exception
            raise ModelError(f"model {model}: its weights cannot be loaded: {first_line(error)}") from error
    if missing := sorted(loading["missing_keys"]):  # transformers would train on with random ones
        raise ModelError(
            f"model {model}: {len(missing)} weights are missing in its files (first: {', '.join(missing[:3])}); it "
            f"is no complete {type(network).__name__}"
        )
    return Base(network, tokenizer, chosen, kind, notes)


def quantize_base(base: Base, *, blocksize: int, quant_type: str, double_quant: bool) -> None:
    """Quantises the base's linear layers in place and notes what was skipped."""
    from pyfastpeft import quantize_model

    try:
        quantize_model(
            base.model, blocksize=blocksize, quant_type=quant_type, double_quant=double_quant, compute_dtype=base.dtype
        )
    except (ValueError, TypeError) as error:
        raise ModelError(f"the base model cannot be quantised: {error}") from error


def put_adapter_on(base: Base, config: FinetuneConfig, checkpoint: Path | None, total_steps: int) -> torch.nn.Module:
    """The PeftModel to train for total_steps: a new adapter, or the one of `checkpoint`."""
    from pyfastpeft import PeftModel, get_peft_model
    from pyfastpeft.finetune.methods import adapter_config

    if checkpoint is not None:
        return PeftModel.from_pretrained(base.model, str(checkpoint), is_trainable=True)
    return get_peft_model(base.model, adapter_config(config, total_steps))


def check_tokens(ids: torch.Tensor, model: torch.nn.Module) -> None:
    """Refuses token ids beyond the embedding: a tokenizer that belongs to another model."""
    rows = model.get_input_embeddings().weight.shape[0]
    highest = int(ids.max())
    if highest >= rows:
        raise ModelError(
            f"the tokenizer gives token {highest}, but the model's embedding has {rows} rows; tokenizer and model do "
            "not belong together (a model whose vocabulary was extended must have its embeddings resized and saved)"
        )


def padding_token(tokenizer: Any) -> int:
    """The id that fills padded rows; it is masked everywhere, so any valid id does."""
    for value in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if value is not None:
            return value
    return 0


def trainable_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Name → parameter for all that the optimizer moves, in a fixed order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def first_line(error: BaseException) -> str:
    """The first line of a foreign error message: libraries add paragraphs."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


class quiet_transformers:
    """Silences transformers' own progress bars and warnings inside the block: ours is the only progress line."""

    def __enter__(self) -> None:
        from transformers.utils import logging

        self._bars = logging.is_progress_bar_enabled()
        self._level = logging.get_verbosity()
        logging.disable_progress_bar()
        logging.set_verbosity_error()

    def __exit__(self, *_: object) -> None:
        from transformers.utils import logging

        logging.set_verbosity(self._level)
        if self._bars:
            logging.enable_progress_bar()
