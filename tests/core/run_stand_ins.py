"""Stand-ins that several tests of a run need: a plugin that raises, a stop signal that was given."""

from camshaft.plugin import Plugin, hookimpl


class Raises(Plugin):
    def __init__(self, error):
        super().__init__()
        self.error = error

    @hookimpl
    def pre_forward(self):
        raise self.error


class Asked:
    requested = 1
