#!/usr/bin/env bash
# Surprising: AutoTokenizer, given an OPT folder with config.json, vocab.json and merges.txt alone (what DeepSpeed-Chat
# writes next to its pytorch_model.bin), gives a tokenizer that ends texts with <|endoftext|>, a token that the
# vocabulary does not have. It is added with the next free id, of an embedding that was never trained or is not there,
# although config.json names the end, </s> of id 2, and no message says so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.24.0 tokenizers==0.23.1
cat > "$folder/show.py" <<'PYTHON'
import json
import sys
from pathlib import Path

import transformers
from tokenizers import pre_tokenizers

folder = Path(sys.argv[1])
words = ["<s>", "<pad>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
(folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
(folder / "merges.txt").write_text("#version: 0.2\n")
config = transformers.OPTConfig(vocab_size=len(words), bos_token_id=2, eos_token_id=2, pad_token_id=1)
config.save_pretrained(folder)
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
print("transformers", transformers.__version__)
print("config.json: eos_token_id", config.eos_token_id, "of", config.vocab_size, "ids, which is", words[2])
print("AutoTokenizer:", tokenizer.eos_token, tokenizer.eos_token_id, "of", len(tokenizer), "ids")
assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|endoftext|>", len(words)), "the behaviour has changed"
PYTHON
mkdir "$folder/model"
"$folder/venv/bin/python" "$folder/show.py" "$folder/model"
