"""The child process that drives wandb: ``python -m camshaft_wandb.worker``, one JSON object a line in and out.

In: the request (``mode``, ``init``, ``settings``, ``parent``), then messages of one key that says what to do
(``{"log": record}``, ``artifact``, ``command``, ``table``, ``html``, ``alert``), at last ``{"finish": exit code}``.
Out: ``{"event": "imported"}``, then ``ready`` or ``failed``, and at the end ``done``.
When the input ends without ``finish`` the trainer is dead: the run is finished as failed and this process ends.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

_STEP = "progress/global_step"
_COMMAND_LIMIT_S = 120.0
_ORPHAN_LIMIT_S = 10.0
"""How long the last upload may take when nobody is left to end this process."""


class Session:
    """One wandb run, from request to finish."""

    def __init__(self, wandb: Any, request: dict[str, Any]) -> None:
        self._wandb = wandb
        self._request = request
        self._failures = 0
        self._first_failure = ""
        self._run: Any = None

    def open(self) -> dict[str, Any]:
        """Start the run and return the ``ready`` event."""
        mode = self._request["mode"]
        if mode == "auto":
            mode = "online" if self._has_key() else "offline"
        known = getattr(self._wandb.Settings, "model_fields", None)  # settings differ between versions of wandb
        settings = {name: value for name, value in self._request["settings"].items() if known is None or name in known}
        self._run = self._wandb.init(mode=mode, settings=self._wandb.Settings(**settings), **self._request["init"])
        self._run.define_metric(_STEP)
        self._run.define_metric("*", step_metric=_STEP)
        url = self._run.url if mode == "online" else None
        return {"event": "ready", "mode": mode, "url": url, "dir": os.path.dirname(self._run.dir)}  # noqa: PTH120

    def _has_key(self) -> bool:
        """wandb's own search: the environment, netrc, an identity token, its settings files."""
        try:
            return bool(self._wandb.login())
        except self._wandb.errors.AuthenticationError:
            raise  # there is a key, and the server did not take it
        except self._wandb.errors.UsageError:
            return False

    def take(self, message: dict[str, Any]) -> None:
        """Do what a message asks for; what fails is counted, and told at the end."""
        ((kind, content),) = message.items()
        with self._counted():
            getattr(self, f"_do_{kind}")(content)

    def finish(self, exit_code: int) -> dict[str, Any]:
        """Finish the run and return the ``done`` event."""
        with self._counted():
            self._run.finish(exit_code=exit_code)
        return {"event": "done", "failures": self._failures, "reason": self._first_failure}

    @contextmanager
    def _counted(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._failures += 1
            self._first_failure = self._first_failure or f"{type(error).__name__}: {error}"

    def _do_log(self, record: dict[str, float]) -> None:
        self._run.log(record)

    def _do_alert(self, alert: dict[str, str]) -> None:
        self._run.alert(title=alert["title"], text=alert["text"], level=alert["level"])

    def _do_artifact(self, content: dict[str, Any]) -> None:
        artifact = self._wandb.Artifact(name=content["name"], type=content["type"])
        for name, text in content["files"].items():
            with artifact.new_file(name, mode="w", encoding="utf-8") as file:
                file.write(text)
        self._run.log_artifact(artifact)

    def _do_command(self, content: dict[str, Any]) -> None:
        """An artifact of what a command prints."""
        with open(os.devnull, "rb") as nothing:  # noqa: PTH123
            done = subprocess.run(
                content["line"], stdin=nothing, capture_output=True, text=True, timeout=_COMMAND_LIMIT_S
            )
        if done.returncode:
            raise RuntimeError(f"no {content['type']}: {done.stderr.strip()[-200:]}")
        self._do_artifact({**content, "files": {content["file"]: done.stdout}})

    def _do_table(self, content: dict[str, Any]) -> None:
        self._run.log({content["key"]: self._wandb.Table(columns=content["columns"], data=content["rows"])})

    def _do_html(self, content: dict[str, str]) -> None:
        self._run.log({content["key"]: self._wandb.Html(content["text"], inject=False)})


def serve(lines: Iterator[str], replies: TextIO) -> None:
    """Work through ``lines``; what goes wrong before the first record is said in one ``failed`` event."""

    def say(event: dict[str, Any]) -> None:
        with suppress(BrokenPipeError):
            replies.write(json.dumps(event) + "\n")
            replies.flush()

    request = json.loads(next(lines))
    threading.Thread(target=_leave_with, args=(request["parent"],), daemon=True).start()
    imported = False
    try:
        import wandb

        imported = True
        say({"event": "imported"})
        session = Session(wandb, request)
        say(session.open())
    except Exception as error:
        say({"event": "failed", "reason": f"{type(error).__name__}: {error}", "final": not imported})
        return
    for line in lines:
        message = json.loads(line)
        if "finish" in message:
            say(session.finish(message["finish"]))
            return
        session.take(message)
    session.finish(1)


def _leave_with(parent: int) -> None:
    """End this process soon after its parent, also out of a call of wandb that never returns."""
    while os.getppid() == parent:
        time.sleep(1)
    time.sleep(_ORPHAN_LIMIT_S)
    os._exit(1)


def main() -> None:
    """Keep the channels to ourselves: what wandb prints goes to the log file, and it gets no input to wait for."""
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, lambda number, frame: None)  # the trainer decides; its death is the end of the input
    lines = os.fdopen(os.dup(0), "r", encoding="utf-8")
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    with open(os.devnull, "rb") as nothing:  # noqa: PTH123
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    serve(iter(lines), replies)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
