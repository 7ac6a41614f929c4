#!/usr/bin/env bash
# Surprising: mlx-lm computes another model, and says nothing, from a folder whose config.json has the base of the
# rotations where transformers 5 writes it, under rope_parameters, and not under rope_theta, transformers 4's key: it
# takes a base of its own (10,000 for Llama, 1,000,000 for Qwen2). mlx-lm itself requires transformers 5.
# Exits with 1 if the logits of the two folders agree.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check mlx-lm==0.32.2 'mlx[cpu]==0.32.4' transformers==5.24.0
cat > "$folder/show.py" <<'PYTHON'
import importlib.metadata
import json
import sys
from pathlib import Path

import mlx.core as mx
import transformers
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes, load_model

mx.set_default_device(mx.cpu)
print("mlx-lm", importlib.metadata.version("mlx-lm"), "transformers", transformers.__version__)
sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
sizes |= dict(num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-6, tie_word_embeddings=False)
text = mx.array([[3, 9, 27, 17, 51, 25, 11, 33]])
for kind in ("llama", "qwen2"):
    config = transformers.AutoConfig.for_model(kind, **sizes, rope_parameters={"rope_type": "default", "rope_theta": 50.0})
    new = Path(sys.argv[1]) / f"{kind}-5"
    config.save_pretrained(new)
    written = json.loads((new / "config.json").read_text())
    assert "rope_theta" not in written and written["rope_parameters"]["rope_theta"] == 50.0
    old = Path(sys.argv[1]) / f"{kind}-4"
    old.mkdir()
    (old / "config.json").write_text(json.dumps(written | {"rope_theta": 50.0}))
    assert transformers.AutoConfig.from_pretrained(old).rope_parameters == config.rope_parameters
    network, arguments = _get_classes(written)
    shapes = {name: value.shape for name, value in tree_flatten(network(arguments.from_dict(written)).parameters())}
    mx.random.seed(0)
    weights, logits = {name: 0.5 * mx.random.normal(shape) for name, shape in shapes.items()}, {}
    for where in (old, new):
        mx.save_safetensors(str(where / "model.safetensors"), weights, {"format": "pt"})
        logits[where] = load_model(where)[0](text)[0, -1]
    difference = mx.abs(logits[old] - logits[new]).max().item()
    print(f"{kind}: the same tensors and base; logits with and without rope_theta differ by {difference:.3f}")
    assert difference > 0.01, "the behaviour has changed"
PYTHON
"$folder/venv/bin/python" "$folder/show.py" "$folder"
