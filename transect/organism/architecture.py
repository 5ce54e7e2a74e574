"""The untrained model: a small Llama with grouped-query attention and tied embeddings."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from transect.organism.tokenizer import END_ID, LENGTH, PAD_ID


def untrained(vocabulary_size: int, seed: int) -> LlamaForCausalLM:
    """The model with random float32 weights, the same for the same seed."""
    config = LlamaConfig(
        vocab_size=vocabulary_size,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        initializer_range=0.06,
        tie_word_embeddings=True,
        bos_token_id=END_ID,
        eos_token_id=END_ID,
        pad_token_id=PAD_ID,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).float()
