"""A front over stub ranks: ``python stub_front.py RUN LAUNCHER PROCESSES MODE``.

LAUNCHER may be ``fake`` (quick), ``half`` (starts one rank only), ``broken``, ``starved`` (no memory for its imports)
or ``held`` (says its pid and starts no rank, ever).
"""

import os
import sys
from pathlib import Path

from camshaft.cli.launch import commands
from camshaft.cli.launch.supervisor import Job, supervise
from camshaft.cli.launch.watch import StopSignal
from camshaft.rundir import RunDirectory

HERE = Path(__file__).parent
QUICK = ("fake", "half", "broken", "starved", "held")
INSTEAD = {
    "broken": "raise SystemExit('no such accelerator')",
    "starved": "import sys; print('MemoryError:\\n' * 12, file=sys.stderr); raise MemoryError",
    "held": "import os, signal; print('held', os.getpid(), flush=True); signal.pause()",
}


def main(run: str, launcher: str, count: str, mode: str) -> int:
    stop = StopSignal(grace_s=None, repeat_ends=False).install()
    directory = RunDirectory(run).create()
    target = commands.Target("stub_rank", (mode,))
    environ = commands.child_environment(
        os.environ, launcher=launcher, device="cpu", threads=1, extensions=directory.path / "ops"
    )
    environ["PYTHONPATH"] = str(HERE)

    def line(folder: Path) -> list[str]:
        quick = [sys.executable, str(HERE / "fake_launcher.py"), "deepspeed.launcher.launch"]
        if launcher in INSTEAD:
            return [sys.executable, "-c", INSTEAD[launcher]]
        if launcher in QUICK:
            return [*quick, "1" if launcher == "half" else count, str(HERE / "stub_rank.py"), mode]
        return commands.command_line(
            launcher, int(count), target, job=folder, port=commands.free_port(), environ=environ
        )

    name = "deepspeed" if launcher in QUICK else launcher
    outcome = supervise(Job(name, int(count), line, directory, environ), stop)
    print(f"outcome {outcome.status}: {outcome.message}", flush=True)
    return outcome.status


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
