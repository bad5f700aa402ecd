"""A plugin that only these tests install: ``TorchStorage`` with nothing around it."""

from importlib.metadata import EntryPoint

import camshaft

GROUP = "camshaft.plugins"


class Options(camshaft.Options):
    keep: bool = False
    reduce: str = "each"


class Plugin(camshaft.Plugin):
    Options = Options

    @camshaft.hookimpl
    def plan(self):
        resources = ("parameter.layout", "gradient.layout", "gradient.reduce", "optimizer.layout")
        return camshaft.Plan(
            claims=tuple(camshaft.Claim(resource, "dp") for resource in resources),
            provides=("parameter_sums",),
        )

    @camshaft.hookimpl
    def shard_storage(self, world, model):
        from camshaft_zero.fully_shard import TorchStorage

        options = self.options
        self.storage = TorchStorage(world, model, reshard_after_forward=not options.keep, reduce=options.reduce)

    @camshaft.hookimpl
    def materialize(self, world, model):
        self.storage.materialize(world, model)

    @camshaft.hookimpl
    def around_forward(self, state, call):
        return self.storage.around_forward(state, call)

    @camshaft.hookimpl
    def reduce(self):
        self.storage.reduce()


POINT = EntryPoint("torch_zero", "torch_zero_plugin:Plugin", GROUP)
