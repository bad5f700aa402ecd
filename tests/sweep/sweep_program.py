"""Stands for ``camshaft train``: writes a curve that follows from the learning rate, and notes that it was started."""

import fcntl
import json
import math
import os
import sys
import time
from pathlib import Path

values = dict(word.split("=", 1) for word in sys.argv[2:])
run, rate = Path(values["run.dir"]), float(values["plugins.adamw.lr"])
with (run.parent / "started").open("a") as notes:
    notes.write(f"{run.name} {rate!r}\n")
mode = os.environ.get("SWEEP_MODE", "")
lock = os.open(run / ".lock", os.O_RDWR | os.O_CREAT)
fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # as a real run does, for as long as it lives
if mode == "hangs in trial 2" and run.name == "trial_0002":
    time.sleep(60)
if mode == "fails in trial 1" and run.name == "trial_0001":
    print("error: out of memory")
    sys.exit(4)
if mode == "always fails":
    sys.exit(5)
with (run / "metrics.jsonl").open("a") as metrics:
    for step in range(1, 6):
        loss = math.log10(rate / 0.01) ** 2 + 1.0 / step
        if mode == "no number":
            loss = math.nan
        metrics.write(json.dumps({"progress/global_step": step, "eval/loss": loss}) + "\n")
        metrics.flush()
        time.sleep(0.4 if mode == "slow" else 0)
(run / "status.json").write_text(json.dumps({"state": "finished"}))
