"""The command line: options reach the job, errors are one message with an exit code, Ctrl-C saves, help is light."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from typer.testing import CliRunner

from pyfastpeft.cli import app
from pyfastpeft.finetune import FinetuneConfig

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


def call(*arguments, **kwargs):
    return CliRunner().invoke(app, list(map(str, arguments)), **kwargs)


@pytest.fixture
def train(tiny_model, text_file, tmp_path):
    def run(*more, output=None):
        return call(
            "finetune", "--model", tiny_model, "--data", text_file, "--output", output or tmp_path / "out",
            "--rank", 4, "--max-steps", 3, "--batch-size", 2, "--gradient-accumulation", 1, "--sequence-length", 32,
            "--dtype", "float32", "--device", "cpu", *more,
        )  # fmt: skip

    return run


def test_finetune_generate_merge(train, tiny_model, tmp_path):
    done = train("--lr", "0.01")
    assert done.exit_code == 0, done.output
    assert "done: 3 steps" in done.stdout and "held-out perplexity per token" in done.stdout
    assert "step 3/3" in done.stderr and "trainable parameters" in done.stderr
    out = tmp_path / "out"
    for name in ("adapter_config.json", "adapter_model.safetensors", "metrics.csv", "loss.png", "run.json"):
        assert (out / name).is_file()
    assert json.loads((out / "run.json").read_text())["options"]["learning_rate"] == 0.01
    options = ("--model", tiny_model, "--adapter", out, "--prompt", "the quick", "--max-new-tokens", 12)
    streamed = call("generate", *options)
    assert streamed.exit_code == 0 and streamed.stdout.startswith("the quick")
    assert call("generate", *options, "--no-stream").stdout == streamed.stdout
    alone = call("generate", *options, "--no-echo").stdout
    assert streamed.stdout == "the quick" + alone
    piped = call("generate", *options[:4], *options[6:], input="the quick")
    assert piped.stdout == streamed.stdout
    merged = call("merge", "--model", tiny_model, "--adapter", out, "--output", tmp_path / "merged")
    assert merged.exit_code == 0 and "merged 14 layers" in merged.stdout and "away from the original" in merged.stdout
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    assert (
        call("generate", "--model", tmp_path / "merged", "--prompt", "the", "--greedy", "--max-new-tokens", 3).exit_code
        == 0
    )


def test_every_option_reaches_the_config(tiny_model, monkeypatch, tmp_path):
    """Each field of FinetuneConfig is an option of the same name, default and effect."""
    import pyfastpeft.finetune

    seen = []
    monkeypatch.setattr(pyfastpeft.finetune, "finetune", lambda config, console: seen.append(config) or exit_now())

    def exit_now():
        raise RuntimeError("stop here")

    required = ["finetune", "--model", "m", "--data", "d", "--output", "o"]
    call(*required)
    assert seen.pop() == FinetuneConfig("m", "d", "o")
    values = {
        "method": "relora", "quantize": True, "restart_every": 3, "rank": 3, "alpha": 5.5, "dropout": 0.25, "rslora": True, "target_modules": "q_proj",
        "modules_to_save": "lm_head", "blocksize": 128, "quant_type": "fp4", "double_quant": False, "learning_rate": 0.5,
        "schedule": "linear", "warmup_steps": 4, "warmup_ratio": 0.5, "min_lr_ratio": 0.1, "epochs": 2.5, "max_steps": 9,
        "batch_size": 7, "gradient_accumulation": 6, "sequence_length": 99, "packing": False, "gradient_checkpointing": True,
        "dtype": "float16", "seed": 8, "eval_data": "e", "eval_fraction": 0.2, "eval_every": 11, "save_every": 12,
        "keep_last": 13, "resume": True, "resume_from": "r", "optimizer": "paged_adamw8bit", "weight_decay": 0.3,
        "max_grad_norm": 0.7, "device": "cpu", "threads": 2, "log_seconds": 3.5, "optimizer_memory": "2GB",
        "spill_dir": str(tmp_path), "virtual_tokens": 6, "prompt_encoder": "lstm",
    }  # fmt: skip
    fields = set(FinetuneConfig("m", "d", "o").to_dict())
    others = {
        "prompt": {"prompt_text": "a"},
        "prefix": {"prefix_projection": True},
        "trainable_tokens": {"token_indices": "3"},
        "lora": {"init": "eva"},
    }  # refused with another method
    named = {name for more in others.values() for name in more}
    assert set(values) | named | {"model", "data", "output", "overwrite"} == fields
    flags = []
    for name, value in values.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            flags += [flag, value]
    call(*required, *flags)
    assert seen.pop() == FinetuneConfig("m", "d", "o", **values)
    call(*required, "--overwrite")
    assert seen.pop().overwrite
    call(*required, "--method", "prompt", "--prompt-text", "a")
    assert seen.pop() == FinetuneConfig("m", "d", "o", method="prompt", **others["prompt"])
    call(*required, "--method", "prefix", "--prefix-projection")
    assert seen.pop() == FinetuneConfig("m", "d", "o", method="prefix", **others["prefix"])
    call(*required, "--method", "trainable_tokens", "--token-indices", "3")
    assert seen.pop() == FinetuneConfig("m", "d", "o", method="trainable_tokens", **others["trainable_tokens"])


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--lr", "-1"], 2, "--learning-rate: expected a number above 0, got -1.0"),
        (["--rank", "0"], 2, "--rank: expected a whole number of at least 1, got 0"),
        (["--spill-dir", "/"], 2, "--spill-dir: expected none without --optimizer paged_adamw or paged_adamw8bit"),
        (
            ["--optimizer", "paged_adamw", "--optimizer-memory", "much"],
            2,
            "--optimizer-memory: expected a number of bytes",
        ),
        (["--schedule", "zigzag"], 2, "--schedule: expected one of cosine, linear, constant, got 'zigzag'"),
        (["--sequence-length", "65"], 2, "--sequence-length: expected at most 64"),
        (["--data", "nowhere.txt"], 1, "nowhere.txt does not exist"),
        (["--model", "./nowhere"], 1, "model folder nowhere does not exist"),
        (["--target-modules", "q_prj"], 1, "q_prj"),
    ],
)
def test_errors_are_one_message_and_a_code(train, more, code, message):
    done = train(*more)
    assert done.exit_code == code, done.output
    text = " ".join(done.stderr.split())
    assert text.count("error: ") == 1 and message in text
    assert "Traceback" not in done.output and done.stdout == ""


def test_broken_line_is_named(train, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"text": \n')
    done = train("--data", tmp_path / "rows.jsonl")
    assert done.exit_code == 1 and "line 2: not JSON: Expecting value at column" in " ".join(done.stderr.split())


def test_usage_errors_exit_with_2(train):
    assert call("finetune", "--rank", "many").exit_code == 2
    assert call("finetune", "--no-such-option").exit_code == 2
    missing = call("finetune", "--model", "m")
    assert missing.exit_code == 2 and "--data, --output: missing (or use --demo" in missing.stderr
    empty = call("generate", "--model", "m", "--prompt", " ")
    assert empty.exit_code == 2 and "--prompt: expected a text" in empty.stderr
    demo = call("finetune", "--demo", "--rank", "8", "--lr", "0.1")
    assert demo.exit_code == 2 and "--demo chooses --rank, --learning-rate itself" in demo.stderr


def test_traceback_on_request(tiny_model, tmp_path, monkeypatch):
    arguments = ["finetune", "--model", tiny_model, "--data", "nowhere.txt", "--output", tmp_path / "out"]
    assert "Traceback" in call("--traceback", *arguments).stderr
    monkeypatch.setenv("PYFASTPEFT_TRACEBACK", "1")
    assert "Traceback" in call(*arguments).stderr
    monkeypatch.setenv("PYFASTPEFT_TRACEBACK", "0")
    assert "Traceback" not in call(*arguments).stderr


def test_a_bug_is_named_as_one(tiny_model, train, monkeypatch):
    import pyfastpeft.finetune

    monkeypatch.setattr(pyfastpeft.finetune, "finetune", lambda *_, **__: {}["missing"])
    done = train()
    assert done.exit_code == 1 and "KeyError: 'missing' (run again with --traceback" in " ".join(done.stderr.split())


def test_overwrite_and_resume(train):
    assert train().exit_code == 0
    again = train()
    assert again.exit_code == 2 and "--resume goes on with it, --overwrite replaces it" in " ".join(
        again.stderr.split()
    )
    assert train("--resume").exit_code == 0
    assert train("--overwrite").exit_code == 0


def test_version_and_help():
    version = call("--version")
    assert version.exit_code == 0 and re.fullmatch(r"pyfastpeft \d+\.\d+\.\d+\S*\n", version.stdout)
    assert call().exit_code in (0, 2) and "finetune" in call("--help").stdout
    text = call("finetune", "--help", env={"COLUMNS": "200"}).stdout
    for name in FinetuneConfig("m", "d", "o").to_dict():
        assert "--" + name.replace("_", "-") in text
    assert "default: ten a run" in text and "--demo-eval-bytes" not in text


def test_help_loads_nothing_heavy():
    """What `import pyfastpeft` itself loads is its own affair; the command line adds typer and rich."""
    script = """
        import sys
        import pyfastpeft
        before = set(sys.modules)
        import pyfastpeft.cli
        new = {name.split(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
        heavy = {"transformers", "matplotlib", "safetensors", "tokenizers", "huggingface_hub", "peft", "bitsandbytes"}
        assert "torch" not in new and not heavy & set(sys.modules), sorted(new)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, env=ENVIRONMENT, timeout=120)


def test_doctor():
    done = call("doctor")
    assert done.exit_code == 0 and "torch" in done.stdout
    report = json.loads(call("doctor", "--json").stdout)
    assert {"versions", "build", "cpu", "kernels", "problems"} <= set(report)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_interrupted_run_goes_on_exactly(train, tiny_model, text_file, tmp_path, number):
    """A real process, a real signal: exit code 130, a checkpoint, and the same numbers as a run left alone."""
    arguments = [
        "finetune", "--model", tiny_model, "--data", text_file, "--rank", 4, "--max-steps", 24, "--batch-size", 2,
        "--gradient-accumulation", 2, "--sequence-length", 32, "--dtype", "float32", "--device", "cpu", "--threads", 1,
        "--dropout", 0.1, "--save-every", 0, "--eval-every", 0, "--log-seconds", 0.001,
    ]  # fmt: skip
    out = tmp_path / "stopped"
    command = [sys.executable, "-m", "pyfastpeft.cli", *map(str, arguments), "--output", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    for line in process.stderr:
        if line.startswith("step 3/24"):
            process.send_signal(number)
            break
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    step = int(re.search(r"interrupted at step (\d+)/24; checkpoint saved", stdout).group(1))
    assert 3 <= step < 24 and "--resume" in stdout and "Traceback" not in stderr
    assert [p.name for p in (out / "checkpoints").iterdir()] == [f"step-{step}"]
    assert json.loads((out / "run.json").read_text())["status"] == "interrupted"
    if number == signal.SIGTERM:
        return
    rest = call(*arguments, "--output", out, "--resume")
    assert rest.exit_code == 0 and f"(step {step})" in " ".join(rest.stderr.split())
    whole = call(*arguments, "--output", tmp_path / "whole")
    assert whole.exit_code == 0

    def losses(folder):
        rows = (folder / "metrics.csv").read_text().splitlines()[1:]
        return [(row.split(",")[0], row.split(",")[3], row.split(",")[9]) for row in rows]

    assert losses(out) == losses(tmp_path / "whole")
    adapters = [(folder / "adapter_model.safetensors").read_bytes() for folder in (out, tmp_path / "whole")]
    assert adapters[0] == adapters[1]


def test_second_signal_stops_at_once(monkeypatch):
    from pyfastpeft.finetune.loop import StopRequest

    stop = StopRequest()
    with stop.listening(), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        os.kill(os.getpid(), signal.SIGINT)  # the same one, passed on by a wrapper
        os.kill(os.getpid(), signal.SIGTERM)
        stop._since -= 2
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_interrupt_outside_training_is_130(train, monkeypatch):
    import pyfastpeft.finetune

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(pyfastpeft.finetune, "finetune", interrupted)
    done = train()
    assert done.exit_code == 130 and "interrupted" in done.stderr
