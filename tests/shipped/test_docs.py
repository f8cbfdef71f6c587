"""README.md and docs/: links resolve, recipes validate, commands and keys exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer
import yaml

from lorakit import load_recipe, registry
from lorakit.api import load_sweep
from lorakit.cli.main import app
from lorakit.methods.lora import LoraConfig
from lorakit.recipe.sections import AdapterSection, ModelSection, TrainSection
from lorakit.sweeps.sections import MemberSection, SweepSection

REPO = Path(__file__).resolve().parents[2]
DOCS = {
    str(path.relative_to(REPO)): path.read_text(encoding="utf-8")
    for path in [*sorted(REPO.glob("*.md")), *sorted((REPO / "docs").rglob("*.md"))]
}
COMMANDS = {
    name: {option for parameter in command.params for option in parameter.opts}
    for name, command in typer.main.get_command(app).commands.items()  # type: ignore[attr-defined]
}
OF_EVERY_COMMAND = {"--help", "-h"}
OF_THE_PROGRAM = {"--help", "-h", "--version", "--install-completion", "--show-completion"}

FENCE = re.compile(r"^```(\w*)(?: (\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")
_FOLDERS = ("lorakit", "tests", "scripts", "recipes", "configs", "docs")


def prose(text: str) -> str:
    return FENCE.sub("", text)


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub gives to a document's headings."""
    titles = re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def command_lines(text: str) -> list[str]:
    """Return every ``lorakit ...`` line in a shell block or an inline code span."""
    blocks = [body for language, _, body in FENCE.findall(text) if language in ("", "bash")]
    lines = [line.removeprefix("$ ") for block in blocks for line in block.splitlines()]
    return [line for line in [*lines, *CODE.findall(prose(text))] if line.startswith("lorakit ")]


@pytest.mark.parametrize("name", DOCS)
def test_links_resolve(name: str) -> None:
    for link in _LINK.findall(DOCS[name]):
        if "://" in link:
            continue
        target, _, anchor = link.partition("#")
        path = (REPO / name).parent / target if target else REPO / name
        assert path.exists(), link
        if anchor:
            assert anchor in anchors(path.read_text(encoding="utf-8")), link


@pytest.mark.parametrize("name", DOCS)
def test_files_that_are_mentioned_exist(name: str) -> None:
    for span in CODE.findall(prose(DOCS[name])):
        first = span.split("/")[0]
        if first in _FOLDERS and re.fullmatch(r"[\w./-]+", span):
            assert (REPO / span).exists(), span


@pytest.mark.parametrize("name", DOCS)
def test_recipes_are_valid(name: str, in_tmp: Path) -> None:
    blocks = FENCE.findall(DOCS[name])
    for _, file, body in blocks:
        if file:
            Path(file).parent.mkdir(parents=True, exist_ok=True)
            Path(file).write_text(body, encoding="utf-8")
    for language, _, body in blocks:
        if language == "yaml" and "model" in yaml.safe_load(body):
            Path("recipe.yaml").write_text(body, encoding="utf-8")
            load_recipe("recipe.yaml")


def test_sweeps_are_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)
    blocks = [
        body for language, _, body in FENCE.findall(DOCS["docs/sweep.md"]) if language == "yaml"
    ]
    assert blocks
    for body in blocks:
        load_sweep(yaml.safe_load(body))


@pytest.mark.parametrize("name", DOCS)
def test_commands_and_options_exist(name: str) -> None:
    for line in command_lines(DOCS[name]):
        command, *arguments = shlex.split(line, comments=True)[1:]
        options = {word.partition("=")[0] for word in arguments if word.startswith("-")}
        if command.startswith("-"):
            assert {command, *options} <= OF_THE_PROGRAM, line
        else:
            assert command in COMMANDS, line
            assert options <= COMMANDS[command] | OF_EVERY_COMMAND, line


def test_the_reference_has_every_key_of_a_recipe() -> None:
    text = "".join(DOCS[f"docs/{name}.md"] for name in ("recipe", "methods", "data"))
    text += "".join(page for name, page in DOCS.items() if name.startswith("docs/methods/"))
    configs = [ModelSection, TrainSection]
    configs += [method.Config for method in registry.methods().values()]
    configs += [task.Config for task in registry.tasks().values()]
    keys = {key for config in configs for key in config.model_fields}
    assert sorted(key for key in keys if f"`{key}`" not in text) == []


def test_the_reference_has_every_key_of_a_sweep() -> None:
    keys = [*SweepSection.model_fields, *MemberSection.model_fields]
    assert [key for key in keys if f"`{key}`" not in DOCS["docs/sweep.md"]] == []


def test_the_reference_has_every_method_and_task() -> None:
    methods, tasks = CODE.findall(DOCS["docs/methods.md"]), CODE.findall(DOCS["docs/data.md"])
    assert set(registry.methods()) <= set(methods)
    assert set(registry.tasks()) <= set(tasks)


def test_the_table_of_methods_has_their_sources_and_learning_rates() -> None:
    rows = re.findall(
        r"^\| \[`(\w+)`\]\S+ \| .* \| (\S+) to (\S+) \|(.*)\|$", DOCS["docs/methods.md"], re.M
    )
    rates = {name: (float(low), float(high)) for name, low, high, _ in rows}
    methods = registry.methods()
    assert rates == {name: m.Config.usual_learning_rates for name, m in methods.items()}
    for name, _, _, source in rows:
        assert methods[name].source in source
        assert methods[name].arxiv in source


def test_every_method_has_a_page() -> None:
    for name, method in registry.methods().items():
        page = DOCS[f"docs/methods/{name}.md"]
        keys = set(method.Config.model_fields) - {
            *AdapterSection.model_fields,
            *LoraConfig.model_fields,
        }
        assert sorted(key for key in keys if f"`{key}`" not in page) == []
        for title in ("When to use it", "Keys", "Measured", "Source"):
            assert f"\n## {title}\n" in page, name


def test_the_readme_has_the_two_commands() -> None:
    for title, command in (("Quickstart", "scripts/quickstart.sh"), ("Tests", "scripts/test.sh")):
        assert f"## {title}\n\n```\nbash {command}\n```\n" in DOCS["README.md"]


def test_the_overview_stays_short() -> None:
    assert len(DOCS["README.md"].splitlines()) <= 200
    assert len(DOCS["docs/architecture.md"].splitlines()) <= 100
