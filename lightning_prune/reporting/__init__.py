"""What a run has done, for people: metrics, plots, a page."""
