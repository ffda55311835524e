"""Trains with transformers' Trainer; runs in its environment. The one argument is a JSON file of options."""

import json
import sys
from pathlib import Path

import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)

options = json.loads(Path(sys.argv[1]).read_text())
tokenizer = AutoTokenizer.from_pretrained(options["model"])


def encode(row):
    encoded = tokenizer.apply_chat_template(
        row["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    pairs = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
    return {"input_ids": encoded["input_ids"], "labels": [token if trained else -100 for token, trained in pairs]}


data = load_dataset("json", data_files=options["rows"], split="train")
data = data.map(encode, remove_columns=data.column_names)
lora = options["lora"]
if options["quickstart"]:
    dtype, adapter = torch.float32, LoraConfig(task_type="CAUSAL_LM")
    arguments = TrainingArguments(
        output_dir=options["output"], num_train_epochs=1, use_cpu=options["cpu"], report_to="none"
    )
else:
    dtype = torch.bfloat16 if options["bf16"] and lora else torch.float32
    adapter = LoraConfig(
        r=options["rank"],
        lora_alpha=2 * options["rank"],
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    arguments = TrainingArguments(
        output_dir=options["output"],
        num_train_epochs=1,
        per_device_train_batch_size=options["micro_batch"],
        gradient_accumulation_steps=options["accumulation"],
        train_sampling_strategy="group_by_length",
        learning_rate=options["learning_rate"],
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=options["bf16"],
        use_cpu=options["cpu"],
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
model = AutoModelForCausalLM.from_pretrained(options["model"], dtype=dtype)
if lora:
    model = get_peft_model(model, adapter)
trainer = Trainer(
    model=model,
    args=arguments,
    train_dataset=data,
    data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100),
)
trainer.train()
trainer.save_model()
