"""Small random models of many families, and the steps that tests of the transformers integration share."""

import torch
import transformers
from transformers import AttentionInterface, AutoModelForCausalLM, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from one_layer import pages_of
from qjl.compat import cache_argument

VOCABULARY = 128
WINDOW = 128  # of the layers with a sliding window
PADDING = 9  # a token like any other: the one of a tokenizer embeds to zero, which hides where padding counts
OWN = "an-attention-of-the-users-own"  # of which nobody knows what it computes: it reads what is decoded
SLIDING_THEN_FULL = ["sliding_attention", "full_attention"]


def _users_attention(*args, **kwargs):
    return sdpa_attention_forward(*args, **kwargs)


AttentionInterface.register(OWN, _users_attention)
AttentionMaskInterface.register(OWN, sdpa_mask)


def _sizes(head_dim=32, heads=4, kv_heads=2, layers=2, **settings):
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": 2048,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
        **settings,
    }


def _implied_head_dim(**settings):
    """For families that take head_dim from hidden_size."""
    sizes = _sizes(**settings)
    return sizes | {"hidden_size": sizes.pop("head_dim") * sizes["num_attention_heads"]}


_SLIDING = {"sliding_window": WINDOW, "layer_types": SLIDING_THEN_FULL}
_HYBRID = {
    "layer_types": ["linear_attention", "full_attention"],
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
_GPT_OSS = {
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}
_GEMMA3N = {
    "layers": 4,
    "layer_types": SLIDING_THEN_FULL * 2,
    "sliding_window": WINDOW,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": VOCABULARY,
    "laurel_rank": 8,
    "activation_sparsity_pattern": [0.0] * 4,
}
_CONFIGS = {
    "llama": ("LlamaConfig", _sizes, {}),
    "qwen2": ("Qwen2Config", _sizes, {}),
    "qwen3": ("Qwen3Config", _sizes, {}),
    "mistral": ("MistralConfig", _sizes, {"sliding_window": None}),
    "gemma": ("GemmaConfig", _sizes, {}),
    "gemma2": ("Gemma2Config", _sizes, _SLIDING),
    "gemma3": ("Gemma3TextConfig", _sizes, _SLIDING),
    "gemma3n": ("Gemma3nTextConfig", _sizes, _GEMMA3N),
    "phi": ("PhiConfig", _implied_head_dim, {}),
    "phi3": ("Phi3Config", _implied_head_dim, {"sliding_window": None}),
    "gpt-oss": ("GptOssConfig", _sizes, _SLIDING | _GPT_OSS),
    "cohere": ("CohereConfig", _implied_head_dim, {}),
    "glm": ("GlmConfig", _sizes, {}),
    "smollm3": ("SmolLM3Config", _implied_head_dim, {"no_rope_layers": [1, 0], "use_sliding_window": False}),
    "gpt2": ("GPT2Config", _implied_head_dim, {"n_inner": 96, "kv_heads": 4}),
    "opt": ("OPTConfig", _implied_head_dim, {"ffn_dim": 96, "word_embed_proj_dim": 128, "kv_heads": 4}),
    "qwen3-next": ("Qwen3NextConfig", _sizes, _HYBRID),
    "lfm2": ("Lfm2Config", _sizes, {"layer_types": ["conv", "full_attention"], "block_multiple_of": 32}),
}
FAMILIES = tuple(_CONFIGS)


def config_of(family, **settings):
    name, sizes, own = _CONFIGS[family]
    return getattr(transformers, name)(**sizes(**(own | settings)))


def build(config, dtype=torch.float32, attention=None, seed=0):
    """A random model, the same for the same seed; its logits are spread so that no two are a near tie."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def tiny(family="llama", dtype=torch.float32, attention=None, seed=0, **settings):
    return build(config_of(family, **settings), dtype, attention, seed)


def attending_across(image_size=28):
    """Mllama, whose layer 1 reads an image; its gates are opened, without which an image counts for nothing."""
    text = config_of("llama", layers=3).to_dict() | {
        "cross_attention_layers": [1],
        "model_type": "mllama_text_model",
    }
    text |= {"hidden_size": 128, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "vocab_size": 128}
    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_global_layers": 1, "attention_heads": 2}
    vision |= {
        "image_size": image_size,
        "patch_size": 14,
        "max_num_tiles": 1,
        "intermediate_size": 32,
        "vision_output_dim": 64,
    }
    config = transformers.MllamaConfig(
        text_config=text,
        vision_config=vision | {"supported_aspect_ratios": [[1, 1]], "intermediate_layers_indices": [0]},
        image_token_index=7,
    )
    torch.manual_seed(0)
    model = transformers.MllamaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate" in name:
                parameter.fill_(1)
    return model


def prompt(length=300, batch=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (batch, length), generator=generator)


def left_padded(rows):
    """One batch of prompts ``[1, T]`` of different lengths, as arguments of a model."""
    longest = max(row.shape[1] for row in rows)
    pads = [longest - row.shape[1] for row in rows]
    ids = torch.cat(
        [torch.nn.functional.pad(row, (pad, 0), value=PADDING) for row, pad in zip(rows, pads, strict=True)]
    )
    mask = torch.arange(longest) >= torch.tensor(pads)[:, None]
    return {"input_ids": ids, "attention_mask": mask.long()}


def generate(model, ids, tokens=8, cache=None, **settings):
    """New tokens ``[B, tokens]``, greedy unless told otherwise."""
    given = {} if cache is None else cache_argument(cache)
    settings = {"do_sample": False, "max_new_tokens": tokens, "min_new_tokens": tokens} | given | settings
    return model.generate(ids, **settings)[:, ids.shape[1] :]


def read(model, ids, cache, sizes=(280,)):
    """Logits ``[B, T, V]`` of all tokens, given in steps of these sizes and one by one from there on."""
    sizes = [*sizes, *[1] * (ids.shape[1] - sum(sizes))]
    with torch.no_grad():
        steps = [model(input_ids=step, **cache_argument(cache)).logits for step in ids.split(sizes, dim=1)]
    return torch.cat(steps, dim=1)


def exact(model, ids, sizes=(280,)):
    """The same with transformers' own cache."""
    return read(model, ids, DynamicCache(config=model.config), sizes)


def packed_bytes(cache, layer=-1, row=0):
    """The stored bytes of one row of one layer, a tensor per field of keys and values: ``[pages, H, *shape]``."""
    core = cache.cores[layer]
    return pages_of(core.index, core, row)


def agreement(first, second):
    """Share of stored numbers that are equal: 1 but for codes at the edge of two cells."""
    pairs = list(zip(first, second, strict=True))
    assert all(one.shape == other.shape and one.numel() for one, other in pairs)
    return sum(_equal(one, other) for one, other in pairs) / sum(one.numel() for one, _ in pairs)


def _equal(first, second):
    return int(torch.isclose(first.float(), second.float(), rtol=1e-3, atol=1e-5).sum())


def difference(logits, reference):
    """Relative to the reference."""
    return float((logits - reference).norm() / reference.norm())
