"""From a GGUF file to an engine, with a tiny one written here."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from serving.config import EngineConfig, ModelConfig
from serving.deploy.model.prepare import fetch_model
from serving.engine.manifest import EngineManifest
from serving.engine.torch.build import build_engine
from serving.errors import ModelError
from tokenizers import Tokenizer, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
HIDDEN, LAYERS, HEADS, KV_HEADS, FEED_FORWARD = 64, 2, 4, 2, 128


def write_gguf(path: Path, *, pre: str = "smollm", architecture: str = "llama") -> Path:
    """A random two-layer Llama; its vocabulary has digits, and runs of spaces as one token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = ["Ġ Ġ", "h e", "l l", "he ll"]
    tokens = [*SPECIAL, *alphabet, *(merge.replace(" ", "") for merge in merges)]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(4096)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    random = np.random.default_rng(0)
    kv = HIDDEN * KV_HEADS // HEADS
    shapes = {"token_embd": (len(tokens), HIDDEN), "output_norm": (HIDDEN,)}
    for layer in range(LAYERS):
        shapes |= {
            f"blk.{layer}.attn_norm": (HIDDEN,),
            f"blk.{layer}.attn_q": (HIDDEN, HIDDEN),
            f"blk.{layer}.attn_k": (kv, HIDDEN),
            f"blk.{layer}.attn_v": (kv, HIDDEN),
            f"blk.{layer}.attn_output": (HIDDEN, HIDDEN),
            f"blk.{layer}.ffn_norm": (HIDDEN,),
            f"blk.{layer}.ffn_gate": (FEED_FORWARD, HIDDEN),
            f"blk.{layer}.ffn_up": (FEED_FORWARD, HIDDEN),
            f"blk.{layer}.ffn_down": (HIDDEN, FEED_FORWARD),
        }
    for name, shape in shapes.items():
        values = random.normal(scale=0.2, size=shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", values)
        else:  # quantized, as people's files are
            packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(f"{name}.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def build(path: Path, out: Path) -> EngineManifest:
    manifest = fetch_model(ModelConfig(id=str(path)), out / "model", report=[].append)
    engine = EngineConfig(device="cpu", dtype="float32")
    return build_engine(
        manifest, out / "engine", engine=engine, fingerprint="f", progress=[].append
    )


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    built = build(write_gguf(folder / "tiny.gguf"), folder)
    assert built.check.kind == "logits"
    return folder / "engine"


def test_engine_computes_what_the_gguf_does(out: Path) -> None:
    manifest = json.loads((out / "engine.json").read_text())
    assert manifest["check"]["max_abs_diff"] == 0.0
    assert manifest["check"]["argmax_agreement"] == 1.0
    assert manifest["kv_layout"]["num_kv_heads"] == KV_HEADS
    assert manifest["model_max_len"] == 4096


def test_special_tokens_are_the_files_own(out: Path) -> None:
    manifest = json.loads((out / "engine.json").read_text())
    assert (manifest["eos_token_ids"], manifest["pad_token_id"]) == ([2], 2)
    loaded = PreTrainedTokenizerFast.from_pretrained(out)
    assert (loaded.bos_token, loaded.eos_token, loaded.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert loaded.chat_template == TEMPLATE


def test_digits_are_split_from_the_space_before_them(out: Path) -> None:
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    assert tokenizer.encode("hell  42").tokens == ["hell", "ĠĠ", "4", "2"]


@pytest.mark.parametrize("text", ["hello ▁ world", "日本 🙂", "a .b", "  two\n\nlines "])
def test_text_survives_encoding_and_decoding(out: Path, text: str) -> None:
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.parametrize(("pre", "architecture"), [("llama-bpe", "llama"), ("gpt-2", "gemma3")])
def test_tokenizer_that_does_not_convert_exactly_is_refused(
    tmp_path: Path, pre: str, architecture: str
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", pre=pre, architecture=architecture)
    with pytest.raises(ModelError, match="cannot be converted exactly"):
        build(path, tmp_path)


def test_damaged_gguf_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf")
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ModelError, match="damaged"):
        build(path, tmp_path)
