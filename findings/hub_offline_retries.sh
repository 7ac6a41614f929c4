#!/usr/bin/env bash
# Surprising: without a network, huggingface_hub's hf_hub_download retries a refused connection for more than 20 seconds
# for every file, while snapshot_download of the same repository on the same machine gives up at once. A program that
# asks for one config.json therefore waits longer than one that asks for the whole model.
# Exits with 1 if the two take about the same time.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check huggingface_hub==2.4.0
# A port where nothing listens, in place of the hub.
HF_ENDPOINT=http://127.0.0.1:9 HF_HOME="$folder/home" "$folder/venv/bin/python" - <<'PYTHON'
import sys
import time

import huggingface_hub

print("huggingface_hub", huggingface_hub.__version__)
seconds = {}
for download, arguments in (
    (huggingface_hub.snapshot_download, ("someone/model",)),
    (huggingface_hub.hf_hub_download, ("someone/model", "config.json")),
):
    start = time.monotonic()
    try:
        download(*arguments)
    except Exception as error:
        seconds[download.__name__] = time.monotonic() - start
        print(f"{download.__name__}: {seconds[download.__name__]:.1f} s, {type(error).__name__}")
sys.exit(seconds["hf_hub_download"] < 10 * seconds["snapshot_download"])
PYTHON
