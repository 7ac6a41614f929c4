#!/usr/bin/env bash
# Surprising: apply_chat_template(sanitize_control_tokens=True) of transformers, which is to keep control tokens that
# messages spell as text, also changes the text around them. Invisible markers are put around every such token before
# the template runs, in the assistant's messages too, and the template sees them: split("</think>") followed by
# strip("\n") no longer meets the line breaks, which then stay. The ids are those of another dialogue.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.24.0 tokenizers==0.23.1 jinja2==3.1.6
cat > "$folder/show.py" <<'PYTHON'
import tokenizers
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TEMPLATE = """
{%- for m in messages %}
{%- set thought = '' %}{%- set said = m.content %}
{%- if '</think>' in said %}
{%- set thought = said.split('</think>')[0].split('<think>')[-1].strip('\n') %}
{%- set said = said.split('</think>')[-1].lstrip('\n') %}
{%- endif %}
{{- '<|start|>' + m.role + '\n' }}
{%- if thought %}{{- '<think>\n' + thought + '\n</think>\n\n' }}{%- endif %}
{{- said + '<|end|>\n' }}
{%- endfor %}"""
alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
backend = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", chat_template=TEMPLATE)
tokenizer.add_tokens([AddedToken(each, special=each == "<|start|>") for each in ("<|start|>", "<think>", "</think>")])
chat = [
    {"role": "user", "content": "What is 3 + 4?"},
    {"role": "assistant", "content": "<think>\nI add.\n</think>\n\nIt is 7."},
]
plain = tokenizer.decode(tokenizer.apply_chat_template(chat, return_dict=False))
sanitized = tokenizer.decode(tokenizer.apply_chat_template(chat, return_dict=False, sanitize_control_tokens=True))
print("transformers", transformers.__version__, "tokenizers", tokenizers.__version__)
print("plain     ", repr(plain))
print("sanitized ", repr(sanitized))
assert plain == "<|start|>user\nWhat is 3 + 4?<|end|>\n<|start|>assistant\n<think>\nI add.\n</think>\n\nIt is 7.<|end|>\n"
assert "<think>\n\nI add.\n\n</think>\n\n\n\nIt is 7." in sanitized, "the behaviour has changed"
PYTHON
"$folder/venv/bin/python" "$folder/show.py"
