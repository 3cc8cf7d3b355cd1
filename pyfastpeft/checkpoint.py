"""Adapter files, as Hugging Face PEFT writes and reads them: adapter_config.json and adapter_model.safetensors.

Writing is all or nothing: every file is written under a temporary name and synced before the first one is renamed, so a
full disk or a crash leaves the former checkpoint. Reading is all or nothing too: everything is read and compared with
what the model expects before the first value is copied. Nothing in a file is ever executed.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pyfastpeft.methods.base import KEY_PREFIX, AdapterHolder, PeftConfig, bare_modules

CONFIG_NAME = "adapter_config.json"
SAFETENSORS_NAME = "adapter_model.safetensors"
BIN_NAME = "adapter_model.bin"
CARD_NAME = "README.md"


def write_config(directory: str | os.PathLike, config: PeftConfig, auto_mapping: dict | None = None) -> None:
    """Writes adapter_config.json alone."""
    write_files(directory, {CONFIG_NAME: _bytes_writer(config_json(config, auto_mapping))})


def config_json(config: PeftConfig, auto_mapping: dict | None = None) -> bytes:
    """The bytes of adapter_config.json: sorted keys, indented by two, sets as sorted lists."""
    fields = {k: sorted(v) if isinstance(v, (set, frozenset)) else v for k, v in config.to_dict().items()}
    if auto_mapping is not None:
        fields["auto_mapping"] = auto_mapping
    return json.dumps(fields, indent=2, sort_keys=True).encode()


def write_adapter(
    directory: str | os.PathLike,
    tensors: Mapping[str, torch.Tensor],
    config: PeftConfig,
    *,
    safe_serialization: bool = True,
    auto_mapping: dict | None = None,
    card: str | None = None,
    resume: Mapping[str, torch.Tensor] | None = None,
    resume_name: str | None = None,
) -> None:
    """Writes weights, config and (where there is none yet) the model card of one adapter into a folder.

    resume   further tensors, for a file of their own, resume_name; without any a former file of that name goes

    Raises OSError when the folder cannot be written or the disk is full; the former checkpoint is then untouched.
    """
    tensors = _separate(tensors)
    if safe_serialization:
        name, other, writer = SAFETENSORS_NAME, BIN_NAME, _safetensors_writer(tensors)
    else:
        name, other, writer = BIN_NAME, SAFETENSORS_NAME, lambda path: torch.save(tensors, path)
    files = {name: writer, CONFIG_NAME: _bytes_writer(config_json(config, auto_mapping))}
    if resume:
        files[resume_name] = _safetensors_writer(_separate(resume))
    if card is not None and not os.path.exists(os.path.join(directory, CARD_NAME)):
        files[CARD_NAME] = _bytes_writer(card.encode())
    write_files(directory, files)
    for stale in (other, resume_name):  # weights of the other kind would be read in place of these
        if stale is not None and stale not in files:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(directory, stale))


def _separate(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """On the CPU, contiguous, each with memory of its own: safetensors refuses tensors that share it."""
    tensors = {key: tensor.detach().to("cpu").contiguous() for key, tensor in tensors.items()}
    storages: set[int] = set()
    for key, tensor in tensors.items():
        if tensor.numel() and tensor.untyped_storage().data_ptr() in storages:
            tensors[key] = tensor.clone()
        storages.add(tensors[key].untyped_storage().data_ptr())
    return tensors


def write_files(directory: str | os.PathLike, files: Mapping[str, Callable[[str], None]]) -> None:
    """Writes several files of a folder, {name: writer(path)}: all are on the disk before the first takes its name."""
    if os.path.exists(directory) and not os.path.isdir(directory):
        raise NotADirectoryError(f"cannot save into {directory}: it is a file, expected a folder")
    written: dict[str, str] = {}
    try:
        os.makedirs(directory, exist_ok=True)
        for name, writer in files.items():
            handle, temporary = tempfile.mkstemp(dir=directory, prefix=f".{name}.", suffix=".tmp")
            os.close(handle)
            written[name] = temporary
            writer(temporary)
            _sync(temporary)
            os.chmod(temporary, 0o666 & ~_umask())
        for name, temporary in list(written.items()):
            os.replace(temporary, os.path.join(directory, name))
            del written[name]
        _sync(directory)
    except Exception as error:
        names = ", ".join(files)
        text = f"saving {names} into {directory} failed: {error}; what was there before is untouched"
        raise OSError(getattr(error, "errno", None) or 0, text) from error
    finally:
        for temporary in written.values():
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(path: str | os.PathLike) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _bytes_writer(content: bytes) -> Callable[[str], None]:
    def write(path: str) -> None:
        with open(path, "wb") as file:
            file.write(content)

    return write


def _safetensors_writer(tensors: dict[str, torch.Tensor]) -> Callable[[str], None]:
    def write(path: str) -> None:
        from safetensors.torch import save_file

        save_file(tensors, path, metadata={"format": "pt"})

    return write


def read_config(
    model_id: str | os.PathLike, subfolder: str | None = None, expected: type[PeftConfig] = PeftConfig, **hub_kwargs
) -> PeftConfig:
    """The config in a folder or hub repository, of the class that its peft_type names.

    Raises ValueError, naming the file: not JSON, not an object, no or an unknown peft_type, a peft_type other than that
    of `expected`, a field of a wrong type.
    """
    from pyfastpeft.methods.registry import config_class_for

    path = _find(model_id, (CONFIG_NAME,), subfolder, hub_kwargs)
    try:
        fields = json.loads(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path} holds a {type(fields).__name__}, expected a JSON object")
    if "peft_type" not in fields:
        raise ValueError(f"{path} has no peft_type: it is not the config of an adapter")
    try:
        config_class = config_class_for(fields["peft_type"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not issubclass(config_class, expected):
        raise ValueError(f"{path}: peft_type is {fields['peft_type']!r}, which is not a {expected.__name__}")
    try:
        return config_class.from_dict(fields)
    except NotImplementedError as error:
        raise NotImplementedError(f"{path}: {error}") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def read_tensors(model_id: str | os.PathLike, subfolder: str | None = None, **hub_kwargs) -> dict[str, torch.Tensor]:
    """The tensors of adapter_model.safetensors, or else of adapter_model.bin (read with weights_only), on the CPU.

    Raises ValueError, naming the file, when it is truncated, tampered with, or holds anything but tensors.
    """
    return _read_file(_find(model_id, (SAFETENSORS_NAME, BIN_NAME), subfolder, hub_kwargs))


def read_resume(
    model_id: str | os.PathLike, name: str | None, subfolder: str | None = None, **hub_kwargs
) -> dict[str, torch.Tensor]:
    """The tensors of the file `name`; none where there is no such file (PEFT writes none)."""
    if name is None:
        return {}
    folder = os.path.join(model_id, subfolder) if subfolder else os.fspath(model_id)
    if os.path.isdir(model_id):
        path = os.path.join(folder, name)
        return _read_file(path) if os.path.isfile(path) else {}
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return _read_file(hf_hub_download(os.fspath(model_id), name, subfolder=subfolder, **hub_kwargs))
    except EntryNotFoundError:
        return {}


def _read_file(path: str) -> dict[str, torch.Tensor]:
    try:
        if str(path).endswith(".safetensors"):
            from safetensors.torch import load_file

            tensors = load_file(path, device="cpu")
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # each of the two readers has error classes of its own
        raise ValueError(f"{path} cannot be read, it is truncated or damaged: {error}") from error
    if not isinstance(tensors, dict) or not all(
        isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in tensors.items()
    ):
        raise ValueError(f"{path} holds something other than named tensors")
    return {key.replace("_orig_mod.", ""): tensor for key, tensor in tensors.items()}  # saved while compiled


def _find(model_id: str | os.PathLike, names: tuple[str, ...], subfolder: str | None, hub_kwargs: dict) -> str:
    """The path of the first of `names` in a folder, or downloaded from the hub."""
    folder = os.path.join(model_id, subfolder) if subfolder else os.fspath(model_id)
    for name in names:
        if os.path.isfile(os.path.join(folder, name)):
            return os.path.join(folder, name)
    missing = f"{folder} has no {' and no '.join(names)}"
    looks_local = os.path.exists(model_id) or os.path.isabs(model_id) or os.fspath(model_id).startswith((".", "~"))
    if looks_local or os.fspath(model_id).count("/") > 1:
        raise ValueError(f"{missing}; expected a folder that save_pretrained wrote")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    for name in names:
        try:
            return hf_hub_download(os.fspath(model_id), name, subfolder=subfolder, **hub_kwargs)
        except EntryNotFoundError:
            continue
        except Exception as error:  # no network, no such repository, no permission
            raise ValueError(f"{missing}, and it could not be had from the hub: {error}") from error
    raise ValueError(f"the hub's {model_id} has no {' and no '.join(names)}")


def check_tensors(source: str, found: Mapping[str, torch.Tensor], live: Mapping[str, torch.Tensor]) -> None:
    """Compares a file's tensors with the model's by key, shape and kind; ValueError names all that is wrong.

    The output and input embeddings that PEFT adds to some files must be among `live` too when they are to be loaded.
    """
    problems = []
    for title, keys in (("missing", set(live) - set(found)), ("unexpected", set(found) - set(live))):
        if keys:
            shown = ", ".join(sorted(keys)[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
            problems.append(f"{len(keys)} {title}: {shown}")
    for key in sorted(set(found) & set(live)):
        tensor, mine = found[key], live[key]
        if tensor.shape != mine.shape:
            problems.append(f"{key} has shape {tuple(tensor.shape)}, the model expects {tuple(mine.shape)}")
        elif tensor.is_floating_point() != mine.is_floating_point():
            problems.append(f"{key} has dtype {tensor.dtype}, the model expects {mine.dtype}")
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(
            f"{source} does not fit the model, nothing was loaded: {'; '.join(problems[:8])}{more}. Is it the base "
            "model that the adapter was trained on?"
        )


@torch.no_grad()
def copy_tensors(found: Mapping[str, torch.Tensor], live: Mapping[str, torch.Tensor]) -> None:
    """Copies checked values into the model, casting to what it stores."""
    for key, tensor in found.items():
        live[key].copy_(tensor)


def warn_not_finite(source: str, found: Mapping[str, torch.Tensor]) -> None:
    """Says that a file holds NaN or infinities, with the first key."""
    for key, tensor in found.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            warnings.warn(f"{source}: {key} has NaN or infinities", stacklevel=3)
            return


def model_card(config: PeftConfig) -> str:
    """A small README.md for the adapter, with the fields the hub reads."""
    fields: dict[str, Any] = {"base_model": config.base_model_name_or_path, "library_name": "peft"}
    front = "\n".join(f"{key}: {json.dumps(value)}" for key, value in fields.items() if value)
    tags = f"tags:\n- {str(config.peft_type.value).lower()}"
    pipeline = "\npipeline_tag: text-generation" if config.task_type == "CAUSAL_LM" else ""
    base = config.base_model_name_or_path or "the base model"
    return (
        f"---\n{front}\n{tags}{pipeline}\n---\n\n# {config.peft_type.value} adapter for {base}\n\n"
        "Trained with pyfastpeft; loads with `pyfastpeft.PeftModel.from_pretrained(base, folder)` and with Hugging Face "
        "PEFT's method of the same name.\n"
    )


def update_model_card(folder: str | os.PathLike, config: PeftConfig) -> None:
    """Puts the fields of model_card() into the README.md of a folder, whose text and other fields stay."""
    from huggingface_hub import ModelCard

    path, own = os.path.join(folder, "README.md"), ModelCard(model_card(config))
    if not os.path.isfile(path):
        own.save(path)
        return
    card = ModelCard.load(path)
    card.data.tags = sorted({*(card.data.tags or []), *own.data.tags})
    for field in ("base_model", "library_name", "pipeline_tag"):
        if getattr(own.data, field) is not None:
            setattr(card.data, field, getattr(own.data, field))
    card.save(path)


def embedding_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The dense weights of input and output embedding by the keys PEFT saves them under."""
    layers = []
    for get in ("get_input_embeddings", "get_output_embeddings"):
        try:
            layers.append(getattr(model, get)())
        except (AttributeError, NotImplementedError):  # not a transformers model, or one without embeddings
            continue
    tensors = {}
    for path, module in bare_modules(model):
        bare = module.bare_module() if isinstance(module, AdapterHolder) else module
        if not any(layer is not None and layer in (module, bare) for layer in layers):
            continue
        suffix = f"{module.base_key}.weight" if hasattr(module, "base_key") else "weight"
        weight = getattr(bare, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.is_floating_point():
            tensors[f"{KEY_PREFIX}{path}.{suffix}"] = weight
    return tensors
