"""``python -m camshaft.testing.plans RECIPE SIZE...``: what a recipe plans for each number of processes, as JSON.

Run in a process of its own, so that it can say whether planning imported torch.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

RANK = ("RANK", "LOCAL_RANK")
"""Variables that tell a process which rank it is."""


def main(path: str, sizes: Sequence[str]) -> None:
    """Print plans and the whole of ``camshaft plan`` for each size: as the rank that the environment tells,
    as each rank, and as the first one again.
    """
    from camshaft.cli import run
    from camshaft.recipe import check, load

    found: dict[str, Any] = {}
    environment, files = dict(os.environ), sorted(map(str, Path().iterdir()))
    for size in sizes:
        texts, own = [], {key: os.environ.pop(key) for key in RANK if key in os.environ}
        first = own.get("RANK", "0")
        for rank in (first, *map(str, range(int(size))), first):
            os.environ |= dict.fromkeys(RANK, rank)
            checked = check(load(path, world_size=int(size)), int(size), device="any")
            shown = io.StringIO()
            with redirect_stdout(shown):
                status = run(["plan", path, "--world-size", size])
            texts.append([str(status), *map(str, checked.problems), repr(checked.plans), shown.getvalue()])
        for key in RANK:
            os.environ.pop(key, None)
        os.environ |= own
        found[size] = texts
    torch = sorted({"torch"} & sys.modules.keys())
    clean = environment == dict(os.environ) and files == sorted(map(str, Path().iterdir()))
    print(json.dumps({"plans": found, "imported": torch, "clean": clean}))


def planned(path: Path, sizes: Sequence[int], folder: Path, **environment: str) -> Mapping[str, Any]:
    """What ``main`` prints, run in ``folder`` with variables of ``environment``.

    Raises:
        AssertionError: it failed; with what it said.
    """
    folder.mkdir()
    command = [sys.executable, "-m", "camshaft.testing.plans", str(path), *map(str, sizes)]
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    found: Mapping[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
