"""Training: from a recipe to an adapter directory.

Read ``run`` (the stages of a run, in order), ``loop`` (when to log, evaluate, save, stop and
resume) and ``engine/eager`` (one optimizer step).

To extend it, add an engine (see ``engine``) or a strategy (see ``lorakit.distributed``). Methods
take part through their hooks and tasks through their metrics; no method or task is named here.
"""
