#!/usr/bin/env bash
# Surprising: AutoTokenizer of transformers 5 gives other ids than the folder's own tokenizer.json, and says nothing, if
# config.json says "qwen2": it builds a Qwen2Tokenizer with Qwen2's splitting into words from the vocabulary, although
# tokenizer_config.json names another class (PreTrainedTokenizerFast). The same two files without config.json, or with
# another model_type there, are read as they are.
# Exits with 1 if the ids are those of the file in both cases.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.24.0 tokenizers==0.23.1
cat > "$folder/show.py" <<'PYTHON'
import json
import sys
from pathlib import Path

import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

# Digits in groups of three from the left; Qwen2 splits every digit.
split = pre_tokenizers.Split(pattern=Regex(r"\d{1,3}|[^\d]+"), behavior="isolated")
own = Tokenizer(models.BPE())
own.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
own.decoder = decoders.ByteLevel()
alphabet = pre_tokenizers.ByteLevel.alphabet()
trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
own.train_from_iterator(["123 456 123 456"] * 9, trainer)
text, folder = "123 456", Path(sys.argv[1])
print("transformers", transformers.__version__)
print("tokenizer.json alone            ", expected := own.encode(text).ids)
found = {}
for kind in ("llama", "qwen2"):
    where = folder / kind
    where.mkdir()
    own.save(str(where / "tokenizer.json"))
    (where / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    (where / "config.json").write_text(json.dumps({"model_type": kind}))
    tokenizer = transformers.AutoTokenizer.from_pretrained(where)
    found[kind] = tokenizer(text, add_special_tokens=False).input_ids
    print(f"with model_type {kind!r:8}", type(tokenizer).__name__.ljust(15), found[kind])
assert found["qwen2"] != expected, "the behaviour has changed"
PYTHON
"$folder/venv/bin/python" "$folder/show.py" "$folder"
