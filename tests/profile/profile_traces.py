"""Traces written by hand, in the format of torch's profiler."""

from camshaft.profiling.trace import parse


class Writer:
    """Collects events; times are microseconds."""

    def __init__(self):
        self.events = []
        self._number = 0

    def host(self, name, start, end, thread=1, kind="cpu_op", **args):
        self._number += 1
        self.events.append(
            {
                "ph": "X", "cat": kind, "name": name, "pid": 9, "tid": thread, "ts": start, "dur": end - start,
                "args": {"External id": self._number, **args},
            }
        )  # fmt: skip
        return self._number

    def range(self, name, start, end, thread=1):
        return self.host(name, start, end, thread, kind="user_annotation")

    def kernel(self, name, start, end, stream, launcher=None, kind="kernel"):
        self.events.append(
            {
                "ph": "X", "cat": kind, "name": name, "pid": 0, "tid": stream, "ts": start, "dur": end - start,
                "args": {"stream": stream, **({} if launcher is None else {"External id": launcher})},
            }
        )  # fmt: skip

    def memory(self, time, address, size, total=0, device=0, thread=1):
        self.events.append(
            {
                "ph": "i", "cat": "cpu_instant_event", "s": "t", "name": "[memory]",
                "pid": 9, "tid": thread, "ts": time,
                "args": {"Addr": address, "Bytes": size, "Total Allocated": total, "Device Type": device},
            }
        )  # fmt: skip

    @property
    def document(self):
        return {"traceEvents": self.events}

    def trace(self):
        return parse(self.document)
