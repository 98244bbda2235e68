"""A few rows of every kind, as our commands write them."""

from qjl.lab import rows

VERSIONS = {"qjl": "0.1.0", "torch": "2.13.0"}
BITS = {"full": 16.0, "b3": 2.625, "b2": 2.125, "kivi-2": 3.0}
OURS = ("full", "b3", "b2")
TEXT = "25083846a9069b84"
HERE = {"machine": "a machine", "versions": VERSIONS, "isa": "avx2", "threads": 1, "device": "cpu", "dtype": "float32"}


def preset(name, **fields):
    """What rows of evaluations share."""
    bits = {"bits": BITS[name], "bits_keys": BITS[name], "bits_values": BITS[name]}
    return {
        "model": "tiny",
        "dtype": "float32",
        "preset": name,
        "settings": {"key": {"method": "balanced", "num_bits": 3}, "value": {"method": "uniform"}, "recent": 32},
        "fitted_to": TEXT,
        "versions": VERSIONS,
        "source": "this project" if name in OURS else "arXiv:2402.02750",
        "recent": 32,
        **bits,
        **fields,
    }


def frontier(name, kl, kl_se=0.001, **fields):
    protocol = {"prefix": 512, "decode": 256, "chunks": 4, "seeds": 3, "recent": 32, "retrieval": False, "text": TEXT}
    fields = {"case": "frontier"} | fields
    found = {"kl": kl, "kl_se": kl_se, "ppl_full": 20.0, "dppl_percent": 1.5, "top1": 0.9, "retrieval": None}
    size = {"bits_with_window": 5.0, "prefix": 512, "decode": 256, "chunks": 4}
    return preset(name, protocol=protocol, **found, **size) | fields


def distortion(name, layer, role, error, theory=None):
    where = {"case": "distortion", "text": TEXT, "tokens": 320, "rows": 2, "layer": layer, "role": role}
    return preset(name, **where, error=error, error_se=error / 10, theory=theory)


def perplexity(name, context, ppl, ppl_full=20.0):
    lost = {"kl": 0.01, "kl_se": 0.001, "dppl_percent_se": 0.5}
    return preset(name, case="perplexity", text=TEXT, context=context, chunks=2, ppl=ppl, ppl_full=ppl_full, **lost)


def seed(name, number, kl):
    return preset(name, case="seeds", text=TEXT, seed=number, kl=kl, prefix=256, decode=128, chunks=2)


def haystack(name, context, depth, found, task="needle"):
    where = {"context": context, "depth": depth, "seed": 0}
    return preset(name, case="haystack", task=task, **where, found=found, read_as_codes=0.9)


def problems(name, right):
    accuracy = right.count("1") / len(right)
    protocol = {"max_new_tokens": 384, "batch": 25, "recent": None, "seed": 0}
    found = {"accuracy": accuracy, "accuracy_se": (accuracy * (1 - accuracy) / len(right)) ** 0.5, "right": right}
    asked = {"case": "problems", "task": "gsm8k", "n": len(right), "protocol": protocol}
    return preset(name, **asked, **found, tokens=180.5, unfinished=0.02, read_as_codes=0.9)


def harness(name, task, metric, value, value_se=0.01):
    protocol = {"recent": 32, "chunk": None, "batch": 8, "seed": 0, "text": TEXT}
    found = {"task": task, "metric": metric, "filter": "none", "n": 100, "shots": 5, "limit": 100}
    fields = {"case": "harness"}
    asked = {"task": task, "shots": 5, "limit": 100, "include": None, "metadata": {"max_seq_lengths": [1024]}}
    fields |= {"value": value, "value_se": value_se, "read_as_codes": 0.9}
    return preset(name, protocol=protocol, **found, **fields, asked=asked)


def layer(case, name, tokens, ms, **fields):
    """What benchmarks of a layer share."""
    shape = {"head_dim": 64, "kv_heads": 2, "group": 4, "batch": 1, "repeats": 3}
    found = {"bytes": 1000 * tokens, "bandwidth_gbs": 20.0, "fraction_of_bandwidth": 0.1, "max_error": 2e-5}
    return {"case": case, "backend": "cpu", "preset": name, "tokens": tokens, "ms": ms} | shape | found | HERE | fields


def decode(name, tokens, ms):
    work = {"operations": 1e4 * tokens, "peak_gflops": 90.0, "kernel_ms": 0.8 * ms}
    ratio = {"ratio_torch_bf16": 2.5, "spread_torch_bf16": [2.4, 2.6], "ms_torch_bf16": 2.5 * ms}
    return layer("decode", name, tokens, ms, **work, **ratio)


def scan(name, bits):
    ratio = {"ratio_popcount": 1.2, "spread_popcount": [1.1, 1.3], "ms_popcount": 2.0}
    return layer("scan", name, 32768, 1.7, bits_per_key=bits, ns_per_vector=6.6, **ratio)


def encode(role, tokens, ms):
    cost = {"bits_per_vector": 200.0, "ns_per_vector": 900.0, "prefill_ms": 50 * ms, "share_of_prefill": 0.02}
    return layer("encode", "b3", tokens, ms, role=role, ratio_torch_bf16=None, **cost)


def static(kernel, **fields):
    where = {"capability": 90, "gpu": "H100", "statistics": "smollm2", "layers": 29, "preset": "b3"}
    shape = {"head_dim": 64, "kv_heads": 3, "group": 3, "batch": 8, "tokens": 32768}
    room = {"warps": 4, "registers": 255, "spilled_bytes": 320, "shared_bytes": 27648}
    grid = {"programs": 264, "programs_per_processor": 2, "filled": 1.0, "loop_instructions": {"ALU": 400, "IMAD": 90}}
    loop = {"reads": "codes", "tokens_per_tile": 64, "thread_instructions_per_token_head": 8524.0}
    cycles = {"bandwidth_cycles_per_token_head": 3.1, "model_cycles_per_token_head": {"opt": 8, "mid": 9, "pes": 11}}
    ratio = {"predicted_ratio_bf16": 2.1, "predicted_ratio_bf16_range": [1.7, 2.4]}
    told = where | shape | room | grid | loop | cycles | ratio
    return {"case": "static", "kernel": kernel, "versions": VERSIONS} | told | fields


NO_LOOP = dict.fromkeys(
    [key for key in static("x") if key == "reads" or key.endswith(("_token_head", "_tile", "_bf16", "_range"))]
)
OF_CPU = {"machine": "a machine", "versions": VERSIONS, "isa": "avx2"}


def overhead(name):
    times = {"python_us_per_layer_token": 20.0, "kernel_us_per_layer_token": 70.0, "python_us_per_block": 1500.0}
    turns = {"rows_us_per_layer": 500.0, "server_turn_ms": 18.0, "plan_us": 600.0}
    return {"case": "overhead", "preset": name, "layers": 30, "tokens": 4096, "repeats": 256} | times | turns | OF_CPU


def whole(case, name, tokens, ms, **fields):
    """What benchmarks of whole models share."""
    backend = "cpu" if name.startswith("b") else None
    return (
        {"case": case, "backend": backend, "preset": name, "tokens": tokens, "ms": ms, "model": "toy"} | HERE | fields
    )


def memory(name, tokens, ms):
    peaks = {"cache_bytes": 100 * tokens, "peak_bytes": 200 * tokens, "prefill_peak_bytes": None}
    ratio = {"ratio_dynamic": 1.5, "spread_dynamic": [1.4, 1.6], "smaller_than_dynamic": 4.0}
    return whole("memory", name, tokens, ms, prefill_ms=10 * ms, steps=4, repeats=2, **peaks, **ratio)


def throughput(name, batch, is_largest=False):
    facts = {"cache_bytes": 1000 * batch, "peak_bytes": 2000 * batch, "memory": 1 << 24, "steps": 2}
    speed = {"batch": batch, "tokens_per_second": 100.0 * batch, "ratio_dynamic": 2.0 if is_largest else None}
    return whole("throughput", name, 256, 10.0, is_largest=is_largest, **facts, **speed)


def generate(name, tokens, ms):
    ratio = {"ratio_dynamic_bf16": 1.1, "spread_dynamic_bf16": [1.0, 1.2]}
    attention = {"attention_ms_per_layer": ms / 100, "tokens_per_second": 1e3 / ms, "repeats": 9}
    return whole("generate", name, tokens, ms, model="smollm2", **attention, **ratio)


def serving(name, **fields):
    load = {"clients": 64, "requests": 100, "words": 150, "answer": 16, "slots": 16, "queue": 32}
    waits = {"first_token_seconds": {"p50": 1.5, "p99": 4.0}, "request_seconds": {"p50": 2.0, "p99": 5.0}}
    memory = {"peak_bytes": [10**9, 10**9], "resident_bytes": [10**9] * 4, "smaller_than_full": 2.5}
    found = {"statuses": {"200": 98, "429": 7, "broken": 2}, "leaks": 1, "repeated": 0.9, "exit_code": 0}
    told = {
        "seconds": 60.0,
        "tokens_per_second": 250.0,
        "processor_seconds": 50.0,
        "backend": None if name == "full" else "cpu",
    }
    return {"case": "serving", "preset": name, "model": "tiny"} | load | waits | memory | found | told | HERE | fields


def vllm(name, **fields):
    asked = {"requests": 4, "context": 4032, "steps": 48}
    times = {"step_seconds": 0.08, "step_cpu_seconds": 0.08, "prefill_seconds": 12.0, "prefill_cpu_seconds": 12.0}
    told = {"right": 1.0, "attention": ["an attention"], "cached_tokens": 46592 if name == "full" else 284032}
    backend = {"backend": None if name == "full" else "cpu"}
    return {"case": "vllm", "preset": name, "model": "tiny"} | asked | times | told | backend | HERE | fields


def family(name, verdict, why=None):
    right = {"max_error_full": 1e-6, "kl": 0.01, "kl_other": 0.02}
    asked = {"task": "text", "model_class": "Model", "preset": "b3", "versions": VERSIONS}
    return {"case": "models", "family": name, "verdict": verdict, "why": why} | asked | right


EVERY_KIND = {
    "frontier": [
        frontier("b3", 0.010, kl_of_chunks=[0.012, 0.008, 0.011, 0.009]),
        frontier("full", 0.0, None),
        frontier("b2", 0.030),
        frontier("kivi-2", 0.2, kl_of_chunks=[0.3, 0.1, 0.25, 0.15]),
    ],
    "distortion": [
        distortion(name, index, role, error, theory if role == "score" else None)
        for name, error, theory in (("b3", 0.01, None), ("kivi-2", 0.03, 0.028))
        for index in (0, 1)
        for role in ("score", "output")
    ],
    "perplexity": [
        perplexity(name, context, ppl) for name, ppl in (("full", 20.0), ("b3", 20.2)) for context in (512, 1024)
    ],
    "seeds": [seed("b3", 0, 0.010), seed("b3", 1, 0.012), seed("kivi-2", 0, 0.2)],
    "haystack": [
        haystack(name, context, depth, found)
        for name, found in (("full", 1.0), ("b3", 1.0), ("kivi-2", 0.5))
        for context in (1024, 2048)
        for depth in (0.25, 0.75)
    ],
    "problems": [problems("full", "1101"), problems("b3", "1101"), problems("kivi-2", "0001")],
    "harness": [harness(name, "piqa", "acc", value) for name, value in (("full", 0.66), ("b3", 0.65), ("b2", 0.60))],
    "decode": [decode("b3", 1024, 1.0), decode("b3", 4096, 2.0)],
    "scan": [scan("signs-128", 128), scan("levels-2", 128)],
    "encode": [encode(role, tokens, tokens / 1e3) for role in ("key", "value") for tokens in (1024, 2048)],
    "static": [
        static("attends"),
        static("joins", **NO_LOOP, why="It has no loop over tokens."),
        static("attends", preset="b2", model_cycles_per_token_head=None, why="The model does not know it."),
    ],
    "overhead": [overhead("b3"), overhead("b2")],
    "memory": [memory(name, tokens, 5.0) for name in ("b3", "dynamic") for tokens in (256, 512)],
    "throughput": [
        throughput("dynamic", 1),
        throughput("dynamic", 2, True),
        throughput("b3", 1),
        throughput("b3", 8, True),
    ],
    "generate": [generate(name, tokens, 80.0) for name in ("b3 bf16", "dynamic bf16") for tokens in (512, 2048)],
    "vllm": [vllm(name, step_seconds=seconds) for name, seconds in (("full", 0.1), ("b3", 0.08)) * 2],
    "serving": [serving("b3"), serving("full", peak_bytes=None, resident_bytes=[], smaller_than_full=None)],
    "models": [family("llama", "works"), family("mamba", "refused", "it has no keys")],
}


def typed(*found):
    """As the report reads them."""
    return [rows.typed(row) for row in found]
