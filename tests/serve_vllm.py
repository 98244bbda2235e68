"""One vLLM engine in a process of its own: reads a job, answers its calls, tells what served them.

A job is JSON: ``engine`` (what ``vllm.LLM`` takes) and ``calls``, each with ``prompts`` (token ids), ``sampling``, and
``one_by_one`` or ``forget`` (prompts that are cached) where wanted; ``without`` names what is taken away from vLLM.
"""

import json
import sys
from importlib import import_module
from pathlib import Path


def main(job_path, answer_path):
    from qjl.vllm.compat import LLM, SamplingParams

    job = json.loads(Path(job_path).read_text())
    for home, name in job.get("without", ()):
        delattr(import_module(home), name)
    llm = LLM(enforce_eager=True, skip_tokenizer_init=True, disable_log_stats=False, seed=0, **job["engine"])
    calls = []
    for call in job["calls"]:
        if call.get("forget"):
            assert llm.reset_prefix_cache()
        sampling = SamplingParams(temperature=0, logprobs=0, ignore_eos=True, detokenize=False, **call["sampling"])
        prompts = [{"prompt_token_ids": prompt} for prompt in call["prompts"]]
        groups = [[prompt] for prompt in prompts] if call.get("one_by_one") else [prompts]
        before = counts(llm)
        answers = [answer(one) for group in groups for one in llm.generate(group, sampling, use_tqdm=False)]
        after = counts(llm)
        calls.append({"answers": answers, **{name: after[name] - before.get(name, 0) for name in after}})
    cache = llm.llm_engine.vllm_config.cache_config
    told = {"calls": calls, "served": llm.apply_model(served), "tokens": cache.num_gpu_blocks * cache.block_size}
    Path(answer_path).write_text(json.dumps(told))


def answer(output):
    completion = output.outputs[0]
    logprobs = [next(iter(of_token.values())).logprob for of_token in completion.logprobs]
    return {"tokens": list(completion.token_ids), "logprobs": logprobs}


def counts(llm):
    return {metric.name.split(":")[1]: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}


def served(model):
    """Per layer: the implementation's name, its steps, the KV heads and the bytes of its pool."""
    impls = [module.impl for module in model.modules() if type(module).__name__ == "Attention"]
    ours = [impl for impl in impls if getattr(impl, "paged", None) is not None]
    return {
        "names": sorted({type(impl).__name__ for impl in impls}),
        "steps": min((impl.steps for impl in ours), default=0),
        "layers": len(impls),
        "heads": [impl.num_kv_heads for impl in impls],
        "pool_bytes": sum(impl.paged.nbytes for impl in ours),
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
