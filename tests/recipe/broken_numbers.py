# ruff: noqa: E501  (a table: one case, one entry)
"""Broken recipes whose numbers no machine has, places that are none, and what a new user may come to write."""

from __future__ import annotations

from recipe_cases import Case, one, override, recipe

HUGE = 2**53
PIPELINE = "parallel: {pipeline_parallel: 2}"
MANY = "batch: {micro_batch_size: 1, global_batch_size: 1000000}"


def only(name: str, options: str = "", reducer: str = "") -> str:
    """Plugins without ``ddp``, and the last of them as given."""
    lines = ["plugins:", "  adamw: {lr: 1e-3}", f"  {reducer}" if reducer else "", f"  {name}: {options}  #!"]
    return "\n".join(line for line in lines if line)


def model(rest: str) -> str:
    return f"model: {{preset: llama-tiny, {rest}}}  #!"


def rope(rest: str) -> str:
    return model(
        f"rope_scaling: {{rope_type: llama3, low_freq_factor: 1, original_max_position_embeddings: 64, {rest}}}"
    )


# fmt: off
SIZES = [
    one(f"{name} of {HUGE}", f"model.{name}", "must be at most", "or less", model=model(f"{name}: {HUGE}"))
    for name in (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "head_dim", "max_position_embeddings",
    )
]
RANKS = [
    one(f"{name} of {HUGE}", f"parallel.{name}", "must be at most 1048576", "write 1048576 or less", parallel=f"parallel: {{{name}: {HUGE}}}  #!")
    for name in ("data_parallel", "data_parallel_shard", "data_parallel_replicate", "pipeline_parallel", "context_parallel", "tensor_parallel")
]
NUMBERS = [
    *SIZES,
    *RANKS,
    one("processes", "launch.processes", "must be at most 1048576", "or less", launch=f"launch: {{processes: {HUGE}}}  #!"),
    one("threads", "launch.threads_per_rank", "must be at most 4096", "or less", launch=f"launch: {{processes: 2, threads_per_rank: {HUGE}}}  #!"),
    one("samples", "batch.global_batch_size", "must be at most 2147483648", "or less", batch=f"batch: {{micro_batch_size: 1, global_batch_size: {HUGE}}}  #!"),
    one("tokens of a sample", "data.sequence_length", "must be at most", "or less", data=f"data: {{sequence_length: {HUGE}}}  #!"),
    one("a schedule of a million microbatches", "plugins.pipeline", "make 2000000 forwards, and a schedule has 262144 at most", "raise batch.micro_batch_size",
        batch=MANY, parallel=PIPELINE, plugins=only("pipeline", "{}")),
    one("a schedule of more stages than layers", "plugins.pipeline", "20000 stages, and the model has 4 layers", "lower parallel.pipeline_parallel",
        parallel=PIPELINE, plugins=only("pipeline", "{schedule: interleaved_1f1b, virtual_stages: 10000}")),
    one("times that add up to nothing", "plugins.pipeline.split.times", "all times are 0", "give measured times",
        parallel=PIPELINE, plugins=only("pipeline", "{split: {times: [0, 0, 0, 0]}}")),
    one("times that add up to infinity", "plugins.pipeline.split.times.0", "must be at most 1000000000000, got 1e+308", "or less",
        parallel=PIPELINE, plugins=only("pipeline", "{split: {times: [1e308, 1, 1, 1]}}")),
    one("a budget of infinity in bytes", "plugins.recompute.budget_gib", "must be at most 1048576, got 1e+300", "or less", plugins=only("recompute", "{budget_gib: 1e300}", "ddp: {}")),
    one("an offload of infinity in bytes", "plugins.recompute.offload_from_kib", "must be at most", "or less", plugins=only("recompute", "{mode: offload, offload_from_kib: 1e308}", "ddp: {}")),
    one("buckets of infinity in bytes", "plugins.ddp.bucket_size_mb", "must be at most 1048576", "or less", plugins=only("ddp", "{bucket_size_mb: 1e308}")),
    one("units of infinity in bytes", "plugins.zero.unit_size_mb", "must be at most 1048576", "or less", plugins=only("zero", "{stage: 3, unit_size_mb: 1e308}")),
    one("a history without end", "plugins.precision.fp8.history", "must be at most 65536", "or less", plugins=only("precision", "{compute: fp8, fp8: {scaling: delayed, history: 9223372036854775808}}", "ddp: {}")),
    one("a negative seed", "seed", "must be at least 0, got -1", "write 0 or more", seed="seed: -1  #!"),
    one("an open bound", "plugins.clip.max_norm", "must be greater than 0, got 0", "write a number above 0", plugins=only("clip", "{max_norm: 0}", "ddp: {}")),
    one("an upper bound", "plugins.zero.prefetch", "must be at most 8, got 9", "write 8 or less", plugins=only("zero", "{stage: 3, prefetch: 9}")),
    one("a text that is no number", "plugins.adamw.lr", "must be a number, got 'nan'", "write a number", plugins="plugins:\n  ddp: {}\n  adamw: {lr: nan}  #!"),
    one("a number for a switch", "model.tie_word_embeddings", "must be true or false, got 1", "write true or false", model=model("tie_word_embeddings: 1")),
    one("a mapping for a list", "plugins.adamw.betas", "must be a list, got a mapping", "in brackets", plugins="plugins:\n  ddp: {}\n  adamw: {lr: 1, betas: {a: 1}}  #!"),
    one("a version in quotes", "schema_version", "must be 1, got '1'", "write 1", schema_version="schema_version: '1'  #!"),
    one("a word for a mapping", "data.validation", "must be a mapping, got 'python-docs'", "write a mapping", data="data: {sequence_length: 64, validation: python-docs}  #!"),
    one("an empty text", "plugins.wandb.tags.0", "must have at least 1 character(s), got 0", "at least 1", plugins=only("wandb", "{tags: ['']}", "ddp: {}")),
    one("a factor that is a mapping", "model.rope_scaling.factor", "a positive number, got a mapping", "factor: 8.0", model=rope("factor: {a: 1}, high_freq_factor: 4")),
    one("a factor that shortens", "model.rope_scaling.factor", "a factor of 0.5 would shorten", "1 or more", model=rope("factor: 0.5, high_freq_factor: 4")),
    one("frequencies the wrong way round", "model.rope_scaling.high_freq_factor", "must be above low_freq_factor", "raise it", model=rope("factor: 8, high_freq_factor: 1")),
    one("a warm-up that outlasts the tokens", "plugins.lr_schedule.warmup_steps", "a warm-up of 99 steps does not end within the run's 20 steps", "below 20",
        training="training: {max_tokens: 10240}", plugins=only("lr_schedule", "{warmup_steps: 99}", "ddp: {}")),
    one("checkpoints that outlast the tokens", "plugins.checkpoint.every_steps", "every_steps is 99, training ends after 20", "20 or less",
        training="training: {max_tokens: 10240}", plugins=only("checkpoint", "{every_steps: 99, save_at_end: false}", "ddp: {}")),
    one("CUDA graphs of torch's own on a CPU", "plugins.compile.backend", "this run is on a CPU", "backend=inductor", plugins=only("compile", "{backend: cudagraphs}", "ddp: {}")),
]

LONG = "x" * 5000
PLACES = [
    one("a path that is too long", "data.train.files.0", "there is no such file", "correct the path", data=f"data: {{train: {{files: [{LONG}]}}}}  #!"),
    one("a checkpoint whose path is too long", "plugins.checkpoint.resume", "there is no folder xxx", "step_N", plugins=only("checkpoint", f"{{resume: {LONG}}}", "ddp: {}")),
    one("a control character in a list", "data.train.files.0", "control characters", "remove them", data='data: {train: {files: ["a\\0"]}}  #!'),
    one("a file for the runs", "run.root", "'recipe.yaml' is a file, and a folder is to be there", "another place", extra="run: {root: recipe.yaml}  #!"),
    one("a file for the run", "run.dir", "'recipe.yaml' is a file", "another place", extra="run: {dir: recipe.yaml}  #!"),
    one("a file for the cache", "data.cache_dir", "'recipe.yaml' is a file", "another place", data="data: {sequence_length: 64, cache_dir: recipe.yaml}  #!"),
    one("a file for compiled code", "plugins.compile.cache_dir", "recipe.yaml is no folder", "name a folder", plugins=only("compile", "{cache_dir: recipe.yaml}", "ddp: {}")),
    one("no place at all", "run.dir", "must have at least 1 character(s), got 0", "remove the key", extra="run: {dir: ''}  #!"),
    one("a table without a name", "plugins.pipeline.table", "'' cannot be read", "CSV file", parallel=PIPELINE, plugins=only("pipeline", "{table: ''}")),
    one("a table that is a folder", "plugins.pipeline.table", "'.' cannot be read: Is a directory", "CSV file", parallel=PIPELINE, plugins=only("pipeline", "{table: .}")),
    one("a tokenizer that is a folder", "tokenizer.path", "cannot be read: Is a directory", "tokenizer.json", tokenizer="tokenizer: {type: file, path: .}  #!"),
    override("NaN", "plugins.adamw.lr=.nan", "plugins.adamw.lr", "not a finite number", "give a finite number"),
    override("an item of a list that there is not", "plugins.recompute.layers.0=9", "plugins.recompute.layers", "must be a list, got a mapping", "in brackets"),
    override("a layer that there is not", "plugins.recompute.layers=[0,99]", "plugins.recompute.layers.1", "have no layer 99", "number layers"),
    Case("two that cannot be together and a third", recipe(plugins="plugins:\n  ddp: {}\n  adamw: {lr: 1e-3}\n  recompute: {layers: [7]}  #!\n  compile: {backend: nope}  #!\n  clip: {max_norm: 1.0}"),
         (("plugins.recompute.layers.0", "have no layer 7", ""), ("plugins.compile.backend", "knows no backend 'nope'", ""))),
]

CASES = [*NUMBERS, *PLACES]
