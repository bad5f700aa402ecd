"""What ranks would import anew, each for half a second of the processor: they are forked from here."""

import tokenizers  # noqa: F401
import torch._dynamo  # noqa: F401

import camshaft.testing.record  # noqa: F401
import camshaft_recompute.runtime  # noqa: F401
