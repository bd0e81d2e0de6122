"""Corpora, their preparation, the sampler and the loader.

Reading order, the way of a batch: `tokenizer`, `prepare`, `packing` and `corpus` make tokenised sources on disk. The
sampler decides what a step trains on: `schedule` (the groups' weights on a global clock), `counts` (sequences of each
source), `order` (which windows, and the dealing), `plan` (one step's result), `mix` (the sampler itself and its state)
and `ledger` (what a run was created with). `sources` and `loader` turn its plans into tensors. `native` loads the C++
of `csrc/host/`.
"""
