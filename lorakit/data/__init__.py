"""Load a task's data and turn it into batches.

Rows come from local files or the Hub, one split at a time, loaded or streamed. A task builds an
example from each row, which is tokenized into ids with a loss mask. These rows are grouped into
steps, packed or not, and collated into the tensors of a batch. The rows and tokens of large splits
stay on disk, and tokens are cached between runs.

To add a file format, list its suffix in ``file_names.SUFFIXES`` and read it in
``files.read_rows`` and ``files.stream_rows``, or in ``tables`` if it holds an Arrow table. To add a
kind of example, define it in ``examples`` and tokenize it in ``tokens``. To group rows differently,
implement ``plan.Plan``, or ``plan.StepSource`` if steps cannot be indexed; to collate differently,
subclass ``collate.Batch``.
"""
