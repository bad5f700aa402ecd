"""Which W&B run this is, whether it goes online, and what of the recipe W&B may see."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from camshaft.recipe.secrets import has_secret_shape, is_secret_name

_PRIVACY = {"run": "online", "dryrun": "offline", "online": "online", "offline": "offline", "disabled": "disabled"}
_ORDER = ("auto", "online", "offline", "disabled")
_ID = re.compile(r"[^:;,#?/'\s]{1,128}")


def resolve_mode(option: str, environ: Mapping[str, str]) -> str:
    """``auto``, ``online``, ``offline`` or ``disabled``: the more private one of the recipe and ``WANDB_MODE``.

    A ``WANDB_MODE`` that wandb has and this does not (``shared``) counts as ``online``.
    """
    wanted = environ.get("WANDB_MODE", "").strip().lower()
    if not wanted:
        return option
    return max(option, _PRIVACY.get(wanted, "online"), key=_ORDER.index)


def run_id(path: Path, environ: Mapping[str, str]) -> str:
    """The id of the run: a sweep agent's or user's ``WANDB_RUN_ID``, else the one kept in ``path``, else a new one.

    Raises:
        OSError: ``path`` cannot be written.
    """
    kept = path.read_text(encoding="utf-8").strip() if path.is_file() else ""
    found = environ.get("WANDB_RUN_ID", "").strip() or kept
    if not _ID.fullmatch(found):
        found = secrets.token_hex(4)
    if found != kept:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(found + "\n", encoding="utf-8")
        temporary.replace(path)
    return found


def public_text(text: str, environ: Mapping[str, str]) -> str:
    """``text``, in which the W&B key of this process, should it be there, is replaced by ``[removed]``."""
    key = environ.get("WANDB_API_KEY", "")
    return text.replace(key, "[removed]") if key else text


def public(tree: Mapping[str, Any], environ: Mapping[str, str]) -> dict[str, Any]:
    """A copy of ``tree`` without keys that are named like secrets; text that looks like one, or holds the W&B key,
    becomes ``[removed]``.

    The loader of recipes refuses such keys and values already. This is the last gate before they leave the machine,
    and knows what the loader cannot: the key of this process.
    """
    key = environ.get("WANDB_API_KEY", "")
    return {name: _public(value, key) for name, value in tree.items() if not is_secret_name(name)}


def _public(value: Any, key: str) -> Any:
    if isinstance(value, Mapping):
        return public(value, {"WANDB_API_KEY": key})
    if isinstance(value, list | tuple):
        return [_public(item, key) for item in value]
    if isinstance(value, str) and ((key and key in value) or has_secret_shape(value)):
        return "[removed]"
    return value
