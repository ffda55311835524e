"""Reads rows from files, buckets and hubs, checks them, keeps the row ledger, and plans batches. It knows no tokenizer.

Here are the words that other rooms share; what does something is imported from its module: `files.find_files`,
`blocks.read_rows`, `prepare.prepare`, `dataset.Dataset`, `batches.StepPlan`. So the words cost no import of pyarrow.
"""

from llmforge.data.rows import RowEncoder, RowLayout, RowProblem
from llmforge.data.samples import Sample

__all__ = ["RowEncoder", "RowLayout", "RowProblem", "Sample"]
