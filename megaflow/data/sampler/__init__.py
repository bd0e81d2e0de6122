"""The global-batch sampler: schedule, counts, order, plans, ledger."""
