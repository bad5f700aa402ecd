"""What ranks would import anew, each for half a second of the processor, they are forked with."""

import torch._dynamo
import torch._inductor  # noqa: F401
