import io
import json
import math
import pickle
import time

import pytest
import torch
from safetensors.torch import load_file

from lorauter.adapters.weights import CONFIG_FILE, TARGETS, WEIGHTS_FILE, LoraWeights, ModelShape
from lorauter.errors import AdapterRejected

PREFIX = "base_model.model.model.layers.0.self_attn.q_proj"
SHAPE = ModelShape(
    names=("models/Tiny-Base", "org/tiny-base-instruct"), layers=2, linears={"q_proj": (8, 8), "v_proj": (8, 8)}
)


def load(folder):
    return LoraWeights.load(folder, name=folder.name, version="0a1b2c3d")


def scalings(folder) -> dict[tuple[int, str], float]:
    """What each B was multiplied by."""
    stored = load_file(folder / WEIGHTS_FILE)
    factors = {}
    for (layer, target), (a, b) in load(folder).tensors.items():
        key = f"base_model.model.model.layers.{layer}.self_attn.{target}"
        torch.testing.assert_close(a, stored[f"{key}.lora_A.weight"], rtol=0, atol=0)
        ratio = b / stored[f"{key}.lora_B.weight"]
        torch.testing.assert_close(ratio, ratio[:1, :1].expand_as(ratio))
        factors[layer, target] = ratio[0, 0].item()
    return factors


def test_an_adapter_is_read_with_its_facts(tmp_path, make_adapter) -> None:
    folder = make_adapter(tmp_path, "sst2", rank=3, targets=TARGETS, layers=2, base="org/tiny-base")
    weights = load(folder)
    assert (weights.name, weights.version, weights.key) == ("sst2", "0a1b2c3d", ("sst2", "0a1b2c3d"))
    assert weights.base_model == "org/tiny-base"
    assert set(weights.tensors) == {(layer, target) for layer in (0, 1) for target in TARGETS}
    assert {(a.shape, b.shape) for a, b in weights.tensors.values()} == {((3, 8), (8, 3))}
    assert weights.nbytes == 2 * 7 * (3 * 8 + 8 * 3) * 4
    assert (weights.rank, weights.ranks) == (3, dict.fromkeys(TARGETS, 3))


def test_ranks_are_the_largest_of_each_target(tmp_path, make_adapter) -> None:
    def widen(tensors):
        tensors[f"{PREFIX}.lora_A.weight"] = torch.zeros(5, 8)
        tensors[f"{PREFIX}.lora_B.weight"] = torch.zeros(8, 5)

    folder = make_adapter(tmp_path, "x", layers=2, change=widen, rank_pattern={r"layers\.0\.self_attn\.q_proj": 5})
    weights = load(folder)
    assert (weights.rank, weights.ranks) == (5, {"q_proj": 5, "v_proj": 2})


@pytest.mark.parametrize(
    ("config", "q", "v"),
    [
        ({}, 2, 2),
        ({"lora_alpha": 3}, 0.75, 0.75),
        ({"lora_alpha": 0.5}, 0.125, 0.125),
        ({"use_rslora": True}, 4, 4),
        ({"use_rslora": True, "lora_alpha": 3}, 1.5, 1.5),
        ({"alpha_pattern": {"q_proj": 1}}, 0.25, 2),
        ({"alpha_pattern": {"q_proj": 1}, "use_rslora": True}, 0.5, 4),
        ({"alpha_pattern": {"self_attn.v_proj": 2.5}}, 2, 0.625),
        ({"alpha_pattern": {r".*\.(q|v)_proj": 1}}, 0.25, 0.25),
        ({"alpha_pattern": {"^model.layers.0.self_attn.q_proj": 1}}, 0.25, 2),
        ({"alpha_pattern": {"layers.1.self_attn.q_proj": 1, "proj": 1, "q_pro": 1}}, 2, 2),
        ({"alpha_pattern": {"q_proj": 1, ".*": 12}}, 0.25, 3),
        ({"alpha_pattern": {".*": 12, "q_proj": 1}}, 3, 3),
        ({"alpha_pattern": None, "rank_pattern": None}, 2, 2),
    ],
)
def test_b_carries_the_scaling(tmp_path, make_adapter, config, q, v) -> None:
    folder = make_adapter(tmp_path, "x", rank=4, **config)
    assert scalings(folder) == pytest.approx({(0, "q_proj"): q, (0, "v_proj"): v})


@pytest.mark.parametrize(("rslora", "factor"), [(False, 9 / 5), (True, 9 / math.sqrt(5))])
def test_a_rank_pattern_changes_the_scaling_too(tmp_path, make_adapter, rslora, factor) -> None:
    def widen(tensors):
        tensors[f"{PREFIX}.lora_A.weight"] = torch.randn(5, 8)
        tensors[f"{PREFIX}.lora_B.weight"] = torch.randn(8, 5)

    folder = make_adapter(
        tmp_path, "x", change=widen, rank_pattern={"q_proj": 5}, alpha_pattern={"q_proj": 9}, use_rslora=rslora
    )
    assert scalings(folder)[0, "q_proj"] == pytest.approx(factor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_tensors_without_scaling_keep_their_type(tmp_path, make_adapter, dtype) -> None:
    plain, scaled = (
        load(make_adapter(tmp_path, name, dtype=dtype, lora_alpha=alpha)).tensors[0, "q_proj"]
        for name, alpha in (("plain", 2), ("scaled", 3))
    )
    assert [tensor.dtype for tensor in (*plain, *scaled)] == [dtype, dtype, dtype, torch.float32]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT 0.21 asks for it
def test_it_computes_what_peft_computes(tmp_path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=True,
        init_lora_weights=False,
        target_modules=["q_proj", "down_proj", "o_proj"],
        rank_pattern={"^model.layers.0.self_attn.q_proj": 2, "down_proj": 3},
        alpha_pattern={r"layers\.1\..*": 5, "o_proj": 1.5},
    )
    llama = LlamaConfig(vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2)
    model = get_peft_model(LlamaForCausalLM(llama), config)
    model.save_pretrained(tmp_path / "x", save_embedding_layers=False)
    expected = {
        (i, name.split(".")[-1]): module.get_delta_weight("default")
        for i, layer in enumerate(model.base_model.model.model.layers)
        for name, module in layer.named_modules()
        if hasattr(module, "get_delta_weight")
    }
    got = {where: b @ a for where, (a, b) in load(tmp_path / "x").tensors.items()}
    assert len(expected) == 6
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"lora_bias": True}, "lora_bias"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        (
            {"a_setting_of_tomorrow": 1, "another": "x", "peft_version": "1.0.0"},
            "a_setting_of_tomorrow, another, which is not served",
        ),
        ({"bias": "some"}, "bias is 'some'"),
        ({"init_lora_weights": "pissa"}, "'pissa', which changes the base weights"),
        ({"init_lora_weights": "olora"}, "changes the base weights"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"peft_type": None}, "peft_type is None"),
        ({"r": 4}, "do not fit rank 4"),
        ({"rank_pattern": {"q_proj": 3}}, "q_proj has A .* do not fit rank 3"),
        ({"target_modules": {"q_proj": 1}}, "target_modules is"),
        ({"target_modules": ["q_proj", 1]}, "target_modules is"),
        ({"exclude_modules": 1}, "exclude_modules is"),
        ({"layers_to_transform": "0"}, "layers_to_transform is"),
        ({"layers_to_transform": ["0"]}, "layers_to_transform is"),
        ({"layers_to_transform": [0], "layers_pattern": 1}, "layers_pattern is"),
        ({"r": 0}, "r is 0"),
        ({"r": None}, "r is None"),
        ({"r": 2.5}, "r is 2.5"),
        ({"r": True}, "r is True"),
        ({"r": "2"}, "r is '2'"),
        ({"r": 10**400}, "r is 1000"),
        ({"lora_alpha": 10**400}, "lora_alpha is 1000"),
        ({"lora_alpha": math.nan}, "lora_alpha is nan"),
        ({"lora_alpha": math.inf}, "lora_alpha is inf"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern is"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern is"),
        ({"rank_pattern": {"q_proj": 2.5}}, "rank_pattern is"),
        ({"rank_pattern": {"q_proj": math.nan}}, "rank_pattern is"),
        ({"alpha_pattern": {"q_proj": math.nan}}, "alpha_pattern is"),
        ({"alpha_pattern": {"q_proj": math.inf}}, "alpha_pattern is"),
        ({"alpha_pattern": {"q_proj": "4"}}, "alpha_pattern is"),
        ({"alpha_pattern": {"q_proj(": 4}}, "no regular expression"),
    ],
)
def test_a_setting_that_is_not_served_is_refused(tmp_path, make_adapter, config, said) -> None:
    with pytest.raises(AdapterRejected, match=said) as caught:
        load(make_adapter(tmp_path, "sst2", **config))
    assert caught.value.adapter == "sst2"


def test_settings_that_change_nothing_are_taken(tmp_path, make_adapter) -> None:
    off = {"use_dora": False, "modules_to_save": None, "lora_bias": False, "a_setting_of_tomorrow": None}
    training = {"lora_dropout": 0.1, "init_lora_weights": "gaussian", "bias": "none", "revision": "main"}
    assert scalings(make_adapter(tmp_path, "x", **off, **training)) == {(0, "q_proj"): 2, (0, "v_proj"): 2}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(f"{PREFIX}.lora_B.weight"), "q_proj has lora_A without its pair"),
        (lambda t: t.pop(f"{PREFIX}.lora_A.weight"), "q_proj has lora_B without its pair"),
        (lambda t: t[f"{PREFIX}.lora_A.weight"][1, 3].fill_(math.nan), "q_proj holds NaN or infinity"),
        (lambda t: t[f"{PREFIX}.lora_B.weight"][0, 0].fill_(-math.inf), "q_proj holds NaN or infinity"),
        (lambda t: t[f"{PREFIX}.lora_B.weight"][0, 0].fill_(3e38), "q_proj holds NaN or infinity"),
        (lambda t: t.update({f"{PREFIX}.lora_A.weight": torch.zeros(2)}), "do not fit rank 2"),
        (lambda t: t.update({f"{PREFIX}.lora_A.weight": torch.zeros(3, 8)}), "do not fit rank 2"),
        (lambda t: t.update({f"{PREFIX}.lora_B.weight": torch.zeros(2, 8)}), "do not fit rank 2"),
        (lambda t: t.update({f"{PREFIX}.lora_A.weight": torch.zeros(2, 8, dtype=torch.int8)}), "int8"),
        (lambda t: t.update({f"{PREFIX}.lora_A.weight": torch.zeros(2, 8, dtype=torch.bool)}), "bool"),
        (lambda t: t.clear(), "holds no LoRA tensor"),
    ],
)
def test_tensors_that_are_no_sound_pairs_are_refused(tmp_path, make_adapter, change, said) -> None:
    with pytest.raises(AdapterRejected, match=said) as caught:
        load(make_adapter(tmp_path, "sst2", change=change))
    assert caught.value.adapter == "sst2"


@pytest.mark.parametrize("file", [CONFIG_FILE, WEIGHTS_FILE])
@pytest.mark.parametrize(
    "damage",
    [
        lambda content: None,
        lambda content: b"",
        lambda content: content[: len(content) // 2],
        lambda content: content[:-1],
        lambda content: b"\xff" * len(content),
        lambda content: b"[" * 100_000,
    ],
    ids=["missing", "empty", "half", "a byte short", "garbage", "deep"],
)
def test_a_damaged_file_is_refused(tmp_path, make_adapter, file, damage) -> None:
    path = make_adapter(tmp_path, "sst2") / file
    content = damage(path.read_bytes())
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(AdapterRejected, match=f"{file} cannot be read"):
        load(path.parent)


def test_a_configuration_is_an_object(tmp_path, make_adapter) -> None:
    folder = make_adapter(tmp_path, "sst2")
    (folder / CONFIG_FILE).write_text(json.dumps(["LORA"]))
    with pytest.raises(AdapterRejected, match="is not a JSON object"):
        load(folder)


class _Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path) -> None:
        self._path = path

    def __reduce__(self):
        return open, (str(self._path), "w")


@pytest.mark.parametrize("file", ["adapter_model.bin", WEIGHTS_FILE])
def test_a_pickle_is_never_opened(tmp_path, make_adapter, file) -> None:
    folder = make_adapter(tmp_path, "sst2")
    (folder / WEIGHTS_FILE).unlink()
    (folder / file).write_bytes(pickle.dumps(_Trap(tmp_path / "sprung")))
    with pytest.raises(AdapterRejected, match=r"cannot be read: .* is a pickle, which can run any code"):
        load(folder)
    assert not (tmp_path / "sprung").exists()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:6d1b\nsize 750\n"


def _saved(tensors) -> bytes:
    stream = io.BytesIO()
    torch.save(tensors, stream)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({WEIGHTS_FILE: LFS}, f"{WEIGHTS_FILE} cannot be read: it is a Git LFS pointer, .* `git lfs pull`"),
        ({CONFIG_FILE: LFS}, f"{CONFIG_FILE} cannot be read: it is a Git LFS pointer"),
        ({WEIGHTS_FILE: _saved({"x": torch.ones(1)})}, r"it is a pickle, .*save_pretrained writes safetensors"),
        ({WEIGHTS_FILE: b"<!DOCTYPE html><html>"}, "it is a web page"),
        ({WEIGHTS_FILE: None}, f"{WEIGHTS_FILE} cannot be read: it is missing$"),
        ({WEIGHTS_FILE: None, "training_args.bin": b""}, "it is missing$"),
        ({WEIGHTS_FILE: None, "adapter_model.bin": _saved({})}, "it is missing, and adapter_model.bin is a pickle"),
        ({WEIGHTS_FILE: None, "adapters.safetensors": b""}, "adapters.safetensors is not what PEFT reads"),
        (
            {WEIGHTS_FILE: None, "adapter_model-00001-of-00002.safetensors": b""},
            f"-00001-of-00002.safetensors is of several files; PEFT reads one, so merge them into {WEIGHTS_FILE}",
        ),
    ],
)
def test_what_is_there_in_place_of_a_file_is_said(tmp_path, make_adapter, files, said) -> None:
    folder = make_adapter(tmp_path, "sst2")
    for name, content in files.items():
        (folder / name).unlink(missing_ok=True)
        if content is not None:
            (folder / name).write_bytes(content)
    with pytest.raises(AdapterRejected, match=said):
        load(folder)


HASH = "7e27bd9f95328f0f3b08261d1252705110c806f8"


@pytest.mark.parametrize(
    "base",
    [
        "models/tiny-base",
        "elsewhere/TINY-BASE/",
        "tiny-base-instruct",
        f"/somewhere/.cache/huggingface/hub/models--org--Tiny-Base/snapshots/{HASH}",
        f"/somewhere/.cache/huggingface/hub/models--org--Tiny-Base/snapshots/{HASH}/",
        "/cache/models--org--tiny-base",
        f"models--tiny-base/snapshots/{HASH}",
        "C:\\Users\\me\\models\\Tiny-Base",
        "D:\\models\\tiny-base\\",
        f"C:\\hub\\models--org--tiny-base\\snapshots\\{HASH}",
        r"..\models/tiny-base",
        "./tiny-base",
        "",
        None,
    ],
)
def test_an_adapter_fits_under_every_name_of_the_model(tmp_path, make_adapter, base) -> None:
    load(make_adapter(tmp_path, "x", base=base)).check_fits(SHAPE, max_rank=2)


def test_a_base_model_out_of_the_hubs_cache_has_its_own_name(tmp_path, make_adapter) -> None:
    cached = f"/cache/models--org--Tiny.Base/snapshots/{HASH}"
    shape = ModelShape((cached,), SHAPE.layers, SHAPE.linears)
    for base in ("org/tiny.base", "/modelscope/org/Tiny___Base"):
        load(make_adapter(tmp_path, "x", base=base)).check_fits(shape, max_rank=2)


def test_a_shape_without_names_takes_any(tmp_path, make_adapter) -> None:
    nameless = ModelShape((), SHAPE.layers, SHAPE.linears)
    load(make_adapter(tmp_path, "x", base="someone/else")).check_fits(nameless, max_rank=2)


@pytest.mark.parametrize(
    ("adapter", "max_rank", "said"),
    [
        ({"base": "org/other-base"}, 64, "trained for the base model 'org/other-base', .*base_model_aliases"),
        ({"base": f"hub/models--org--other/snapshots/{HASH}"}, 64, "trained for the base model"),
        ({"base": "hub/models--tiny-base--other/snapshots/tiny-base"}, 64, "trained for the base model"),
        ({"base": "org/tiny-base/other"}, 64, "trained for the base model"),
        ({"rank": 5}, 4, "has rank 5; the engine serves up to 4"),
        ({"layers": 3}, 64, "changes layer 2, but the base model has 2"),
        ({"targets": ("q_proj", "up_proj")}, 64, "up_proj maps 8 to 8 features, but the base model's maps none"),
        (
            {"change": lambda t: t.update({f"{PREFIX}.lora_A.weight": torch.zeros(2, 9)})},
            64,
            "q_proj maps 9 to 8 features, but the base model's maps 8 to 8",
        ),
        (
            {"change": lambda t: t.update({f"{PREFIX}.lora_B.weight": torch.zeros(7, 2)})},
            64,
            "q_proj maps 8 to 7 features, but the base model's maps 8 to 8",
        ),
    ],
)
def test_an_adapter_of_another_model_is_refused(tmp_path, make_adapter, adapter, max_rank, said) -> None:
    weights = load(make_adapter(tmp_path, "sst2", **adapter))
    with pytest.raises(AdapterRejected, match=said) as caught:
        weights.check_fits(SHAPE, max_rank=max_rank)
    assert caught.value.adapter == "sst2"


def test_a_long_configuration_takes_no_time(tmp_path, make_adapter) -> None:
    used = time.process_time()
    folder = make_adapter(tmp_path, "x", base_model_name_or_path="models--" + "--" * 200_000 + "/x")
    with pytest.raises(AdapterRejected, match="models--"):
        load(folder).check_fits(SHAPE, max_rank=8)
    folder = make_adapter(tmp_path, "y", rank_pattern={"q" * 2_000_000: 1})
    with pytest.raises(AdapterRejected, match=r"bytes; at most 1048576 are taken"):
        load(folder)
    assert time.process_time() - used < 2


def test_nor_does_one_of_many_names_and_layers_or_a_file_of_many_tensors(tmp_path, make_adapter) -> None:
    names = [f"m{i}" for i in range(30_000)]
    left_out = {f"base_model.model.model.layers.{i}.mlp.up_proj.lora_A.weight": torch.zeros(1) for i in range(8_000)}
    folder = make_adapter(
        tmp_path,
        "x",
        layers=100,
        change=lambda tensors: tensors.update(left_out),
        target_modules=[*names, "q_proj", "self_attn.v_proj"],
        exclude_modules=[*names, "layers.1.self_attn.q_proj"],
        layers_to_transform=list(range(8_000)),
    )
    used = time.process_time()
    assert len(load(folder).tensors) == 2 * 100 - 1
    assert time.process_time() - used < 5
