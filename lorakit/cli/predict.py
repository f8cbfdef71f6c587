"""``predict``: labels and probabilities, or numbers, from a classifier or a regressor."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from lorakit.cli.console import (
    Dtype,
    MethodFile,
    Subfolder,
    TrustRemoteCode,
    check_distinct,
    check_exclusive,
    check_writable,
    echo,
    model_and_adapter,
    only_results,
    option_named,
    progress,
    say,
    write_output,
)
from lorakit.errors import UserError, shown

_SUFFIXES = (".jsonl", ".csv")

_Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="Adapter directory, classifier, or base for --adapter (or Hub id)."
    ),
]
_Adapter = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Adapter of the model: directory or Hub id.")
]
_Texts = Annotated[
    list[str] | None,
    typer.Option("--text", metavar="TEXT ...", help="Classify each TEXT. Can be repeated."),
]
_MoreTexts = Annotated[list[str] | None, typer.Argument(metavar="TEXT", hidden=True)]
_TextPairs = Annotated[
    list[str] | None,
    typer.Option(
        "--text-pair", metavar="TEXT", help="Second text of the pair with --text. Can be repeated."
    ),
]
_Input = Annotated[
    Path | None,
    typer.Option("--input", metavar="FILE", help="csv, tsv, jsonl, json or parquet file."),
]
_Output = Annotated[
    Path | None, typer.Option(metavar="FILE", help=".jsonl or .csv file [default: stdout].")
]
_TextColumn = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Column of the text [default: as in training]."),
]
_TextPairColumn = Annotated[
    str | None, typer.Option(metavar="NAME", help="Column of the second text of a pair.")
]
_BatchSize = Annotated[int, typer.Option(metavar="N", min=1, help="Rows to classify at a time.")]
_MaxLength = Annotated[
    int | None,
    typer.Option(
        metavar="N", min=1, help="Truncate to N tokens [default: as in training, or the model's]."
    ),
]
_Revision = Annotated[
    str | None, typer.Option(metavar="R", help="Load this commit or tag of the base from the Hub.")
]


def predict(
    model: _Model,
    more_texts: _MoreTexts = None,
    adapter: _Adapter = None,
    text: _Texts = None,
    text_pair: _TextPairs = None,
    input_file: _Input = None,
    output: _Output = None,
    text_column: _TextColumn = None,
    text_pair_column: _TextPairColumn = None,
    batch_size: _BatchSize = 32,
    max_length: _MaxLength = None,
    dtype: Dtype = None,
    revision: _Revision = None,
    method: MethodFile = None,
    subfolder: Subfolder = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Classify texts, or the rows of a file.

    The model is a classifier, a regressor or a tagger of words, as lorakit trains it. Prints one
    JSON object per text, in order: {"label", "score", "scores": {NAME: p}}, for multi-label models
    with "labels"; for a regression {"score"}; for tags of words {"entities"}.

    Example: lorakit predict runs/quickstart-encoder/adapter --text "A delight."

    Example: lorakit predict runs/reviews/adapter --input new.csv
    """
    model, adapter = model_and_adapter(model, adapter, subfolder)
    text = _all_texts(text, more_texts)
    _check_input(text, text_pair, input_file, output)
    if input_file is None and (text_column or text_pair_column):
        raise UserError("--text-column, --text-pair-column: require --input")
    from lorakit.api import predict as classify

    texts = None
    if text is not None:
        texts = list(zip(text, text_pair, strict=True)) if text_pair else text
    with (
        only_results(),
        progress("predicted") as report,
        option_named("--adapter", adapter),
    ):
        found = classify(
            model, texts, adapter, file=input_file, text_column=text_column,
            text_pair_column=text_pair_column, batch_size=batch_size, max_length=max_length,
            dtype=dtype, revision=revision, trust_remote_code=trust_remote_code, method=method,
            on_progress=report, say=say,
        )  # fmt: skip
    if output is None:
        echo(_json_lines(found).removesuffix("\n"))
        return
    write_output(output, _table(found) if output.suffix == ".csv" else _json_lines(found))
    say(f"{output}: {len(found):,} prediction{'' if len(found) == 1 else 's'}")


def _all_texts(texts: list[str] | None, more: list[str] | None) -> list[str] | None:
    """Add the texts after the first one of ``--text A B C``."""
    if not more:
        return texts
    if texts is None or len(texts) > 1:  # then it is not known which --text they follow
        raise UserError(f"unexpected argument: {shown(more[0])}; hint: lorakit predict --help")
    return [*texts, *more]


def _check_input(
    texts: list[str] | None, pairs: list[str] | None, input_file: Path | None, output: Path | None
) -> None:
    check_exclusive({"--text": texts is not None, "--input": input_file is not None})
    if texts is None and input_file is None:
        raise UserError("nothing to predict; allowed: --text TEXT or --input FILE")
    if pairs is not None and len(pairs) != len(texts or ()):
        raise UserError(
            f"--text-pair: given {_times(len(pairs))}, but --text "
            f"{_times(len(texts or ()))}; allowed: one for each"
        )
    check_writable("--output", output)
    check_distinct({"--output": output}, {input_file: "the input file"} if input_file else {})
    if output is not None and output.suffix not in _SUFFIXES and not output.exists():
        raise UserError(f"--output {output}: unknown format; allowed: {', '.join(_SUFFIXES)}")


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _json_lines(found: Sequence[Mapping[str, Any]]) -> str:
    return "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in found)


def _table(found: Sequence[Mapping[str, Any]]) -> str:
    """csv with the columns ``label``, ``score`` and ``scores.NAME``; several labels and entities
    are JSON lists."""
    rows = [_cells(row) for row in found]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _cells(row: Mapping[str, Any]) -> dict[str, Any]:
    cells = {key: value for key, value in row.items() if key != "scores"}
    for key in cells.keys() & {"labels", "entities"}:
        cells[key] = json.dumps(cells[key], ensure_ascii=False)
    return cells | {f"scores.{name}": p for name, p in row.get("scores", {}).items()}
