"""A whole Llama of the 8 B shape with random weights: QLoRA training and decoding, beside PEFT + bitsandbytes and bf16.

    python bench/gpu/llama.py [--json FILE] [--layers 32] [--compiled]

train    tokens per second and peak memory of a step of QLoRA (NF4, double quantisation, rank 16 on every linear layer,
         gradient checkpointing), batch 4 x 1024 tokens
decode   tokens per second of greedy generation after a prompt of 128 tokens, batch 1, 8 and 32: NF4 beside bitsandbytes
         and beside bf16. --compiled adds a row each with a static cache, which transformers compiles into CUDA graphs

One model lies in memory at a time; candidates follow each other twice, and both figures are kept. A peer that is missing is
named and left out.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from pyfastpeft import _bench

_bench.load()
from pyfastpeft.bench.measure import environment, version  # noqa: E402
from pyfastpeft.bench.models import bitsandbytes_layers  # noqa: E402

import pyfastpeft as pf  # noqa: E402

SHAPE = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
}  # fmt: skip
LAYERS, BATCH, TOKENS, RANK = 32, 4, 1024, 16
PROMPT, NEW, BATCHES = 128, 64, (1, 8, 32)
STEPS = 5


def llama(device: str, layers: int, shape: dict | None = None) -> torch.nn.Module:
    """In bf16, drawn on the device layer by layer: at no time more than the model itself."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(num_hidden_layers=layers, max_position_embeddings=8192, **(shape or SHAPE))
    torch.manual_seed(0)
    former = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(former)


def ours(model: torch.nn.Module, adapter: bool) -> torch.nn.Module:
    model = pf.quantize_model(model, double_quant=True)
    return pf.get_peft_model(model, _lora(pf)) if adapter else model


def theirs(model: torch.nn.Module, adapter: bool) -> torch.nn.Module:
    device = next(model.parameters()).device
    model = bitsandbytes_layers(model).to(device)
    if not adapter:
        return model
    import peft

    return peft.get_peft_model(model, _lora(peft))


def plain(model: torch.nn.Module, adapter: bool) -> torch.nn.Module:
    return model


def _lora(package):
    return package.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")


# name → (what it makes of the bf16 model, the packages it needs)
TRAINED = {"ours": (ours, ()), "peft + bitsandbytes": (theirs, ("peft", "bitsandbytes"))}
DECODED = {"ours": (ours, ()), "bitsandbytes": (theirs, ("bitsandbytes",)), "bf16": (plain, ())}


def present(candidates: dict) -> Iterator[tuple[str, Callable]]:
    for name, (build, needs) in candidates.items():
        missing = [package for package in needs if version(package) is None]
        if missing:
            print(f"  {name} is left out: {', '.join(missing)} is not installed")
        else:
            yield name, build


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def let_go(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def train(model: torch.nn.Module, device: str, batch: int, tokens: int, steps: int = STEPS) -> dict:
    """Tokens per second of the median step, and the peak of what was allocated, the model included."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    mine = isinstance(model, pf.PeftModel)
    optimizer = pf.optim.AdamW(trained, lr=1e-4) if mine else torch.optim.AdamW(trained, lr=1e-4, fused=True)
    ids = torch.randint(0, model.config.vocab_size, (batch, tokens), device=device)
    seconds = []
    for _ in range(steps + 1):  # the first pays for what is made once
        synchronise(device)
        begin = time.perf_counter()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        synchronise(device)
        seconds.append(time.perf_counter() - begin)
    if not torch.isfinite(loss):
        raise RuntimeError(f"the loss is {loss.item()}")
    peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None
    return {
        "tokens_per_second": batch * tokens / sorted(seconds[1:])[steps // 2],
        "peak_GiB": peak,
        "loss": loss.item(),
    }


@torch.no_grad()
def decode(model: torch.nn.Module, device: str, batch: int, prompt: int, new: int, **options) -> float:
    """Tokens per second after the prompt: the time of new + 1 tokens less the time of one."""
    ids = torch.randint(0, model.config.vocab_size, (batch, prompt), device=device)

    def seconds(count: int) -> float:
        synchronise(device)
        begin = time.perf_counter()
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count, do_sample=False,
            pad_token_id=0, **options,
        )  # fmt: skip
        synchronise(device)
        assert out.shape == (batch, prompt + count)
        return time.perf_counter() - begin

    seconds(new + 1)
    return batch * new / min(max(seconds(new + 1) - seconds(1), 1e-9) for _ in range(2))


def run(device: str, layers: int, shape: dict, sizes: dict, compiled: bool) -> list[dict]:
    rows = []

    def keep(row: dict) -> None:
        rows.append(row)
        print(
            "  " + ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True
        )

    for turn in range(2):
        for name, build in present(TRAINED):
            let_go(device)
            model = build(llama(device, layers, shape), True)
            keep(
                {
                    "row": "train",
                    "candidate": name,
                    "turn": turn,
                    **train(model, device, sizes["batch"], sizes["tokens"]),
                }
            )
            del model
        for name, build in present(DECODED):
            let_go(device)
            model = build(llama(device, layers, shape), False).eval()
            for batch in sizes["batches"]:
                for mode, options in (("eager", {}), ("compiled", {"cache_implementation": "static"})):
                    if mode == "compiled" and not compiled:
                        continue
                    rate = decode(model, device, batch, sizes["prompt"], sizes["new"], **options)
                    keep({"row": f"decode {batch}, {mode}", "candidate": name, "turn": turn, "tokens_per_second": rate})
            del model
    let_go(device)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write results there")
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument(
        "--compiled", action="store_true", help="static caches and CUDA graphs too: minutes of compilation"
    )
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit(f"llama: needs a CUDA device, and torch {torch.__version__} finds none")
    sizes = {"batch": BATCH, "tokens": TOKENS, "prompt": PROMPT, "new": NEW, "batches": BATCHES}
    facts = {**environment(), "gpu": torch.cuda.get_device_name(), "layers": options.layers, "shape": SHAPE, **sizes}
    print(f"llama: {facts['gpu']}, torch {facts['torch']}, commit {facts['commit']}, {options.layers} layers")
    rows = run("cuda", options.layers, SHAPE, sizes, options.compiled)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        temporary = options.json.with_suffix(".tmp")
        temporary.write_text(json.dumps({"bench": "llama", "environment": facts, "rows": rows}, indent=2) + "\n")
        temporary.replace(options.json)


if __name__ == "__main__":
    main()
