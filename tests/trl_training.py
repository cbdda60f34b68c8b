"""The training data in other hands: `make test-trl`, two steps of TRL's SFTTrainer on the files as they are."""

import math

import pytest
from datasets import load_dataset
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

import train_model


@pytest.mark.parametrize("base", ["gpt2_folder", "llama_folder"])
def test_the_data_trains_in_trl_with_loss_on_the_answers_only(base, data_folder, tmp_path, request):
    files = {"train": str(data_folder / "train_data.jsonl"), "validation": str(data_folder / "val_data.jsonl")}
    data = load_dataset("json", data_files=files, cache_dir=str(tmp_path / "cache"))
    tokenizer = train_model.load_tokenizer(request.getfixturevalue(base))
    tokenizer.chat_template = train_model.PLAIN_TEMPLATE  # whose generation tags TRL asks for
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(request.getfixturevalue(base)),
        SFTConfig(
            str(tmp_path), assistant_only_loss=True, max_steps=2, max_length=256, use_cpu=True, bf16=False,
            report_to="none", save_strategy="no", per_device_train_batch_size=2,
        ),
        train_dataset=data["train"], eval_dataset=data["validation"], processing_class=tokenizer,
    )  # fmt: skip
    result = trainer.train()
    assert result.global_step == 2 and math.isfinite(result.training_loss)
    row, conversation = trainer.train_dataset[0], data["train"][0]["messages"]
    ids, scored = train_model.conversation_tokens(tokenizer, conversation)
    assert row["input_ids"][: len(ids)] == ids
    assert [label != train_model.UNSCORED for label in row["labels"][: len(ids)]] == scored
