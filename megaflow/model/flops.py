"""How large a model is and how much it computes, exactly, from its shape."""

from __future__ import annotations

from megaflow.config import ModelConfig


def num_parameters(config: ModelConfig) -> int:
    """Weights of the model, vocabulary padding not counted."""
    embeddings = (1 if config.tie_embeddings else 2) * config.vocab_size * config.hidden_size
    norms = (2 * config.num_layers + 1) * config.hidden_size
    return embeddings + norms + config.num_layers * _layer_matrices(config)


def flops_per_token(config: ModelConfig, seq_length: int, causal: bool) -> int:
    """Floating-point operations of forward and backward per token, in one of two conventions.

    causal=False, the published convention (Chowdhery et al., 2022, appendix B): six per weight, the embedding's and
    the norms' included, and attention as if every token saw the whole sequence: `6 N + 12 L H S`. causal=True, what
    is really multiplied: six per weight of a matrix product (no embedding look-up, no norm), and the half of the
    attention that a causal mask leaves. Recomputation counts in neither.
    """
    if not causal:
        return 6 * num_parameters(config) + 12 * config.num_layers * config.hidden_size * seq_length
    return 3 * (config.num_layers * layer_flops(config, seq_length) + head_flops(config))


def layer_flops(config: ModelConfig, seq_length: int) -> int:
    """Operations of one layer's forward pass per token, with the half of the attention that a causal mask leaves."""
    return 2 * _layer_matrices(config) + 2 * config.hidden_size * seq_length


def head_flops(config: ModelConfig) -> int:
    """Operations of the output head's forward pass per token."""
    return 2 * config.vocab_size * config.hidden_size


def _layer_matrices(config: ModelConfig) -> int:
    attention = 2 * config.hidden_size * (config.num_heads + config.num_kv_heads) * config.head_dim
    return attention + 3 * config.hidden_size * config.intermediate_size
