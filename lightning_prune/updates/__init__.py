"""One update of the masks: statistics, the sparsity that is due, and the decision."""
