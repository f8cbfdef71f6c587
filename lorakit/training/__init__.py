"""Training: from a recipe to an adapter directory.

Read ``run`` (what happens, in order), ``loop`` (when to log, evaluate, save, stop and resume) and
``engine/eager`` (what happens in one optimizer step).

Extended by another engine (see ``engine``) or another strategy (see ``lorakit.distributed``). A
method takes part through its hooks, a task through its metrics; neither is named here.
"""
