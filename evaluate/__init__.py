"""Evaluation: from the records of finished runs to tables."""
