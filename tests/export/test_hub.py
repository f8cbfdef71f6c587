"""Pushes to a stand-in for the Hub, with the real client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

from lorakit.api import HubTarget, check_push, merge, push_to_hub
from lorakit.cli.main import run
from lorakit.errors import HubError, LorakitError, UserError
from lorakit.export.hub import client
from tests.adapters.directories import write_adapter
from tests.export.bases import write_base
from tests.export.hub_server import TOKEN, Hub, Repository, serving

pytestmark = pytest.mark.filterwarnings("ignore")


def quiet(_note: str) -> None:
    pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        huggingface_hub.close_session()
        yield hub
        huggingface_hub.close_session()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    base = write_base(folder / "base", "llama")
    adapter = write_adapter(base, folder / "adapter", r=4)
    (adapter / "optimizer.pt").write_bytes(b"state")
    (adapter / "checkpoints").mkdir()
    (adapter / "chat_template.jinja").write_text("{{ messages }}")
    return base, adapter


def test_an_adapter_arrives_byte_for_byte(hub: Hub, pair: tuple[Path, Path]) -> None:
    base, adapter = pair
    before = {path.name: path.read_bytes() for path in adapter.iterdir() if path.is_file()}
    notes: list[str] = []
    report = push_to_hub(adapter, "me/sql", private=True, say=notes.append)
    repository = hub.repositories["me/sql"]
    assert repository.private
    assert repository.messages == ["Upload adapter with lorakit"]
    for name in (
        "adapter_model.safetensors",
        "adapter_config.json",
        "lorakit.json",
        "chat_template.jinja",
    ):
        assert repository.files[name] == before[name], name
    assert set(report.files) == {*repository.files} - {".gitattributes"}
    assert {"optimizer.pt", "checkpoints"} & {*report.files} == set()
    assert report.url == f"{hub.endpoint}/me/sql"
    assert report.commit == "c" * 40
    assert report.size_bytes == sum(len(repository.files[name]) for name in report.files)
    assert notes[0].startswith(
        f"the base model {base} is a local directory, which others do not have"
    )
    assert notes[1] == "not uploaded: checkpoints/, optimizer.pt"
    assert before == {path.name: path.read_bytes() for path in adapter.iterdir() if path.is_file()}


def test_the_card_names_the_repository_and_the_base(hub: Hub, pair: tuple[Path, Path]) -> None:
    _, adapter = pair
    assert str(adapter) in (adapter / "README.md").read_text()
    push_to_hub(adapter, "team/sql", base="org/model", say=quiet)
    files = hub.repositories["team/sql"].files
    card = files["README.md"].decode()
    assert 'base_model: "org/model"\n' in card
    assert str(adapter) not in card
    assert 'PeftModel.from_pretrained(base, "team/sql")' in card
    assert "lorakit generate team/sql --prompt" in card
    settings = json.loads(files["adapter_config.json"])
    original = json.loads((adapter / "adapter_config.json").read_text())
    assert settings == {**original, "base_model_name_or_path": "org/model", "revision": None}
    assert not hub.repositories["team/sql"].private


def test_a_local_base_is_not_in_the_front_matter(hub: Hub, pair: tuple[Path, Path]) -> None:
    push_to_hub(pair[1], "me/a", say=quiet)
    assert "base_model:" not in hub.repositories["me/a"].files["README.md"].decode().split("---")[1]


def test_a_merged_model_on_a_branch(hub: Hub, pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = pair
    merge(base, adapter, tmp_path / "merged", max_shard_size="20KB", say=quiet)
    (tmp_path / "merged" / "notes.txt").write_text("mine")
    report = push_to_hub(tmp_path / "merged", "me/m", revision="v1", base="org/model", say=quiet)
    branches = hub.repositories["me/m"].branches
    assert set(branches["main"]) == {".gitattributes"}
    assert report.url.endswith("/me/m/tree/v1")
    shards = [path.name for path in (tmp_path / "merged").glob("*.safetensors")]
    assert len(shards) > 1
    for name in (*shards, "config.json", "model.safetensors.index.json", "tokenizer.json"):
        assert branches["v1"][name] == (tmp_path / "merged" / name).read_bytes()
    assert "notes.txt" not in branches["v1"]
    assert b'base_model: "org/model"' in branches["v1"]["README.md"]


def test_pushing_again(hub: Hub, pair: tuple[Path, Path]) -> None:
    """An adapter of the same base replaces the files; another base needs --overwrite."""
    _, adapter = pair
    push_to_hub(adapter, "me/sql", say=quiet)
    uploads = sum(request.startswith("PUT ") for request in hub.requests)
    push_to_hub(adapter, "me/sql", say=quiet)
    assert sum(request.startswith("PUT ") for request in hub.requests) == uploads, (
        "known to the Hub"
    )
    with pytest.raises(
        UserError, match=r"me/sql: exists and has an adapter of .*base, and org/other"
    ):
        push_to_hub(adapter, "me/sql", base="org/other", say=quiet)
    hub.repositories["me/sql"].files["old.bin"] = b"old"
    push_to_hub(adapter, "me/sql", base="org/other", overwrite=True, say=quiet)
    files = hub.repositories["me/sql"].files
    assert "old.bin" not in files and ".gitattributes" in files
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "org/other"
    hub.repositories["me/data"] = Repository(branches={"main": {"train.csv": b""}})
    with pytest.raises(
        UserError, match=r"me/data: exists and has other files, and .* is not its base"
    ):
        push_to_hub(adapter, "me/data", say=quiet)
    hub.repositories["me/empty"] = Repository(branches={"main": {"README.md": b"# Mine"}})
    push_to_hub(adapter, "me/empty", say=quiet)
    with pytest.raises(UserError, match="me/empty: exists and is public"):
        push_to_hub(adapter, "me/empty", private=True, say=quiet)


#: The name of a repository, and what the message says.
NAMES = [
    "sql",
    "me/",
    "/sql",
    "a/b/c",
    "me/a b",
    "me/-a",
    "me/a--b",
    "me/a.git",
    "me/../a",
    "me/" + "a" * 99,
]


@pytest.mark.parametrize("name", NAMES)
def test_names(name: str, hub: Hub) -> None:
    with pytest.raises(UserError) as found:
        check_push(HubTarget(name), None, quiet)
    assert str(found.value).startswith(f"{name}: allowed: NAMESPACE/NAME of letters")
    with pytest.raises(UserError, match='me/a: revision = "a b": allowed: the name of a branch'):
        check_push(HubTarget("me/a", revision="a b"), None, quiet)
    assert hub.requests == []


def checked(hub: Hub, repo: str = "me/sql") -> str:
    with pytest.raises(UserError) as found:
        check_push(HubTarget(repo), "org/model", quiet)
    assert hub.repositories == {}
    return str(found.value)


def test_tokens(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    check_push(HubTarget("me/sql"), "org/model", quiet)
    check_push(HubTarget("team/sql"), "org/model", quiet)
    assert hub.repositories == {}, "a check changes nothing"
    assert "cannot write to other; allowed: me, team" in checked(hub, "other/sql")
    assert "cannot write to readers; allowed: me, team" in checked(hub, "readers/sql")
    token = hub.user["auth"]["accessToken"]
    token["role"] = "read"
    assert "the access token is read-only" in checked(hub)
    token |= {"role": "fineGrained", "fineGrained": {"scoped": [
        {"entity": {"type": "user", "name": "me"}, "permissions": ["repo.content.read"]}
    ]}}  # fmt: skip
    assert "give it the permission repo.write" in checked(hub)
    token["fineGrained"]["scoped"][0]["permissions"].append("repo.write")
    check_push(HubTarget("me/sql"), "org/model", quiet)
    monkeypatch.setenv("HF_TOKEN", "hf_wrongwrongwrong")
    message = checked(hub)
    assert "the access token is not valid (HTTP 401" in message
    assert "hf_wrong" not in message
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert (
        "there is no access token for the Hub; hint: run hf auth login, or set HF_TOKEN"
        in checked(hub)
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert checked(hub) == (
        "me/sql: HF_HUB_OFFLINE is set, so nothing is pushed to the Hub; hint: unset it"
    )


#: Part of a request's path, the fault, the kind of error, and what the message says.
FAULTS: list[tuple[str, Any, type[LorakitError], str]] = [
    ("whoami", 503, HubError, "the Hub failed (HTTP 503"),
    ("whoami", "drop", HubError, "the Hub cannot be reached (RemoteProtocolError"),
    ("whoami", "hang", HubError, "the Hub cannot be reached (ReadTimeout"),
    ("repos/create", 403, UserError, "the access token does not allow writing there (HTTP 403"),
    ("commit", 409, HubError, "the repository is being changed by another process (HTTP 409"),
    ("commit", 500, HubError, "the Hub failed (HTTP 500"),
    ("commit", "drop", HubError, "the Hub cannot be reached (RemoteProtocolError"),
    ("objects/batch", 401, UserError, "the access token is not valid (HTTP 401"),
    ("/objects/", 413, HubError, "a file is larger than the Hub accepts (HTTP 413"),
    ("validate-yaml", 422, HubError, "refused (HTTP 422"),
]  # fmt: skip


@pytest.mark.parametrize(("part", "fault", "kind", "message"), FAULTS)
def test_faults(
    part: str, fault: Any, kind: type[LorakitError], message: str, hub: Hub,
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(client, "TIMEOUT_SECONDS", 0.25)
    hub.faults[part] = fault
    with pytest.raises(kind) as found:
        push_to_hub(pair[1], "me/sql", say=quiet)
    text = str(found.value)
    assert text.startswith(f"me/sql: {message}"), text
    assert not any(secret in text for secret in (TOKEN, "SECRET", "http://"))
    assert "\n" not in text
    files = hub.repositories["me/sql"].files if hub.repositories else {}
    assert set(files) <= {".gitattributes"}, "an upload is complete or absent"
    assert huggingface_hub.get_session().timeout.read is None


def test_the_hub_is_not_there(
    hub: Hub, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match=r"me/sql: the Hub cannot be reached \(ConnectError"):
        push_to_hub(pair[1], "me/sql", say=quiet)


def test_what_is_neither(hub: Hub, pair: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    (tmp_path / "run" / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(
        UserError, match=r"not an adapter: .* is missing; did you mean .*run/adapter\?$"
    ):
        push_to_hub(tmp_path / "run", "me/sql", say=quiet)
    with pytest.raises(UserError, match="incomplete adapter: adapter_model"):
        push_to_hub(tmp_path / "run" / "adapter", "me/sql", say=quiet)
    with pytest.raises(UserError, match="no such adapter directory"):
        push_to_hub(tmp_path / "none", "me/sql", say=quiet)
    assert hub.requests == []


def command(capsys: pytest.CaptureFixture[str], code: int, *arguments: object) -> tuple[str, str]:
    capsys.readouterr()
    assert run([*map(str, arguments)]) == code
    out, err = capsys.readouterr()
    assert TOKEN not in out + err
    assert "Traceback" not in err
    return out, err


def test_export(hub: Hub, pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    adapter = pair[1]
    out, err = command(capsys, 0, "export", adapter, "--to", "hub", "--repo", "me/sql")
    count = len(hub.repositories["me/sql"].files) - 1
    assert out == f"{hub.endpoint}/me/sql: {count} files, 0.0 MB\n"
    assert len(err.splitlines()) == 2
    out, _ = command(capsys, 0, "export", adapter, "--to", "hub", "--repo", "me/sql", "--json")
    assert json.loads(out)["url"] == f"{hub.endpoint}/me/sql"
    for more, message in (
        (["--to", "hub"], "--to hub: --repo is missing"),
        (["--to", "hub", "--repo", "sql"], "--repo sql: allowed: NAMESPACE/NAME"),
        (
            ["--to", "hub", "--repo", "me/a", "--dtype", "f16"],
            "--dtype f16: not allowed with --to hub",
        ),
        (["x.gguf", "--to", "gguf", "--private"], "--private: not allowed with --to gguf"),
    ):
        _, err = command(capsys, 2, "export", adapter, *more)
        assert message in err


def test_merge(
    hub: Hub, pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter = pair
    arguments = ["merge", base, adapter, tmp_path / "m", "--push-to-hub", "me/merged"]
    hub.faults["commit"] = 500
    out, err = command(capsys, 1, *arguments)
    assert "modules merged" in out
    hint = f"lorakit export {tmp_path / 'm'} --to hub --repo me/merged --base {base}"
    assert f"{tmp_path / 'm'} is complete, only the upload failed (exit code 1); hint: " in err
    assert err.rstrip().endswith(hint)
    hub.faults.clear()
    out, _ = command(capsys, 0, *hint.split()[1:])
    assert hub.repositories["me/merged"].files["model.safetensors"] == (
        (tmp_path / "m" / "model.safetensors").read_bytes()
    )


RECIPE = """
model: {{name_or_path: {base}, dtype: float32}}
adapter: {{method: lora, r: 2}}
task: {{name: text, path: {data}, max_length: 16}}
train: {{output_dir: run, max_steps: 2, per_device_batch_size: 2, learning_rate: 1.0e-3}}
"""


def test_train(
    hub: Hub, pair: tuple[Path, Path], in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (in_tmp / "train.jsonl").write_text('{"text": "the cat sat on the mat"}\n' * 8)
    (in_tmp / "r.yaml").write_text(RECIPE.format(base=pair[0], data=in_tmp / "train.jsonl"))
    arguments = ["train", "r.yaml", "--push-to-hub", "me/new", "--private"]
    hub.faults["whoami"] = 401
    _, err = command(capsys, 2, *arguments)
    assert "error: --push-to-hub me/new: the access token is not valid (HTTP 401" in err
    assert not (in_tmp / "run").exists(), "checked before training"
    hub.faults = {"repos/create": 503}
    out, err = command(capsys, 1, *arguments)
    assert out.startswith("run/adapter: 2 steps")
    assert (
        "run/adapter is complete, only the upload failed (exit code 1); hint: try again later, then "
        in err
    )
    again = "lorakit export run/adapter --to hub --repo me/new --private"
    assert err.rstrip().endswith(again)
    hub.faults = {}
    command(capsys, 0, *again.split()[1:])
    hub.repositories.clear()
    out, err = command(capsys, 0, *arguments, "--resume", "auto", "--json")
    assert json.loads(out)["hub"] == f"{hub.endpoint}/me/new"
    assert f"warning: the base model {pair[0]} is a local directory" in err
    repository = hub.repositories["me/new"]
    assert repository.private
    stored = (in_tmp / "run" / "adapter" / "adapter_model.safetensors").read_bytes()
    assert repository.files["adapter_model.safetensors"] == stored
    everything = [path.read_bytes() for path in (in_tmp / "run").rglob("*") if path.is_file()]
    assert not any(
        TOKEN.encode() in content for content in (*everything, *repository.files.values())
    )
    _, err = command(capsys, 2, "train", "r.yaml", "--revision", "v1")
    assert err == "error: --revision: requires --push-to-hub NAMESPACE/NAME\n"
