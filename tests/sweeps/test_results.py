"""Groups, the best member, tables and plots of results, without training."""

from __future__ import annotations

import csv
import json
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lorakit.api import SweepResult, load_sweep, table_text
from lorakit.sweeps.plots import axis_levels, axis_lines, draw, is_logarithmic
from lorakit.sweeps.table import write_tables

RECIPE = """\
model: {name_or_path: no/such/model}
adapter: {r: 8, target_modules: [q, v]}
task: {name: glue/rte}
train: {output_dir: run}
"""


def results(
    metric: str = "accuracy", members: Sequence[dict[str, Any]] = (), **grid: Any
) -> SweepResult:
    """Results without any member trained: those of the grid, and of the settings of ``members``."""
    Path("recipe.yaml").write_text(RECIPE)
    Path("out").mkdir(exist_ok=True)
    keys = {key.replace("__", "."): values for key, values in grid.items()}
    explicit = [{"set": settings} for settings in members]
    sweep = load_sweep(
        {"recipe": "recipe.yaml", "output_dir": "out", "grid": keys, "members": explicit}
    )
    return SweepResult(sweep.output_dir, metric, sweep.members)


def complete(result: SweepResult, values: list[float], loss: float = 1.0) -> None:
    for member, value in zip(result.members, values, strict=True):
        member.status, member.adapter_dir = "completed", Path("out", member.name)
        member.metrics = {"loss": loss, result.metric: value}
        member.trainable_parameters, member.seconds = 1234, 2.0


def test_groups(in_tmp: Path) -> None:
    result = results(adapter__r=[1, 2], train__seed=[1, 2, 3])
    assert [(group.mean, group.std, group.n) for group in result.groups] == [(None, None, 0)] * 2
    complete(result, [0.1, 0.2, 0.3, 0.5, 0.5, 0.5])
    result.members[5].status = "failed"
    first, second = result.groups
    assert (first.set, first.n) == ({"adapter.r": 1}, 3)
    assert first.mean == pytest.approx(0.2)
    assert first.std == pytest.approx(0.1)
    assert [member.name for member in second.members] == ["r=2,seed=1", "r=2,seed=2", "r=2,seed=3"]
    assert (second.mean, second.std, second.n) == (0.5, 0.0, 2)
    result.members[4].status = "pending"
    assert (result.groups[1].std, result.groups[1].n) == (None, 1)


def test_the_best(in_tmp: Path) -> None:
    result = results(train__seed=[1, 2, 3])
    assert (result.best, result.best_group) == (None, None)
    complete(result, [0.5, 0.7, 0.7])
    assert result.best is result.members[1]
    result.members[2].metrics["loss"] = 0.9
    assert result.best is result.members[2], "a lower loss breaks a tie"
    result.members[2].status = "failed"
    assert result.best is result.members[1]
    result.members[1].metrics = {"loss": 0.1}
    assert result.best is result.members[0]


def test_a_metric_that_no_member_has(in_tmp: Path) -> None:
    result = results("bleu", adapter__r=[1, 2])
    assert not result.lacks_metric
    complete(result, [0.5, 0.7])
    assert not result.lacks_metric
    for member in result.members:
        member.metrics.pop("bleu")
    assert result.lacks_metric


def test_of_equal_means_the_group_of_the_best_member_is_marked(in_tmp: Path) -> None:
    result = results(adapter__r=[1, 2, 4])
    complete(result, [0.5, 0.7, 0.7])
    result.members[2].metrics["loss"] = 0.9
    lines = table_text(result).splitlines()
    assert [line.endswith("*") for line in lines[1:4]] == [False, False, True]
    assert lines[4].startswith("best: r=4, accuracy 0.7000")
    write_tables(result)
    assert Path("out/table.md").read_text().splitlines()[4].endswith("| * |")
    rows = list(csv.DictReader(Path("out/table.csv").read_text().splitlines()))
    assert [row["best"] for row in rows] == ["0", "0", "1"]


@pytest.mark.parametrize("metric", ["loss", "perplexity"])
def test_lower_is_better(metric: str, in_tmp: Path) -> None:
    result = results(metric, adapter__r=[1, 2])
    complete(result, [0.7, 0.5])
    assert result.best is result.members[1]
    assert result.best_group is not None
    assert result.best_group.set == {"adapter.r": 2}


def test_tables(in_tmp: Path) -> None:
    result = results(
        adapter__r=[1, 2], adapter__target_modules=[["q"], ["q", "v"]], train__seed=[1, 2]
    )
    complete(result, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.2, 0.2])
    result.members[6].status, result.members[6].error = "failed", "out of memory"
    result.members[7].status = "pending"
    lines = table_text(result).splitlines()
    assert lines[0].split() == [
        "r", "target_modules", "accuracy", "n", "parameters", "seconds", "best"
    ]  # fmt: skip
    assert lines[1].split() == ["1", "q", "0.1500", "±", "0.0707", "2", "1,234", "2.0"]
    assert lines[3].split() == ["2", "q", "0.5500", "±", "0.0707", "2", "1,234", "2.0", "*"]
    assert lines[4].split() == ["2", "q+v", "failed", "0", "1,234", "2.0"]
    assert lines[5:] == [
        "failed: r=2,target_modules=q+v,seed=1: out of memory",
        "pending: 1 of 8",
        "best: r=2,target_modules=q,seed=2, accuracy 0.6000: out/r=2,target_modules=q,seed=2",
    ]
    write_tables(result)
    table = Path("out/table.md").read_text().splitlines()
    assert table[0] == "| r | target_modules | accuracy | n | parameters | seconds | best |"
    assert table[4] == "| 2 | q | 0.5500 ± 0.0707 | 2 | 1,234 | 2.0 | * |"
    rows = list(csv.DictReader(Path("out/table.csv").read_text().splitlines()))
    assert rows[0]["adapter.target_modules"] == "q"
    assert float(rows[0]["accuracy"]) == pytest.approx(0.15)
    assert [row["best"] for row in rows] == ["0", "0", "1", "0"]


def test_a_table_of_seeds_only(in_tmp: Path) -> None:
    result = results(train__seed=[1, 2])
    complete(result, [0.1, 0.2])
    assert table_text(result).splitlines()[0].split() == [
        "accuracy", "n", "parameters", "seconds", "best"
    ]  # fmt: skip


def test_lines_of_an_axis(in_tmp: Path) -> None:
    axes = ["adapter.r", "adapter.target_modules", "train.seed"]
    result = results(
        adapter__r=[4, 1], adapter__target_modules=[["q"], ["q", "v"]], train__seed=[1, 2]
    )
    complete(result, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8])
    first, second = axis_lines(result, "adapter.r", axes)
    assert (first.label, first.values) == ("target_modules q", (1, 4))
    assert first.means == pytest.approx((0.55, 0.15))
    assert first.spreads == pytest.approx((0.0707, 0.0707), abs=1e-4)
    assert second.label == "target_modules q+v"
    (line, _) = axis_lines(result, "adapter.target_modules", axes)
    assert (line.label, line.values) == ("r 4", (["q"], ["q", "v"]))
    many = results(adapter__r=list(range(1, 11)), train__learning_rate=[1e-4, 1e-3])
    complete(many, [0.1 * value for value in range(20)])
    (line,) = axis_lines(many, "train.learning_rate", ["adapter.r", "train.learning_rate"])
    assert line.label == "mean and standard deviation over r"
    assert line.means == pytest.approx((0.9, 1.0))


def test_full_fine_tuning_beside_a_grid(in_tmp: Path) -> None:
    """It has a line of its own where it has the axis, and else the level of its best member."""
    full = {"adapter.method": "full", "adapter.target_modules": None}
    axes = ["adapter.r", "train.learning_rate"]
    result = results(
        adapter__r=[1, 8],
        train__learning_rate=[1e-3, 1e-2],
        members=[full | {"train.learning_rate": rate} for rate in (1e-4, 1e-3)],
    )
    complete(result, [0.1, 0.2, 0.3, 0.4, 0.7, 0.6])
    lines = axis_lines(result, "train.learning_rate", axes)
    assert [(line.label, line.values, line.means) for line in lines] == [
        ("r 1", (1e-3, 1e-2), (0.1, 0.2)),
        ("r 8", (1e-3, 1e-2), (0.3, 0.4)),
        ("full", (1e-4, 1e-3), (0.7, 0.6)),
    ]
    assert axis_levels(result, "train.learning_rate", axes) == []
    assert [line.label for line in axis_lines(result, "adapter.r", axes)] == [
        "learning_rate 0.001", "learning_rate 0.01"
    ]  # fmt: skip
    (level,) = axis_levels(result, "adapter.r", axes)
    assert (level.label, level.values, level.means) == ("full", (), (0.7,))
    draw(result, axes, lambda note: None)
    assert "<!-- full -->" in Path("out/plots/r.svg").read_text()


def test_members_with_the_axes_and_another_method_have_their_own_lines(in_tmp: Path) -> None:
    axes = ["train.learning_rate", "train.weight_decay"]
    rates = {"train__learning_rate": [1e-3, 1e-2], "train__weight_decay": [0.0]}
    other = {"adapter.method": "bitfit", "train.learning_rate": 1e-3, "train.weight_decay": 0.0}
    result = results(**rates, members=[other])
    complete(result, [0.1, 0.2, 0.3])
    lines = axis_lines(result, "train.learning_rate", axes)
    assert [line.label for line in lines] == ["weight_decay 0", "bitfit, weight_decay 0"]


def test_the_ranks_of_adalora_are_drawn_beside_those_of_lora(in_tmp: Path) -> None:
    adalora = [{"adapter.method": "adalora", "adapter.target_r": r} for r in (1, 8)]
    result = results(adapter__r=[1, 8], members=adalora)
    complete(result, [0.1, 0.2, 0.3, 0.4])
    lines = axis_lines(result, "adapter.r", ["adapter.r"])
    assert [(line.label, line.values, line.means) for line in lines] == [
        ("", (1, 8), (0.1, 0.2)),
        ("adalora", (1, 8), (0.3, 0.4)),
    ]
    assert axis_levels(result, "adapter.r", ["adapter.r"]) == []


def test_stopped_members_are_points(in_tmp: Path) -> None:
    axes = ["adapter.r", "adapter.target_modules"]
    result = results(adapter__r=[1, 2], adapter__target_modules=[["q"], ["q", "v"]])
    complete(result, [0.1, 0.2, 0.3, 0.4])
    for member in result.members[1:3]:
        member.status, member.stopped_at_step = "stopped", 5
        member.stopped_metrics, member.metrics = member.metrics, {"accuracy": 0.9}
    lines = axis_lines(result, "adapter.r", axes)
    assert [(line.label, line.values, line.stopped) for line in lines] == [
        ("target_modules q", (1,), ((2, 0.3),)),
        ("target_modules q+v", (2,), ((1, 0.2),)),
    ]
    draw(result, axes, lambda note: None)
    for name in ("r", "target_modules"):
        assert "<!-- hollow: stopped by halving -->" in Path(f"out/plots/{name}.svg").read_text()


def test_the_intrinsic_dimension_can_be_read(in_tmp: Path) -> None:
    """Full fine-tuning and 90% of its score are drawn across the figure."""
    Path("intrinsic.yaml").write_text(RECIPE.replace("{r: 8, ", "{method: intrinsic, "))
    sweep = load_sweep(
        {
            "recipe": "intrinsic.yaml",
            "output_dir": "out",
            "grid": {"adapter.d": [10, 100]},
            "members": [{"name": "full", "set": {"adapter.method": "full"}}],
        }
    )
    Path("out").mkdir()
    result = SweepResult(sweep.output_dir, "accuracy", sweep.members)
    complete(result, [0.5, 0.7, 0.8])
    assert [level.means for level in axis_levels(result, "adapter.d", ["adapter.d"])] == [(0.8,)]
    draw(result, ["adapter.d"], lambda note: None)
    assert "<!-- 90% of full -->" in Path("out/plots/d.svg").read_text()


def test_logarithmic_axes() -> None:
    assert is_logarithmic("adapter.r", [1, 2])
    assert is_logarithmic("train.learning_rate", [1e-4, 3e-4])
    assert is_logarithmic("train.max_steps", [10, 1000])
    assert not is_logarithmic("train.epochs", [1, 2, 3])
    assert not is_logarithmic("train.weight_decay", [0.0, 0.1])
    assert not is_logarithmic("adapter.use_rslora", [True, False])


def test_plots(in_tmp: Path) -> None:
    result = results(
        adapter__r=[1, 8], adapter__target_modules=[["q"], ["q", "v"]], train__seed=[1, 2]
    )
    notes: list[str] = []
    draw(result, ["adapter.r", "adapter.target_modules", "train.seed"], notes.append)
    assert not Path("out/plots").exists(), "nothing is completed"
    complete(result, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8])
    draw(result, ["adapter.r", "adapter.target_modules", "train.seed"], notes.append)
    assert sorted(path.name for path in Path("out/plots").iterdir()) == [
        "r.png", "r.svg", "target_modules.png", "target_modules.svg"
    ]  # fmt: skip
    before = Path("out/plots/r.svg").read_bytes()
    ET.fromstring(before)
    draw(result, ["adapter.r", "adapter.target_modules", "train.seed"], notes.append)
    assert Path("out/plots/r.svg").read_bytes() == before
    assert notes == []


def test_categories_are_in_the_order_of_the_members(in_tmp: Path) -> None:
    """Also if other members with the settings of the first come later."""
    ranks = {"q": 8, "k": 12, "o": 8}
    settings = [{"adapter.target_modules": [role], "adapter.r": r} for role, r in ranks.items()]
    result = results(adapter__target_modules=[["v"]], members=settings)
    complete(result, [0.1, 0.2, 0.3, 0.4])
    draw(result, ["adapter.target_modules"], lambda note: None)
    svg = Path("out/plots/target_modules.svg").read_text()
    places = [svg.index(f"<!-- {role} -->") for role in ("v", "q", "k", "o")]
    assert places == sorted(places)


def test_json_is_written(in_tmp: Path) -> None:
    result = results(adapter__r=[1, 2], train__seed=[1, 2])
    complete(result, [0.1, 0.2, 0.3, 0.4])
    result.write()
    assert json.loads(Path("out/sweep.json").read_text()) == result.as_json()
