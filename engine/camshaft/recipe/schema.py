"""The recipe as a typed, frozen object. Everything under ``plugins`` is typed by the plugin that owns it."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

SCHEMA_VERSION = 1

PositiveInt = Annotated[int, Field(ge=1, le=2**53)]
NonNegativeInt = Annotated[int, Field(ge=0, le=2**53)]
Size = Annotated[int, Field(ge=1, le=2**31)]
"""Of one dimension of a tensor."""
Place = Annotated[str, Field(min_length=1)]
"""A path; an empty one would be the working directory."""
Heads = Annotated[int, Field(ge=1, le=2**16)]
Ranks = Annotated[int, Field(ge=1, le=2**20)]

NAME_PATTERN = r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}"
_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)


def _run_name(name: str) -> str:
    """A name becomes a folder below the output root on any file system, and cannot leave it."""
    if not re.fullmatch(NAME_PATTERN, name):
        raise ValueError(
            "must be 1 to 64 of the characters A-Z a-z 0-9 . _ - and cannot start with a dot:"
            " it becomes a folder of the output root Fix: choose a short plain name; run.root and run.dir take paths"
        )
    if _RESERVED.fullmatch(name) or name.endswith("."):
        raise ValueError(f"'{name}' cannot be a folder's name on every system Fix: choose another name")
    return name


RunName = Annotated[str, AfterValidator(_run_name), Field(json_schema_extra={"pattern": f"^{NAME_PATTERN}$"})]


class Section(BaseModel):
    """Base of every section: unknown keys and wrong types are errors, values are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class Model(Section):
    """The architecture: a preset, single fields that change it, or every field."""

    preset: str | None = None
    """Name of a shipped architecture; `camshaft explain` shows its fields."""
    vocab_size: Size | None = None
    """Rows of the embedding. Without it: the preset's, or the tokenizer's where the preset leaves it open."""
    hidden_size: Size | None = None
    """Width of the residual stream."""
    intermediate_size: Size | None = None
    """Inner width of the feed-forward (SwiGLU) block."""
    num_hidden_layers: Annotated[int, Field(ge=1, le=10_000)] | None = None
    """Decoder layers."""
    num_attention_heads: Heads | None = None
    """Query heads."""
    num_key_value_heads: Heads | None = None
    """Key and value heads; divides num_attention_heads (grouped-query attention)."""
    head_dim: Heads | None = None
    """Width of one attention head; without it hidden_size / num_attention_heads."""
    max_position_embeddings: Size | None = None
    """Longest sequence that the architecture is meant for."""
    rope_theta: Annotated[float, Field(gt=0, le=1e18)] | None = None
    """Base of the rotary position frequencies."""
    rope_scaling: dict[str, Any] | None = None
    """Hugging Face's `rope_scaling` block; type `llama3` is known."""
    rms_norm_eps: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Added to the mean square in RMSNorm."""
    initializer_range: Annotated[float, Field(gt=0, le=100)] | None = None
    """Standard deviation of the first values of matrices and embeddings."""
    tie_word_embeddings: bool | None = None
    """Input and output embeddings are one parameter."""
    attention_bias: bool | None = None
    """Bias on the q, k and v projections (Qwen2)."""
    qk_norm: bool | None = None
    """RMSNorm on each head of q and k (Qwen3)."""


class Tokenizer(Section):
    """How text becomes token ids."""

    type: Literal["bpe", "byte", "file"] = "bpe"
    """`bpe`: trained on the corpus and cached; `byte`: one id a byte; `file`: a local `tokenizer.json`."""
    vocab_size: Annotated[int, Field(ge=258, le=1_000_000)] | None = None
    """Size of a trained vocabulary; only for `bpe`."""
    path: str | None = None
    """The `tokenizer.json`; only for `file`. Relative paths start at the recipe's folder."""


class BlendPart(Section):
    """One dataset of a blend."""

    prefix: str
    """Path of an indexed dataset without `.bin` and `.idx`. Relative paths start at the recipe's folder."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Share of the samples, relative to the other parts."""


class IndexedData(Section):
    """Tokenised data in Megatron's indexed format."""

    blend: Annotated[list[BlendPart], Field(min_length=1)]
    """Datasets, drawn from in proportion to their weights."""


class TextData(Section):
    """Raw text, tokenised once and cached."""

    files: Annotated[list[str], Field(min_length=1)]
    """Text files (one document each) and `.jsonl` files (one document a line)."""
    json_key: str = "text"
    """Key of a `.jsonl` object that holds the text."""


class Data(Section):
    """What the model reads."""

    train: Literal["python-docs", "python-source"] | IndexedData | TextData = "python-docs"
    """`python-docs`: prose that every CPython carries; `python-source`: its standard library; or data of your own."""
    validation: IndexedData | TextData | None = None
    """A validation set of its own; otherwise `validation_fraction` of the training documents."""
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Part of the training documents that is held out."""
    sequence_length: Size = 128
    """Tokens of one sample."""
    pack: bool = True
    """Concatenate documents and cut every `sequence_length` tokens; otherwise one document a sample, padded."""
    document_mask: bool = True
    """Attention stays inside a document, and positions restart with it."""
    cache_dir: Place | None = None
    """Where tokenised corpora are kept; default: `camshaft` in the user's cache folder."""


class Batch(Section):
    """Batch algebra: global = micro x accumulation x data-parallel ranks."""

    micro_batch_size: Size | Literal["auto"]
    """Samples of one forward on one rank. `auto`: the most that fit, by the plan and then by trial, and leave as many
    microbatches as a pipeline has ranks; the global batch stays as it is, and a run that goes on keeps the number."""
    global_batch_size: Size
    """Samples of one optimizer step on all ranks."""
    gradient_accumulation_steps: PositiveInt | None = None
    """Derived when absent, checked when given."""
    on_out_of_memory: Literal["stop", "halve"] = "stop"
    """What to do with a microbatch that does not fit: `stop` ends the run; `halve` runs it again in two halves on all
    ranks, with the same numbers, where no owner exchanges anything during forward or backward."""


class Parallel(Section):
    """Degrees of the mesh axes."""

    data_parallel: Ranks | Literal["auto"] = "auto"
    """`auto`: what the other degrees leave of the processes."""
    data_parallel_shard: Ranks | None = None
    """Hybrid sharding: so many neighbouring data-parallel ranks share one copy; divides data_parallel."""
    data_parallel_replicate: Ranks | None = None
    """Hybrid sharding: number of copies; derived as data_parallel / data_parallel_shard when absent."""
    pipeline_parallel: Ranks = 1
    """Ranks that the layers are divided over, as `plugins.pipeline` says."""
    context_parallel: Ranks = 1
    """Parts that a sequence is split into."""
    tensor_parallel: Ranks = 1
    """Ranks that each matrix product is divided over, as `plugins.tensor_parallel` says."""


class Training(Section):
    """How long to train, and how often to look."""

    max_steps: PositiveInt | None = None
    """Stop after so many optimizer steps."""
    max_epochs: PositiveInt | None = None
    """Stop after so many passes; the last window holds what is left and may be short."""
    max_tokens: PositiveInt | None = None
    """Stop once so many tokens have been read, over all ranks."""
    log_every: PositiveInt = 10
    """Steps between two log records; device values are copied to the host only then."""
    eval_every: PositiveInt | None = None
    """Steps between two evaluations; without it there are none."""
    eval_samples: PositiveInt = 64
    """Validation samples an evaluation reads, over all ranks."""
    deterministic: bool = False
    """Ask torch for deterministic algorithms (always on a CPU)."""


class Launch(Section):
    """How many processes, and who starts them."""

    launcher: Literal["deepspeed", "torchrun"] = "deepspeed"
    """Which of the two starts the ranks when `train` has to start them itself."""
    processes: Ranks | Literal["auto"] = "auto"
    """Processes on this machine. `auto`: one a GPU, one without a GPU."""
    threads_per_rank: Annotated[int, Field(ge=1, le=4096)] | Literal["auto"] = "auto"
    """Threads of one rank on a CPU. `auto`: cores / processes."""
    keep_freed_memory: bool = True
    """On a CPU: a rank keeps what a step frees for the next step, in place of giving it back to the system (glibc)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: cuda where there is a GPU, else the CPU."""
    memory_gib: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    """Memory of one rank that `micro_batch_size: auto` may fill. `auto`: that of its GPU; on a CPU its share of what is
    free."""
    group_timeout_s: Annotated[int, Field(ge=1, le=600)] = 600
    """How long a collective may wait for a peer before the run stops."""


class Run(Section):
    """Where a run writes."""

    root: Place = "runs"
    """Folder of all runs. Relative to the working directory."""
    dir: Place | None = None
    """Exactly this folder instead of `<root>/<name>/<id>`; a run found in it is continued."""


class Debug(Section):
    """Checks that cost time, for finding a fault."""

    contracts: bool = False
    """Look around each hook whether its plugin changes a parameter, a gradient or a value of the optimizer that it did
    not claim, and compare copies on several ranks by a sample that rotates."""


class Recipe(Section):
    """The root of a recipe."""

    schema_version: Literal[1]
    """Version of this format."""
    name: RunName
    """Letters, digits, `.`, `_`, `-`; at most 64; not starting with a dot."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Decides first values, the order of the data and every random draw."""
    model: Model = Model()
    tokenizer: Tokenizer = Tokenizer()
    data: Data = Data()
    batch: Batch
    parallel: Parallel = Parallel()
    training: Training = Training()
    launch: Launch = Launch()
    run: Run = Run()
    debug: Debug = Debug()
    plugins: dict[str, Any] = {}
    """Plugin name to its options object, in the order in which they take effect."""
