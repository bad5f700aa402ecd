# ruff: noqa: E501  (a table: one case, one entry)
"""Broken recipes that name modules, layers or backends which the built-in decoder, or torch, does not have."""

from __future__ import annotations

from recipe_cases import Case, one, recipe

ANYWHERE = ("--world-size", "2")
TENSOR = "parallel: {tensor_parallel: 2}"
PIPELINE = "parallel: {pipeline_parallel: 2}"


def plugin(text: str, optimizer: str = "adamw: {lr: 1e-3}", reducer: str = "ddp: {}") -> str:
    lines = [f"  {line}" for line in (reducer, optimizer, *text.split("\n")) if line]
    return "\n".join(["plugins:", *lines])


def elsewhere(name: str, key: str, message: str, fix: str, /, **sections: str) -> Case:
    """A case of a recipe for a machine that is not this one."""
    return Case(name, recipe(**sections), ((key, message, fix),), options=ANYWHERE)


# fmt: off
CASES = [
    one("recompute of modules that there are not", "plugins.recompute.modules.1", "no module is called 'model.layer.*'; there are, for example, model, ", "named_modules()",
        plugins=plugin("recompute:\n    mode: full\n    modules:\n    - model.layers.*.mlp\n    - model.layer.*  #!")),
    one("recompute of a layer too many", "plugins.recompute.layers.2", "have no layer 4; they are 0 to 3", "number layers from 0",
        plugins=plugin("recompute:\n    layers:\n    - 0\n    - 3\n    - 4  #!")),
    one("recompute of layers of modules without any", "plugins.recompute.layers.0", "have no layer 1; they are without numbers", "leave layers out",
        plugins=plugin("recompute:\n    modules: [model.norm]\n    layers: [1]  #!")),
    one("recompute of no layer", "plugins.recompute.every", "none of the modules chosen is in a layer whose number it divides", "remove every",
        plugins=plugin("recompute:\n    layers: [1, 3]\n    every: 2  #!")),
    one("recompute along a pipeline", "plugins.recompute.layers.0", "have no layer 9; they are 0 to 3", "number layers",
        parallel=PIPELINE, plugins=plugin("pipeline: {}\nrecompute: {layers: [9]}  #!", reducer="")),
    one("compiled modules that there are not", "plugins.compile.modules.0", "the pattern 'layers.*' matches no module", "model.layers.*",
        plugins=plugin("compile: {backend: eager, modules: [layers.*]}  #!")),
    one("compiled modules inside of others", "plugins.compile.modules", "'model.layers.2.mlp' is inside of 'model.layers.2'", "choose one",
        plugins=plugin("compile:\n    backend: eager\n    modules: [model.layers.2, model.layers.*.mlp]  #!")),
    one("the list of the layers, which nobody calls", "plugins.compile.modules.0", "the pattern 'model.layers' matches no module", "model.layers.*",
        plugins=plugin("compile: {backend: eager, modules: [model.layers]}  #!")),
    one("the list of the layers, to be recomputed", "plugins.recompute.modules.0", "no module is called 'model.layers'", "any one level",
        plugins=plugin("recompute: {modules: [model.layers]}  #!")),
    one("a backend of torch's own tools", "plugins.compile.backend", "no backend 'dynamo_minifier_backend'", "remove it",
        plugins=plugin("compile: {backend: dynamo_minifier_backend}  #!")),
    one("a backend of nobody", "plugins.compile.backend", "torch knows no backend 'inducto'; there are: aot_eager, ", "remove it for inductor",
        plugins=plugin("compile: {backend: inducto}  #!")),
    one("a backend whose package is missing", "plugins.compile.backend", "needs the package tvm", "install it",
        plugins=plugin("compile: {backend: tvm}  #!")),
    one("a mode of nobody", "plugins.compile.mode", "must be 'default' or 'max-autotune-no-cudagraphs', got 'reduce-overhead'", "write 'default'",
        plugins=plugin("compile: {mode: reduce-overhead}  #!")),
    one("compiling one step", "plugins.compile", "the run has one step, which is never compiled", "lengthen the run",
        training="training: {max_steps: 1}", plugins=plugin("compile: {backend: eager}  #!")),
    one("units that there are not", "plugins.zero.units.0", "the pattern 'layers.*' matches no module that holds parameters", "one level",
        plugins=plugin("", reducer="zero: {stage: 3, units: [layers.*]}  #!")),
    one("a unit without parameters", "plugins.zero.units.1", "'model.rotary_emb' matches no module that holds parameters", "model.layers.*",
        plugins=plugin("", reducer="zero:\n    stage: 3\n    units:\n    - model.layers.*\n    - model.rotary_emb  #!")),
    one("units inside of what is compiled", "plugins.zero.units", "'model.layers.0.mlp' is a unit inside of 'model.layers.0'", "whole layers",
        plugins=plugin("compile: {backend: eager}", reducer="zero: {stage: 3, units: [model.layers.*.mlp]}  #!")),
    one("layers inside of what is compiled", "plugins.zero.units", "'model.layers.0' is a unit inside of 'model'", "compile smaller modules",
        plugins=plugin("compile: {backend: eager, modules: [model]}", reducer="zero: {stage: 3}  #!")),
    one("matrices that there are not", "plugins.muon.exclude.0", "'lm_heads*' matches no parameter", "'lm_head.weight' is one of the names",
        plugins=plugin("", optimizer="muon: {lr: 0.01, exclude: [lm_heads*]}  #!")),
    one("no matrix", "plugins.muon.exclude", "no hidden matrix is left", "exclude less",
        plugins=plugin("", optimizer="muon: {lr: 0.01, exclude: ['*']}  #!")),
    elsewhere("fp8 with what there is not kept out", "plugins.precision.fp8.keep.0", "no linear layer is called 'head'", "correct or remove it",
              plugins=plugin("precision: {compute: fp8, fp8: {keep: [head]}}  #!")),
    elsewhere("fp8 with everything kept out", "plugins.precision.fp8.keep", "no linear layer is left for fp8, of 29", "compute=bf16",
              plugins=plugin("precision: {compute: fp8, fp8: {keep: ['*']}}  #!")),
    elsewhere("fp8 in two layers", "plugins.precision.fp8.keep", "no linear layer is left for fp8, of 15", "compute=bf16",
              model="model: {preset: llama-tiny, num_hidden_layers: 2}", plugins=plugin("precision: {compute: fp8}  #!")),
    elsewhere("fp8 of uneven sizes", "plugins.precision.fp8.keep", "'model.layers.1.mlp.gate_proj' has 128 inputs and 40 outputs, and fp8 needs multiples of 16", "keep it out",
              model="model: {preset: llama-tiny, intermediate_size: 40}", plugins=plugin("precision: {compute: fp8}  #!")),
    one("styles of modules that there are not", "plugins.tensor_parallel.plan.model.layers.*.mpl", "no module of the model matches 'model.layers.*.mpl'", "correct or remove",
        parallel=TENSOR, plugins=plugin("tensor_parallel:\n    plan:\n      lm_head: logits\n      model.layers.*.mpl: region  #!", reducer="")),
    one("a style of nobody", "plugins.tensor_parallel.plan.loss", "there is no style 'losses'", "use one of region",
        parallel=TENSOR, plugins=plugin("tensor_parallel:\n    plan:\n      loss: losses  #!", reducer="")),
    one("logits without a loss", "plugins.tensor_parallel.plan", "has the style logits, and none has loss", "cross-entropy",
        parallel=TENSOR, plugins=plugin("tensor_parallel:\n    plan:  #!\n      loss: outer", reducer="")),
    one("parameters in a region without a style", "plugins.tensor_parallel.plan", "'model.norm' has parameters (weight) in a region", "inner if it sees",
        parallel=TENSOR, plugins=plugin("tensor_parallel:\n    plan: {model.norm: region}  #!", reducer="")),
    one("tokens that are never divided", "plugins.tensor_parallel.plan", "no module has the style logits or loss", "sequence_parallel=false",
        parallel=TENSOR, plugins=plugin("tensor_parallel:\n    sequence_parallel: true\n    plan: {lm_head: outer, loss: outer}  #!", reducer=""),
        model="model: {preset: llama-tiny, tie_word_embeddings: false}"),
    one("one parameter that is divided in two ways", "plugins.tensor_parallel.plan", "are one parameter, and the plan divides them differently", "embedding and logits",
        parallel=TENSOR, plugins=plugin("tensor_parallel:\n    plan: {model.embed_tokens: outer}  #!", reducer="")),
    one("units of features that are not whole", "plugins.tensor_parallel.plan", "384 features, which are not whole units of 5", "correct the style",
        parallel=TENSOR, plugins=plugin("tensor_parallel:\n    plan: {'*.down_proj': 'row:5'}  #!", reducer="")),
    one("fewer features than ranks", "parallel.tensor_parallel", "the 3 features of 'model.layers.0.mlp.gate_proj.weight' cannot be divided over 4 ranks", "set it to one of 1, 3",
        parallel="parallel: {tensor_parallel: 4}  #!", launch="launch: {processes: 4}", plugins=plugin("tensor_parallel: {}", reducer=""),
        model="model: {preset: llama-tiny, intermediate_size: 3, num_key_value_heads: 4}"),
]
