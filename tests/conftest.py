"""Shared fixtures: real data, real models, tiny random models.

The environment is set before anything is imported: no test reaches the network, and the workers of
a parallel run share the cores.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# No test reads tokens that another run left, or writes into the home directory.
os.environ["LORAKIT_CACHE"] = tempfile.mkdtemp(prefix="lorakit-test-cache-")
atexit.register(shutil.rmtree, os.environ["LORAKIT_CACHE"], ignore_errors=True)
# A subprocess of a test runs this checkout, installed or not.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPO), os.environ.get("PYTHONPATH")]))
# Read by torch when it is first imported; subprocesses of a test inherit it.
os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // _WORKERS))

import pytest  # noqa: E402

WITHOUT_DATA = "--without-data"
_deselected = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        WITHOUT_DATA,
        action="store_true",
        help="leave out the tests that read LORAKIT_TEST_DATA, and say how many",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_deselected] = 0
    if config.pluginmanager.hasplugin("xdist"):
        config.pluginmanager.register(_CountFromWorkers(config))


class _CountFromWorkers:
    """Count deselected tests, which each worker deselects on its own."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        count = getattr(node, "workeroutput", {}).get("without_data", 0)
        self.config.stash[_deselected] = max(count, self.config.stash[_deselected])


@pytest.hookimpl(tryfirst=True)  # before -m looks at the marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if "data_dir" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.data)
    if config.getoption(WITHOUT_DATA):
        left_out = [item for item in items if item.get_closest_marker("data")]
        items[:] = [item for item in items if not item.get_closest_marker("data")]
        config.hook.pytest_deselected(items=left_out)
        config.stash[_deselected] = len(left_out)
        if hasattr(config, "workeroutput"):
            config.workeroutput["without_data"] = len(left_out)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if count := config.stash[_deselected]:
        terminalreporter.section("tests on real data NOT run", sep="!", yellow=True, bold=True)
        terminalreporter.write_line(
            f"{count} tests read real data and were left out: LORAKIT_TEST_DATA is not set. "
            "Set it to a directory with glue/, wikisql/, e2e_nlg/ and instructions/ to run them."
        )


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        if item.get_closest_marker("multi_gpu") and torch.cuda.device_count() < 2:
            pytest.skip("needs two CUDA devices")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Return the directory of real data; tests that use it fail without it."""
    value = os.environ.get("LORAKIT_TEST_DATA")
    if not value:
        pytest.fail(
            "LORAKIT_TEST_DATA is not set: set it to a directory with glue/, wikisql/, e2e_nlg/ "
            f"and instructions/, or run pytest {WITHOUT_DATA}",
            pytrace=False,
        )
    path = Path(value).expanduser().resolve()
    if not path.is_dir():
        pytest.fail(f"LORAKIT_TEST_DATA={value}: no such directory", pytrace=False)
    return path


def _model(name: str) -> Path:
    path = Path(os.environ.get("LORAKIT_TEST_MODELS") or REPO / "models").resolve() / name
    if not (path / "config.json").is_file():
        pytest.fail(
            f"{path} is not there: run scripts/fetch_models.py, or set LORAKIT_TEST_MODELS to a "
            f"directory that holds {name}/",
            pytrace=False,
        )
    return path


@pytest.fixture(scope="session")
def minilm() -> Path:
    """all-MiniLM-L6-v2: a BERT encoder, 22 M parameters."""
    return _model("all-minilm-l6-v2")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct: a Llama with tied embeddings, bfloat16."""
    return _model("smollm2-135m-instruct")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama (2 layers, hidden size 32, grouped-query attention) with a byte-level
    tokenizer that has a chat template and, like many base models, no pad token."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-llama")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_byte_tokenizer(["<s>", "</s>"]), bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    _save_random(LlamaForCausalLM, config, folder)
    return folder


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT encoder (2 layers, hidden size 32), without a classification head."""
    from tokenizers.processors import TemplateProcessing
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-bert")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    backend = _byte_tokenizer(special)
    backend.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    tokenizer.save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
    )
    _save_random(BertModel, config, folder)
    return folder


@pytest.fixture(scope="session")
def still_bert(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the tiny encoder without dropout."""
    from tests.training.runs import without_dropout

    return without_dropout(tiny_bert, tmp_path_factory.mktemp("still"))


def _byte_tokenizer(special: list[str]) -> Any:
    """Return a tokenizer with one token per byte, so that every text round-trips."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    names = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, merges=[]))
    tokenizer.add_special_tokens(special)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _save_random(model_class: Any, config: Any, folder: Path) -> None:
    import torch

    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    model_class(config).eval().save_pretrained(folder)
    torch.random.set_rng_state(state)


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
