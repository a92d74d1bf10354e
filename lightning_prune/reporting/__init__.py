"""Reporting: metrics, plots and an HTML page about a run."""
