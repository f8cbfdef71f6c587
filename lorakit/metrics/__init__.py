"""Scores of predictions against references: pure functions that know no task, row or file."""
