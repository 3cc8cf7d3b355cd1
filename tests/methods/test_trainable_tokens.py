"""trainable_token_indices by itself: rows, tied heads, several adapters, merging, files, and errors."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pyfastpeft as pf
from pyfastpeft.trainable_tokens import TrainableTokens
from tests.methods.contract import scatter
from tests.methods.models import VOCAB, batch, build
from tests.methods.test_targets import assert_unchanged, snapshot


@pytest.fixture(autouse=True)
def quiet():
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


class Small(nn.Module):
    """An embedding, a linear layer and a head; tied or not."""

    def __init__(self, tied=False, bias=True, dtype=torch.float32, padding_idx=None):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(13, 6, padding_idx=padding_idx)
        self.inner = nn.Linear(6, 6)
        self.head = nn.Linear(6, 13, bias=bias)
        if tied:
            self.head.weight = self.embed.weight
        self.to(dtype)

    def get_input_embeddings(self):
        return self.embed

    def forward(self, x):
        return self.head(self.inner(self.embed(x)))


def config(tokens, **more):
    return pf.LoraConfig(target_modules=["inner"], r=2, trainable_token_indices=tokens, **more)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("padding_idx", [None, 7])
def test_forward_and_gradients_are_those_of_the_whole_matrix(tied, padding_idx):
    tokens = [7, 0, 12]
    base = Small(tied, dtype=torch.float64, padding_idx=padding_idx)
    plain = copy.deepcopy(base)
    model = scatter(pf.get_peft_model(base, config(tokens)), scale=0.3)
    rows = model.get_base_model().embed.rows["default"]
    assert rows.dtype == torch.float64 and rows.shape == (3, 6)
    inner = model.get_base_model().inner
    x = torch.tensor([[7, 7, 3], [12, 1, 0]])
    y = model(x)
    y.square().sum().backward()
    mine = rows.detach().clone().requires_grad_()
    whole = plain.embed.weight.detach().index_copy(0, torch.tensor(tokens), mine)
    h = F.embedding(x, whole, padding_idx=padding_idx)
    expected = F.linear(inner(h), whole if tied else plain.head.weight.detach(), plain.head.bias.detach())
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    expected.square().sum().backward()
    torch.testing.assert_close(rows.grad, mine.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model.get_base_model().embed.weight, whole)
    assert model.get_base_model().embed.num_embeddings == 13
    assert all(p.grad is None for n, p in model.named_parameters() if "base_layer" in n)
    for shape in ((0,), (2, 0), ()):
        assert model.get_base_model().embed(torch.zeros(shape, dtype=torch.long)).shape == (*shape, 6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_stays_16_bit_and_rows_are_fp32(dtype):
    model = scatter(pf.get_peft_model(Small(True, dtype=dtype), config([1, 5])))
    assert model.get_base_model().embed.rows["default"].dtype == torch.float32
    x = torch.tensor([[1, 2, 5]])
    y = model(x)
    assert y.dtype == dtype
    torch.testing.assert_close(model.merge_and_unload()(x), y, rtol=2e-2, atol=2e-2)
    narrow = pf.get_peft_model(Small(dtype=dtype), config([1]), autocast_adapter_dtype=False)
    assert narrow.get_base_model().embed.rows["default"].dtype == dtype


def test_several_adapters_disabling_and_merging():
    base = Small(True)
    x = torch.tensor([[1, 2, 5, 4]])
    before, weight = base(x).detach(), base.embed.weight.detach().clone()
    model = pf.get_peft_model(base, config([1, 5]))
    torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-6)
    scatter(model)
    first = model(x)
    model.add_adapter("b", config([4]))
    model.add_adapter("c", config([5, 6]))
    model.add_adapter("d", pf.LoraConfig(target_modules=["inner"], r=2))
    assert torch.equal(model(x), first)
    model.set_adapter("b")
    scatter(model, seed=3)
    second = model(x)
    with pytest.raises(ValueError, match="'default' and 'c' both have a row for token 5 of embed"):
        model.base_model.set_adapter(["default", "c"])
    assert torch.equal(model(x), second)
    model.set_adapter("d")
    assert torch.equal(model(x), before)
    model.base_model.set_adapter(["default", "b"])
    both = model(x)
    with model.disable_adapter():
        assert torch.equal(model(x), before)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(model(x), both, rtol=1e-5, atol=1e-6)
    holder = model.get_base_model().embed
    changed = (holder.base_layer.weight != weight).any(dim=1).nonzero().flatten().tolist()
    assert changed == [1, 4, 5] and model.get_base_model().head.base_layer.weight is holder.base_layer.weight
    with model.disable_adapter():
        assert torch.equal(model(x), before)
    model.unmerge_adapter()
    assert torch.equal(holder.base_layer.weight, weight) and torch.equal(model(x), both)
    rows = model.eval()(torch.tensor([[1, 2, 5], [4, 4, 1], [4, 1, 5]]), adapter_names=["default", "b", "__base__"])
    for row, name in zip(rows, ("default", "b", None), strict=True):
        tokens = torch.tensor([[[1, 2, 5]], [[4, 4, 1]], [[4, 1, 5]]][["default", "b", None].index(name)])
        if name is None:
            with model.disable_adapter():
                expected = model(tokens)
        else:
            model.set_adapter(name)
            expected = model(tokens)
        torch.testing.assert_close(row, expected[0], rtol=1e-5, atol=1e-6)
    model.set_adapter("b")
    model.merge_adapter()
    model.delete_adapter("b")
    assert torch.equal(holder.base_layer.weight, weight)
    for name in ("c", "d", "default"):
        model.delete_adapter(name)
    bare = model.get_base_model()
    assert type(bare.embed) is nn.Embedding and type(bare.head) is nn.Linear and bare.head.weight is bare.embed.weight
    assert torch.equal(model(x), before)


def test_a_merged_head_of_its_own_leaves_the_embedding_alone():
    """Rows of the head alone, where its weight is the embedding's too: PEFT writes them into both."""
    base = Small(True)
    weight = base.embed.weight.detach().clone()
    model = scatter(pf.get_peft_model(base, config({"head": [3, 4]})))
    x = torch.tensor([[3, 4, 5]])
    y = model(x)
    with pytest.warns(UserWarning, match="head has now a weight of its own"):
        merged = model.merge_and_unload()
    torch.testing.assert_close(merged(x), y, rtol=1e-5, atol=1e-6)
    assert torch.equal(merged.embed.weight, weight) and not torch.equal(merged.head.weight, weight)


@pytest.mark.parametrize("tied", [False, True])
def test_files_copies_and_status(tied, tmp_path):
    model = scatter(pf.get_peft_model(Small(tied), config([2, 9, 4])))
    x = torch.tensor([[2, 9, 4, 1]])
    y = model(x)
    model.save_pretrained(tmp_path)
    again = pf.PeftModel.from_pretrained(Small(tied), tmp_path, is_trainable=True)
    assert torch.equal(again(x), y) and again.get_base_model().embed.rows["default"].requires_grad
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), y)
        other.get_base_model().embed.rows["default"].data.add_(1)
        assert not torch.equal(other(x), y) and torch.equal(model(x), y)
        if tied:
            assert other.get_base_model().head.source is other.get_base_model().embed
    assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(x), y)
    assert sum("trainable_tokens_delta" in name for name in model.state_dict()) == 1
    record = {layer.name: layer for layer in model.get_layer_status()}
    assert record["embed"].requires_grad == {"default": True} and ("head" in record) == tied
    with pytest.raises(ValueError, match="cannot be combined"):
        model.add_weighted_adapter(["default"], [1.0], "sum", "linear")


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_generate_and_checkpointing(kind):
    inputs = batch(kind, rows=1)
    model = pf.get_peft_model(
        build(kind),
        pf.LoraConfig(trainable_token_indices=inputs["input_ids"][0].unique().tolist(), task_type="CAUSAL_LM"),
    )
    scatter(model, scale=0.3)
    tokens = model.generate(input_ids=inputs["input_ids"], max_new_tokens=4, do_sample=False, min_new_tokens=4)
    logits = model(input_ids=tokens).logits
    assert torch.equal(logits[0, -5:-1].argmax(-1), tokens[0, -4:])
    model(**inputs).loss.backward()
    plain = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model.train()(**inputs).loss.backward()
    for name, gradient in plain.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-5, atol=1e-7)


def test_on_a_quantised_base():
    model = pf.quantize_model(build("llama"))
    adapted = scatter(pf.get_peft_model(model, pf.LoraConfig(trainable_token_indices=[1, 2], task_type="CAUSAL_LM")))
    y = adapted(**batch("llama")).logits
    with pytest.warns(UserWarning, match="merged into"):
        adapted.merge_adapter()
    adapted.unmerge_adapter()
    assert torch.equal(adapted(**batch("llama")).logits, y)


BAD = {
    "too high": ({"trainable_token_indices": [VOCAB]}, rf"token {VOCAB} of model.embed_tokens, which has {VOCAB} rows"),
    "no such module": ({"trainable_token_indices": {"embed_tokns": [1]}}, "'embed_tokns' matches no module.*embed_tokens"),
    "a norm": ({"trainable_token_indices": {"model.norm": [1]}}, "model.norm is a LlamaRMSNorm, expected an nn.Embedding"),
    "saved whole": ({"trainable_token_indices": [1], "modules_to_save": ["embed_tokens"]}, "is in modules_to_save too"),
    "adapted": ({"trainable_token_indices": {"q_proj": [1]}}, "q_proj is adapted or saved whole"),
    "two names": (
        {"trainable_token_indices": {"embed_tokens": [1], "model.embed_tokens": [2]}}, "two of its names mean model.embed_t"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("fields", "message"), BAD.values(), ids=BAD)
def test_errors_leave_the_model_as_it_was(fields, message):
    model = build("llama")
    before = snapshot(model)
    wrong = pf.LoraConfig(**{"target_modules": ["q_proj"]} | fields)
    with pytest.raises(ValueError, match=message):
        pf.get_peft_model(model, wrong)
    assert_unchanged(model, before)
    adapted = pf.get_peft_model(model, pf.LoraConfig(target_modules=["v_proj"], trainable_token_indices=[0]))
    before = snapshot(adapted)
    with pytest.raises(ValueError, match=message if "modules_to_save" not in fields else "adapted by an earlier"):
        adapted.add_adapter("b", wrong)
    assert_unchanged(adapted, before)


def test_errors_of_shared_weights():
    def refused(base, wrong, message):
        before = snapshot(base)
        with pytest.raises(ValueError, match=message):
            pf.get_peft_model(base, wrong)
        assert_unchanged(base, before)

    refused(
        Small(True), config({"embed": [1], "head": [2]}), "embed and head share one weight and have different tokens"
    )
    both = pf.LoraConfig(target_modules=["head"], trainable_token_indices=[1])
    refused(Small(True), both, "head is adapted or saved whole")
    model = pf.get_peft_model(Small(True), config({"embed": [1], "head": [1]}))
    with pytest.raises(ValueError, match="head shares its tokens with an embedding for an earlier adapter"):
        model.add_adapter("b", config({"head": [2]}))
    model = pf.get_peft_model(Small(True), config({"head": [1]}))
    with pytest.raises(ValueError, match="head does not share its tokens"):
        model.add_adapter("b", config([2]))
    saved = pf.get_peft_model(Small(True), config([1], modules_to_save=["head"]))
    assert not isinstance(saved.get_base_model().head, TrainableTokens)
    nan = pf.get_peft_model(Small(), config([1]))
    nan.get_base_model().embed.rows["default"].data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinities in its rows"):
        nan.merge_adapter()


class Learned(nn.Embedding):
    def forward(self, mask):
        return super().forward(mask.cumsum(-1))


@pytest.mark.parametrize(
    "embedding", [nn.Embedding(13, 6, max_norm=1.0), nn.Embedding(13, 6, sparse=True), Learned(13, 6)]
)
def test_embeddings_that_do_more_are_refused(embedding):
    model = Small()
    model.embed = embedding
    with pytest.raises(ValueError, match="does more than look up and scale rows"):
        pf.get_peft_model(model, config([1]))


@pytest.mark.parametrize(
    ("value", "error"),
    [([], ValueError), ([-1], ValueError), ([1, 1], ValueError), ({}, ValueError), ({"a": [1, 1]}, ValueError)]
    + [(3, TypeError), (["1"], TypeError), ([True], TypeError), ({"a": 1}, TypeError), ("12", TypeError)],
    ids=str,
)
def test_bad_fields(value, error):
    with pytest.raises(error, match="trainable_token_indices"):
        pf.LoraConfig(trainable_token_indices=value)


def test_a_file_of_another_number_of_tokens_loads_nothing(tmp_path):
    model = scatter(pf.get_peft_model(Small(), config([1, 2])))
    model.save_pretrained(tmp_path)
    base = Small()
    before = snapshot(base)
    with pytest.raises(ValueError, match=r"trainable_tokens_delta has shape \(2, 6\), the model expects \(1, 6\)"):
        pf.PeftModel.from_pretrained(base, tmp_path, config=config([1]))
    assert_unchanged(base, before)


def alone(tokens, **more):
    return pf.TrainableTokensConfig(token_indices=tokens, **more)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_method_by_itself(tied, dtype, tmp_path):
    """The same numbers as beside an adapter that does nothing; its own places in the model and the files."""
    tokens = [2, 9, 4]
    named = alone(
        tokens, target_modules=["embed", "head"] if tied else None
    )  # a tied head can be named: PEFT raises then
    model, beside = (pf.get_peft_model(Small(tied, dtype=dtype), c) for c in (named, config(tokens)))
    holder, other = model.get_base_model().embed, beside.get_base_model().embed
    x = torch.tensor([[2, 9, 4, 1]])
    assert torch.equal(model(x), beside(x)) and {p.dtype for p in model.parameters() if p.requires_grad} == {
        torch.float32
    }
    with torch.no_grad():
        holder.rows["default"].normal_(), other.rows["default"].copy_(holder.rows["default"])
    y = model(x)
    assert y.dtype == dtype and torch.equal(y, beside(x))
    assert model.peft_config["default"].target_modules == (["embed", "head"] if tied else "embed")
    model.save_pretrained(tmp_path)
    again = pf.PeftModel.from_pretrained(Small(tied, dtype=dtype), tmp_path)
    assert torch.equal(again(x), y) and not any(p.requires_grad for p in again.parameters())
    model.add_adapter("b", alone([5]))
    model.set_adapter("b")
    with model.disable_adapter():
        before = model(x)
    assert torch.equal(model(x), before)
    with pytest.raises(ValueError, match="embed is adapted or saved whole"):
        model.add_adapter("c", config([1]))
    merged = again.merge_and_unload()
    torch.testing.assert_close(merged(x), y, rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=1e-2)
    assert type(merged.embed) is nn.Embedding and (merged.head.weight is merged.embed.weight) == tied


ALONE_BAD = {
    "too high": ({"token_indices": [VOCAB]}, rf"TrainableTokensConfig: token {VOCAB} of model.embed_tokens"),
    "no such module": ({"target_modules": ["embed_tokns"]}, "embed_tokns.*match no module.*near misses: embed_tokens"),
    "no such pattern": ({"target_modules": "model.embed"}, "match no module of the model"),
    "a norm": ({"target_modules": "model.norm"}, "model.norm is a LlamaRMSNorm, expected an nn.Embedding"),
}  # fmt: skip


@pytest.mark.parametrize(("fields", "message"), ALONE_BAD.values(), ids=ALONE_BAD)
def test_errors_of_the_method_leave_the_model_as_it_was(fields, message):
    model = build("llama")
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        pf.get_peft_model(model, pf.TrainableTokensConfig(**{"token_indices": [1]} | fields))
    assert_unchanged(model, before)
    with pytest.raises(ValueError, match="not quantised"):
        quantised = pf.quantize_model(Small())
        pf.get_peft_model(quantised, alone([1], target_modules=["inner"]))


@pytest.mark.parametrize(
    ("value", "error"), [([], ValueError), ([1, 1], ValueError), (3, TypeError), ([True], TypeError)]
)
def test_bad_tokens(value, error):
    with pytest.raises(error, match="TrainableTokensConfig: token_indices"):
        pf.TrainableTokensConfig(token_indices=value)


def test_rows_of_an_untied_model_are_not_put_into_a_tied_one(tmp_path):
    """Nor is anything lost in silence the other way: the head of a tied model has a key of its own."""
    both = alone([2, 4], target_modules=["embed", "head"])
    scatter(pf.get_peft_model(Small(), both)).save_pretrained(tmp_path / "untied")
    scatter(pf.get_peft_model(Small(True), alone([2, 4]))).save_pretrained(tmp_path / "tied")
    for folder, base, message in (
        ("untied", Small(True), "differ in the file, and the model has one weight for both"),
        ("tied", Small(), "base_model.model.head.trainable_tokens_delta"),
    ):
        before = snapshot(base)
        with pytest.raises(ValueError, match=message):
            pf.PeftModel.from_pretrained(base, tmp_path / folder)
        assert_unchanged(base, before)
