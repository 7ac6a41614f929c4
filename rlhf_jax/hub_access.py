"""Whether the Hugging Face hub answers, found out once per process, so that without a network nothing waits for it."""

from __future__ import annotations

import functools
import logging
import os
import sys

LOGGER = logging.getLogger(__name__)
TIMEOUT = 3.0  # seconds for each address of the hub; the clients of the hub would retry for half a minute each time


@functools.cache
def hub_obstacle() -> str:
    """Why the hub cannot be asked; "" if it answers, whatever it says.

    Where it does not, the clients of the hub (huggingface_hub, transformers, datasets) are set to read only what is
    in their caches, as HF_HUB_OFFLINE=1 sets them, and a warning says so.
    """
    # Imported where used: with the libraries below it takes seconds.
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=TIMEOUT)
    except Exception as error:  # of whichever HTTP client huggingface_hub uses
        what = " ".join(str(error).split()) or type(error).__name__
        obstacle = f"the hub is not reachable: {constants.ENDPOINT}: {what}"
        LOGGER.warning(f"{obstacle}; only what is in its cache here is used")
        os.environ["HF_HUB_OFFLINE"] = "1"  # for what is imported later
        constants.HF_HUB_OFFLINE = True
        if "datasets" in sys.modules:
            sys.modules["datasets"].config.HF_HUB_OFFLINE = True
        return obstacle
    return ""
