"""The name of what a model computes: all that changes a number changes it, nothing else does."""

import copy
import functools

import pytest
import torch
import transformers
from torch import nn

from models_for_tests import FAMILIES, config_of, prompt, tiny
from qjl.fingerprints import fingerprint, fingerprint_of_folder, fingerprint_or_none

SPLIT_IN_FILES = {"qwen3-next"}  # experts that transformers joins when it loads them
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 16,
    "long_factor": [2.0] * 16,
    "original_max_position_embeddings": 128,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_same_wherever_the_model_is_loaded(family, tmp_path):
    model = tiny(family)
    name = fingerprint(model)
    assert len(name) == 32
    model.save_pretrained(tmp_path)
    loaded = [
        tiny(family, attention="eager"),
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path),
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16),
        copy.deepcopy(model).to(torch.bfloat16),
        copy.deepcopy(model).train(),
        torch.compile(copy.deepcopy(model)),
    ]
    assert [fingerprint(one) for one in loaded] == [name] * len(loaded)
    of_folder = fingerprint_of_folder(tmp_path)
    assert of_folder is None if family in SPLIT_IN_FILES else of_folder == name


@pytest.mark.parametrize("rope", [None, YARN, DYNAMIC, LONGROPE], ids=["default", "yarn", "dynamic", "longrope"])
def test_running_a_model_leaves_it(rope):
    model = tiny(**({"rope_parameters": rope, "max_position_embeddings": 256} if rope else {}))
    name = fingerprint(model)
    with torch.no_grad():
        model(prompt(400))
        assert fingerprint(model) == name
        model.generate(prompt(20), max_new_tokens=3)
    assert fingerprint(model) == name


IDLE = {
    "bos_token_id": 5,
    "dtype": "bfloat16",
    "id2label": {0: "a", 1: "b", 2: "c"},
    "initializer_range": 0.5,
    "name_or_path": "elsewhere",
    "output_hidden_states": True,
    "transformers_version": "4.0.0",
    "use_cache": False,
}


@pytest.mark.parametrize("entry", IDLE)
def test_an_entry_that_changes_nothing_leaves_it(entry):
    model = tiny()
    name = fingerprint(model)
    setattr(model.config, entry, IDLE[entry])
    assert fingerprint(model) == name


CHANGES = {
    "llama": {
        "rms_norm_eps": 1e-3,
        "hidden_act": "gelu",
        "max_position_embeddings": 4096,
        "an_entry_of_the_future": 0.5,
        **{
            f"rope_parameters.{name}": {"rope_type": "default", "rope_theta": 1e4} | change
            for name, change in {
                "theta": {"rope_theta": 1e3},
                "yarn": YARN,
                "yarn's length": YARN | {"original_max_position_embeddings": 256},
                "linear": {"rope_type": "linear", "factor": 4.0},
            }.items()
        },
    },
    "gemma2": {
        "sliding_window": 64,
        "attn_logit_softcapping": 20.0,
        "final_logit_softcapping": 20.0,
        "query_pre_attn_scalar": 100,
        "layer_types": ["full_attention", "full_attention"],
    },
    "gpt-oss": {"num_experts_per_tok": 2},
    "phi": {"partial_rotary_factor": 0.25},
    "cohere": {"logit_scale": 0.5},
}


@pytest.mark.parametrize(("family", "entry"), [(family, entry) for family, some in CHANGES.items() for entry in some])
@pytest.mark.parametrize("is_loaded", [False, True], ids=["built so", "changed in place"])
def test_an_entry_that_changes_what_is_computed_changes_it(family, entry, is_loaded):
    changed, before = tiny(family), tiny(family)
    name = entry.partition(".")[0]
    if is_loaded:
        setattr(changed.config, name, CHANGES[family][entry])
    else:
        config = config_of(family)
        setattr(config, name, CHANGES[family][entry])
        changed = transformers.AutoModelForCausalLM.from_config(config)
        changed.load_state_dict(before.state_dict())
    assert fingerprint(changed) != fingerprint(before)


def in_weights(model):
    model.model.layers[1].mlp.up_proj.weight.data += 0.01


def in_frequencies(model):
    model.model.rotary_emb.inv_freq[-1] /= 4


def in_rope_parameters(model):
    model.config.rope_parameters["rope_theta"] = 5e5


def in_scaling(model):
    model.model.layers[0].self_attn.scaling *= 2


def in_norm(model):
    model.model.norm.variance_epsilon = 1e-2


def in_activation(model):
    model.model.layers[0].mlp.act_fn = nn.GELU()


def in_layers(model):
    model.model.layers = model.model.layers[:1]


BY_HAND = [in_weights, in_frequencies, in_rope_parameters, in_scaling, in_norm, in_activation, in_layers]


@pytest.mark.parametrize("change", BY_HAND)
def test_what_is_changed_by_hand_changes_it(change):
    model = tiny()
    name = fingerprint(model)
    change(model)
    assert fingerprint(model) != name


def test_models_have_names_of_their_own():
    assert len({fingerprint(model) for model in (tiny(), tiny(seed=1), tiny("qwen2"), tiny("mistral"))}) == 4


# Adapters, as PEFT keeps them


class Lora(nn.Module):
    def __init__(self, base_layer, **scaling):
        super().__init__()
        self.base_layer = base_layer
        sizes = base_layer.in_features, base_layer.out_features
        self.lora_A = nn.ModuleDict({name: nn.Linear(sizes[0], 2, bias=False) for name in scaling})
        self.lora_B = nn.ModuleDict({name: nn.Linear(2, sizes[1], bias=False) for name in scaling})
        self.scaling = scaling
        self.active_adapters = list(scaling)
        self.disable_adapters = self.merged = False

    def forward(self, x):
        added = (self.lora_B[name](self.lora_A[name](x)) * self.scaling[name] for name in self.active_adapters)
        return sum(added, self.base_layer(x))


class Saved(nn.Module):
    """A module that an adapter replaces."""

    def __init__(self, original_module, name):
        super().__init__()
        self.original_module = original_module
        self.modules_to_save = nn.ModuleDict({name: copy.deepcopy(original_module)})
        self.active_adapters, self.disable_adapters = [name], False


def adapted(**scaling):
    model = tiny()
    torch.manual_seed(3)
    model.model.layers[0].self_attn.q_proj = Lora(model.model.layers[0].self_attn.q_proj, **scaling)
    return model, model.model.layers[0].self_attn.q_proj


def test_adapters_at_work_are_part_of_it():
    model, lora = adapted(first=1.0)
    names = [fingerprint(tiny()), fingerprint(model)]
    lora.scaling["first"] = 2.0
    names.append(fingerprint(model))
    lora.lora_B["first"].weight.data += 0.1
    names.append(fingerprint(model))
    assert len(set(names)) == 4


@pytest.mark.parametrize("state", [{"disable_adapters": True}, {"merged": True}, {"active_adapters": []}])
def test_adapters_at_rest_are_not(state):
    model, lora = adapted(first=1.0)
    vars(lora).update(state)
    assert fingerprint(model) == fingerprint(tiny())


def test_the_adapter_that_is_chosen_counts():
    model, lora = adapted(first=1.0, second=1.0)
    names = []
    for active in (["first"], ["second"], ["first", "second"]):
        lora.active_adapters = active
        names.append(fingerprint(model))
    assert len(set(names)) == 3
    lora.active_adapters = ["first"]
    del lora.lora_A["second"], lora.lora_B["second"], lora.scaling["second"]
    assert fingerprint(model) == names[0]


def test_a_module_that_an_adapter_replaces():
    model = tiny()
    model.lm_head = Saved(model.lm_head, "tuned")
    assert fingerprint(model) == fingerprint(tiny())
    model.lm_head.modules_to_save["tuned"].weight.data += 0.1
    assert fingerprint(model) != fingerprint(tiny())
    model.lm_head.disable_adapters = True
    assert fingerprint(model) == fingerprint(tiny())


# What has none


def sharded(model):
    model.lm_head.weight.device_mesh = "two processes"


def offloaded(model):
    model.lm_head.to("meta")


def partitioned(model):
    model.lm_head.weight.ds_id = 1


def packed(model):
    model.lm_head = torch.ao.nn.quantized.dynamic.Linear(64, 128)


def patched(model):
    attention = model.model.layers[0].self_attn
    attention.forward = functools.partial(attention.forward, use_cache=True)


def steered(model):
    model.model.layers[0].register_forward_hook(lambda module, args, output: output)


def prompted(model):
    model.active_peft_config = transformers.PreTrainedConfig(is_prompt_learning=True)


REFUSED = {
    sharded: "lm_head.weight is sharded over processes",
    offloaded: "lm_head.weight is offloaded",
    partitioned: "lm_head.weight is sharded over processes",
    packed: "lm_head._packed_params packs its weights where they cannot be read",
    patched: "model.layers.0.self_attn has another forward function than its class",
    steered: "model.layers.0 has a forward hook of test_fingerprints, which may change what it computes",
    prompted: "an adapter puts tokens of its own before each prompt",
}


@pytest.mark.parametrize("change", REFUSED)
def test_what_cannot_be_read_has_none_and_says_why(change, refuses):
    model = tiny()
    change(model)
    with refuses(f"{REFUSED[change]}, so that nothing tells this model from others"):
        fingerprint(model)
    assert fingerprint_or_none(model) is None


def test_what_torch_compile_makes_of_a_function_is_no_other_function():
    model = tiny()
    name = fingerprint(model)
    model.forward = torch.compile(model.forward)
    model.model.layers[0] = torch.compile(model.model.layers[0])
    assert fingerprint(model) == name


def test_a_hook_that_transformers_or_torch_sets_is_no_other_function():
    model = tiny()
    name = fingerprint(model)
    model.enable_input_require_grads()
    assert fingerprint(model) == name
