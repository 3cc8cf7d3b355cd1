"""The job as a whole: files, exact resumption, interruption, full disks, gradient accumulation, NaN."""

import csv
import errno
import json
import os
import signal
import threading

import pytest
import torch
from safetensors.torch import load_file

import pyfastpeft as pf
from pyfastpeft.finetune import ConfigError, DataError, NonFiniteLossError, OutputError, checkpoint, finetune, loop
from pyfastpeft.finetune.files import TEMPORARY

TIMES = {"seconds", "tokens_per_second", "peak_memory_mib"}


def metrics(output):
    """The rows of metrics.csv without what time decides."""
    with open(output / "metrics.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]


def same_adapters(a, b):
    x, y = (load_file(folder / "adapter_model.safetensors") for folder in (a, b))
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


def stop_at(monkeypatch, config_step, micro_batch=None):
    """Makes the process receive SIGINT in the loss of that step (0-based) and micro-batch."""
    calls = {"training": 0}
    original = loop.summed_loss

    def interrupting(logits, labels):
        if torch.is_grad_enabled():
            step, micro = divmod(calls["training"], 2)
            calls["training"] += 1
            if step == config_step and (micro_batch is None or micro == micro_batch):
                os.kill(os.getpid(), signal.SIGINT)
        return original(logits, labels)

    monkeypatch.setattr(loop, "summed_loss", interrupting)


@pytest.fixture
def uninterrupted(make_config, tmp_path):
    def run(**options):
        return finetune(make_config(output=str(tmp_path / "whole"), **options))

    return run


def test_files_and_result(make_config):
    config = make_config(keep_last=2)
    result = finetune(config)
    assert result.status == "complete" and result.step == result.total_steps == 6
    assert len(result.losses) == 6 and [step for step, _ in result.eval_losses] == [0, 3, 6]
    assert result.losses[-1] < result.losses[0]
    assert result.eval_losses[-1][1] < result.eval_losses[0][1]
    assert result.tokens == 6 * 4 * 32
    output = result.output
    assert sorted(p.name for p in output.glob("checkpoints/*")) == ["step-4", "step-6"]
    assert same_adapters(output, output / "checkpoints/step-6")
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    rows = metrics(output)
    assert [row["step"] for row in rows] == ["0", "1", "2", "3", "3", "4", "5", "6", "6"]
    assert [float(row["train_loss"]) for row in rows if row["train_loss"]] == result.losses
    assert [float(row["eval_loss"]) for row in rows if row["eval_loss"]] == [loss for _, loss in result.eval_losses]
    record = json.loads((output / "run.json").read_text())
    assert record["status"] == "complete" and record["base_model"] == config.model
    assert record["options"] == config.to_dict()
    assert record["result"]["eval_loss_after"] == result.eval_losses[-1][1]
    assert set(record["versions"]) >= {"python", "torch", "transformers", "pyfastpeft"}
    assert not list(output.rglob(TEMPORARY + "*"))


def test_adapter_loads_in_peft_with_the_same_loss(make_config, tiny_model):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    config = make_config(method="lora", dropout=0.0)
    result = finetune(config)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, str(result.output))
    from transformers import AutoTokenizer

    from pyfastpeft.finetune.run import _load_data

    heldout = _load_data(config, AutoTokenizer.from_pretrained(tiny_model), 32).heldout
    loss = loop.mean_loss(theirs, heldout, batch_size=2, pad=0, device=torch.device("cpu"))
    assert loss == pytest.approx(result.eval_losses[-1][1], rel=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"optimizer": "adamw8bit", "rank": 64},  # 8-bit state starts at 4096 values
        {"optimizer": "paged_adamw", "rank": 64, "optimizer_memory": "200KB"},
        {"max_steps": None, "epochs": 2.0, "batch_size": 3, "schedule": "linear", "save_every": 3},
        {"method": "lora", "dtype": "bfloat16", "gradient_checkpointing": True, "packing": False},
        {"method": "lora", "dtype": "float16"},
        {"method": "adalora"},
        {"method": "ia3", "quantize": True},
        {"method": "relora", "restart_every": 2},
        {"method": "p_tuning", "prompt_encoder": "lstm", "packing": False},
    ],
    ids=[
        "plain",
        "8bit",
        "paged",
        "epochs",
        "bf16-checkpointing-padded",
        "fp16-scaled",
        "adalora",
        "ia3",
        "relora",
        "p_tuning",
    ],
)
def test_resumed_run_is_the_same_run_bit_for_bit(make_config, uninterrupted, monkeypatch, options):
    whole = uninterrupted(**options)
    with monkeypatch.context() as patch:
        stop_at(patch, config_step=3, micro_batch=0)
        part = finetune(make_config(**options))
    assert part.interrupted and part.step == 3
    rest = finetune(make_config(resume=True, **options))
    assert rest.status == "complete"
    assert part.losses + rest.losses == whole.losses
    assert part.eval_losses + rest.eval_losses == whole.eval_losses
    assert metrics(rest.output) == metrics(whole.output)
    assert same_adapters(rest.output, whole.output)


def test_dropout_really_acts(make_config, tmp_path):
    with_dropout = finetune(make_config(dropout=0.5, output=str(tmp_path / "a"), eval_fraction=0.0))
    without = finetune(make_config(dropout=0.0, output=str(tmp_path / "b"), eval_fraction=0.0))
    assert with_dropout.losses[1] != without.losses[1] and not with_dropout.eval_losses


def test_global_random_state_is_left_alone(make_config):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    finetune(make_config(max_steps=1))
    assert torch.equal(torch.rand(3), expected)


def test_stop_between_micro_batches_discards_the_half_step(make_config, uninterrupted, monkeypatch):
    whole = uninterrupted()
    with monkeypatch.context() as patch:
        stop_at(patch, config_step=2, micro_batch=0)
        part = finetune(make_config())
    assert part.step == 2  # not 3: the second micro-batch did not start
    assert part.losses + finetune(make_config(resume=True)).losses == whole.losses


def test_stop_during_evaluation_repeats_it_on_resume(make_config, uninterrupted, monkeypatch):
    whole = uninterrupted()
    original, seen = loop.summed_loss, []

    def interrupting(logits, labels):
        if not torch.is_grad_enabled():
            seen.append(1)
            if len(seen) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
        return original(logits, labels)

    config = make_config(eval_fraction=0.2)
    whole = finetune(make_config(eval_fraction=0.2, output=whole.output / "again"))
    with monkeypatch.context() as patch:
        patch.setattr(loop, "summed_loss", interrupting)
        part = finetune(config)
    assert part.interrupted and part.step == 0 and part.eval_losses == []
    rest = finetune(make_config(eval_fraction=0.2, resume=True))
    assert rest.losses == whole.losses and metrics(rest.output) == metrics(whole.output)


def test_resume_from_an_older_checkpoint(make_config, uninterrupted):
    whole = uninterrupted(keep_last=5)
    for name in ("adapter_model.safetensors", "loss.png"):
        (whole.output / name).unlink()
    again = finetune(
        make_config(output=str(whole.output), keep_last=5, resume_from=str(whole.output / "checkpoints/step-2"))
    )
    assert again.losses == whole.losses[2:] and again.status == "complete"
    assert [row["step"] for row in metrics(whole.output)] == ["0", "1", "2", "3", "3", "4", "5", "6", "6"]


def test_resuming_a_complete_run_changes_nothing(make_config):
    first = finetune(make_config())
    before = metrics(first.output)
    again = finetune(make_config(resume=True))
    assert again.status == "complete" and again.losses == [] and metrics(first.output) == before


def test_resume_with_nothing_there_starts(make_config):
    result = finetune(make_config(resume=True))
    assert result.status == "complete" and "nothing to resume" in result.notes[0]


def test_stop_request_works_off_the_main_thread(make_config):
    """Signal handlers belong to the main thread: elsewhere the job just runs."""
    results = []
    thread = threading.Thread(target=lambda: results.append(finetune(make_config(max_steps=1))))
    thread.start()
    thread.join()
    assert results[0].status == "complete"


# --- what the gradients are of ---------------------------------------------------------------------------------------


def test_accumulation_weighs_tokens_not_micro_batches(make_config, tmp_path):
    """Rows of very different length: 4 × 1, 2 × 2 and 1 × 4 must be the same step (up to rounding)."""
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": "q", "completion": "ab" * n}) + "\n" for n in (1, 14, 2, 9)))
    runs = []
    for batch, accumulation in ((4, 1), (2, 2), (1, 4)):
        config = make_config(
            data=str(data),
            output=str(tmp_path / f"{batch}"),
            batch_size=batch,
            gradient_accumulation=accumulation,
            dropout=0.0,
            eval_fraction=0.0,
            max_steps=3,
        )
        runs.append(finetune(config).losses)
    assert runs[1] == pytest.approx(runs[0], rel=1e-5)
    assert runs[2] == pytest.approx(runs[0], rel=1e-5)


def test_steps_equal_a_loop_written_out(make_config, tiny_model):
    """The trainer against fifteen plain lines with torch's own AdamW on the same adapter."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from pyfastpeft.finetune.data import BatchOrder, step_seed
    from pyfastpeft.finetune.model import Base, put_adapter_on
    from pyfastpeft.finetune.run import _load_data
    from pyfastpeft.finetune.schedule import learning_rate_at

    config = make_config(
        method="lora", dropout=0.0, batch_size=4, gradient_accumulation=1, weight_decay=0.01, max_grad_norm=0.5
    )
    result = finetune(config)
    data = _load_data(config, AutoTokenizer.from_pretrained(tiny_model), 32)
    order = BatchOrder(len(data.train), 4, seed=config.seed, epochs=1, max_steps=6)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    torch.manual_seed(step_seed(config.seed, 0, "initialisation"))
    AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    model = put_adapter_on(Base(base, None, torch.device("cpu"), torch.float32, []), config, None, 6)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.01)
    losses = []
    for step in range(6):
        rows = [data.train[i] for i in order.indices(step)]
        inputs, labels = (torch.stack(part) for part in zip(*rows, strict=True))
        loss = torch.nn.functional.cross_entropy(model(input_ids=inputs).logits.transpose(1, 2), labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.param_groups[0]["lr"] = learning_rate_at(step, peak=1e-2, total=6, warmup=0)
        optimizer.step()
        losses.append(loss.item())
    assert result.losses == pytest.approx(losses, rel=1e-4)


def test_nan_loss_stops_and_saves_nothing(make_config, monkeypatch):
    calls = []
    original = loop.summed_loss

    def poisoned(logits, labels):
        if torch.is_grad_enabled():
            calls.append(1)
            if len(calls) == 9:  # step 5 of 2 micro-batches each
                logits = logits * float("nan")
        return original(logits, labels)

    monkeypatch.setattr(loop, "summed_loss", poisoned)
    with pytest.raises(NonFiniteLossError) as error:
        finetune(make_config())
    message = str(error.value)
    assert "step 5: the loss is nan" in message and "learning-rate (now 0.01; 0.0025" in message
    output = make_config().output
    checkpoints = checkpoint.list_checkpoints(__import__("pathlib").Path(output))
    assert [path.name for path in checkpoints] == ["step-2", "step-4"] and "step-4" in message
    for path in checkpoints:
        assert all(t.isfinite().all() for t in load_file(path / "adapter_model.safetensors").values())
    monkeypatch.setattr(loop, "summed_loss", original)
    assert finetune(make_config(resume=True)).status == "complete"


def test_infinite_gradient_stops(make_config, monkeypatch):
    def steep(logits, labels):
        scaled = logits * (1 + torch.zeros_like(logits).requires_grad_())
        scaled.register_hook(lambda grad: grad * float("inf")) if torch.is_grad_enabled() else None
        return torch.nn.functional.cross_entropy(scaled.flatten(0, 1), labels.flatten(), reduction="sum")

    monkeypatch.setattr(loop, "summed_loss", steep)
    with pytest.raises(NonFiniteLossError, match="step 1: the gradient norm is (nan|inf)"):
        finetune(make_config())


# --- the output folder -----------------------------------------------------------------------------------------------


def test_earlier_run_needs_resume_or_overwrite(make_config):
    first = finetune(make_config())
    (first.output / "mine.txt").write_text("keep me")
    with pytest.raises(ConfigError, match="holds an earlier run .*--resume goes on with it, --overwrite"):
        finetune(make_config())
    with pytest.raises(ConfigError, match="made with other options \\(rank: 4 -> 8\\)"):
        finetune(make_config(rank=8, resume=True))
    second = finetune(make_config(rank=8, overwrite=True))
    assert second.status == "complete"
    assert (first.output / "mine.txt").read_text() == "keep me"
    assert json.loads((first.output / "adapter_config.json").read_text())["r"] == 8


def test_failed_overwrite_leaves_the_earlier_run(make_config, tmp_path):
    first = finetune(make_config())
    before = (first.output / "adapter_model.safetensors").read_bytes()
    with pytest.raises(DataError):
        finetune(make_config(data=str(tmp_path / "nowhere.txt"), overwrite=True))
    assert (first.output / "adapter_model.safetensors").read_bytes() == before


def test_changed_data_cannot_be_resumed(make_config, text_file):
    finetune(make_config())
    text_file.write_text(text_file.read_text() + "more. ")
    with pytest.raises(ConfigError, match="data was .*the file has changed"):
        finetune(make_config(resume=True))


@pytest.mark.parametrize("damage", ["remove", "truncate", "foreign"])
def test_damaged_checkpoint_is_refused_by_name(make_config, damage):
    output = finetune(make_config(max_steps=4)).output
    newest = output / "checkpoints/step-4"
    if damage == "remove":
        (newest / "trainer_state.json").unlink()
    elif damage == "truncate":
        data = (newest / "optimizer.pt").read_bytes()
        (newest / "optimizer.pt").write_bytes(data[: len(data) // 2])
    else:
        torch.save({"optimizer": {}, "names": ["other"], "scaler": None}, newest / "optimizer.pt")
    with pytest.raises(OutputError, match="step-4"):
        finetune(make_config(max_steps=4, resume=True))


def test_optimizer_file_is_never_executed(make_config, tmp_path):
    output = finetune(make_config(max_steps=2)).output
    marker = tmp_path / "executed"

    class Evil:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    torch.save({"optimizer": Evil(), "names": [], "scaler": None}, output / "checkpoints/step-2/optimizer.pt")
    with pytest.raises(OutputError, match="optimizer.pt cannot be read"):
        finetune(make_config(max_steps=2, resume=True))
    assert not marker.exists()


@pytest.mark.parametrize("where", ["adapter", "optimizer", "state"])
def test_full_disk_keeps_the_previous_checkpoint(make_config, monkeypatch, where):
    full = OSError(errno.ENOSPC, "No space left on device")
    original_save_state, original_json, saves = checkpoint._save, checkpoint.write_json, []

    class Full:
        def __init__(self, file):
            self.file = file

        def write(self, data):
            if self.file.tell() + len(data) > 4096:
                raise full
            return self.file.write(data)

        def flush(self):
            self.file.flush()

    def save_state(content, file):
        original_save_state(content, Full(file) if where == "optimizer" and len(saves) == 2 else file)

    def write_json(path, value):
        if where == "state" and len(saves) == 2:
            raise full
        original_json(path, value)

    original_save = checkpoint.save_checkpoint

    def counting(*args, save_adapter, **kwargs):
        saves.append(1)

        def save(folder):
            save_adapter(folder)
            if where == "adapter" and len(saves) == 2:
                raise full

        return original_save(*args, save_adapter=save, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_save", save_state)
        patch.setattr(checkpoint, "write_json", write_json)
        patch.setattr(loop, "save_checkpoint", counting)
        with pytest.raises(OutputError) as error:
            finetune(make_config())
    message = str(error.value)
    assert "step 4" in message and "disk is full" in message and "step-2 is intact" in message and "--resume" in message
    output = loop.Path(make_config().output)
    assert [p.name for p in checkpoint.list_checkpoints(output)] == ["step-2"]
    assert not list(output.rglob(TEMPORARY + "*"))
    assert json.loads((output / "run.json").read_text())["status"] == "failed: OutputError"
    assert finetune(make_config(resume=True)).status == "complete"


def test_output_that_cannot_be_a_folder(make_config, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="expected a folder, got a file|cannot be written"):
        finetune(make_config(output=str(tmp_path / "file")))
    with pytest.raises(OutputError, match="cannot be written"):
        finetune(make_config(output=str(tmp_path / "file" / "below")))
    with pytest.raises(OutputError, match="cannot be written"):
        finetune(make_config(output="/proc/1/out"))


def test_read_only_output(make_config, tmp_path):
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o555)
    if os.access(folder, os.W_OK):
        pytest.skip("this user may write everywhere")
    with pytest.raises(OutputError, match="no permission"):
        finetune(make_config(output=str(folder)))


def test_text_shorter_than_a_sequence(make_config, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("too short")
    with pytest.raises(DataError, match="tokens are fewer than one sequence of 32"):
        finetune(make_config(data=str(path)))
    assert finetune(make_config(data=str(path), packing=False, max_steps=1)).status == "complete"


@pytest.mark.parametrize("method", ["adalora", "ia3", "relora"])
def test_other_methods_train_and_merge(make_config, tiny_model, tmp_path, method):
    from pyfastpeft.merge import MergeConfig, merge

    result = finetune(make_config(method=method, max_steps=10, learning_rate=0.05, dropout=0.0))
    assert result.losses[-1] < result.losses[0]
    config = json.loads((result.output / "adapter_config.json").read_text())
    assert config["peft_type"] == {"adalora": "ADALORA", "ia3": "IA3", "relora": "LORA"}[method]
    assert (result.output / "base_weights.safetensors").exists() is (method == "relora")
    if method == "adalora":
        assert sum(map(sum, config["rank_pattern"].values())) == 4 * len(config["rank_pattern"])
    merged = merge(MergeConfig(str(tiny_model), str(result.output), str(tmp_path / "merged")))
    assert merged.layers > 0
    whole = finetune_logits(tiny_model, result.output)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(model(torch.arange(9)[None]).logits, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method, init", [("qlora", "eva"), ("lora", "eva"), ("lora", "orthogonal")])
def test_how_lora_starts(make_config, method, init):
    """EVA's directions are the data's: other rows than those drawn, with the ranks the file says; a run resumes."""
    from safetensors.torch import load_file

    options = {"method": method, "init": init, "dropout": 0.0, "batch_size": 4, "learning_rate": 1e-6}
    result = finetune(make_config(**options, max_steps=4))
    config = json.loads((result.output / "adapter_config.json").read_text())
    assert config["init_lora_weights"] == init and result.status == "complete"
    tensors = load_file(result.output / "adapter_model.safetensors")
    ranks = {name.removesuffix(".lora_A.weight"): len(a) for name, a in tensors.items() if "lora_A" in name}
    if init == "eva":
        assert config["rank_pattern"]
        for name, rank in ranks.items():
            path = name.removeprefix("base_model.model.")
            assert config["rank_pattern"].get(path, config["r"]) == rank
            rows = tensors[f"{name}.lora_A.weight"]  # directions, which the small steps have left alone
            torch.testing.assert_close(rows @ rows.t(), torch.eye(rank), atol=1e-3, rtol=0)
    again = finetune(make_config(**options, max_steps=4, resume_from=str(result.output / "checkpoints/step-2")))
    assert again.losses == result.losses[2:]


METHODS = {
    "bitfit": {"quantize": True},
    "prompt": {"prompt_text": "a text", "virtual_tokens": 7},
    "p_tuning": {"virtual_tokens": 3, "gradient_checkpointing": True},
    "prefix": {"virtual_tokens": 4, "prefix_projection": True, "quantize": True},
    "trainable_tokens": {"token_indices": "3-120", "quantize": True},
}


@pytest.mark.parametrize("method", METHODS)
def test_methods_that_do_not_adapt_layers(make_config, tiny_model, tmp_path, method):
    from pyfastpeft.generate import GenerateConfig, Generator
    from pyfastpeft.merge import MergeConfig, merge

    result = finetune(make_config(method=method, max_steps=8, learning_rate=0.05, **METHODS[method]))
    assert result.losses[-1] < result.losses[0]
    config = json.loads((result.output / "adapter_config.json").read_text())
    kind = {"prompt": "PROMPT_TUNING", "prefix": "PREFIX_TUNING"}.get(method, method.upper())
    assert config["peft_type"] == kind
    generator = Generator(GenerateConfig(str(tiny_model), str(result.output), greedy=True, max_new_tokens=60))
    longest = 64 - METHODS[method].get("virtual_tokens", 0)
    assert len(generator("pack my ")) <= longest - 8 + 60 and generator.model.peft_config
    if method not in ("bitfit", "trainable_tokens"):
        with pytest.raises(ValueError, match="virtual tokens are no part of any weight"):
            merge(MergeConfig(str(tiny_model), str(result.output), str(tmp_path / "merged")))
        with pytest.raises(ConfigError, match="expected at most .*less .* virtual tokens, got 64"):
            finetune(make_config(method=method, sequence_length=64, overwrite=True, **METHODS[method]))


def finetune_logits(folder, adapter):
    from transformers import AutoModelForCausalLM

    model = pf.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), adapter)
    with torch.no_grad():
        return model(torch.arange(9)[None]).logits
