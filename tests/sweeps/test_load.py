"""A sweep file: what it makes, and what is wrong with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorakit.api import load_sweep
from lorakit.errors import RecipeError, UserError

RECIPE = """\
model: {name_or_path: no/such/model, dtype: float32}
adapter: {r: 8, target_modules: [q, v]}
task: {name: glue/rte}
train: {output_dir: runs/one, epochs: 1}
"""
SWEEP = """\
recipe: recipe.yaml
output_dir: out
"""


@pytest.fixture(autouse=True)
def recipe(in_tmp: Path) -> None:
    Path("recipe.yaml").write_text(RECIPE)


def write(text: str) -> Path:
    Path("sweep.yaml").write_text(SWEEP + text)
    return Path("sweep.yaml")


def problems(text: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_sweep(write(text))
    return str(caught.value).splitlines()


def names(text: str) -> list[str]:
    return [member.name for member in load_sweep(write(text)).members]


def test_a_grid() -> None:
    sweep = load_sweep(
        write("set: {train.epochs: 2}\ngrid: {adapter.r: [1, 2], train.seed: [1, 2]}\n")
    )
    assert [member.name for member in sweep.members] == [
        "r=1,seed=1", "r=1,seed=2", "r=2,seed=1", "r=2,seed=2"
    ]  # fmt: skip
    last = sweep.members[-1]
    assert last.set == {"adapter.r": 2, "train.seed": 2}
    assert (last.recipe.train.epochs, last.recipe.train.seed) == (2, 2)
    assert last.recipe.train.output_dir == "out/members/r=2,seed=2"
    groups = [member.group for member in sweep.members]
    assert groups[0] == groups[1] != groups[2] == groups[3]
    assert len({member.identity for member in sweep.members}) == 4


def test_members_beside_a_grid_and_alone() -> None:
    members = "members:\n- {name: ada, set: {adapter.method: adalora, adapter.target_r: 4}}\n"
    assert names("grid: {adapter.r: [1]}\n" + members) == ["r=1", "ada"]
    assert names(members) == ["ada"]
    assert names("members: [{set: {train.seed: 3}}]\n") == ["seed=3"]


def test_another_method_drops_the_keys_of_the_first() -> None:
    (member,) = load_sweep(write("members: [{set: {adapter.method: adalora}}]\n")).members
    assert (member.recipe.adapter.method, member.recipe.adapter.target_modules) == (
        "adalora", ["q", "v"]
    )  # fmt: skip
    assert not hasattr(member.recipe.adapter, "r")
    (member,) = load_sweep(write("members: [{set: {adapter.method: dora}}]\n")).members
    assert member.recipe.flat()["adapter.r"] == 8


def test_names_are_safe_and_distinct() -> None:
    made = names(
        "grid:\n  task.name: [glue/rte, glue/cola]\n" + "  train.learning_rate: [1.0e-4, 3e-4]\n"
    )
    assert made[:2] == [
        "name=glue_rte,learning_rate=0.0001", "name=glue_rte,learning_rate=0.0003"
    ]  # fmt: skip
    assert names("grid: {adapter.target_modules: [[q], [q, v]]}\n") == [
        "target_modules=q", "target_modules=q+v"
    ]  # fmt: skip
    # Short names that two keys share become longer.
    assert names("grid: {task.name: [glue/rte], model.name_or_path: [a/b], adapter.layers: [null]}\n") == [
        "name=glue_rte,name_or_path=a_b,layers=null"
    ]  # fmt: skip
    long = names("grid:\n  task.path: [" + ", ".join(f"{'x' * 200}{i}" for i in range(2)) + "]\n")
    assert len(set(long)) == 2
    assert all(len(name) <= 120 for name in long)
    alike = names("grid: {model.name_or_path: [a/b, a_b, A_b]}\n")
    assert alike == ["name_or_path=a_b", "name_or_path=a_b-2", "name_or_path=A_b-3"]


def test_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEED", "5")
    assert names("grid:\n  train.seed:\n  - ${SEED}\n  - 6\n") == ["seed=5", "seed=6"]


def test_variables_are_for_files_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shell has expanded those of the command line."""
    monkeypatch.setenv("NAME", "value")
    literal = ["model.name_or_path=${NAME}"]
    sweep = load_sweep("recipe.yaml", grid=["train.seed=1,2"], overrides=literal)
    assert sweep.members[0].recipe.model.name_or_path == "${NAME}"


def test_a_mapping() -> None:
    keys: dict[str, Any] = {"recipe": "recipe.yaml", "output_dir": "out"}
    sweep = load_sweep({**keys, "grid": {"train.seed": [1, 2]}})
    assert [member.recipe.train.seed for member in sweep.members] == [1, 2]
    with pytest.raises(RecipeError, match=r"^sweep: has no members"):
        load_sweep(keys)


def test_a_recipe_with_a_grid() -> None:
    grid = ["adapter.target_modules=[q],[q,v]", "train.seed=1,2"]
    sweep = load_sweep("recipe.yaml", grid=grid, overrides=["train.epochs=2"])
    assert [member.name for member in sweep.members][:2] == [
        "target_modules=q,seed=1", "target_modules=q,seed=2"
    ]  # fmt: skip
    assert sweep.output_dir == Path("runs/one-sweep")
    assert sweep.members[0].recipe.train.epochs == 2
    sweep = load_sweep("recipe.yaml", grid=grid, options={"--output-dir": "x", "--metric": "loss"})
    assert (sweep.section.output_dir, sweep.section.metric) == ("x", "loss")


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (["train.seed"], "--grid: 'train.seed' is not a key and a value; allowed: SECTION.KEY=VALUE,"),
        (["train.seed=[1"], "--grid: train.seed = \"[1\": not valid YAML"),
        (["train.seed="], "--grid: grid.train.seed = []: must not be empty"),
        (["seed=1,2"], "--grid: grid.seed = [1, 2]: unknown section (did you mean 'train.seed'?)"),
        (["train.seed=1", "train.seed=2"], "--grid: train.seed = \"2\": duplicate"),
        (["train.seed=1,-1"], "--grid: member seed=-1: train.seed = -1: out of range; allowed:"),
        (["train.seed=" + ",".join(map(str, range(5000)))], "--grid: makes 5,000 members; allowed: at most 4,096"),
    ],
)  # fmt: skip
def test_a_wrong_grid_option(grid: list[str], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_sweep("recipe.yaml", grid=grid)
    (found,) = str(caught.value).splitlines()
    assert found.startswith(message)


def test_a_recipe_and_a_sweep_file_are_told_apart() -> None:
    with pytest.raises(
        UserError, match=r"^recipe.yaml: is a recipe, not a sweep file; hint: add --grid"
    ):
        load_sweep("recipe.yaml")
    file = write("grid: {train.seed: [1]}\n")
    with pytest.raises(UserError, match=r"^--grid: sweep.yaml is not a recipe"):
        load_sweep(file, grid=["train.seed=1"])
    with pytest.raises(RecipeError, match="no such file"):
        load_sweep("nothing.yaml")


#: What is in the file after its first two lines, and the whole error.
WRONG = {
    "no members": ("set: {train.epochs: 2}", "sweep.yaml: has no members; allowed: grid, members, or both"),
    "an unknown key": (
        "grd: {train.seed: [1]}\ngrid: {train.seed: [1]}",
        "sweep.yaml, line 3: grd = {\"train.seed\": [1]}: unknown key (did you mean 'grid'?); allowed: recipe, output_dir, set, grid, members, trainable_parameters, metric, joint, max_joint",
    ),
    "no list": ("grid:\n  train.seed: 1", "sweep.yaml, line 4: grid.train.seed = 1: wrong type (an integer); allowed: a non-empty list"),
    "an empty list": ("grid:\n  train.seed: []", "sweep.yaml, line 4: grid.train.seed = []: must not be empty; allowed: a non-empty list"),
    "twice": ("grid:\n  train.seed: [1, 2, 1]", "sweep.yaml, line 4: grid.train.seed[2] = 1: duplicate; allowed: each value once"),
    "a wrong value of one member": (
        "grid:\n  adapter.r:\n  - 0\n  - 1\n  train.seed: [1, 2]",
        "sweep.yaml, line 5: member r=0,seed=1 and 1 more: adapter.r = 0: out of range; allowed: an integer > 0 and <= 65536",
    ),
    "a wrong value of all": ("set:\n  train.seed: x\ngrid: {adapter.r: [1, 2]}", 'sweep.yaml, line 4: train.seed = "x": wrong type (a string); allowed: an integer >= 0 and < 4294967296'),
    "an unknown recipe key": ("grid: {adapter.rr: [1]}", "sweep.yaml, line 3: adapter.rr = 1: unknown key (did you mean 'r'?)"),
    "no section": ("grid: {epochs: [1]}", "sweep.yaml, line 3: grid.epochs = [1]: unknown section (did you mean 'train.epochs'?); allowed: SECTION.KEY; sections: model, adapter, task, train"),
    "no key": ("grid: {train: [1]}", "sweep.yaml, line 3: grid.train = [1]: names no key; allowed: SECTION.KEY, such as train.epochs"),
    "its own output directory": ("set: {train.output_dir: x}\ngrid: {train.seed: [1]}", 'sweep.yaml, line 3: set.train.output_dir = "x": each member has its own; allowed: output_dir of the sweep'),
    "in set and grid": ("set: {train.seed: 1}\ngrid: {train.seed: [1]}", "sweep.yaml, line 4: grid.train.seed = [1]: is in set, too; allowed: one of the two"),
    "a rank beside a budget": ("grid: {adapter.r: [1]}\ntrainable_parameters: 100", "sweep.yaml, line 3: grid.adapter.r = [1]: trainable_parameters chooses the rank; allowed: one of the two"),
    "an unsafe name": ("members: [{name: ../x, set: {train.seed: 1}}]", 'sweep.yaml, line 3: members[0].name = "../x": is the name of a directory; allowed: 1 to 120 letters, digits and any of ._+=,@- after the first'),
    "a name twice": ("members: [{name: a, set: {train.seed: 1}}, {name: A, set: {train.seed: 2}}]", 'sweep.yaml, line 3: members[1].name = "A": duplicate; allowed: each name once'),
    "an unknown key of a member": ("members: [{nam: a, set: {train.seed: 1}}]", "sweep.yaml, line 3: members[0].nam = \"a\": unknown key (did you mean 'name'?); allowed: name, set"),
    "no settings": ("members: [{name: a}]", "sweep.yaml, line 3: members[0].set: required key is missing; allowed: a mapping"),
    "equal members": ("members:\n- {name: a, set: {train.seed: 1}}\n- {name: b, set: {train.seed: 1, adapter.r: 8}}", "sweep.yaml, line 5: members[1]: member b has the same recipe as member a; allowed: members that differ"),
    "an unknown metric": ("grid: {train.seed: [1]}\nmetric: acuracy", "sweep.yaml, line 4: metric = \"acuracy\": unknown metric (did you mean 'accuracy'?)"),
    "a budget of nothing": ("grid: {train.seed: [1]}\ntrainable_parameters: 0", "sweep.yaml, line 4: trainable_parameters = 0: out of range; allowed: an integer > 0 or null"),
    "joint": ("grid: {train.seed: [1]}\njoint: perhaps", 'sweep.yaml, line 4: joint = "perhaps": unknown value; allowed: auto or true or false'),
    "an unset variable": ("grid:\n  train.seed: [\"${NO_SUCH_SEED}\"]", "sweep.yaml, line 4: grid.train.seed[0] = \"${NO_SUCH_SEED}\": environment variable NO_SUCH_SEED is not set"),
    "an unset variable in a path": ("grid: {train.seed: [1]}\nmetric: \"${NO_SUCH}\"", "sweep.yaml, line 4: metric = \"${NO_SUCH}\": environment variable NO_SUCH is not set"),
    "too many": (f"grid: {{train.seed: {list(range(65))}, adapter.r: {list(range(1, 65))}}}", "sweep.yaml, line 3: grid: makes 4,160 members; allowed: at most 4,096"),
    "a name of the grid": ("grid: {adapter.r: [1]}\nmembers: [{name: R=1, set: {adapter.r: 2}}]", 'sweep.yaml, line 4: members[0].name = "R=1": is the name of a member of the grid; allowed: another name'),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_sweeps(case: str) -> None:
    text, message = WRONG[case]
    found = problems(f"{text}\n")
    assert len(found) == 1
    assert found[0].startswith(message)


def test_a_wrong_recipe_is_reported_once() -> None:
    Path("recipe.yaml").write_text(RECIPE.replace("epochs: 1", "epohs: 1"))
    (found,) = problems("grid: {adapter.r: [1, 2]}\n")
    assert found.startswith("recipe.yaml, line 4: train.epohs = 1: unknown key")
    Path("recipe.yaml").unlink()
    (found,) = problems("grid: {adapter.r: [1, 2]}\n")
    assert (
        found == 'sweep.yaml, line 1: recipe = "recipe.yaml": no such file; allowed: a recipe file'
    )


def test_all_errors_at_once() -> None:
    found = problems("set: {train.epoch: 2, seed: 1}\ngrid: {adapter.r: [0]}\njoint: x\nfoo: 1\n")
    assert [line.split(" = ")[0].rpartition(" ")[2] for line in found] == [
        "set.seed", "train.epoch", "adapter.r", "joint", "foo"
    ]  # fmt: skip
