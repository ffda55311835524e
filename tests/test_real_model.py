"""The main job on a real pretrained model: SmolLM2-135M-Instruct as GGUF. `make install-model` fetches it."""

import json
import os
from pathlib import Path

import pytest

import llmforge
from llmforge.config import load_config
from llmforge.jobs.display import QuietDisplay
from llmforge.jobs.finetune import finetune

ROOT = Path(__file__).parent.parent
MODEL = Path(os.environ.get("LLMFORGE_REAL_MODEL", ROOT / ".cache" / "models" / "SmolLM2-135M-Instruct.gguf"))

pytestmark = [
    pytest.mark.real_model,
    pytest.mark.skipif(not MODEL.is_file(), reason=f"{MODEL} is missing: make install-model"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two steps of the quickstart's own config."""
    import sys

    directory = tmp_path_factory.mktemp("real")
    rows = (ROOT / "examples" / "safety" / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:8]
    (directory / "train.jsonl").write_text("".join(rows), encoding="utf-8")
    loaded = load_config(
        ROOT / "examples" / "safety" / "quickstart.yaml",
        [
            f"model_id={MODEL}",
            f"train_path={directory / 'train.jsonl'}",
            "valid_path=null",
            "num_epochs=1",
            f"output_dir={directory}",
            f"cache_dir={directory / 'cache'}",
            "dtype=fp32",
        ],
    )
    finished = finetune(loaded, QuietDisplay(sys.stderr))
    assert finished is not None
    return finished


def test_the_base_model_is_really_the_trained_one(run):
    question = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    assert "Paris" in run.generate([[{"role": "user", "content": question}]], base=True, max_new_tokens=12)[0]


def test_the_saved_tokenizer_renders_the_ids_that_were_trained(run):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(run.artifact_dir)
    for line in (ROOT / "examples" / "safety" / "valid.jsonl").read_text(encoding="utf-8").splitlines():
        prompt = json.loads(line)["messages"][:-1]
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        assert ids == run.model.encoder.encode_prompt(prompt)


def test_plain_transformers_and_peft_compute_the_same(run):
    import torch
    from peft import AutoPeftModelForCausalLM

    from llmforge.models.trained import load_trained_model

    plain = AutoPeftModelForCausalLM.from_pretrained(run.artifact_dir, dtype=torch.float32)
    ids = torch.tensor([run.model.encoder.encode_prompt([{"role": "user", "content": "Message: hello"}])])
    with torch.no_grad():
        expected, found = load_trained_model(run.artifact_dir, dtype=torch.float32)(ids).logits, plain(ids).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_finished_run_opens_again(run):
    assert llmforge.load_run(run.run_dir).tag == run.tag
