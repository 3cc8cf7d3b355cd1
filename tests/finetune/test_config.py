"""Every option with a value that cannot be used is refused by name; the schedule; the targets."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyfastpeft.finetune import ConfigError, FinetuneConfig
from pyfastpeft.finetune.schedule import learning_rate_at


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", " "),
        ("method", "dora"),
        ("rank", 0),
        ("rank", 2.5),
        ("rank", True),
        ("alpha", 0),
        ("dropout", 1.0),
        ("dropout", -0.1),
        ("dropout", math.nan),
        ("target_modules", ""),
        ("blocksize", 48),
        ("quant_type", "int4"),
        ("learning_rate", -1e-4),
        ("learning_rate", 0.0),
        ("learning_rate", math.inf),
        ("schedule", "polynomial"),
        ("warmup_steps", -1),
        ("warmup_ratio", 1.0),
        ("min_lr_ratio", 1.5),
        ("epochs", 0),
        ("max_steps", 0),
        ("batch_size", 0),
        ("gradient_accumulation", -2),
        ("sequence_length", 0),
        ("dtype", "fp8"),
        ("seed", -1),
        ("eval_fraction", 1.0),
        ("eval_every", -5),
        ("save_every", -5),
        ("keep_last", 0),
        ("restart_every", 0),
        ("virtual_tokens", 0),
        ("prompt_encoder", "gru"),
        ("prompt_text", "a"),  # of prompt alone
        ("prefix_projection", True),  # of prefix alone
        ("token_indices", "3"),  # of trainable_tokens alone
        ("optimizer", "sgd"),
        ("optimizer_memory", "2GB"),  # of a paged one alone
        ("spill_dir", "/"),
        ("weight_decay", -0.1),
        ("max_grad_norm", -1),
        ("threads", 0),
        ("log_seconds", 0),
    ],
)
def test_bad_value_is_refused_by_name(field, value):
    values = {"model": "m", "data": "d", "output": "o", field: value}
    with pytest.raises(ConfigError) as error:
        FinetuneConfig(**values)
    message = str(error.value)
    assert message.startswith("--" + field.replace("_", "-") + ": expected ") and f"got {value!r}" in message


def test_resume_and_overwrite_exclude_each_other():
    with pytest.raises(ConfigError, match="exclude each other"):
        FinetuneConfig("m", "d", "o", resume=True, overwrite=True)
    with pytest.raises(ConfigError, match="exclude each other"):
        FinetuneConfig("m", "d", "o", resume_from="x", overwrite=True)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("all-linear", "all-linear"),
        ("q_proj", ["q_proj"]),
        ("q_proj, v_proj", ["q_proj", "v_proj"]),
        (r".*\.(q|v)_proj", r".*\.(q|v)_proj"),
    ],
)
def test_targets(text, expected):
    assert FinetuneConfig("m", "d", "o", target_modules=text).targets() == expected


def test_what_the_method_decides():
    assert FinetuneConfig("m", "d", "o").targets() == "all-linear"
    assert all(FinetuneConfig("m", "d", "o", method=m).targets() is None for m in ("ia3", "bitfit"))
    assert [FinetuneConfig("m", "d", "o", method=m).quantized for m in ("qlora", "lora", "ia3")] == [True, False, False]
    assert FinetuneConfig("m", "d", "o", method="adalora", quantize=True).quantized
    with pytest.raises(ConfigError, match="--no-quantize contradicts it"):
        FinetuneConfig("m", "d", "o", quantize=False)
    with pytest.raises(ConfigError, match="--restart-every is an option of --method relora, this is qlora"):
        FinetuneConfig("m", "d", "o", restart_every=3)
    with pytest.raises(ConfigError, match="--init eva is an option of --method lora and qlora, this is ia3"):
        FinetuneConfig("m", "d", "o", method="ia3", init="eva")
    with pytest.raises(ConfigError, match="init"):
        FinetuneConfig("m", "d", "o", init="EVE")


@given(
    total=st.integers(1, 300),
    warmup=st.integers(0, 50),
    schedule=st.sampled_from(["cosine", "linear", "constant"]),
    min_ratio=st.floats(0, 1),
)
def test_schedule_stays_between_zero_and_the_peak(total, warmup, schedule, min_ratio):
    rates = [
        learning_rate_at(s, peak=0.5, total=total, warmup=warmup, schedule=schedule, min_ratio=min_ratio)
        for s in range(total)
    ]
    assert all(0 <= rate <= 0.5 for rate in rates) and rates[0] > 0
    climb, fall = rates[:warmup], rates[warmup:]
    assert climb == sorted(climb) and fall == sorted(fall, reverse=True)
    assert all(rate >= 0.5 * min_ratio - 1e-12 for rate in fall)


def test_schedule_values():
    kwargs = {"peak": 1.0, "total": 12, "warmup": 2}
    assert learning_rate_at(0, **kwargs) == pytest.approx(1 / 3)
    assert learning_rate_at(2, **kwargs) == 1.0
    assert learning_rate_at(7, **kwargs) == pytest.approx(0.5)
    assert learning_rate_at(7, schedule="linear", min_ratio=0.2, **kwargs) == pytest.approx(0.6)
    assert learning_rate_at(11, schedule="constant", **kwargs) == 1.0


def test_tokens():
    def config(text):
        return FinetuneConfig("m", "d", "o", method="trainable_tokens", token_indices=text)

    assert config(" 7, 10-12,3").tokens() == [7, 10, 11, 12, 3]
    for text in (None, "", "a", "3,", "5-3", "-4", "1-", "3,1-4", "1-99999999999"):
        with pytest.raises(ConfigError, match="--token-indices: expected"):
            config(text)
