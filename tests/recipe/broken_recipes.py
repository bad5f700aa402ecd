"""The table of broken recipes: what is wrong, and what the message must say.

A case changes sections of a good recipe. Lines marked ``#!`` are where a problem must be reported, one for each entry
of ``expect`` and in the same order; an entry is (key, piece of the message, piece of the fix).
"""

from __future__ import annotations

from dataclasses import dataclass, field

GOOD = {
    "schema_version": "schema_version: 1",
    "name": "name: good",
    "model": "model: {preset: llama-tiny}",
    "tokenizer": "tokenizer: {type: byte}",
    "data": "data: {train: python-docs, sequence_length: 64}",
    "batch": "batch: {micro_batch_size: 2, global_batch_size: 8}",
    "training": "training: {max_steps: 5}",
    "launch": "launch: {processes: 2}",
    "plugins": "plugins:\n  ddp: {}\n  adamw: {lr: 1e-3}",
}


def recipe(**sections: str) -> str:
    """The good recipe with some sections replaced, added or (empty text) left out."""
    return "\n".join(text for text in {**GOOD, **sections}.values() if text) + "\n"


@dataclass(frozen=True)
class Case:
    name: str
    text: str | bytes
    expect: tuple[tuple[str, str, str], ...]
    overrides: tuple[str, ...] = ()
    environ: dict[str, str] = field(default_factory=dict)
    options: tuple[str, ...] = ()


def one(name: str, key: str, message: str, fix: str = "", /, *, text: str | bytes = "", **sections: str) -> Case:
    """A case with one problem, in a section that is changed."""
    return Case(name, text or recipe(**sections), ((key, message, fix),))


def override(name: str, text: str, key: str, message: str, fix: str = "") -> Case:
    """A case with one problem, in an override of the good recipe."""
    return Case(name, recipe(), ((key, message, fix),), overrides=(text,))


def data(rest: str) -> str:
    return f"data: {{sequence_length: 64, {rest}}}  #!"


TYPES = [
    one(
        "text for a number",
        "training.max_steps",
        "whole number, got 'many'",
        training="training: {max_steps: many}  #!",
    ),
    one(
        "quoted 1e-4",
        "plugins.adamw.lr",
        "must be a number, got '1e-4'",
        "remove the quotes: write 1e-4",
        plugins="plugins:\n  ddp: {}\n  adamw: {lr: '1e-4'}  #!",
    ),
    one("1e3 steps", "training.max_steps", "got 1000.0", "write 1000", training="training: {max_steps: 1e3}  #!"),
    one("half a step", "training.max_steps", "whole number, got 0.5", training="training: {max_steps: 0.5}  #!"),
    one("no is a text", "data.pack", "true or false, got 'no'", "write false", data=data("pack: no")),
    one("on is a text", "data.pack", "true or false, got 'on'", "write true", data=data("pack: on")),
    one(
        "010 is ten",
        "batch.global_batch_size",
        "global_batch_size 10",
        "set it to 8 or 12",
        batch="batch:\n  micro_batch_size: 2\n  global_batch_size: 010  #!",
    ),
    one(
        "0o10 is eight",
        "training.max_steps",
        "must be at most",
        training="training: {max_steps: 0o777777777777777777777}  #!",
    ),
    one("thousands", "training.max_steps", "got '1_000'", "write 1000", training="training: {max_steps: 1_000}  #!"),
    one("sexagesimal is a text", "training.max_steps", "got '12:30'", training="training: {max_steps: 12:30}  #!"),
    one(
        "true for a number", "training.max_steps", "whole number, got true", training="training: {max_steps: true}  #!"
    ),
    one("null where none may be", "data.pack", "got null", "remove the key", data=data("pack: null")),
    one("a number for a text", "name", "must be a text, got 7", "quotes", name="name: 7  #!"),
    one(
        "zero",
        "batch.micro_batch_size",
        "at least 1, got 0",
        batch="batch: {micro_batch_size: 0, global_batch_size: 8}  #!",
    ),
    one("negative", "training.log_every", "at least 1, got -1", training="training: {max_steps: 5, log_every: -1}  #!"),
    one("fraction of one", "data.validation_fraction", "less than 1, got 1.0", data=data("validation_fraction: 1.0")),
    one("a list for a section", "training", "must be a mapping, got a list of 2", training="training: [1, 2]  #!"),
    one("a text for a section", "model", "must be a mapping, got 'llama-tiny'", model="model: llama-tiny  #!"),
    one("a mapping for a number", "seed", "got a mapping", seed="seed: {value: 1}  #!"),
    one("future schema", "schema_version", "must be 1, got 2", schema_version="schema_version: 2  #!"),
    one(
        "wrong choice",
        "launch.launcher",
        "got 'deepsped'",
        "did you mean 'deepspeed'",
        launch="launch: {launcher: deepsped}  #!",
    ),
    one(
        "wrong corpus",
        "data.train",
        "or a mapping, got 'python-doc'",
        "did you mean 'python-docs'",
        data="data:\n  train: python-doc  #!",
    ),
    one(
        "union of number and word",
        "parallel.data_parallel",
        "a whole number or 'auto', got 'aut'",
        "did you mean 'auto'",
        parallel="parallel: {data_parallel: aut}  #!",
    ),
    one(
        "union out of bounds",
        "parallel.data_parallel",
        "at least 1, got 0",
        parallel="parallel: {data_parallel: 0}  #!",
    ),
    one("empty blend", "data.train.blend", "at least 1 item(s), got 0", data="data: {train: {blend: []}}  #!"),
    one(
        "list of pairs",
        "plugins.adamw.betas",
        "must be a list, got 0.9",
        plugins="plugins:\n  ddp: {}\n  adamw: {lr: 1, betas: 0.9}  #!",
    ),
    one(
        "not a number",
        "plugins.adamw.lr",
        "not a finite number",
        plugins="plugins:\n  ddp: {}\n  adamw: {lr: .nan}  #!",
    ),
    one("infinite", "plugins.adamw.lr", "not a finite number", plugins="plugins:\n  ddp: {}\n  adamw: {lr: 1e999}  #!"),
    one("endless number", "seed", "a number of 5000 characters", seed=f"seed: {'9' * 5000}  #!"),
]

KEYS = [
    one("unknown at the root", "trainings", "Did you mean 'training'?", "write 'training'",
        training="training: {max_steps: 5}", extra="trainings: {}  #!"),
    one("misspelt in a section", "training.max_setps", "Did you mean 'max_steps'?", training="training: {max_setps: 5}  #!"),
    one("misspelt and required", "batch.micro_batch_sise", "Did you mean 'micro_batch_size'?",
        batch="batch: {micro_batch_sise: 2, global_batch_size: 8}  #!"),
    one("misspelt in a plugin", "plugins.adamw.weigth_decay", "Did you mean 'weight_decay'?",
        plugins="plugins:\n  ddp: {}\n  adamw: {lr: 1, weigth_decay: 0.1}  #!"),
    one("misspelt in a blend", "data.train.blend.1.wieght", "Did you mean 'weight'?",
        data="data:\n  train:\n    blend:\n      - {prefix: a}\n      - prefix: b\n        wieght: 2  #!"),
    one("misspelt form of data", "data.train.file", "Did you mean 'files'?", data="data:\n  train:\n    file: [a.txt]  #!"),
    one("of another section", "model.max_steps", "it belongs to 'training'", "set training.max_steps",
        model="model: {preset: llama-tiny, max_steps: 5}  #!"),
    one("of a plugin", "training.lr", "it belongs to 'plugins.adamw'", "set plugins.adamw.lr",
        training="training:\n  max_steps: 5\n  lr: 1e-3  #!"),
    one("a section inside another", "model.batch", "it belongs to 'the root of the recipe'", "set batch",
        model="model: {preset: llama-tiny, batch: {}}  #!"),
    one("a plugin at the root", "adamw", "it belongs to 'plugins'", "set plugins.adamw", extra="adamw: {lr: 1}  #!"),
    one("nothing like it", "training.zzzzqqqq", "unknown key 'zzzzqqqq'", "keys of training: max_steps",
        training="training: {max_steps: 5, zzzzqqqq: 1}  #!"),
    one("missing section", "batch", "a required key is missing", "add 'batch: ...'", batch="", schema_version="schema_version: 1  #!"),
    one("missing key", "batch.global_batch_size", "a required key is missing", "under 'batch'", batch="batch: {micro_batch_size: 2}  #!"),
    one("duplicate key", "training", "'training' is given twice, first in line 7", "remove one", extra="training: {max_steps: 6}  #!"),
    one("duplicate in a plugin", "plugins.adamw.lr", "given twice, first in line 12",
        plugins="plugins:\n  ddp: {}\n  adamw:\n    lr: 1\n    lr: 2  #!"),
    one("a number as a key", "model", "the key '3' is not a text", "quotes", model="model: {preset: llama-tiny, 3: 4}  #!"),
    one("a list as a key", "model", "a key must be a text", model="model: {preset: llama-tiny, [1]: 4}  #!"),
    one("no as a key", "model.no", "unknown key 'no'", model="model: {preset: llama-tiny, no: 4}  #!"),
    one("merge key", "model", "merge key '<<'", "extends", model="model: {preset: llama-tiny, <<: {}}  #!"),
    one("a key that is very long", "model." + "k" * 500, "unknown key 'kkk", model=f"model: {{preset: llama-tiny, {'k' * 500}: 1}}  #!"),
]  # fmt: skip

YAML = [
    one("alias", "model.preset", "alias", "extends", text=recipe(name="name: &n good", model="model: {preset: *n}")),
    one("tag", "seed", "a tag", "remove the tag", seed="seed: !!python/object/apply:os.system [ls]  #!"),
    one("local tag", "name", "a tag", name="name: !env good  #!"),
    one("two documents", "", "more than one YAML document", text=recipe() + "---  #!\nname: x\n"),
    one("tab", "", "a tab where YAML allows only spaces", "indent with spaces", training="training:\n\tmax_steps: 5  #!"),
    one("open bracket", "", "not valid YAML", "brackets", text=recipe() + "run: {root: x  #!\n"),
    one("open quote", "", "not valid YAML", extra='run: {root: "x}  #!'),
    one("no mapping", "", "not a mapping of keys to values", text="- 1  #!\n"),
    one("not UTF-8", "", "not UTF-8 text", "save the file as UTF-8", text=recipe().encode() + b"run: {root: '\xff'}  #!\n"),
    one("control character", "", "control character", text=recipe() + "run: {root: 'a\x00'}  #!\n"),
    one("escaped control character", "run.root", "control characters", extra='run: {root: "a\\0"}  #!'),
    one("half a surrogate pair", "run.root", "surrogate", extra='run: {root: "\\ud800"}  #!'),
    one("deep nesting", "", "deeper than 32 levels", "flatten", text=recipe() + f"run: {'[' * 40}{']' * 40}  #!\n"),
    one("deep block nesting", "", "deeper than 32 levels",
        text=recipe() + "run:\n" + "".join(f"{' ' * n}a:{'  #!' if n == 32 else ''}\n" for n in range(1, 300))),
    one("huge", "", "larger than 1 MiB", text="#!" + "x" * (1 << 20) + "\n" + recipe()),
    one("alias bomb", "", "", text="#"),
]  # fmt: skip
YAML[0] = Case(
    "alias",
    recipe(name="name: &n good  #!", model="model: {preset: *n}  #!"),
    (("name", "an anchor", "extends"), ("model.preset", "an alias", "extends")),
)
YAML[-1] = Case(
    "alias bomb",
    recipe(extra="run:\n  root: &a [1]  #!\n  dir: &b [*a, *a]  #!#!#!"),
    (
        ("run.root", "an anchor", ""), ("run.dir.0", "an alias", ""), ("run.dir.1", "an alias", ""),
        ("run.dir", "an anchor", ""),
    ),
)  # fmt: skip

PLUGINS = [
    one("unknown plugin", "plugins.adamv", "Did you mean 'adamw'?", "use 'adamw'",
        plugins="plugins:\n  ddp: {}\n  adamw: {lr: 1}\n  adamv: {}  #!"),
    one("plugin of nobody", "plugins.qqqqzzzz", "is installed (installed: ", "install a package",
        plugins="plugins:\n  ddp: {}\n  adamw: {lr: 1}\n  qqqqzzzz: {}  #!"),
    one("unknown plugin switched off", "plugins.dpd", "Did you mean 'ddp'?",
        plugins="plugins:\n  ddp: {}\n  adamw: {lr: 1}\n  dpd: null  #!"),
    one("a list of plugins", "plugins", "must be a mapping of plugins", plugins="plugins: [ddp, adamw]  #!"),
    one("a switch for a plugin", "plugins.ddp", "must be a mapping of the plugin's options, got true", "'ddp: {}'",
        plugins="plugins:\n  ddp: true  #!\n  adamw: {lr: 1}"),
    one("no optimizer", "plugins", "no plugin owns the slot 'optimizer'", "adamw", plugins="plugins:  #!\n  ddp: {}"),
    one("no plugins at all", "plugins", "no plugin owns the slot 'optimizer'", "adamw",
        plugins="plugins:  #!", launch="launch: {processes: 1}"),
    one("two owners of a slot", "plugins.sgd", "'adamw' and 'sgd' both own the slot 'optimizer'", "plugins.sgd=null",
        plugins="plugins:\n  ddp: {}\n  adamw: {lr: 1}\n  sgd: {lr: 1}  #!"),
    one("two plugins on one claim", "plugins.other_layout", "'ddp' and 'other_layout' both claim gradient.reduce@dp",
        "plugins.other_layout=null", plugins="plugins:\n  ddp: {}\n  adamw: {lr: 1}\n  other_layout: {}  #!"),
    one("an axis without a plugin", "parallel.data_parallel", "axis 'dp' has degree 2", "plugins.ddp",
        plugins="plugins:\n  adamw: {lr: 1}", parallel="parallel:\n  data_parallel: 2  #!"),
    one("a tensor axis without a plugin", "parallel.tensor_parallel", "axis 'tp' has degree 2",
        "set parallel.tensor_parallel=1", parallel="parallel: {tensor_parallel: 2}  #!", launch="launch: {processes: 4}"),
    one("a fancy section", "plugins.fancy.required_text", "required key is missing", "under 'plugins.fancy'",
        plugins="plugins:\n  ddp: {}\n  adamw: {lr: 1}\n  fancy: {}  #!"),
    one("nested option", "plugins.fancy.inner.rato", "Did you mean 'ratio'?",
        plugins="plugins:\n  ddp: {}\n  adamw: {lr: 1}\n  fancy:\n    required_text: x\n    inner: {rato: 1}  #!"),
    one("one number of a pair", "plugins.fancy.pair.1", "must be a number, got 'x'",
        plugins="plugins:\n  ddp: {}\n  adamw: {lr: 1}\n  fancy: {required_text: x, pair: [0.9, x]}  #!"),
    one("half a pair", "plugins.fancy.pair", "too few items: 1",
        plugins="plugins:\n  ddp: {}\n  adamw: {lr: 1}\n  fancy: {required_text: x, pair: [0.9]}  #!"),
    Case("needs and faults", recipe(plugins="plugins:\n  ddp: {}\n  adamw: {lr: 1}\n  needy: {}  #!#!"),
         (("plugins.needy", "needs 3 things", "bring them"),
          ("plugins.needy", "needs 'elementwise_magic', which no", "or remove 'needy'"))),
]  # fmt: skip

SIZES = [
    one("global batch does not divide", "batch.global_batch_size", "10 is not micro 2 x accumulation x 2 batch-parallel",
        "8 or 12", batch="batch: {micro_batch_size: 2, global_batch_size: 10}  #!"),
    one("asserted accumulation", "batch.gradient_accumulation_steps",
        "micro 2 x accumulation 4 x 2 batch-parallel rank(s) = 16, but global_batch_size is 8", "set it to 2",
        batch="batch:\n  micro_batch_size: 2\n  global_batch_size: 8\n  gradient_accumulation_steps: 4  #!"),
    one("micro above global", "batch.global_batch_size", "is not micro 16", "set it to 32",
        batch="batch: {micro_batch_size: 16, global_batch_size: 8}  #!"),
    one("micro does not divide, processes open", "batch.global_batch_size", "is not micro 3", "6 or 9",
        batch="batch: {micro_batch_size: 3, global_batch_size: 8}  #!", launch=""),
    one("degrees against processes", "parallel", "3 processes cannot be divided by", "multiple of 2",
        parallel="parallel: {tensor_parallel: 2}  #!", launch="launch: {processes: 3}"),
    one("data parallel against processes", "parallel", "dp 4 x", "start 4 processes",
        parallel="parallel: {data_parallel: 4}  #!"),
    one("no end", "training", "a run needs an end", "set one of max_steps", training="training: {log_every: 5}  #!"),
    one("no end, no section", "training", "a run needs an end", training="", schema_version="schema_version: 1  #!"),
    one("two ends", "training.max_tokens", "max_steps and max_tokens are both given", "keep one",
        training="training:\n  max_steps: 5\n  max_tokens: 1000  #!"),
    one("heads do not divide", "model.num_attention_heads", "", "",
        model="model:\n  preset: llama-tiny\n  num_attention_heads: 7  #!\n  num_key_value_heads: 1"),
    one("unknown preset", "model.preset", "llama-tiny", "", model="model: {preset: llama-tiney}  #!"),
    one("sequence too long", "data.sequence_length", "samples of 65536 tokens, but the model has", "shorten",
        data="data: {sequence_length: 65536}  #!"),
    Case("world size on the command line", recipe(parallel="parallel: {data_parallel: 2}  #!"),
         (("parallel", "but the run has 3 process(es)", "start 2"),), options=("--world-size", "3")),
]  # fmt: skip

NAMES = [
    one(f"name {text}", "name", message, name=f"name: {text}  #!")
    for text, message in {
        "../../etc": "folder of the output root",
        "a/b": "folder of the output root",
        ".hidden": "cannot start with a dot",
        "..": "cannot start with a dot",
        "'a\\b'": "folder of the output root",
        "a b": "folder of the output root",
        "'name\n\n  two'": "folder of the output root",
        "x" * 65: "1 to 64",
        "''": "1 to 64",
        "con": "on every system",
        "NUL.txt": "on every system",
        "Com1": "on every system",
        "dot.": "on every system",
        "ünder": "folder of the output root",
    }.items()
]
NAMES[6] = one("name with a line break", "name", "folder of the output root", name='name: "a\\nb"  #!')

HIDDEN = "Xq7fVerySecretValue"
SECRETS = [
    one("api key", "plugins.fancy.api_key", "named like a secret", "environment variable",
        plugins=f"plugins:\n  ddp: {{}}\n  adamw: {{lr: 1}}\n  fancy:\n    required_text: x\n    api_key: {HIDDEN}  #!"),
    one("token at the root", "hf_token", "named like a secret", extra=f"hf_token: {HIDDEN}  #!"),
    one("camel case", "run.authToken", "named like a secret", extra=f"run: {{authToken: {HIDDEN}}}  #!"),
    one("deep inside", "model.rope_scaling.client_secret", "named like a secret",
        model=f"model: {{preset: llama-tiny, rope_scaling: {{client_secret: {HIDDEN}}}}}  #!"),
    one("password in a list", "data.train.blend.0.password", "named like a secret",
        data=f"data:\n  train:\n    blend:\n    - prefix: x\n      password: {HIDDEN}  #!"),
    one("secret as wrong type", "plugins.password", "named like a secret",
        plugins=f"plugins:\n  ddp: {{}}\n  adamw: {{lr: 1}}\n  password: {HIDDEN}  #!"),
    one("URL with a user", "run.root", "URL with user information", extra=f"run: {{root: 'https://me:{HIDDEN}@host/x'}}  #!"),
    one("URL with a token in its query", "run.root", "secret in its query", extra=f"run: {{root: 'https://h/x?access_token={HIDDEN}'}}  #!"),
    one("known form of a key", "run.root", "known kind of access key", extra=f"run: {{root: hf_{HIDDEN * 2}}}  #!"),
    one("secret from the environment", "run.root", "'WANDB_API_KEY' is named like a secret", extra="run: {root: '${env:WANDB_API_KEY}'}  #!"),
    Case("URL from the environment", recipe(extra="run: {root: '${env:PLACE}'}  #!"),
         (("run.root", "the environment puts a URL with user information here", ""),), environ={"PLACE": f"s3://a:{HIDDEN}@b"}),
    override("override with a secret", f"plugins.wandb.api_key={HIDDEN}", "plugins.wandb.api_key", "named like a secret"),
    override("override with a mapping", f"plugins.wandb={{api_key: {HIDDEN}}}", "plugins.wandb.api_key", "named like a secret"),
    override("override with a URL", f"run.root=https://me:{HIDDEN}@host", "run.root", "URL with user information"),
    override("malformed override with a secret", f"plugins.wandb.api_key:{HIDDEN}", "", "'...' is not a usable override"),
    one("in a file with a syntax error", "", "not valid YAML", text=f"password: {HIDDEN}\nx: [  #!"),
]  # fmt: skip

ENVIRONMENT = [
    one("variable not set", "seed", "'CAMSHAFT_TEST_UNSET' is not set", ":-default}", seed="seed: ${env:CAMSHAFT_TEST_UNSET}  #!"),
    one("other interpolation", "run.root", "'${HOME}' is not interpolated", "${env:NAME}", extra="run: {root: '${HOME}/x'}  #!"),
    one("resolver of others", "run.root", "'${oc.env:HOME}' is not interpolated", extra="run: {root: '${oc.env:HOME}'}  #!"),
    one("open brace", "run.root", "without a matching '}'", extra="run: {root: '${env:HOME'}  #!"),
    one("empty name", "run.root", "not interpolated", extra="run: {root: '${env:}'}  #!"),
    Case("wrong type from the environment", recipe(seed="seed: ${env:SEED}  #!"),
         (("seed", "whole number, got 'x1'", ""),), environ={"SEED": "x1"}),
    Case("nothing twice", recipe(seed="seed: ${env:SEED}  #!"),
         (("seed", "holds '${'", ""),), environ={"SEED": "${env:HOME}"}),
]  # fmt: skip

OVERRIDES = [
    override("no equals sign", "training.max_steps", "", "'training.max_steps' is not a usable override", "section.key=value"),
    override("empty key", "=5", "", "is not a usable override"),
    override("empty part", "training..max_steps=5", "", "'training..max_steps' is not a usable override"),
    override("dashes", "--training.max_steps=5", "", "") ,
    override("no value", "training.max_steps=", "training.max_steps", "the value is missing"),
    override("misspelt key", "training.max_setps=5", "training.max_setps", "Did you mean 'max_steps'?"),
    override("type", "training.max_steps=soon", "training.max_steps", "whole number, got 'soon'"),
    override("open list", "plugins.adamw.betas=[0.9", "plugins.adamw.betas", "not valid YAML"),
    override("alias in an override", "name=*x", "name", "cannot start with '*'"),
    override("tag inside", "plugins.adamw={lr: !!float 1}", "plugins.adamw.lr", "a tag"),
    override("below a scalar", "name.x=1", "name.x", "'name' is 'good', which has no keys"),
    override("unknown plugin set", "plugins.adamv.lr=1", "plugins.adamv", "Did you mean 'adamw'?"),
    override("unknown plugin off", "plugins.dpd=null", "plugins.dpd", "Did you mean 'ddp'?"),
    override("comment is no comment", "name=foo #bar", "name", "folder of the output root"),
    override("bases by override", "extends=x.yaml", "extends", "chosen in the file"),
    override("too deep", ".".join("a" * 40) + "=1", "", "is not a usable override"),
    Case("list index", recipe(data="data:\n  train:\n    blend: [{prefix: a}]"),
         (("data.train.blend.1.weight", "a list of 1: it has no item '1'", "from 0 to 0"),),
         overrides=("data.train.blend.1.weight=2",)),
]  # fmt: skip
OVERRIDES = [case for case in OVERRIDES if case.name != "dashes"]  # a misspelt option: see test_cli_basics

BASES = [
    one("missing base", "extends", "there is no file", "folder of this recipe", extends="extends: nowhere.yaml  #!"),
    one("base of a wrong kind", "extends", "must be the path of a recipe", extends="extends: {a: b}  #!"),
    one("base is null", "extends", "must be the path of a recipe", extends="extends:  #!"),
    one("base is a folder", "extends", "there is no file", extends="extends: ./  #!"),
    one("itself", "extends", "a cycle of extends: recipe.yaml -> recipe.yaml", extends="extends: recipe.yaml  #!"),
]


CASES = [*TYPES, *KEYS, *YAML, *PLUGINS, *SIZES, *NAMES, *SECRETS, *ENVIRONMENT, *OVERRIDES, *BASES]
