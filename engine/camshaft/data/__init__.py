"""What a run reads. Free of torch; only ``camshaft.data.loader`` makes tensors."""

from __future__ import annotations

from camshaft.data.check import check
from camshaft.data.prepare import Prepared, prepare
from camshaft.data.samples import IGNORE, SampleDataset
from camshaft.data.sources import vocab_size

__all__ = ["IGNORE", "Prepared", "SampleDataset", "check", "prepare", "vocab_size"]
