"""``wikisql``: files, prompts, and the official evaluator's scores, quirks included."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from lorakit import registry
from lorakit.data.sources import Split
from lorakit.errors import DataError
from lorakit.tasks.wikisql import Database
from lorakit.tasks.wikisql_query import Query, QueryError, bound_value
from tests.tasks.wikisql_files import ROWS, TABLE, write_database, write_lines

TASK = registry.tasks()["wikisql"]
WikiSqlWriter = Callable[..., Path]
GOLD = [{"query": row["sql"]} for row in ROWS]


def load(folder: Path, **keys: Any) -> tuple[Split, Any]:
    config = TASK.Config(path=str(folder), **keys)
    return TASK.load(config, "validation"), config


def scores(folder: Path, predictions: list[Any]) -> dict[str, float]:
    split, config = load(folder)
    return TASK.metrics(predictions, split, config)


def query(sel: int, agg: int, *conds: list[Any]) -> dict[str, Any]:
    return {"query": {"sel": sel, "agg": agg, "conds": list(conds)}}


def test_prompt_and_completion(wikisql_folder: WikiSqlWriter) -> None:
    split, config = load(wikisql_folder())
    example = TASK.example(split.rows[1], config)
    assert [segment.text for segment in example.segments] == [
        'columns: "Player", "No." real, "Score" real, "Score (2)" real, "column 5"\n'
        "question: How many wear 8?\nSQL:",
        """ SELECT COUNT("Player") FROM t WHERE "No." = '8'""",
    ]
    assert [segment.trained for segment in example.segments] == [False, True]
    assert example.eos
    prompt = TASK.prompt(split.rows[1], config)
    assert prompt.segments == example.segments[:1]
    assert not prompt.eos


def test_gold_scores_one_in_every_format(wikisql_folder: WikiSqlWriter) -> None:
    folder = wikisql_folder()
    split, config = load(folder)
    texts = [TASK.example(row, config).segments[1].text for row in split.rows]
    for predictions in (GOLD, texts):
        assert scores(folder, predictions) == {"lf_accuracy": 1.0, "ex_accuracy": 1.0}


def test_wrong_predictions(wikisql_folder: WikiSqlWriter) -> None:
    predictions = [{"error": "no idea"}, "SELECT nonsense", query(0, 3, [99, 0, 1])]
    assert scores(wikisql_folder(), predictions) == {"lf_accuracy": 0.0, "ex_accuracy": 0.0}


def test_invalid_query_objects_are_wrong(wikisql_folder: WikiSqlWriter) -> None:
    unreadable = [
        {"query": None},
        {"query": {"sel": 0}},
        {"query": {"sel": 0, "agg": 0, "conds": [[1]]}},
    ]
    assert scores(wikisql_folder(), unreadable) == {"lf_accuracy": 0.0, "ex_accuracy": 0.0}


def test_without_a_database_only_the_logical_form_counts(wikisql_folder: WikiSqlWriter) -> None:
    assert scores(wikisql_folder(database=False), GOLD) == {"lf_accuracy": 1.0}


def test_condition_order_case_and_repeats_do_not_count() -> None:
    gold = Query(0, 0, ((0, 0, "Ann"), (1, 0, 3)))
    assert Query(0, 0, ((1, 0, "3"), (0, 0, "aNN"), (0, 0, "Ann"))).matches(gold)
    assert not Query(0, 0, ((1, 0, "3.0"), (0, 0, "Ann"))).matches(gold)
    assert not Query(0, 0, ((1, 0, "3"), (0, 0, " Ann"))).matches(gold)


def test_a_different_query_with_the_same_result_is_correct(wikisql_folder: WikiSqlWriter) -> None:
    predictions = [query(0, 0, [2, 0, 7]), GOLD[1], query(2, 0, [3, 0, "2.5"])]
    assert scores(wikisql_folder(), predictions) == {"lf_accuracy": 1 / 3, "ex_accuracy": 1.0}


def test_results_compare_in_row_order(wikisql_folder: WikiSqlWriter) -> None:
    gold = {"sel": 3, "agg": 0, "conds": [[1, 0, 8]]}
    folder = wikisql_folder(rows=[{**ROWS[0], "sql": gold}])
    assert scores(folder, [query(3, 0, [3, 1, 2])])["ex_accuracy"] == 1.0
    assert scores(folder, [query(2, 0, [3, 1, 2])])["ex_accuracy"] == 0.0


def test_two_empty_results_are_equal(wikisql_folder: WikiSqlWriter) -> None:
    gold = {"sel": 0, "agg": 0, "conds": [[1, 0, 77]]}
    folder = wikisql_folder(rows=[{**ROWS[0], "sql": gold}])
    assert scores(folder, [query(2, 0, [0, 0, "nobody"])])["ex_accuracy"] == 1.0


def test_the_last_value_is_bound_to_every_condition_on_a_column(tmp_path: Path) -> None:
    with closing(Database(write_database(tmp_path / "t.db", TABLE))) as database:
        twice = Query(0, 0, ((1, 1, 100), (1, 1, 5)))  # No. > 100 and No. > 5, both with 5
        assert database.execute("1-10-2", twice) == ["bo day", "cy ito"]
        assert database.execute("1-10-2", Query(0, 0, ((1, 1, 5), (1, 1, 100)))) == []


def test_text_values_are_lower_cased_and_text_equality_is_exact(tmp_path: Path) -> None:
    with closing(Database(write_database(tmp_path / "t.db", TABLE))) as database:
        assert database.execute("1-10-2", Query(0, 0, ((4, 0, "Y"),))) == ["bo day", "cy ito"]
        assert database.execute("1-10-2", Query(0, 0, ((4, 0, " y"),))) == []


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1,234.5", 1234.5),
        (" 7 ", 7.0),
        ("-3", -3.0),
        ("1e3", 1000.0),
        ("about 5", 5.0),
        ("week -12", 12.0),  # the fallback has no sign before a whole number
        ("-.5 or so", -0.5),
        ("3-4", 3.0),
    ],
)
def test_text_against_a_real_column(text: str, number: float) -> None:
    assert bound_value(text, "real") == number
    assert bound_value(text, "text") == text


def test_text_without_a_number_against_a_real_column_is_wrong(
    wikisql_folder: WikiSqlWriter,
) -> None:
    with pytest.raises(IndexError):
        bound_value("many", "real")
    assert (
        scores(wikisql_folder(), [query(0, 0, [1, 0, "many"]), *GOLD[1:]])["ex_accuracy"] == 2 / 3
    )


def test_the_database_is_read_only(wikisql_folder: WikiSqlWriter) -> None:
    folder = wikisql_folder()
    before = (folder / "dev.db").read_bytes()
    scores(folder, GOLD)
    assert (folder / "dev.db").read_bytes() == before
    assert sorted(path.name for path in folder.iterdir()) == [
        "dev.db",
        "dev.jsonl",
        "dev.tables.jsonl",
    ]


def test_a_query_that_runs_too_long_is_stopped(wikisql_folder: WikiSqlWriter) -> None:
    folder = wikisql_folder()
    with closing(Database(folder / "dev.db")) as database:
        endless = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT x FROM n WHERE x < 0"
        with pytest.raises(Exception, match="interrupted"):
            database.run_sql(endless, {})
        assert database.execute("1-10-2", Query.from_json(ROWS[0]["sql"])) == ["ann lee"]


def test_released_gold_results(data_dir: Path) -> None:
    file = data_dir / "wikisql" / "mini" / "mini.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(records) == 15
    with closing(Database(file.with_suffix(".db"))) as database:
        for record in records:
            result = database.execute(record["table_id"], Query.from_json(record["sql"]))
            assert result == record["gold_result"], record["question"]
    config = TASK.Config(path={"validation": str(file)})
    split = TASK.load(config, "validation")
    gold = [{"query": record["sql"]} for record in records]
    assert TASK.metrics(gold, split, config) == {"lf_accuracy": 1.0, "ex_accuracy": 1.0}
    assert TASK.metrics([{"error": "x"}] * 15, split, config)["ex_accuracy"] == 0.0


def test_each_file_uses_its_own_database(tmp_path: Path) -> None:
    files = []
    for number, table in enumerate([TABLE, {**TABLE, "id": "1-10-3"}]):
        rows = [{**row, "table_id": table["id"]} for row in ROWS]
        files.append(str(write_lines(tmp_path / f"part{number}.jsonl", rows)))
        write_lines(tmp_path / f"part{number}.tables.jsonl", [table])
        write_database(tmp_path / f"part{number}.db", table)
    config = TASK.Config(path=files, limit_train=4)
    split = TASK.load(config, "train")
    assert len(split) == 4
    assert split.locate(3) == f"{files[1]}, row 1"
    predictions = [{"query": row["sql"]} for row in split.rows]
    assert TASK.metrics(predictions, split, config) == {"lf_accuracy": 1.0, "ex_accuracy": 1.0}


def test_gzipped_files(tmp_path: Path) -> None:
    for name, records in (("dev", ROWS), ("dev.tables", [TABLE])):
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (tmp_path / f"{name}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    split, _ = load(tmp_path)
    assert len(split) == 3


def test_the_fingerprint_covers_the_tables(wikisql_folder: WikiSqlWriter) -> None:
    first = load(wikisql_folder(database=False))[0].fingerprint
    other = {**TABLE, "header": ["Name", *TABLE["header"][1:]]}
    assert load(wikisql_folder(database=False, table=other))[0].fingerprint != first


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in ROWS[1].items() if name != key}


@pytest.mark.parametrize(
    ("second_row", "expected"),
    [
        (without("question"), "question = null"),
        (without("table_id"), "table_id = null"),
        (without("sql"), "missing key 'sql'"),
        ({**ROWS[1], "table_id": "9-9-9"}, 'table_id = "9-9-9": not in the tables file'),
        ({**ROWS[1], "sql": {"sel": 0, "agg": 0}}, "missing key 'conds'"),
        ({**ROWS[1], "sql": {"sel": "0", "agg": 0, "conds": []}}, "sel = '0'"),
        ({**ROWS[1], "sql": {"sel": 0, "agg": 0, "conds": [[0, 0]]}}, "[0, 0]"),
        ({**ROWS[1], "sql": {"sel": 0, "agg": 0, "conds": [[0, 0, None]]}}, "None"),
        ({**ROWS[1], "sql": [0, 0]}, "[0, 0]"),
    ],
)
def test_invalid_rows_are_located(
    wikisql_folder: WikiSqlWriter, second_row: dict[str, Any], expected: str
) -> None:
    folder = wikisql_folder(rows=[ROWS[0], second_row])
    with pytest.raises(DataError) as caught:
        load(folder)
    assert str(caught.value).startswith(f"{folder / 'dev.jsonl'}, row 2: ")
    assert expected in str(caught.value)


def test_a_broken_line_is_located(wikisql_folder: WikiSqlWriter) -> None:
    folder = wikisql_folder()
    with (folder / "dev.jsonl").open("a") as lines:
        lines.write('\n{"phase": \n')
    with pytest.raises(DataError, match=r"dev\.jsonl, row 4: invalid JSON"):
        load(folder)


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ({"header": ["a"]}, "id = null"),
        ({"id": "1-10-2", "header": "a"}, 'header = "a"'),
        ({"id": "1-10-2", "header": ["a"], "types": ["text", "real"]}, "types"),
    ],
)
def test_invalid_tables_are_located(
    wikisql_folder: WikiSqlWriter, table: dict[str, Any], expected: str
) -> None:
    folder = wikisql_folder(database=False, table=table)
    with pytest.raises(DataError, match=r"dev\.tables\.jsonl, row 1: ") as caught:
        load(folder)
    assert expected in str(caught.value)


def test_missing_tables_file(wikisql_folder: WikiSqlWriter) -> None:
    folder = wikisql_folder()
    (folder / "dev.tables.jsonl").unlink()
    with pytest.raises(DataError, match=r"no dev\.tables\.jsonl\.gz or dev\.tables\.jsonl in the"):
        load(folder)


def test_a_file_that_is_not_a_database(wikisql_folder: WikiSqlWriter) -> None:
    folder = wikisql_folder()
    (folder / "dev.db").write_text("this is text, and long enough to be read as a header " * 20)
    with pytest.raises(DataError, match=r"dev\.db: cannot be read as an SQLite database"):
        scores(folder, GOLD)


def test_a_gold_query_that_fails_is_located(wikisql_folder: WikiSqlWriter) -> None:
    folder = wikisql_folder(database=False)
    write_database(folder / "dev.db", {**TABLE, "id": "other"})
    with pytest.raises(DataError, match=r"dev\.jsonl, row 1: the gold query cannot be executed"):
        scores(folder, GOLD)


def test_a_column_index_out_of_range_is_refused(wikisql_folder: WikiSqlWriter) -> None:
    row = {**ROWS[0], "sql": {"sel": 50, "agg": 0, "conds": []}}
    split, config = load(wikisql_folder(rows=[row]))
    with pytest.raises(DataError, match="column 50: the table has 5 columns"):
        TASK.example(split.rows[0], config)


@pytest.mark.parametrize("prediction", [3, None, ["x"], {"answer": "x"}])
def test_predictions_of_another_type_are_refused(
    wikisql_folder: WikiSqlWriter, prediction: Any
) -> None:
    with pytest.raises(DataError, match="prediction 2: "):
        scores(wikisql_folder(), [GOLD[0], prediction, GOLD[2]])


def test_too_few_predictions(wikisql_folder: WikiSqlWriter) -> None:
    with pytest.raises(DataError, match="1 prediction for 3 rows"):
        scores(wikisql_folder(), GOLD[:1])


def test_path_is_required() -> None:
    with pytest.raises(DataError, match=r"task\.path = null"):
        TASK.load(TASK.Config(), "train")


def test_when_it_generates() -> None:
    answers = {
        when: (
            TASK.generates(config),
            TASK.generates(config, final=False),
            TASK.best_metric(config),
        )
        for when in ("never", "end", "always")
        for config in [TASK.Config(eval_generate=when)]
    }
    assert answers == {
        "never": (False, False, "loss"),
        "end": (True, False, "loss"),
        "always": (True, True, "lf_accuracy"),
    }
    assert TASK.Config().eval_generate == "end"
    assert TASK.Config().max_new_tokens == 96


@pytest.mark.parametrize(
    "data", [None, [], {"sel": True, "agg": 0, "conds": []}, {"sel": 0, "agg": 0, "conds": {}}]
)
def test_query_from_json_refuses(data: Any) -> None:
    with pytest.raises(QueryError):
        Query.from_json(data)
