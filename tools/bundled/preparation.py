"""Prepared initialisation: a rough recall circuit in the weights before the first step.

From a standard initialisation an earlier trial had not found the circuit after 700 to 950 steps; here it
starts in place, noisy, and training sharpens it. Layer 0 heads look back 1, 2, 3 and 4 tokens and note a
code of the token seen there. Layers 1 and 2 compare the code at (or before) the query with the notes at
each key, so that every digit of a value can be found from the asked name. Other matrices keep their small
random values.

The residual stream of D dimensions is divided: 0 holds a constant, 1 to D/2 - 1 the token embedding, the
upper half four notes of ``CODE_DIMS`` each. Other letters: d head size.
"""

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

CONSTANT = 2.0
EMBEDDING_STD = 1.0
UNUSED_STD = 0.05
FINAL_NORM = 0.1
NOTE_GAIN = 0.7
MATCH_GAIN = 2.4
COPY_GAIN = 0.4
CODE_DIMS = 16
LOOK_BACK = (1, 2, 3, 4)
OFFSET_AMPLITUDES = (12.0, 8.0, 8.0, 8.0, 8.0, 8.0)
# (layer, KV head, tokens from name to key): the first query head of the group reads the code at the query
# itself, the second one at one token less than the key's, to continue a value that has begun
MATCHES = ((1, 0, 1), (1, 1, 2), (2, 0, 3), (2, 1, 4))


@torch.no_grad()
def prepare(model: LlamaForCausalLM, generator: torch.Generator) -> None:
    """Write the circuit into ``model`` (4 query heads, 2 KV heads, D = 4 d = 8 * CODE_DIMS)."""
    hidden = model.config.hidden_size
    embedding = model.model.embed_tokens.weight
    embedding.normal_(0.0, EMBEDDING_STD, generator=generator)
    embedding[:, 0] = CONSTANT
    embedding[:, hidden // 2 :] *= UNUSED_STD
    model.model.norm.weight.fill_(FINAL_NORM)
    code = _embedding_directions(CODE_DIMS, hidden, generator)
    notes = tuple(torch.eye(hidden)[hidden // 2 :].view(-1, CODE_DIMS, hidden))
    _prepare_look_back(model)
    _prepare_notes(model, code, notes)
    for layer, kv_head, offset in MATCHES:
        _prepare_match(model, layer, kv_head, (code, *notes)[offset - 1 : offset + 1], code)
        _prepare_copy(model, layer, kv_head, _embedding_directions(model.config.head_dim, hidden, generator))


def _prepare_look_back(model: LlamaForCausalLM) -> None:
    """Make layer 0 heads attend 1 to 4 tokens back: constant queries and keys, a RoPE phase apart."""
    config, attention = model.config, model.model.layers[0].self_attn
    head, half = config.head_dim, config.head_dim // 2
    root_mean_square = (EMBEDDING_STD**2 / 2 + CONSTANT**2 / config.hidden_size) ** 0.5
    for pair, amplitude in enumerate(OFFSET_AMPLITUDES):
        size = amplitude**0.5 * head**0.25 * root_mean_square / CONSTANT
        turn_per_token = config.rope_parameters["rope_theta"] ** (-pair / half)
        attention.k_proj.weight[pair::head, 0] = size
        for query_head, offset in enumerate(LOOK_BACK):
            angle = torch.tensor(offset * turn_per_token)
            attention.q_proj.weight[query_head * head + pair, 0] = size * angle.cos()
            attention.q_proj.weight[query_head * head + pair + half, 0] = -size * angle.sin()


def _prepare_notes(model: LlamaForCausalLM, code: Tensor, notes: tuple[Tensor, ...]) -> None:
    """Make each layer 0 head write the code [CODE_DIMS, D] of the token it sees into its own note."""
    head, attention = model.config.head_dim, model.model.layers[0].self_attn
    for kv_head in range(model.config.num_key_value_heads):
        attention.v_proj.weight[kv_head * head : kv_head * head + CODE_DIMS] = code
    for query_head, note in enumerate(notes):
        attention.o_proj.weight[:, query_head * head : query_head * head + CODE_DIMS] = NOTE_GAIN * note.T


def _prepare_match(
    model: LlamaForCausalLM, layer: int, kv_head: int, seen: tuple[Tensor, Tensor], code: Tensor
) -> None:
    """Make the two query heads of a KV head attend to keys whose note equals the query's code.

    Args:
        model: to write into.
        layer: layer index.
        kv_head: KV head index.
        seen: [CODE_DIMS, D] each; reads what stands one token nearer than the key's note, and the key's note.
        code: [CODE_DIMS, D], reads the code of the token itself.
    """
    head, attention = model.config.head_dim, model.model.layers[layer].self_attn
    nearer, note = seen
    slow = torch.arange(head // 2 - CODE_DIMS // 2, head // 2)
    dims = torch.cat([slow, slow + head // 2])
    attention.k_proj.weight[kv_head * head + dims] = MATCH_GAIN * note
    attention.q_proj.weight[2 * kv_head * head + dims] = MATCH_GAIN * code
    attention.q_proj.weight[(2 * kv_head + 1) * head + dims] = MATCH_GAIN * nearer


def _prepare_copy(model: LlamaForCausalLM, layer: int, kv_head: int, directions: Tensor) -> None:
    """Make the second query head of a KV head raise the logit of the token it attends to.

    Args:
        model: to write into.
        layer: layer index.
        kv_head: KV head index.
        directions: [d, D], the part of the embedding that is copied.
    """
    head, attention = model.config.head_dim, model.model.layers[layer].self_attn
    attention.v_proj.weight[kv_head * head : (kv_head + 1) * head] = directions
    attention.o_proj.weight[:, (2 * kv_head + 1) * head : (2 * kv_head + 2) * head] = COPY_GAIN * directions.T


def _embedding_directions(count: int, hidden: int, generator: torch.Generator) -> Tensor:
    """Return [count, D] orthonormal rows that read only the embedding half of the residual."""
    size = hidden // 2 - 1
    directions = torch.zeros(count, hidden)
    directions[:, 1 : hidden // 2] = torch.linalg.qr(torch.randn(size, size, generator=generator)).Q[:count]
    return directions
