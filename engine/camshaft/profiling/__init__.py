"""``camshaft profile``: one window of a run in a trace, and what the trace says.

``recording`` puts ranges into the steps of a run and makes the trace; everything else reads a trace (Chrome's JSON
format, as torch's profiler writes it) and needs no torch: ``trace`` its slices and their nesting, ``times`` time by
operation, ``exposed`` communication that no computation hides, ``memory`` the bytes held over the window and whose
they are. ``report`` puts the findings into words.

A plugin that wants a range of its own in the trace opens a ``torch.profiler.record_function``; it is listed in the
report, and costs nothing while nobody profiles but the microsecond of the call.
"""
