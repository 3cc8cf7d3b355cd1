"""Trainable tokens, beside LoRA and as a method of their own, against installed Hugging Face PEFT: outputs, gradients,
files, merged models."""

import copy
import json
import warnings

import pytest
import torch
import transformers

import pyfastpeft as pf
from tests.methods.contract import scatter
from tests.methods.models import TASK, VOCAB, _bert_config, batch, build
from tests.parity.pairs import pair, run

peft = pytest.importorskip("peft")
EMBEDDING = {
    "llama": "model.embed_tokens", "tied": "model.embed_tokens", "gpt2": "transformer.wte", "t5": "shared",
    "bloom": "transformer.word_embeddings", "gemma": "model.embed_tokens",
}  # fmt: skip


@pytest.fixture(autouse=True)
def quiet():
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def model_of(kind):
    if kind not in ("tied", "gemma"):
        return build(kind)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"vocab_size": VOCAB, "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": True}
    if kind == "gemma":  # its embedding multiplies by sqrt(hidden_size)
        return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(head_dim=8, **sizes)).eval()
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()


def inputs_of(kind):
    return batch(kind if kind in TASK else "llama")


@pytest.mark.parametrize("kind", EMBEDDING)
@pytest.mark.parametrize("named", [False, True], ids=["list", "dict"])
def test_outputs_gradients_files_and_merged_models(kind, named, tmp_path):
    inputs = inputs_of(kind)
    tokens = [*inputs["input_ids"][0, [3, 1, 5]].unique().tolist()[::-1], VOCAB - 1]
    if len(set(tokens)) < len(tokens):
        tokens = tokens[:-1]
    theirs, ours = pair(
        lambda: model_of(kind),
        task_type=TASK.get(kind, "CAUSAL_LM"),
        trainable_token_indices={EMBEDDING[kind]: tokens} if named else tokens,
        r=4,
        target_modules="all-linear",
    )
    assert {n for n, p in ours.named_parameters() if p.requires_grad} == {
        n for n, p in theirs.named_parameters() if p.requires_grad
    }
    scatter(theirs, scale=0.2), scatter(ours, scale=0.2)
    got, expected = run(ours, inputs), run(theirs, inputs)
    assert set(got) == set(expected) and any("trainable_tokens_delta" in name for name in got)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=2e-5, msg=name)
    theirs.save_pretrained(tmp_path / "theirs"), ours.save_pretrained(tmp_path / "ours")
    weights = [(tmp_path / who / "adapter_model.safetensors").read_bytes() for who in ("theirs", "ours")]
    assert weights[1] == weights[0]
    configs = [json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("theirs", "ours")]
    for config in configs:
        del config["target_modules"]  # the same layers, which PEFT lists by their whole paths here
    assert configs[1] == configs[0]
    for library, folder in ((pf, "theirs"), (peft, "ours")):
        again = library.PeftModel.from_pretrained(model_of(kind), tmp_path / folder).eval()
        torch.testing.assert_close(again(**inputs).logits, expected["logits"], rtol=1e-4, atol=2e-5)
    merged = [model.merge_and_unload().eval() for model in (theirs, ours)]
    torch.testing.assert_close(merged[1](**inputs).logits, expected["logits"], rtol=1e-4, atol=2e-5)
    for name, value in merged[0].state_dict().items():
        torch.testing.assert_close(merged[1].state_dict()[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_embeddings_saved_beside_the_rows(tmp_path):
    theirs, ours = pair("llama", trainable_token_indices=[3, 7], r=2)
    scatter(theirs), scatter(ours)
    inputs = batch("llama")
    for who, model in (("theirs", theirs), ("ours", ours)):
        model.save_pretrained(tmp_path / who, save_embedding_layers=True)
    from safetensors.torch import load_file

    files = [load_file(tmp_path / who / "adapter_model.safetensors") for who in ("theirs", "ours")]
    assert set(files[1]) == set(files[0])
    for library, folder in ((pf, "theirs"), (pf, "ours"), (peft, "ours")):
        base = model_of("llama")
        base.model.embed_tokens.weight.data.add_(1.0)  # the file's weights replace it
        again = library.PeftModel.from_pretrained(base, tmp_path / folder).eval()
        torch.testing.assert_close(again(**inputs).logits, theirs.eval()(**inputs).logits, rtol=1e-4, atol=2e-5)


def test_a_tied_head_keeps_its_bias():
    """BERT's head shares the embedding's weight and has a bias, which PEFT drops: ours is the merged model."""
    inputs = {key: value for key, value in batch("bert").items() if key != "labels"}
    outputs = {}
    for library in (peft, pf):
        torch.manual_seed(0)
        base = transformers.BertForMaskedLM(_bert_config()).eval()
        base.cls.predictions.bias.data.normal_()
        model = library.get_peft_model(
            base, library.LoraConfig(trainable_token_indices=[5, 9], target_modules=["query"])
        )
        scatter(model, scale=0.5)
        before = model(**inputs).logits.detach()
        after = copy.deepcopy(model).merge_and_unload()(**inputs).logits
        outputs[library.__name__] = before, after
    torch.testing.assert_close(*outputs["pyfastpeft"], rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(outputs["pyfastpeft"][1], outputs["peft"][1], rtol=1e-4, atol=2e-5)
    assert (outputs["peft"][0] - outputs["peft"][1]).abs().max() > 0.5


HEADS = [("llama", None), ("llama", ["embed_tokens", "lm_head"]), ("llama", "lm_head"), ("tied", None),
         ("gpt2", None), ("bert", None), ("t5", None), ("bloom", None), ("gemma", None)]  # fmt: skip


@pytest.mark.parametrize(("kind", "targets"), HEADS, ids=str)
def test_the_method_by_itself(kind, targets, tmp_path):
    """Every byte of both files is PEFT's, the rows repeated for tied heads as well."""
    inputs = inputs_of(kind)
    tokens = list(dict.fromkeys([*inputs["input_ids"][0, [3, 1, 5]].tolist(), VOCAB - 1]))
    task = TASK.get(kind, "CAUSAL_LM")
    theirs, ours = pair(
        lambda: model_of(kind),
        "TrainableTokensConfig",
        task_type=task,
        token_indices=tokens,
        target_modules=targets,
    )
    scattered = {n for n, p in theirs.named_parameters() if p.requires_grad}
    assert {n for n, p in ours.named_parameters() if p.requires_grad} == scattered
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name in sorted(scattered):
            step = torch.randn(len(tokens), 32, generator=generator) * 0.2
            for model in (theirs, ours):
                model.get_parameter(name).add_(step)
    got, expected = run(ours, inputs), run(theirs, inputs)
    assert set(got) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=2e-5, msg=name)
    theirs.save_pretrained(tmp_path / "theirs"), ours.save_pretrained(tmp_path / "ours")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        files = [(tmp_path / who / file).read_bytes() for who in ("theirs", "ours")]
        if file.endswith("json"):
            files = [json.loads(text) for text in files]
            if isinstance(targets, list):  # a set in PEFT's, in any order
                for each in files:
                    each["target_modules"] = sorted(each["target_modules"])
        assert files[1] == files[0], file
    again = pf.PeftModel.from_pretrained(model_of(kind), tmp_path / "theirs")
    torch.testing.assert_close(again(**inputs).logits, expected["logits"], rtol=1e-4, atol=2e-5)
    again = peft.PeftModel.from_pretrained(model_of(kind), tmp_path / "ours").eval()
    torch.testing.assert_close(again(**inputs).logits, expected["logits"], rtol=1e-4, atol=2e-5)
    merged = ours.merge_and_unload()
    torch.testing.assert_close(merged(**inputs).logits, expected["logits"], rtol=1e-4, atol=2e-5)


def test_random_rows_are_drawn_as_peft_draws_them():
    rows = []
    for library in (peft, pf):
        config = library.TrainableTokensConfig(token_indices=[3, 1], init_weights=False)
        base = model_of("llama")
        torch.manual_seed(5)
        model = library.get_peft_model(base, config)
        rows += [p for p in model.parameters() if p.requires_grad]
    assert rows[0].shape == (2, 32) and torch.equal(*rows)
