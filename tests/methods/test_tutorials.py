"""The code of the field's tutorials, as it stands there, with the import line changed and nothing else.

Each snippet makes a config; the frame around it is the one all of them have: a BLOOM, get_peft_model, a Trainer, saving,
from_pretrained by keyword, generate, and for what merges merge_and_unload().save_pretrained().
"""

import warnings

import pytest
import torch
import transformers

import pyfastpeft as pf
from tests.methods.models import build
from tests.methods.test_prompt_inputs import tokenizer_at

SNIPPETS = {
    "prompt tuning": """
from peft import PromptTuningConfig, get_peft_model, TaskType, PromptTuningInit
config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM,
                            prompt_tuning_init=PromptTuningInit.TEXT,
                            prompt_tuning_init_text="w1 w20 w3 w4",
                            num_virtual_tokens=len(tokenizer("w1 w20 w3 w4")["input_ids"]),
                            tokenizer_name_or_path=model_path)
""",
    "p-tuning": """
from peft import PromptEncoderConfig, TaskType, get_peft_model, PromptEncoderReparameterizationType
config = PromptEncoderConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=10,
                             encoder_reparameterization_type=PromptEncoderReparameterizationType.LSTM,
                             encoder_dropout=0.1, encoder_num_layers=2, encoder_hidden_size=1024)
""",
    "prefix": """
from peft import PrefixTuningConfig, get_peft_model, TaskType
config = PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=10, prefix_projection=True)
""",
    "lora": """
from peft import LoraConfig, TaskType, get_peft_model
config = LoraConfig(task_type=TaskType.CAUSAL_LM, r=8, target_modules=["query_key_value", "dense_4h_to_h"],
                    modules_to_save=["word_embeddings"])
""",
    "lora by expression": """
from peft import LoraConfig, TaskType, get_peft_model
config = LoraConfig(task_type=TaskType.CAUSAL_LM, target_modules=".*\\\\.1.*query_key_value")
""",
    "ia3": """
from peft import IA3Config, TaskType, get_peft_model
config = IA3Config(task_type=TaskType.CAUSAL_LM, target_modules=["query_key_value"],
                   feedforward_modules=["mlp.dense_4h_to_h"])
""",
}
TRAIN = """
model = get_peft_model(model, config)
model.print_trainable_parameters()
trainer = Trainer(model=model, args=args, train_dataset=rows)
trainer.train()
ids = torch.tensor([rows[0]["input_ids"][:6]])
model.eval()
expected = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
model.save_pretrained(folder)
"""
LOAD = """
from peft import PeftModel
p_model = PeftModel.from_pretrained(model=fresh, model_id=folder)
got = p_model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
"""
MERGE = """
merge_model = p_model.merge_and_unload()
merged = merge_model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
merge_model.save_pretrained(folder + "/merged")
"""


def run(code, names):
    exec(code.replace("from peft import", "from pyfastpeft import"), names)


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_tutorials_run(snippet, tmp_path, capsys):
    pytest.importorskip("accelerate")
    tokenizer_at(tmp_path / "base")
    rows = [{"input_ids": (row := [(3 * i + j) % 60 + 2 for j in range(12)]), "labels": row} for i in range(8)]
    names = {
        "torch": torch,
        "Trainer": transformers.Trainer,
        "tokenizer": transformers.AutoTokenizer.from_pretrained(tmp_path / "base"),
        "model_path": str(tmp_path / "base"),
        "folder": str(tmp_path / "out"),
        "model": build("bloom"),
        "fresh": build("bloom"),
        "rows": rows,
        "args": transformers.TrainingArguments(
            output_dir=str(tmp_path / "run"), max_steps=2, per_device_train_batch_size=4, learning_rate=5e-2,
            report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no",
        ),
    }  # fmt: skip
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*(fan_in_fan_out|shares a weight)")
        run(SNIPPETS[snippet] + TRAIN, names)
        run(LOAD, names)
        assert "trainable params" in capsys.readouterr().out
        assert isinstance(names["p_model"], pf.PeftModel)
        assert torch.equal(names["got"], names["expected"])
        if "lora" in snippet or snippet == "ia3":
            run(MERGE, names)
            assert torch.equal(names["merged"], names["expected"])
            again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged")
            state = names["merge_model"].state_dict()
            assert all(torch.equal(value, state[key]) for key, value in again.state_dict().items())
