"""What ranks would import anew, each for half a second of the processor: they are forked from here."""

import tokenizers  # noqa: F401
import torch._dynamo
import torch._inductor  # noqa: F401

import camshaft_zero.fully_shard
import camshaft_zero.native  # noqa: F401
