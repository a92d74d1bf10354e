"""Methods beyond a schedule of rising sparsity, a callback each."""
