"""Trains with TRL's SFTTrainer; runs in TRL's environment. The one argument is a JSON file of options."""

import json
import sys
from pathlib import Path

from datasets import load_dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

options = json.loads(Path(sys.argv[1]).read_text())
data = load_dataset("json", data_files=options["rows"], split="train")
if options["quickstart"]:
    arguments = SFTConfig(output_dir=options["output"], num_train_epochs=1, use_cpu=options["cpu"], report_to="none")
    adapter = LoraConfig()
else:
    arguments = SFTConfig(
        output_dir=options["output"],
        num_train_epochs=1,
        per_device_train_batch_size=options["micro_batch"],
        gradient_accumulation_steps=options["accumulation"],
        max_length=options["context"],
        packing=options["packing"],
        train_sampling_strategy="random" if options["packing"] else "group_by_length",
        assistant_only_loss=True,
        learning_rate=options["learning_rate"],
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=options["bf16"],
        gradient_checkpointing=False,
        use_cpu=options["cpu"],
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        dataset_num_proc=1,
        model_init_kwargs={"dtype": "bfloat16" if options["bf16"] and options["lora"] else "float32"},
    )
    adapter = None
    if options["lora"]:
        adapter = LoraConfig(
            r=options["rank"],
            lora_alpha=2 * options["rank"],
            lora_dropout=0.0,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
trainer = SFTTrainer(model=options["model"], args=arguments, train_dataset=data, peft_config=adapter)
trainer.train()
trainer.save_model()
