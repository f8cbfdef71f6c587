"""The calls behind the command line and ``import lorakit``.

Every name is imported from its module on first use, so importing this module loads no tensor
library. The command line imports nothing else but ``recipe``, ``registry`` and ``errors``. To add a
name, add it in three places: the imports under ``TYPE_CHECKING`` (for type checkers), ``_MODULES``
(for the import on first use) and ``__all__``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorakit.adapters.convert import convert
    from lorakit.adapters.load import load, load_with_tokenizer
    from lorakit.adapters.merge.output import LeftOut
    from lorakit.adapters.merge.run import MergeReport, merge
    from lorakit.adapters.switching import switch
    from lorakit.analysis.inspect import inspect
    from lorakit.analysis.report import InspectReport, MatrixReport, Similarity
    from lorakit.data.paths import data_files
    from lorakit.distributed.group import is_main
    from lorakit.distributed.launcher import is_launched
    from lorakit.distributed.processes import process_group
    from lorakit.doctor.diagnose import Diagnosis, diagnose
    from lorakit.evaluation.generation import generate_text, stream_text
    from lorakit.evaluation.hf_generate import prompt_limits
    from lorakit.evaluation.progress import ProgressMonitor
    from lorakit.evaluation.requests import chat_request, read_requests, text_request
    from lorakit.evaluation.sampling import Decoding
    from lorakit.export.gguf.run import GgufReport, export_gguf
    from lorakit.export.hub.check import HubTarget, check_push
    from lorakit.export.hub.push import PushReport, push_to_hub, push_trained
    from lorakit.export.vllm_check import VllmReport, check_vllm
    from lorakit.first_recipe.draft import (
        FirstRecipe,
        RecipeDraft,
        check_hardware,
        check_method_name,
        init_recipe,
        this_hardware,
    )
    from lorakit.host.openmp import yield_cores
    from lorakit.injection import inject
    from lorakit.io.atomic import check_new, write_text
    from lorakit.method_check import CheckResult, check_method
    from lorakit.methods.lora import LoraConfig
    from lorakit.migration.convert import ConvertedRecipe, convert_recipe
    from lorakit.models.window import window
    from lorakit.nn import (
        Conv2d,
        Embedding,
        Linear,
        MergedLinear,
        lora_state_dict,
        mark_only_lora_as_trainable,
    )
    from lorakit.pipeline.evaluation import evaluate, evaluate_split, load_for_generation
    from lorakit.pipeline.local_paths import path_faults
    from lorakit.pipeline.predict import predict
    from lorakit.pipeline.predictions import SplitEvaluation, prediction_lines, score_predictions
    from lorakit.pipeline.preview import DescribedRow, Piece, Preview, preview
    from lorakit.pipeline.system_prompts import trained_system_prompts
    from lorakit.planning.plan import RunPlan, plan
    from lorakit.recipe.load import load_recipe
    from lorakit.reports.comparison import Comparison, compare, comparison_text
    from lorakit.reports.serve import ReportServer, report_server
    from lorakit.reports.write import report
    from lorakit.sweeps.load import Sweep, load_sweep
    from lorakit.sweeps.plan import SweepPlan, plan_sweep
    from lorakit.sweeps.results import MemberResult, SweepResult
    from lorakit.sweeps.run import sweep
    from lorakit.sweeps.table import table_text
    from lorakit.tasks.checks import counts_line
    from lorakit.terminal.columns import aligned
    from lorakit.terminal.progress_bar import ProgressBar
    from lorakit.terminal.progress_lines import progress_lines
    from lorakit.training.run import dry_run, train
    from lorakit.training.session import RunResult
    from lorakit.user_code import locate_error

_MODULES = {
    "lorakit.adapters.convert": ("convert",),
    "lorakit.adapters.load": ("load", "load_with_tokenizer"),
    "lorakit.adapters.merge.output": ("LeftOut",),
    "lorakit.adapters.merge.run": ("MergeReport", "merge"),
    "lorakit.adapters.switching": ("switch",),
    "lorakit.analysis.inspect": ("inspect",),
    "lorakit.analysis.report": ("InspectReport", "MatrixReport", "Similarity"),
    "lorakit.data.paths": ("data_files",),
    "lorakit.distributed.group": ("is_main",),
    "lorakit.distributed.launcher": ("is_launched",),
    "lorakit.distributed.processes": ("process_group",),
    "lorakit.doctor.diagnose": ("Diagnosis", "diagnose"),
    "lorakit.evaluation.generation": ("generate_text", "stream_text"),
    "lorakit.evaluation.hf_generate": ("prompt_limits",),
    "lorakit.evaluation.progress": ("ProgressMonitor",),
    "lorakit.evaluation.requests": ("chat_request", "read_requests", "text_request"),
    "lorakit.evaluation.sampling": ("Decoding",),
    "lorakit.export.gguf.run": ("GgufReport", "export_gguf"),
    "lorakit.export.hub.check": ("HubTarget", "check_push"),
    "lorakit.export.hub.push": ("PushReport", "push_to_hub", "push_trained"),
    "lorakit.export.vllm_check": ("VllmReport", "check_vllm"),
    "lorakit.first_recipe.draft": (
        "FirstRecipe",
        "RecipeDraft",
        "check_hardware",
        "check_method_name",
        "init_recipe",
        "this_hardware",
    ),
    "lorakit.host.openmp": ("yield_cores",),
    "lorakit.injection": ("inject",),
    "lorakit.io.atomic": ("check_new", "write_text"),
    "lorakit.method_check": ("CheckResult", "check_method"),
    "lorakit.methods.lora": ("LoraConfig",),
    "lorakit.migration.convert": ("ConvertedRecipe", "convert_recipe"),
    "lorakit.models.window": ("window",),
    "lorakit.nn": (
        "Conv2d",
        "Embedding",
        "Linear",
        "MergedLinear",
        "lora_state_dict",
        "mark_only_lora_as_trainable",
    ),
    "lorakit.pipeline.evaluation": ("evaluate", "evaluate_split", "load_for_generation"),
    "lorakit.pipeline.local_paths": ("path_faults",),
    "lorakit.pipeline.predict": ("predict",),
    "lorakit.pipeline.predictions": ("SplitEvaluation", "prediction_lines", "score_predictions"),
    "lorakit.pipeline.preview": ("DescribedRow", "Piece", "Preview", "preview"),
    "lorakit.pipeline.system_prompts": ("trained_system_prompts",),
    "lorakit.planning.plan": ("RunPlan", "plan"),
    "lorakit.recipe.load": ("load_recipe",),
    "lorakit.reports.comparison": ("Comparison", "compare", "comparison_text"),
    "lorakit.reports.serve": ("ReportServer", "report_server"),
    "lorakit.reports.write": ("report",),
    "lorakit.sweeps.load": ("Sweep", "load_sweep"),
    "lorakit.sweeps.plan": ("SweepPlan", "plan_sweep"),
    "lorakit.sweeps.results": ("MemberResult", "SweepResult"),
    "lorakit.sweeps.run": ("sweep",),
    "lorakit.sweeps.table": ("table_text",),
    "lorakit.tasks.checks": ("counts_line",),
    "lorakit.terminal.columns": ("aligned",),
    "lorakit.terminal.progress_bar": ("ProgressBar",),
    "lorakit.terminal.progress_lines": ("progress_lines",),
    "lorakit.training.run": ("dry_run", "train"),
    "lorakit.training.session": ("RunResult",),
    "lorakit.user_code": ("locate_error",),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "CheckResult",
    "Comparison",
    "Conv2d",
    "ConvertedRecipe",
    "Decoding",
    "DescribedRow",
    "Diagnosis",
    "Embedding",
    "FirstRecipe",
    "GgufReport",
    "HubTarget",
    "InspectReport",
    "LeftOut",
    "Linear",
    "LoraConfig",
    "MatrixReport",
    "MemberResult",
    "MergeReport",
    "MergedLinear",
    "Piece",
    "Preview",
    "ProgressBar",
    "ProgressMonitor",
    "PushReport",
    "RecipeDraft",
    "ReportServer",
    "RunPlan",
    "RunResult",
    "Similarity",
    "SplitEvaluation",
    "Sweep",
    "SweepPlan",
    "SweepResult",
    "VllmReport",
    "aligned",
    "chat_request",
    "check_hardware",
    "check_method",
    "check_method_name",
    "check_new",
    "check_push",
    "check_vllm",
    "compare",
    "comparison_text",
    "convert",
    "convert_recipe",
    "counts_line",
    "data_files",
    "diagnose",
    "dry_run",
    "evaluate",
    "evaluate_split",
    "export_gguf",
    "generate_text",
    "init_recipe",
    "inject",
    "inspect",
    "is_launched",
    "is_main",
    "load",
    "load_for_generation",
    "load_recipe",
    "load_sweep",
    "load_with_tokenizer",
    "locate_error",
    "lora_state_dict",
    "mark_only_lora_as_trainable",
    "merge",
    "path_faults",
    "plan",
    "plan_sweep",
    "predict",
    "prediction_lines",
    "preview",
    "process_group",
    "progress_lines",
    "prompt_limits",
    "push_to_hub",
    "push_trained",
    "read_requests",
    "report",
    "report_server",
    "score_predictions",
    "stream_text",
    "sweep",
    "switch",
    "table_text",
    "text_request",
    "this_hardware",
    "train",
    "trained_system_prompts",
    "window",
    "write_text",
    "yield_cores",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
