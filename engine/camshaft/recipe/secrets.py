"""Secrets do not belong into a recipe: it is copied into run directories, trackers and checkpoints.

Keys are judged by their name, values by their shape. Nothing here ever returns or prints a value.
"""

from __future__ import annotations

import re

from camshaft.recipe.nodes import Document, show_key, walk

FIX = "remove it and give it to the program itself: its environment variable, its own login command or ~/.netrc"

_WORDS = frozenset(
    {
        "apikey", "authorization", "bearer", "credential", "credentials", "jwt", "passphrase", "passwd",
        "password", "passwords", "pwd", "secret", "secrets", "token",
    }
)  # fmt: skip
_PARTS = ("secret", "password", "passwd", "passphrase", "credential", "apikey")
_KEY_OWNERS = frozenset({"access", "account", "api", "auth", "encryption", "private", "secret", "signing", "ssh"})
_TOKENS_OF_TEXT = frozenset({"bos", "cls", "eos", "mask", "max", "min", "pad", "per", "sep", "unk"})
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
# Lengths are bounded, so that no text takes more than linear time.
_URL_USER = re.compile(r"(?<![A-Za-z0-9+.-])[A-Za-z0-9+.-]{1,40}://[^/\s?#]{0,1000}@")
_QUERY = re.compile(r"[?&]([A-Za-z0-9_.-]+)=")
_SHAPES = re.compile(
    r"\b(hf_[A-Za-z0-9]{30,}|gh[opsur]_[A-Za-z0-9]{30,}|github_pat_\w{20,}|glpat-[\w-]{20,}|sk-(?:proj-|ant-)?\w{32,}"
    r"|AKIA[0-9A-Z]{16}|xox[abpr]-[\w-]{10,}|eyJ[\w-]{10,200}\.eyJ[\w-]{10})|-----BEGIN [A-Z ]*PRIVATE KEY"
)


def is_secret_name(name: str) -> bool:
    """Whether a key or an environment variable is named like a secret. ``max_tokens`` and ``eos_token`` are not."""
    words = [word for word in re.split(r"[^a-z0-9]+", _CAMEL.sub("_", name).lower()) if word]
    if any(part in "".join(words) for part in _PARTS):
        return True
    for index, word in enumerate(words):
        before = words[index - 1] if index else ""
        if word == "token" and (index + 1 < len(words) or before in _TOKENS_OF_TEXT):
            continue
        if word in _WORDS or (word == "key" and before in _KEY_OWNERS):
            return True
    return False


def has_secret_shape(text: str) -> str:
    """Why ``text`` looks like a secret, or an empty string."""
    if _URL_USER.search(text):
        return "a URL with user information"
    if "://" in text and any(is_secret_name(name) for name in _QUERY.findall(text)):
        return "a URL with a secret in its query"
    return "a value in the form of a known kind of access key" if _SHAPES.search(text) else ""


def check(document: Document) -> None:
    """Report every secret in a tree, and mark its node bad so that its value is never shown."""
    for key, node in list(walk(document.root)):
        name = key.rsplit(".", 1)[-1]
        if is_secret_name(name):
            document.refuse(node, key, f"'{show_key(name)}' is named like a secret, and a recipe holds none", FIX)
        elif isinstance(node.value, str) and (why := has_secret_shape(node.value)):
            document.refuse(node, key, f"{why}: a recipe holds no secrets", FIX)
