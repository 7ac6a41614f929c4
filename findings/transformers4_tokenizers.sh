#!/usr/bin/env bash
# Surprising: a tokenizer that transformers 5 only opens and saves again is refused by transformers 4.57, the last version
# before it, although tokenizer.json is the same: tokenizer_config.json then names a class "TokenizersBackend", which
# version 4 does not have, and has a list under extra_special_tokens, of which version 4 asks the keys.
# Exits with 1 if version 4 reads either folder.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for version in 4.57.6 5.24.0; do
    python3 -m venv "$folder/$version"
    # Without protobuf version 4 asks for it instead of naming the error.
    "$folder/$version/bin/pip" install --quiet --disable-pip-version-check "transformers==$version" protobuf
done
cat > "$folder/save.py" <<'PYTHON'
import sys

import transformers
from tokenizers import Tokenizer, models

print("saved by transformers", transformers.__version__)
backend = Tokenizer(models.WordLevel({"<unk>": 0, "hello": 1}, unk_token="<unk>"))
for name, extra in (("plain", {}), ("extra", {"extra_special_tokens": ["<call>"]})):
    if transformers.__version__.startswith("4"):
        extra = {"additional_special_tokens": list(*extra.values())} if extra else {}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", **extra)
    tokenizer.save_pretrained(f"{sys.argv[1]}/{name}")
PYTHON
cat > "$folder/open.py" <<'PYTHON'
import json
import sys
from pathlib import Path

import transformers

refused = 0
for name in ("plain", "extra"):
    path = Path(sys.argv[1]) / name
    for change in ({}, {"tokenizer_class": "PreTrainedTokenizerFast"}):
        config = json.loads((path / "tokenizer_config.json").read_text()) | change
        (path / "tokenizer_config.json").write_text(json.dumps(config))
        try:
            ids = transformers.AutoTokenizer.from_pretrained(path)("hello").input_ids
            print(name, config["tokenizer_class"], "->", ids)
        except Exception as error:
            refused += 1
            print(name, config["tokenizer_class"], "->", type(error).__name__, str(error)[:90])
print("transformers", transformers.__version__, "refuses", refused, "of 4")
sys.exit(refused != int(sys.argv[2]))
PYTHON
"$folder/4.57.6/bin/python" "$folder/save.py" "$folder/by4"
"$folder/4.57.6/bin/python" "$folder/open.py" "$folder/by4" 0
"$folder/5.24.0/bin/python" "$folder/save.py" "$folder/by5"
"$folder/4.57.6/bin/python" "$folder/open.py" "$folder/by5" 3
