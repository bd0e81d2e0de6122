"""Corpora on disk: formats, checks, shards, writing, merging."""
