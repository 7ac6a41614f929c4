#!/usr/bin/env bash
# Surprising: llama.cpp's converter of Hugging Face folders drops the base of the rotations (rotary_emb_base, rope_theta)
# of GPT-NeoX and StableLM without a word: two folders whose models differ, since their bases do, give the same file byte
# for byte, without a key for the base, for which llama.cpp then takes 10,000. Of Llama it writes the base.
# The converter is that of the llama.cpp in llama-cpp-python's source package (77 MB), which is not built here.
# Exits with 1 if the files differ.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip=("$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check)
"${pip[@]}" install torch==2.13.0 transformers==4.57.6 sentencepiece==0.2.3
"${pip[@]}" download --no-deps --no-binary :all: --dest "$folder" llama-cpp-python==0.3.36
tar -xzf "$folder"/llama_cpp_python-0.3.36.tar.gz -C "$folder"
cat > "$folder/show.py" <<'PYTHON'
import hashlib
import sys
from pathlib import Path

folder = Path(sys.argv[1])
source = folder / "llama_cpp_python-0.3.36" / "vendor" / "llama.cpp"
sys.path[:0] = [str(source), str(source / "gguf-py")]

import convert_hf_to_gguf
import gguf
import torch
import transformers
from conversion.base import TextModel
from tokenizers import Tokenizer, models, pre_tokenizers

TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"  # a new vocabulary is not in its list
vocab = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
sizes = dict(vocab_size=256, hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2)
sizes |= dict(num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False)
text = torch.arange(3, 40)[None]
for kind, key in (("gpt_neox", "rotary_emb_base"), ("stablelm", "rope_theta"), ("llama", "rope_theta")):
    hashes, logits = set(), []
    for base in (10000, 50):
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(kind, **sizes, **{key: base})
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(0.5 * torch.randn(parameter.shape))
            logits.append(model(text).logits[0, -1])
        where, out = folder / kind, folder / f"{kind}.gguf"  # of one name, which the file contains
        model.save_pretrained(where)
        tokenizer.save_pretrained(where)
        sys.argv = ["convert", str(where), "--outfile", str(out), "--outtype", "f32"]
        convert_hf_to_gguf.main()
        hashes.add(hashlib.sha256(out.read_bytes()).hexdigest())
        keys = [name for name in gguf.GGUFReader(out).fields if "freq_base" in name]
    different = (logits[0] - logits[1]).abs().max().item()
    print(f"{kind}: torch's logits differ by {different:.2f}; files: {len(hashes)}; keys of the base: {keys}")
    assert different > 0.1
    assert (len(hashes), len(keys)) == ((2, 1) if kind == "llama" else (1, 0)), "the behaviour has changed"
PYTHON
"$folder/venv/bin/python" "$folder/show.py" "$folder" 2>"$folder/log" || { tail -n 20 "$folder/log"; exit 1; }
