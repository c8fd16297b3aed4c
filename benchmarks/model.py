"""Rows 1 to 3: generation and training of the transformer beside Hugging Face's GPT-2 of the same weights."""

from __future__ import annotations

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from model.gpt import GPT


def hugging_face_twin(gpt: GPT, dropout: float = 0.0) -> GPT2LMHeadModel:
    """GPT2LMHeadModel with the weights of an `arch: gpt2` model; the start token is its last id."""
    config = GPT2Config(
        vocab_size=gpt.vocabulary + 1,
        n_positions=gpt.tokens,
        n_embd=gpt.config.width,
        n_layer=gpt.config.depth,
        n_head=gpt.config.heads,
        add_cross_attention=True,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=gpt.vocabulary,
        eos_token_id=None,
        pad_token_id=gpt.vocabulary,
    )
    twin = GPT2LMHeadModel(config).eval()

    def linear(theirs: nn.Module, ours: nn.Linear) -> None:
        theirs.weight.copy_(ours.weight.T)  # their Conv1D keeps (in, out)
        theirs.bias.copy_(ours.bias)

    def norm(theirs: nn.LayerNorm, ours: nn.LayerNorm) -> None:
        theirs.load_state_dict(ours.state_dict())

    with torch.no_grad():
        twin.transformer.wte.weight.copy_(gpt.embedding.weight)
        twin.transformer.wpe.weight.copy_(gpt.position.weight)
        norm(twin.transformer.ln_f, gpt.norm)
        for theirs, ours in zip(twin.transformer.h, gpt.blocks, strict=True):
            norm(theirs.ln_1, ours.norms[0])
            norm(theirs.ln_cross_attn, ours.norms[1])
            norm(theirs.ln_2, ours.norms[2])
            linear(theirs.attn.c_attn, ours.attention.qkv)
            linear(theirs.attn.c_proj, ours.attention.out)
            linear(theirs.crossattention.q_attn, ours.cross.q)
            linear(theirs.crossattention.c_attn, ours.cross.kv)
            linear(theirs.crossattention.c_proj, ours.cross.out)
            linear(theirs.mlp.c_fc, ours.mlp.up)
            linear(theirs.mlp.c_proj, ours.mlp.down)
    return twin
