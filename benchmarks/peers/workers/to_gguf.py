"""Write a Llama checkpoint of transformers as GGUF in float16, the one file that OpenVINO GenAI loads without torch.

Runs in the peer's environment (benchmarks/peers/openvino_genai.sh). The tokenizer is a stand-in of one word per id:
the benchmark speaks in token ids.

    out/peers/openvino/bin/python benchmarks/peers/workers/to_gguf.py FOLDER FILE
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gguf
import numpy as np
from safetensors import safe_open

NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Return rows in the order of GGUF, which rotates neighbours; transformers rotates halves."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def renamed(name: str) -> str:
    if name in TOP:
        return TOP[name]
    _, _, layer, *rest = name.split(".")
    return f"blk.{layer}.{NAMES['.'.join(rest[:-1])]}.{rest[-1]}"


def describe(writer: gguf.GGUFWriter, config: dict) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)


def add_tokenizer(writer: gguf.GGUFWriter, vocabulary: int) -> None:
    """Write a stand-in; without a control token and a merge of known tokens the pipeline does not compile."""
    alphabet = [chr(code) for code in range(33, 127)]
    tokens = alphabet + [f"t{number}" for number in range(vocabulary - len(alphabet))]
    kinds = [gguf.TokenType.NORMAL] * vocabulary
    kinds[1] = kinds[2] = gguf.TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(["t 0"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def main(folder: Path, path: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    partial = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, "llama")
    describe(writer, config)
    add_tokenizer(writer, config["vocab_size"])
    heads = {"attn_q.": config["num_attention_heads"], "attn_k.": config["num_key_value_heads"]}
    for part in sorted(folder.glob("*.safetensors")):
        with safe_open(part, "np") as weights:
            for name in weights.keys():  # noqa: SIM118  # the file is no dictionary
                weight, new = weights.get_tensor(name), renamed(name)
                for kind, count in heads.items():
                    if kind in new:
                        weight = interleaved(weight, count)
                writer.add_tensor(new, weight.astype(np.float32 if weight.ndim == 1 else np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
