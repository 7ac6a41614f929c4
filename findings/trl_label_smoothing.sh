#!/usr/bin/env bash
# Surprising: TRL's DPOTrainer takes label_smoothing with its default loss, "sigmoid", without a word, and ignores it:
# three steps with label_smoothing=0.4 log the very losses of label_smoothing=0. Conservative DPO (Mitchell 2023), which
# older versions computed for this pair of settings, is no longer trained; only "robust" and "exo_pair" read the value.
# Exits with 1 if the two runs log different losses, or the trainer warns or refuses.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    trl==1.16.0 transformers==5.24.0 torch==2.13.0 accelerate==1.15.0 datasets==5.2.0
cd "$folder"
HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES="" venv/bin/python - <<'PYTHON'
import sys
import warnings

import torch
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

words = ["<pad>", "<eos>", "a", "b", "c", "d", "e"]
backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<pad>"))
backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
rows = Dataset.from_list([{"prompt": "a b", "chosen": " c d", "rejected": " e"}] * 8)
sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)


def losses(**settings):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(words), pad_token_id=0, eos_token_id=1, **sizes))
    model.save_pretrained("model")
    tokenizer.save_pretrained("model")
    args = trl.DPOConfig(
        output_dir="out", max_steps=3, logging_steps=1, learning_rate=0.01, report_to=[], use_cpu=True, bf16=False,
        beta=0.5, save_strategy="no", disable_tqdm=True, **settings
    )
    trainer = trl.DPOTrainer("model", args=args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


print("trl", trl.__version__)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    found = {smoothing: losses(label_smoothing=smoothing) for smoothing in (0.0, 0.4)}
said = [str(each.message) for each in caught if "smoothing" in str(each.message)]
robust = losses(loss_type=["robust"], label_smoothing=0.4)
print(f"sigmoid, label_smoothing 0.0: {found[0.0]}\nsigmoid, label_smoothing 0.4: {found[0.4]}\nrobust, 0.4: {robust}")
print("warnings that name it:", said)
moved = len(set(found[0.0])) > 1 and robust != found[0.0]
sys.exit(not (found[0.0] == found[0.4] and moved and not said))
PYTHON
