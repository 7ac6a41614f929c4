"""Passwords, keys and tokens in texts: refused in a configuration, which is copied, and left out of messages."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

_HIDDEN = "***"
# What in a text is secret by its form, without the part that says so.
_PATTERNS = {
    "a password": re.compile(r"(?<=://)[^/\s:@'\"]*:[^/\s@'\"]+(?=@)"),  # https://user:password@host
    "a key or token": re.compile(
        r"(?<=[?&])(?:[\w-]*(?:key|token|secret|password|signature|credential)=)[^&\s'\"#]+"  # https://host/?key=value
        # Of the hub; of OpenAI, Anthropic and servers that follow them. Names such as hf_preferences_cleaned are none.
        r"|\bhf_[A-Za-z0-9]{16,}|\bsk-(?=[\w-]*\d)[\w-]{16,}",
        re.IGNORECASE,
    ),
}
_VARIABLES = re.compile(r"(?:^|_)(?:TOKEN|SECRET|PASSWORD|KEY)$", re.IGNORECASE)  # names of the environment
_SHORTEST = 8  # characters of a value of the environment that is taken for a secret


def find_secret(text: str) -> str:
    """What kind of secret a text holds; "" for none."""
    return next((kind for kind, pattern in _PATTERNS.items() if pattern.search(text)), "")


def redact(text: str, environ: Mapping[str, str] = os.environ) -> str:
    """The text with *** in place of secrets, and of the values of variables such as HF_TOKEN and OPENAI_API_KEY."""
    for pattern in _PATTERNS.values():
        text = pattern.sub(_HIDDEN, text)
    values = [value for name, value in environ.items() if _VARIABLES.search(name) and len(value) >= _SHORTEST]
    for value in sorted(values, key=len, reverse=True):
        text = text.replace(value, _HIDDEN)
    return text
