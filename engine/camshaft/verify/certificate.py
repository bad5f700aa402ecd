"""What a proof leaves behind: a file that says what was compared, how far it was off, and what it is valid for."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import platform
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from camshaft.errors import CamshaftError
from camshaft.host import distribution, installed, plugin_class
from camshaft.rundir import utc_now
from camshaft.verify.shrink import Small, shrink
from camshaft.verify.sorting import full_world, legal, sort

if TYPE_CHECKING:
    from camshaft.recipe import Resolved
    from camshaft.verify.examine import Report

FORMAT = 1
FOLDER = "certificates"


def versions(plugins: Iterable[str]) -> dict[str, str]:
    """Versions of Python, torch, the core and of the distribution of each plugin. Imports no torch."""
    from camshaft.cli.inventory import version

    points = installed()
    found = {
        "python": platform.python_version(),
        "torch": version("torch") or "",
        "camshaft": version("camshaft") or "",
    }
    return found | {f"plugin {name}": distribution(points[name]) for name in plugins if name in points}


def code_digest(plugins: Iterable[str]) -> str:
    """Digest of every line of the core and of the packages of ``plugins``: a version number may cover many of them."""
    packages = ["camshaft", *(plugin_class(name).__module__.split(".")[0] for name in plugins)]
    found = hashlib.sha256()
    for package in dict.fromkeys(packages):
        spec = importlib.util.find_spec(package)
        for folder in [] if spec is None else spec.submodule_search_locations or []:
            for path in sorted(Path(folder).rglob("*.py")):
                found.update(f"{package}/{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return found.hexdigest()


def valid_for(small: Small) -> str:
    """Digest of what a proof of ``small`` is about: its recipe, axes and windows, versions and code.

    Recipes that are alike when they are small have one: other data, lengths, ranks along an axis, names and folders.
    """
    tree = {key: value for key, value in small.tree.items() if key not in ("seed", "data", "training", "launch")}
    data = {key: small.tree["data"][key] for key in ("sequence_length", "pack", "document_mask")}
    content = {
        "format": FORMAT,
        "recipe": {**tree, "data": data},
        "plugins": list(small.sections.items()),
        "own": small.own,
        "axes": small.degrees,
        "windows": [small.micro, small.accumulation],
        "compute": [small.compute, small.device],
        "versions": versions(small.sections),
        "code": code_digest(small.sections),
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
        "valid_for": valid_for(report.shrunk),
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
            small = shrink(resolved, checked, sort(resolved, checked), Path(made), steps=STEPS)
        digest = valid_for(small)
        content = json.loads((folder(resolved) / f"{digest}.json").read_text(encoding="utf-8"))
        return {key: content[key] for key in ("result", "made", "plan", "valid_for")}
    except (CamshaftError, OSError, ValueError, KeyError):
        return None


STEPS = 4
"""Steps of a proof that ``lookup`` finds."""
