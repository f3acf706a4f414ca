"""What PEFT loads and computes as plain LoRA is served as PEFT computes it; all else is refused, with the reason.

Every case is a folder on which PEFT and the engine are set, over the same tiny base model.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from peft_folders import (
    LINEARS,
    PREFIX,
    SIZES,
    Base,
    Tensors,
    assert_refused,
    assert_served,
    logits,
    loud,
    make_base,
    merged,
    pairs,
    peft,
    write,
)
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from lorauter.adapters.weights import TARGETS, LoraWeights, ModelShape
from lorauter.errors import AdapterRejected


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> Iterator[dict[str, Base]]:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("bases")
    made = {
        "llama": make_base(LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False)), folder / "llama"),
        "llama-tied": make_base(LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)), folder / "tied"),
        "qwen2": make_base(Qwen2ForCausalLM(Qwen2Config(**SIZES)), folder / "qwen2"),
    }
    yield made
    for base in made.values():
        base.engine.close()


@pytest.fixture
def base(bases) -> Base:
    return bases["llama"]


@dataclass(frozen=True)
class Case:
    config: dict[str, Any] = field(default_factory=dict)
    tensors: Callable[[], Tensors] = pairs
    told: str | None = None
    base: str = "llama"


def everything() -> Tensors:
    return pairs(*TARGETS)


def with_extra(**extra: torch.Tensor) -> Callable[[], Tensors]:
    return lambda: {**pairs(), **{PREFIX + key.replace("__", "."): value for key, value in extra.items()}}


QUERY = "model__layers__0__self_attn__q_proj__"
LEFT_OUT = "modules that the configuration leaves out"
SERVED = {
    "plain": Case(),
    "qwen2": Case(base="qwen2"),
    "tied": Case(base="llama-tied"),
    "all targets": Case({"target_modules": list(TARGETS)}, everything),
    "one target of many": Case({"target_modules": ["q_proj"]}, lambda: loud(pairs(), "v_proj"), LEFT_OUT),
    "full names": Case(
        {"target_modules": ["model.layers.0.self_attn.q_proj", "layers.1.self_attn.v_proj"]},
        lambda: {**loud(pairs(), "layers.0", "v_proj"), **loud(pairs(), "layers.1", "q_proj")},
        LEFT_OUT,
    ),
    "a name's end alone is no target": Case(
        {"target_modules": ["q_proj", "_proj", "proj"]}, lambda: loud(pairs(), "v_proj"), LEFT_OUT
    ),
    "unknown targets": Case({"target_modules": ["q_proj", "v_proj", "c_attn", "Q_PROJ"]}),
    "many targets": Case(
        {"target_modules": [f"model.layers.{i}.self_attn.{t}" for i in range(40) for t in ("q_proj", "v_proj")]}
    ),
    "all-linear": Case({"target_modules": "all-linear"}, everything),
    "All-Linear": Case({"target_modules": "All-Linear"}, everything),
    "no targets named": Case(
        {"target_modules": None}, lambda: loud(pairs("q_proj", "v_proj", "o_proj"), "o_proj"), LEFT_OUT
    ),
    "targets missing": Case({"target_modules": ...}),
    "an expression": Case({"target_modules": r".*\.(q|v)_proj"}),
    "an expression for a layer": Case(
        {"target_modules": r"model\.layers\.1\.self_attn\.(q|v)_proj"}, lambda: loud(pairs(), "layers.0"), LEFT_OUT
    ),
    "an expression with lookahead": Case(
        {"target_modules": r"^(?!.*layers\.0).*(?:q_proj|v_proj)$"}, lambda: loud(pairs(), "layers.0"), LEFT_OUT
    ),
    "an output layer without tensors": Case({"target_modules": ["q_proj", "v_proj", "lm_head", "embed_tokens"]}),
    "a layer": Case({"layers_to_transform": 1}, lambda: loud(pairs(), "layers.0"), LEFT_OUT),
    "layers": Case({"layers_to_transform": [0]}, lambda: loud(pairs(), "layers.1"), LEFT_OUT),
    "a layer, and modules by their whole path": Case(
        {"layers_to_transform": 1, "target_modules": ["model.layers.0.self_attn.q_proj", "v_proj"]},
        lambda: {**loud(pairs(), "layers.0", "v_proj"), **loud(pairs(), "layers.1", "q_proj")},
        LEFT_OUT,
    ),
    "no layers": Case({"layers_to_transform": []}),
    "layers and a pattern": Case(
        {"layers_to_transform": [1], "layers_pattern": "layers"}, lambda: loud(pairs(), "layers.0"), LEFT_OUT
    ),
    "layers and patterns": Case(
        {"layers_to_transform": [1], "layers_pattern": ["h", "lay.*"]}, lambda: loud(pairs(), "layers.0"), LEFT_OUT
    ),
    "layers and an empty pattern": Case(
        {"layers_to_transform": [1], "layers_pattern": ""}, lambda: loud(pairs(), "layers.0"), LEFT_OUT
    ),
    "excluded": Case({"exclude_modules": ["v_proj"]}, lambda: loud(pairs(), "v_proj"), LEFT_OUT),
    "excluded by name": Case(
        {"exclude_modules": ["model.layers.0.self_attn.v_proj"]},
        lambda: loud(pairs(), "layers.0", "v_proj"),
        LEFT_OUT,
    ),
    "excluded by expression": Case({"exclude_modules": r".*layers\.0.*"}, lambda: loud(pairs(), "layers.0"), LEFT_OUT),
    "all-linear but": Case(
        {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
        lambda: loud(everything(), "down_proj"),
        LEFT_OUT,
    ),
    "nothing excluded": Case({"exclude_modules": []}),
    "rank pattern": Case({"rank_pattern": {"q_proj": 2}}, lambda: {**pairs("v_proj"), **pairs("q_proj", rank=2)}),
    "rank pattern by expression": Case(
        {"rank_pattern": {r"layers\.0\..*": 6}, "r": 2},
        lambda: {**pairs(layers=[0], rank=6), **pairs(layers=[1], rank=2)},
    ),
    "alpha pattern": Case({"alpha_pattern": {"^q_proj": 100, "v_proj": 3.5}}),
    "alpha pattern, the first counts": Case({"alpha_pattern": {".*q_proj": 2, "q_proj": 90}}),
    "alpha pattern by expression": Case({"alpha_pattern": {r"layers\.[01]\.self_attn\.(q|v)_proj": 3}}),
    "rslora": Case({"use_rslora": True, "alpha_pattern": {"q_proj": 3}}),
    "alpha missing": Case({"lora_alpha": ...}),
    "rank missing": Case({"r": ...}, lambda: pairs(rank=8)),
    "a fraction of alpha": Case({"lora_alpha": 0.3}),
    "alpha 0": Case({"lora_alpha": 0}),
    "alpha below 0": Case({"lora_alpha": -6, "alpha_pattern": {"v_proj": -1}}),
    "rank 1": Case({"r": 1}, lambda: pairs(rank=1)),
    "fan_in_fan_out": Case({"fan_in_fan_out": True}),
    "bias lora_only": Case({"bias": "lora_only"}),
    "bias all": Case({"bias": "all"}),
    "bias all, on a model with biases": Case({"bias": "all"}, base="qwen2"),
    "biases of no module": Case(
        {"bias": "all"},
        with_extra(**{QUERY + "bias": torch.ones(16) * 9, QUERY + "base_layer__bias": torch.ones(16) * 9}),
        "the base model does not have",
    ),
    "biases that PEFT does not look at": Case(
        {"bias": "all"}, with_extra(**{QUERY + "bias": torch.ones(16) * 9}), "no part of the model", base="qwen2"
    ),
    **{
        f"init {init!r}": Case({"init_lora_weights": init})
        for init in (True, False, None, "gaussian", "Gaussian", "eva")
    },
    **{f"init {init!r}": Case({"init_lora_weights": init}) for init in ("orthogonal", "mica", "MiCA")},
    "init 'lora_ga'": Case({"init_lora_weights": "lora_ga", "lora_ga_config": {"direction": "ArBr"}}, told="LoRA-GA"),
    "velora": Case({"velora_config": {"num_groups": 4, "scale": 1.0, "init_type": "random"}}),
    "velora's buffers": Case(
        {"velora_config": {"num_groups": 4}}, with_extra(**{QUERY + "lora_velora_embed": torch.ones(4)})
    ),
    "monteclora": Case({"monteclora_config": {"num_samples": 4}}),
    "left-over settings of other initialisations": Case(
        {
            "corda_config": {"corda_method": "kpm"},
            "eva_config": {"rho": 2.0},
            "lora_ga_config": {"scale": "stable"},
            "loftq_config": {"loftq_bits": 4},
        }
    ),
    "settings of training": Case(
        {"lora_dropout": 0.5, "inference_mode": True, "revision": "x", "use_qalora": True, "qalora_group_size": 4}
    ),
    "settings of the run": Case({"runtime_config": {"ephemeral_gpu_offload": True}, "ensure_weight_tying": True}),
    **{f"task {task}": Case({"task_type": task}) for task in ("CAUSAL_LM", "SEQ_CLS", "FEATURE_EXTRACTION")},
    "a classifier's head": Case(
        {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}, with_extra(score__weight=torch.ones(2, 16)), "no part"
    ),
    "keys of nobody": Case({"competition_metadata": {"id": 1}, "peft_version": "0.18.1"}, told="competition_metadata"),
    "keys of nobody, of an older PEFT": Case({"unsloth_fixed": True}, told="unsloth_fixed"),
    "keys of a newer PEFT that are off": Case({"use_warp": False, "warp_config": None, "peft_version": "0.99.0"}),
    "off": Case({"use_dora": False, "lora_bias": False, "layer_replication": None, "target_parameters": []}),
    ".default. in the names": Case({}, lambda: pairs(infix=".default")),
    "layers without tensors": Case({}, lambda: pairs(layers=[1]), "no tensors for 2 of the 4 modules"),
    "modules without tensors": Case(
        {"target_modules": ["q_proj", "v_proj", "up_proj"]}, told="2 of the 6 .*layers.0.mlp.up_proj"
    ),
    "layers without tensors, orthogonal": Case(
        {"init_lora_weights": "orthogonal"}, lambda: pairs(layers=[0]), "no tensors for"
    ),
    "layers without tensors, mica": Case({"init_lora_weights": "mica"}, lambda: pairs(layers=[0]), "no tensors for"),
    "biases of B without lora_bias": Case(
        {}, with_extra(**{QUERY + "lora_B__bias": torch.ones(16) * 9}), "no part of the model"
    ),
    "magnitudes without use_dora": Case(
        {}, with_extra(**{QUERY + "lora_magnitude_vector": torch.ones(16) * 9}), "no part of the model"
    ),
    "the output layer's LoRA, not a target": Case(
        {},
        with_extra(lm_head__lora_A__weight=torch.ones(4, 16), lm_head__lora_B__weight=torch.ones(32, 4)),
        "no part of the model",
    ),
    "tensors of another architecture beside": Case(
        {}, with_extra(transformer__h__0__c_attn__lora_A__weight=torch.ones(4, 16)), "no part of the model"
    ),
    **{
        f"tensors in {dtype}": Case({}, lambda dtype=dtype: {key: t.to(dtype) for key, t in pairs().items()})
        for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2)
    },
}


@pytest.mark.parametrize("case", SERVED.values(), ids=SERVED)
def test_it_is_served_as_peft_computes_it(bases, tmp_path, case) -> None:
    told = assert_served(bases[case.base], write(tmp_path / "x", case.config, case.tensors()))
    if case.told is None:
        assert not [warning for warning in told if "no tensors for" not in warning and "velora" not in warning]
    else:
        assert any(re.search(case.told, warning) for warning in told), told


def saved_along(*parameters: str, change: float = 0.0, dtype: torch.dtype = torch.float32):
    def make(base: Base) -> Tensors:
        own = dict(base.model.state_dict())
        return pairs() | {PREFIX + key: (own[key] + change).to(dtype).clone() for key in parameters}

    return make


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "qwen2"])
@pytest.mark.parametrize("parameters", [[EMBEDDING], [HEAD], [EMBEDDING, HEAD], ["model.norm.weight"]])
def test_the_bases_own_parameters_saved_along_change_nothing(bases, tmp_path, kind, parameters) -> None:
    base = bases[kind]
    told = assert_served(base, write(tmp_path / "x", {}, saved_along(*parameters)(base)))
    assert any("unchanged" in warning for warning in told)


def test_the_bases_own_modules_may_have_been_saved_whole(base, tmp_path) -> None:
    config = {"modules_to_save": ["embed_tokens", "lm_head"]}
    assert_served(base, write(tmp_path / "x", config, saved_along(EMBEDDING, HEAD)(base)))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (saved_along(EMBEDDING, change=0.1), "brings model.embed_tokens.weight along, changed"),
        (saved_along(HEAD, change=0.1), "brings lm_head.weight along, changed"),
        (saved_along(HEAD, dtype=torch.bfloat16), "brings lm_head.weight along, changed"),
        (saved_along("model.layers.1.input_layernorm.weight", change=0.1), "input_layernorm.weight along, changed"),
        (saved_along("model.layers.0.self_attn.k_proj.weight", change=0.1), "k_proj.weight along, changed"),
    ],
)
def test_changed_parameters_of_the_base_are_refused(base, tmp_path, make, said) -> None:
    folder = write(tmp_path / "x", {}, make(base))
    assert_refused(base, folder, said)
    weights = LoraWeights.load(folder, name="x", version="1")
    assert (logits(peft(base, folder)) - logits(merged(base, weights))).abs().max() > 1e-3, "PEFT puts it in place"


def test_trained_biases_are_refused(bases, tmp_path) -> None:
    base = bases["qwen2"]
    own = base.model.state_dict()["model.layers.0.self_attn.q_proj.bias"]
    extra = {f"{PREFIX}model.layers.0.self_attn.q_proj.base_layer.bias": own + 1}
    assert_refused(base, write(tmp_path / "x", {"bias": "lora_only"}, pairs() | extra), "q_proj.bias along, changed")


def test_what_cannot_be_compared_is_refused_and_said(base, tmp_path) -> None:
    weights = LoraWeights.load(write(tmp_path / "x", {}, saved_along(HEAD)(base)), name="x", version="1")
    for names in ((), ("org/tiny",), (str(tmp_path),)):
        with pytest.raises(AdapterRejected, match=r"cannot be compared .*save_embedding_layers=False"):
            weights.check_fits(
                ModelShape(names, 2, LINEARS) if not names else ModelShape((*names, "tiny"), 2, LINEARS), max_rank=16
            )


REFUSED = {
    "dora": (Case({"use_dora": True}), "use_dora"),
    "lora_bias": (Case({"lora_bias": True}, with_extra(**{QUERY + "lora_B__bias": torch.ones(16)})), "lora_bias"),
    **{
        f"init {init!r}": (Case({"init_lora_weights": init}), "changes the base weights; convert")
        for init in ("pissa", "pissa_niter_4", "olora", "OLoRA", "corda", "loftq")
    },
    "init of nobody": (Case({"init_lora_weights": "magic"}), "'magic', which PEFT does not know"),
    "init 1": (Case({"init_lora_weights": 1}), "is 1, which PEFT does not know"),
    "kasa": (Case({"kasa_config": {}}), "kasa_config"),
    "arrow": (Case({"arrow_config": {"top_k": 1}}), "arrow_config"),
    "bdlora": (Case({"use_bdlora": {"nblocks": 2}}), "use_bdlora"),
    "alora": (Case({"alora_invocation_tokens": [1, 2]}), "alora_invocation_tokens"),
    "trainable tokens": (Case({"trainable_token_indices": [1]}), "trainable_token_indices"),
    "two variants": (Case({"velora_config": {}, "init_lora_weights": "mica"}), "PEFT takes one"),
    "velora's settings are no object": (Case({"velora_config": True}), "velora_config is True"),
    "modules saved whole": (Case({"modules_to_save": ["lm_head"]}), "modules_to_save names lm_head"),
    "targets saved whole": (Case({"modules_to_save": ["q_proj"]}), "modules_to_save names q_proj"),
    "bias of nobody": (Case({"bias": "some"}), "bias is 'some'"),
    "a task of nobody": (Case({"task_type": "CHAT"}), "task_type is 'CHAT'"),
    "another method": (Case({"peft_type": "lora"}), "peft_type is 'lora'"),
    "rank 0": (Case({"r": 0}), "r is 0"),
    "rank below 0": (Case({"r": -4}), "r is -4"),
    "rank null": (Case({"r": None}), "r is None"),
    "rank with a point": (Case({"r": 4.0}), "r is 4.0"),
    "alpha null": (Case({"lora_alpha": None}), "lora_alpha is None"),
    "alpha a text": (Case({"lora_alpha": "8"}), "lora_alpha is '8'"),
    "another rank": (Case({"r": 8}), "do not fit rank 8"),
    "rank missing": (Case({"r": ...}), "do not fit rank 8"),
    "rank pattern of other ranks": (Case({"rank_pattern": {"q_proj": 2}}), "q_proj has A .* do not fit rank 2"),
    "no pattern": (Case({"rank_pattern": {"q_proj(": 2}}), "rank_pattern: .*no regular expression"),
    "no target pattern": (Case({"target_modules": "q_proj("}), "target_modules: .*no regular expression"),
    "no exclude pattern": (Case({"exclude_modules": "q_proj("}), "exclude_modules: .*no regular expression"),
    "odd rank, orthogonal": (
        Case({"init_lora_weights": "orthogonal", "r": 3}, lambda: pairs(rank=3)),
        "has rank 3; PEFT loads even ones",
    ),
    "transposed": (Case({}, lambda: {k: t.T.contiguous() for k, t in pairs().items()}), "A and B are transposed"),
    "no targets": (Case({"target_modules": []}), "PEFT would change nothing"),
    "targets that are not there": (Case({"target_modules": ["c_attn"]}), "PEFT would change nothing"),
    "a name where an expression is meant": (Case({"target_modules": "q_proj"}), "PEFT would change nothing"),
    "everything": (Case({"target_modules": ".*"}), "target_modules names model too, to which PEFT cannot"),
    "blocks": (Case({"target_modules": ["q_proj", "self_attn"]}), r"names model\.layers\.0\.self_attn too"),
    "norms": (Case({"target_modules": ["q_proj", "norm"]}), r"names model\.norm too"),
    "all excluded": (Case({"exclude_modules": r".*"}), "PEFT would change nothing"),
    "the output layer": (
        Case(
            {"target_modules": ["q_proj", "v_proj", "lm_head"]},
            with_extra(lm_head__lora_A__weight=torch.ones(4, 16), lm_head__lora_B__weight=torch.ones(32, 4)),
        ),
        "adapts lm_head; served are",
    ),
    "an expression and layers": (
        Case({"target_modules": ".*q_proj", "layers_to_transform": [0]}),
        "layers_to_transform is set, and target_modules is a string",
    ),
    "all-linear and layers": (Case({"target_modules": "all-linear", "layers_to_transform": [0]}), "is a string"),
    "a pattern without layers": (Case({"layers_pattern": "layers"}), "without layers_to_transform"),
    "layers at random": (
        Case({"init_lora_weights": False}, lambda: pairs(layers=[1])),
        "lacks 2 of the 4 modules .* PEFT draws those at random",
    ),
    "an output layer at random": (
        Case({"init_lora_weights": False, "target_modules": ["q_proj", "v_proj", "lm_head"]}),
        "lacks 1 of the 5 modules .* lm_head: with init_lora_weights false",
    ),
    "A at random": (
        Case({}, lambda: {k: t for k, t in pairs().items() if "0.self_attn.q_proj.lora_A" not in k}),
        "lora_B without",
    ),
    "another prefix": (Case({}, lambda: pairs(prefix="model.")), r"model\.layers.* is not named like base_model"),
    "of a model without a head": (Case({}, lambda: pairs(prefix=PREFIX)), "is not named like base_model"),
    "prefixed twice": (Case({}, lambda: pairs(prefix=PREFIX * 2 + "model.")), "is not named like base_model"),
    "another adapter's name": (Case({}, lambda: pairs(infix=".mine")), r"lora_A\.mine\.weight is not named like"),
    "by another library": (
        Case({}, lambda: {"lora_te_q_proj.lora_down.weight": torch.ones(4, 16)}),
        "is not named like",
    ),
    "no LoRA": (Case({}, lambda: {"prompt_embeddings": torch.ones(4, 16)}), "holds no LoRA tensor"),
}


@pytest.mark.parametrize(("case", "said"), REFUSED.values(), ids=REFUSED)
def test_it_is_refused_as_peft_cannot_load_it_or_computes_something_else(base, tmp_path, case, said) -> None:
    folder = write(tmp_path / "x", case.config, case.tensors())
    assert_refused(base, folder, said)
    plain = merged(base, LoraWeights.load(write(tmp_path / "plain", {}, pairs()), name="x", version="1"))
    try:
        model = peft(base, folder)
    except Exception:  # noqa: BLE001 (whatever: it is not served)
        return
    assert (logits(model) - logits(plain)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("case", "said"),
    [
        (Case({"warp_speed": 1, "peft_version": "0.99.0"}), "of PEFT 0.99.0 and uses warp_speed, which is not served"),
        (Case({"warp_speed": 1, "peft_version": "unknown"}), "of PEFT unknown and uses warp_speed"),
        (Case({"warp_speed": 1, "peft_version": "0.22.0.dev0@abc"}), "uses warp_speed"),
        (Case({"layer_replication": [[0, 2]]}), "layer_replication"),
        (Case({"target_parameters": ["mlp.experts.gate_up_proj"]}), "target_parameters"),
        (Case({"r": True}), "r is True"),
        (Case({}, lambda: {k: (t * 50).to(torch.int8) for k, t in pairs().items()}), "int8; floating-point"),
        (Case({}, lambda: {k: t for k, t in pairs().items() if "q_proj.lora_B" not in k}), "lora_A without its pair"),
        (Case({}, lambda: {**pairs(), **pairs(infix=".default")}), "is there twice"),
        (Case({}, lambda: pairs(layers=range(3))), "changes layer 2, but the base model has 2"),
    ],
)
def test_it_is_refused_though_peft_would_load_it(base, tmp_path, case, said) -> None:
    """As what PEFT makes of it cannot be what was meant, or another PEFT would make something else of it."""
    assert_refused(base, write(tmp_path / "x", case.config, case.tensors()), said)
