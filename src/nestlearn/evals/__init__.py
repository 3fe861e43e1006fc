"""Evaluations: one module per task, the metrics, and the methods they are compared with."""
