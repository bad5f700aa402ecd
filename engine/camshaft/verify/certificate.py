"""What a proof leaves behind: a file that says what was compared, how far it was off, and what it is valid for."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from camshaft.errors import CamshaftError
from camshaft.rundir import utc_now
from camshaft.verify.code import code_digest, versions
from camshaft.verify.covered import FOUND_STEPS
from camshaft.verify.shrink import Small, shrink
from camshaft.verify.sorting import full_world, legal, sort

if TYPE_CHECKING:
    from camshaft.recipe import Resolved
    from camshaft.verify.examine import Report

FORMAT = 2
FOLDER = "certificates"


def valid_for(small: Small, code: str | None = None) -> str:
    """Digest of what a proof of ``small`` is about: its recipe, axes, windows and steps, versions and code.

    Recipes that are alike when they are small have one: other data, lengths, ranks along an axis, names and folders.
    What had to be taken out of a recipe keeps it apart from one that never had it. ``code``: digest of the code that
    was proven; by default of what is there now.
    """
    tree = {key: value for key, value in small.tree.items() if key not in ("seed", "data", "launch")}
    data = {key: small.tree["data"][key] for key in ("sequence_length", "pack", "document_mask")}
    content = {
        "format": FORMAT,
        "recipe": {**tree, "data": data},
        "plugins": list(small.sections.items()),
        "own": small.own,
        "taken_out": small.taken_out,
        "files": small.files,
        "axes": small.degrees,
        "windows": [small.micro, small.accumulation],
        "compute": [small.compute, small.device],
        "versions": versions(small.sections),
        "code": code or code_digest(small.sections),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def certificate(report: Report, recipe: str, plan_digest: str) -> dict[str, Any]:
    """The content of ``certificate.json``: plain data. ``plan_digest``: that of ``camshaft plan`` of the recipe."""
    small, comparison, finding = report.small, report.comparison, report.finding
    return {
        "format": FORMAT,
        "result": "green" if report.green else "red",
        "recipe": recipe,
        "made": utc_now(),
        "seconds": round(report.seconds, 1),
        "plan": plan_digest,
        "valid_for": valid_for(report.shrunk, report.code),
        "versions": versions(small.sections),
        "proof": {
            "steps": report.steps,
            "ranks": report.world_size,
            "axes": dict(small.degrees),
            "dtype": small.compute,
            "device": small.device,
            "model": dict(small.tree["model"]),
            "windows": {"micro_batch_size": small.micro, "accumulation": small.accumulation, "samples": small.samples},
            "compared_plugins": {name: small.sections[name] for name in report.sorted.compared},
            "plugins_of_both": {name: small.sections[name] for name in report.sorted.kept},
        },
        "compared": {}
        if comparison is None
        else {
            quantity: {
                "values": comparison.compared[quantity],
                "worst": each.value,
                "bound": each.bound,
                "where": f"step {each.step}" + (f", {each.name}" if each.name else ""),
            }
            for quantity, each in comparison.worst.items()
        },
        "not_covered": list(report.not_covered),
        "finding": None
        if finding is None
        else {
            "plugins": list(finding.plugins),
            "smallest_set": list(finding.smallest),
            "message": str(finding),
            "sign": _plain(asdict(finding.sign)),
        },
        **report.extras,
    }


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no infinity."""
    return {
        key: str(each) if isinstance(each, float) and not math.isfinite(each) else each for key, each in values.items()
    }


def folder(resolved: Resolved) -> Path:
    """Where certificates of a recipe are kept: ``certificates`` in its cache folder."""
    from camshaft.data.sources import cache_folder

    return cache_folder(resolved) / FOLDER


def keep(resolved: Resolved, content: Mapping[str, Any]) -> Path:
    """Write a certificate where ``lookup`` finds it, and return its path.

    Raises:
        OSError: the cache folder cannot be written.
    """
    path = folder(resolved) / f"{content['valid_for']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, content)
    return path


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write a certificate; readers see the old file or the new one, whole."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def lookup(resolved: Resolved) -> dict[str, Any] | None:
    """Result, time and digest of the certificate that is valid for ``resolved``; None without one. Imports no torch."""
    try:
        checked = legal(resolved, full_world(resolved))
        with tempfile.TemporaryDirectory() as made:
            small = shrink(resolved, checked, sort(resolved, checked), Path(made), steps=FOUND_STEPS)
        digest = valid_for(small)
        content = json.loads((folder(resolved) / f"{digest}.json").read_text(encoding="utf-8"))
        return {key: content[key] for key in ("result", "made", "plan", "valid_for")}
    except (CamshaftError, OSError, ValueError, KeyError):
        return None
