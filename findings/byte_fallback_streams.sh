#!/usr/bin/env bash
# Surprising: tokenizers' own DecodeStream ends with an exception on tokens that decode takes, where a tokenizer has bytes
# as pieces (byte_fallback, as in Llama 2, Mistral, Gemma). decode takes a run of bytes as a whole: if any part of it is
# no UTF-8, it writes a replacement character for every byte of the run, also for those that were a character by
# themselves. The stream has given that character already, no longer finds it, and raises "Invalid prefix encountered";
# a model may sample such tokens. To stream what decode gives, text has to be kept back until the run of bytes ends.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet tokenizers==0.23.1
cat > "$folder/show.py" <<'PYTHON'
import tokenizers
from tokenizers import Tokenizer, decoders, models

words = {"<unk>": 0, **{f"<0x{byte:02X}>": byte + 1 for byte in range(256)}, "a": 257}
tokenizer = Tokenizer(models.BPE(vocab=words, merges=[], unk_token="<unk>", byte_fallback=True))
tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
ids = [byte + 1 for byte in "日".encode()] + [0xFF + 1, words["a"]]
stream = decoders.DecodeStream(skip_special_tokens=True)
pieces, failure = [], ""
try:
    for id in ids:
        pieces.append(stream.step(tokenizer, id))
except Exception as error:
    failure = str(error)
print("tokenizers", tokenizers.__version__)
print("decode of the character alone ", repr(tokenizer.decode(ids[:3])))
print("decode with a byte after it   ", repr(tokenizer.decode(ids)))
print("DecodeStream                  ", pieces, failure)
assert tokenizer.decode(ids[:3]) == "日"
assert tokenizer.decode(ids) == "\N{REPLACEMENT CHARACTER}" * 4 + "a", "the behaviour has changed"
assert "".join(filter(None, pieces)) == "日" and "Invalid prefix" in failure, "the behaviour has changed"
PYTHON
"$folder/venv/bin/python" "$folder/show.py"
