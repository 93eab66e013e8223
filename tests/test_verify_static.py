"""The static level: good bundles pass whole, each sabotage fails the check that names its cause."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable
from copy import copy as copy_of
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

from qsun.bundle import PrefillModule, read_bundle
from qsun.decode_checkpoint import load_dequantized
from qsun.errors import IncompatibleError
from qsun.files import write_json
from qsun.models import load_model
from qsun.rounding import round_layers
from qsun.scheme import Scheme, scheme_of
from qsun.verdict import Check, Outcome
from qsun.verify.static.expected_tensors import expected_tensors, packed_shapes
from qsun.verify.static.level import static_checks
from qsun.verify.subject import Subject
from tests import sabotage as do
from tests.bundles import Format, Module, Shape, build_bundle, finish, write_tuning_record


class Kind(NamedTuple):
    shape: Shape
    tied: bool
    format: Format
    module: Module

    def __str__(self) -> str:
        return f"{self.shape}-{'tied' if self.tied else 'untied'}-{self.format}-{self.module}"


GOOD = [
    Kind("llama-gqa", True, "compressed-tensors", "lora"),
    Kind("llama-gqa", False, "compressed-tensors", "full"),
    Kind("llama-mha", False, "awq", "lora"),
    Kind("llama-mha", True, "compressed-tensors", "full"),
    Kind("qwen3", False, "compressed-tensors", "lora"),
    Kind("qwen3", True, "awq", "full"),
]
LORA, FULL, AWQ, QWEN3 = GOOD[0], GOOD[1], GOOD[2], GOOD[5]
K_PROJ = "model.layers.0.self_attn.k_proj"
OTHER_DIGEST = {"model.safetensors": "f" * 64}
LLAMA3_ROPE = {
    "rope_theta": 10000.0,
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
Bundles = Callable[[Kind], Path]


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Bundles:
    """Bundles that tests share, each built once: change only copies."""
    built: dict[Kind, Path] = {}

    def bundle(kind: Kind) -> Path:
        if kind not in built:
            folder = tmp_path_factory.mktemp("bundles") / "tiny"
            built[kind] = build_bundle(folder, **kind._asdict())
        return built[kind]

    return bundle


@pytest.fixture
def copy(good: Bundles, tmp_path: Path) -> Bundles:
    """A copy of a good bundle."""
    return lambda kind: shutil.copytree(good(kind), tmp_path / "bundle")


def by_name(checks: list[Check]) -> dict[str, Check]:
    named = {check.name: check for check in checks}
    assert len(named) == len(checks), "names are unique"
    for check in checks:
        assert check.compared
        assert check.message
        assert check.remedy or check.outcome in (Outcome.PASSED, Outcome.SKIPPED)
    return named


def checks_of(folder: Path, *skip: str) -> dict[str, Check]:
    return by_name(static_checks(Subject.from_bundle(read_bundle(folder)), skip))


def names_of(checks: dict[str, Check], outcome: Outcome) -> list[str]:
    return [check.name for check in checks.values() if check.outcome is outcome]


def assert_failed(checks: dict[str, Check], names: str, *said: str) -> None:
    """Exactly these checks failed, and the first one's message has these words."""
    failed, expected = names_of(checks, Outcome.FAILED), names.split()
    assert failed == expected, [checks[name].message for name in failed]
    for words in said:
        assert words in checks[expected[0]].message


@pytest.mark.parametrize("kind", GOOD, ids=str)
def test_a_good_bundle_passes_every_check(kind: Kind, good: Bundles) -> None:
    checks = checks_of(good(kind))
    assert names_of(checks, Outcome.PASSED) == [*checks]
    assert len(checks) > 25


@pytest.mark.parametrize("format_", ["compressed-tensors", "awq"])
def test_the_bundles_of_these_tests_are_quantized_to_nearest(
    format_: Format, good: Bundles
) -> None:
    folder = good(next(kind for kind in GOOD if kind.format == format_ and kind.module == "lora"))
    expected = load_model(folder / "base", "bfloat16")
    scheme = scheme_of(json.loads((folder / "decode" / "config.json").read_text()))
    assert scheme is not None
    round_layers(expected, [K_PROJ], scheme)
    found = load_dequantized(folder / "decode").get_submodule(K_PROJ)
    assert torch.equal(found.weight, expected.get_submodule(K_PROJ).weight)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packed_codes_take_as_many_words_as_compressed_tensors_writes(bits: int) -> None:
    out_features, in_features, group_size = 24, 96, 32
    scheme = Scheme("compressed-tensors", bits, group_size, symmetric=False)
    shapes = packed_shapes("layer", (out_features, in_features), scheme)
    codes = torch.zeros(out_features, in_features, dtype=torch.int8)
    zeros = torch.zeros(out_features, in_features // group_size, dtype=torch.int8)
    assert shapes["layer.weight_packed"] == pack_to_int32(codes, bits).shape
    assert shapes["layer.weight_zero_point"] == pack_to_int32(zeros, bits, packed_dim=0).shape


@pytest.mark.parametrize("part", ["base", "decode"])
def test_sharded_checkpoints_pass_too(part: str, copy: Bundles) -> None:
    folder = copy(LORA)
    do.shard(part)(folder)
    do.seal(folder)
    checks = checks_of(folder)
    # The base's file of the recorded name and digest is gone with its single file.
    assert names_of(checks, Outcome.FAILED) == []
    assert checks[f"static.{'base_model' if part == 'base' else part}.tensors"].outcome.value == (
        "passed"
    )


def test_older_spellings_of_one_tokenizer_are_no_difference(copy: Bundles) -> None:
    folder = copy(LORA)

    def older(tokenizer: dict[str, Any]) -> None:
        model = tokenizer["model"]
        model["merges"] = [" ".join(pair) for pair in model["merges"]]
        del model["ignore_merges"], model["byte_fallback"], tokenizer["pre_tokenizer"]["use_regex"]
        tokenizer["added_tokens"].reverse()

    do.edit_json(folder / "base" / "tokenizer.json", older)
    do.seal(folder)
    checks = checks_of(folder)
    assert names_of(checks, Outcome.PASSED) == [*checks]


# What happened before the export: digests are those of what is there.
SEALED: list[tuple[str, Kind, do.Sabotage, str, tuple[str, ...]]] = [
    # KV layout and attention
    (
        "rope theta",
        FULL,
        do.set_config(do.MATH, rope_parameters={"rope_theta": 5e5, "rope_type": "default"}),
        "static.kv_layout.math",
        ("rope_theta: 500000.0 here, 10000.0 expected",),
    ),
    (
        "D's rope theta",
        FULL,
        do.set_config(do.DECODE, rope_parameters={"rope_theta": 5e5, "rope_type": "default"}),
        "static.decode.kv_layout",
        ("rope_theta: 500000.0 here",),
    ),
    (
        "the base's rope theta",
        LORA,
        do.set_config(do.BASE, rope_parameters={"rope_theta": 5e5, "rope_type": "default"}),
        "static.base_model.kv_layout",
        ("rope_theta: 500000.0 here",),
    ),
    (
        "rope scaling",
        FULL,
        do.set_config(do.MATH, rope_parameters=LLAMA3_ROPE),
        "static.kv_layout.math",
        ("rope_type: llama3 here, default expected", "'factor', 8.0"),
    ),
    (
        "sliding window",
        FULL,
        do.set_config(do.MATH, sliding_window=64),
        "static.kv_layout.math",
        ("sliding_window: 64 here, None expected",),
    ),
    (
        "one KV head fewer",
        FULL,
        do.other_module(num_key_value_heads=1),
        "static.kv_layout.math",
        ("kv_heads: 1 here, 2 expected",),
    ),
    (
        "layer count",
        FULL,
        do.other_module(num_hidden_layers=3),
        "static.kv_layout.math",
        ("layers: 3 here, 2 expected",),
    ),
    (
        "head size",
        FULL,
        do.other_module(head_dim=16),
        "static.kv_layout.math",
        ("head_dim: 16 here, 32 expected",),
    ),
    (
        "vocabulary",
        FULL,
        do.other_module(vocab_size=576),
        "static.kv_layout.math",
        ("vocabulary: 576 here, 512 expected",),
    ),
    (
        "dtype",
        FULL,
        do.other_module(torch.float16),
        "static.kv_layout.math static.cache_dtype",
        ("dtype: float16 here, bfloat16 expected",),
    ),
    (
        "positions",
        FULL,
        do.set_config(do.MATH, max_position_embeddings=384),
        "static.kv_layout.math",
        ("max_tokens: 384 here, 512 expected",),
    ),
    (
        "attention's biases",
        FULL,
        do.other_module(attention_bias=True),
        "static.kv_layout.math",
        ("attention_bias: True here, False in the decode module",),
    ),
    (
        "another architecture",
        QWEN3,
        do.set_config(do.DECODE, architectures=["LlamaForCausalLM"], model_type="llama"),
        "static.decode.tensors static.kv_layout.math static.kv_layout.code",
        ("self_attn.k_norm.weight: the config describes no such tensor",),
    ),
    # Cache dtype and lengths
    (
        "D's own cache dtype",
        LORA,
        lambda folder: do.edit_json(
            folder / "decode/config.json",
            lambda config: config["quantization_config"].update(kv_cache_scheme={"num_bits": 8}),
        ),
        "static.cache_dtype",
        ("decode module: fp8 here, bfloat16 expected",),
    ),
    (
        "a cache dtype that none was tuned with",
        LORA,
        do.set_manifest(kv_cache_dtype="float16"),
        "static.cache_dtype static.serving",
        ("kv_cache_dtype is float16, the modules' dtype bfloat16",),
    ),
    (
        "a worker's cache dtype",
        LORA,
        do.set_option("decode", "--kv-cache-dtype", "fp8"),
        "static.serving",
        ("decode: --kv-cache-dtype fp8, kv_cache_dtype bfloat16 in the manifest",),
    ),
    (
        "more tokens than positions",
        LORA,
        do.set_manifest(max_tokens=1024),
        "static.lengths",
        ("max_tokens is 1024", "decode module: max_position_embeddings 512"),
    ),
    (
        "a worker that takes fewer tokens",
        LORA,
        do.set_option("prefill", "--max-model-len", "128"),
        "static.lengths",
        ("prefill: --max-model-len 128, max_tokens is 256",),
    ),
    # Tokenizer and chat template
    (
        "another tokenizer",
        LORA,
        do.swap_ids(do.DECODE, "a", "b"),
        "static.decode.tokenizer",
        ("vocabulary: 2 entries differ", "'a' is "),
    ),
    (
        "P's other tokenizer",
        FULL,
        do.swap_ids(do.MATH, "a", "b"),
        "static.tokenizer.math",
        ("vocabulary: 2 entries differ",),
    ),
    (
        "reordered special tokens",
        FULL,
        do.reorder_special_tokens(do.MATH),
        "static.tokenizer.math",
        ("special token: 2 entries differ", "<|im_start|>"),
    ),
    (
        "merges",
        LORA,
        lambda folder: do.edit_json(
            folder / "decode/tokenizer.json", lambda value: value["model"]["merges"].reverse()
        ),
        "static.decode.tokenizer",
        ("merge: ",),
    ),
    (
        "normalizer",
        LORA,
        do.set_tokenizer(do.BASE, normalizer={"type": "Lowercase"}),
        "static.base_model.tokenizer",
        ('normalizer: {"type": "Lowercase"} here, null expected',),
    ),
    (
        "post-processor",
        LORA,
        do.set_tokenizer(do.DECODE, post_processor=None),
        "static.decode.tokenizer",
        ("post_processor: null here",),
    ),
    (
        "role",
        LORA,
        do.set_tokenizer_config(do.DECODE, eos_token="<|endoftext|>"),
        "static.decode.tokenizer",
        ("eos_token: '<|endoftext|>' here, '<|im_end|>' expected",),
    ),
    (
        "chat template",
        LORA,
        do.other_chat_template(do.DECODE),
        "static.decode.chat_template",
        ("part at character", "'bot", "'assistant"),
    ),
    (
        "P's chat template",
        FULL,
        do.other_chat_template(do.MATH),
        "static.chat_template.math",
        ("part at character",),
    ),
    (
        "an adapter's own chat template",
        LORA,
        do.set_file(f"{do.MATH}/chat_template.jinja", b"{{ messages }}"),
        "static.chat_template.math",
        ("part at character 3",),
    ),
    (
        "a tokenizer that cannot be read",
        LORA,
        do.set_file("tokenizer/tokenizer_config.json", b"{"),
        "static.reference_tokenizer",
        ("tokenizer_config.json cannot be read",),
    ),
    (
        "no tokenizer",
        LORA,
        lambda folder: (folder / "tokenizer/tokenizer.json").unlink(),
        "static.reference_tokenizer",
        ("tokenizer has no tokenizer.json",),
    ),
    (
        "more ids than embeddings",
        LORA,
        lambda folder: do.edit_json(
            folder / "tokenizer/tokenizer.json",
            lambda value: value["added_tokens"][0].update(id=512),
        ),
        "static.vocabulary static.decode.tokenizer static.base_model.tokenizer",
        ("the tokenizer gives id 512, vocab_size is 512",),
    ),
    # What a prefill module was tuned as
    (
        "a record that cannot be read",
        LORA,
        do.set_file(f"{do.MATH}/records/tuning.json", b"{"),
        "static.record.math",
        ("is not a qsun record",),
    ),
    (
        "no promised rank",
        LORA,
        do.set_entry(rank=None),
        "static.lora.math",
        ("rank 4 in adapter_config.json, None in the manifest",),
    ),
    (
        "another base",
        LORA,
        do.set_record(base={"sha256": OTHER_DIGEST}),
        "static.base.math",
        ("other base weights: model.safetensors: tuned from ffffffffffff, D's base is",),
    ),
    (
        "recorded boundary",
        LORA,
        do.set_record(boundary="n"),
        "static.boundary.math",
        ("n-1 in the manifest", "n in the tuning record"),
    ),
    (
        "promised boundary",
        LORA,
        do.set_entry(boundary="n"),
        "static.boundary.math",
        ("n in its entry for math",),
    ),
    ("full-ft", LORA, do.full_ft, "static.system.math", ("tuned as full-ft", "naive hand-off")),
    (
        "full-ft by its record alone",
        FULL,
        do.set_record(system="full-ft"),
        "static.system.math",
        ("full-ft in the tuning record, qsun expected",),
    ),
    (
        "another module's record",
        LORA,
        do.another_modules_record,
        "static.record.math",
        ("other weights: adapter_model.safetensors",),
    ),
    (
        "a base that is not D's",
        LORA,
        do.other_base_copy,
        "static.base_model.identity",
        ("other base weights: model.safetensors",),
    ),
    # LoRA
    (
        "an adapter of another base",
        LORA,
        do.adapter_of_another_base,
        "static.lora.math",
        ("layers.0.self_attn.k_proj.lora_A.weight [4, 192]", "fits no layer"),
    ),
    (
        "promised rank",
        LORA,
        do.set_entry(rank=8),
        "static.lora.math",
        ("rank 4 in adapter_config.json, 8 in the manifest",),
    ),
    (
        "configured rank",
        LORA,
        do.chain(do.set_adapter(r=8), do.set_entry(rank=8)),
        "static.lora.math",
        ("shape [4, 128], rank 8 in adapter_config.json",),
    ),
    (
        "a worker of a lower rank",
        LORA,
        do.set_option("prefill", "--max-lora-rank", "1"),
        "static.lora.math static.lora.code",
        ("prefill: --max-lora-rank 1, the adapter's rank is 4",),
    ),
    ("DoRA", LORA, do.set_adapter(use_dora=True), "static.lora.math", ("use_dora is True",)),
    (
        "modules to save",
        LORA,
        do.set_adapter(modules_to_save=["lm_head"]),
        "static.lora.math",
        ("modules_to_save is ['lm_head']",),
    ),
    ("biases", LORA, do.set_adapter(bias="all"), "static.lora.math", ("bias is all",)),
    (
        "a start that changed the base",
        LORA,
        do.set_adapter(init_lora_weights="pissa"),
        "static.lora.math",
        ("init_lora_weights is pissa",),
    ),
    (
        "half an adapter",
        LORA,
        do.lose_half_an_adapter,
        "static.lora.math",
        (f"{K_PROJ}: lora_B is missing",),
    ),
    (
        "another kind of adapter",
        LORA,
        do.set_adapter(peft_type="IA3"),
        "static.module.math",
        ("IA3 adapter",),
    ),
    (
        "an adapter called full",
        LORA,
        do.set_entry(module="full"),
        "static.module.math static.serving",
        ("the manifest says full, but it holds an adapter_config.json",),
    ),
    (
        "adapters without a base",
        LORA,
        do.set_manifest(base_path=None),
        "static.kv_layout.math static.kv_layout.code static.serving",
        ("the manifest names no base_path",),
    ),
    # Tensors
    (
        "truncated D",
        LORA,
        do.truncate("decode/model.safetensors"),
        "static.decode.tensors",
        ("model.safetensors: truncated",),
    ),
    (
        "truncated header",
        FULL,
        do.truncate(f"{do.MATH}/model.safetensors", 300_000),
        "static.tensors.math",
        ("model.safetensors: truncated",),
    ),
    (
        "truncated adapter",
        LORA,
        do.truncate(f"{do.MATH}/adapter_model.safetensors"),
        "static.tensors.math",
        ("adapter_model.safetensors: truncated",),
    ),
    (
        "missing shard",
        LORA,
        do.lose_shard(do.DECODE),
        "static.decode.tensors",
        ("model-00002-of-00002.safetensors: missing",),
    ),
    (
        "stale index",
        LORA,
        do.stale_index(do.DECODE),
        "static.decode.tensors",
        ("index.json says model-00002", "it lies in model-00001"),
    ),
    (
        "no scales",
        LORA,
        do.lose_tensor(do.DECODE, f"{K_PROJ}.weight_scale"),
        "static.decode.tensors",
        (f"{K_PROJ}.weight_scale: missing",),
    ),
    (
        "a layer that is not there",
        AWQ,
        do.lose_tensor(do.DECODE, f"{K_PROJ}.qweight"),
        "static.decode.tensors",
        (f"{K_PROJ}: not quantized, the config says it is",),
    ),
    (
        "a bias too many",
        FULL,
        do.add_tensor(do.MATH, f"{K_PROJ}.bias", (64,)),
        "static.tensors.math",
        (f"{K_PROJ}.bias: the config describes no such tensor",),
    ),
    (
        "a config that its tensors do not have",
        FULL,
        do.set_config(do.MATH, num_key_value_heads=1),
        "static.tensors.math static.kv_layout.math",
        (f"{K_PROJ}.weight: shape [64, 128], the config says [32, 128]", "num_key_value_heads 1"),
    ),
    (
        "group size",
        LORA,
        lambda folder: do.edit_json(
            folder / "decode/config.json",
            lambda config: config["quantization_config"]["config_groups"]["group_0"][
                "weights"
            ].update(group_size=64),
        ),
        "static.decode.tensors static.decode.scheme",
        ("weight_zero_point: shape [16, 8], the config says [16, 4]",),
    ),
    (
        "promised scheme",
        AWQ,
        do.set_manifest(decode_scheme="W8A16 symmetric, group 32, awq"),
        "static.decode.scheme",
        ("says W4A16 asymmetric, group 32, awq, the manifest W8A16",),
    ),
    (
        "a quantized prefill module",
        FULL,
        do.set_config(do.MATH, quantization_config={"quant_method": "fp8"}),
        "static.module.math",
        ("it is quantized",),
    ),
    # Code and paths
    ("pickle", LORA, do.add_pickle(), "static.code", ("decode/pytorch_model.bin: a pickle",)),
    (
        "a module that Python imports",
        LORA,
        do.set_file("base/torch.py", b"print()"),
        "static.code",
        ("base/torch.py: Python can import it",),
    ),
    (
        "auto_map",
        FULL,
        do.set_config(do.MATH, auto_map={"AutoModelForCausalLM": "model.Model"}),
        "static.module.math",
        ("auto_map",),
    ),
    (
        "a tokenizer's auto_map",
        LORA,
        do.set_tokenizer_config("tokenizer", auto_map={"AutoTokenizer": ["t.T", None]}),
        "static.code",
        ("tokenizer/tokenizer_config.json: asks to run code", "auto_map"),
    ),
    (
        "a link that leaves",
        LORA,
        do.leave_by_link(),
        "static.paths",
        ("decode/extra.json: a link",),
    ),
    ("a linked folder", LORA, do.leave_by_linked_folder, "static.paths", ("base: a link",)),
    (
        "a path upwards",
        LORA,
        do.set_manifest(decode_path="../bundle/decode"),
        "static.paths",
        ("'../bundle/decode': leaves",),
    ),
    (
        "an absolute path",
        LORA,
        do.set_entry(path="/etc"),
        "static.paths",
        ("'/etc': leaves",),
    ),
    # Serving
    (
        "adapters of other tasks",
        LORA,
        do.swap_adapters,
        "static.serving",
        ("--lora-modules has ../prefill/code for math, the task's module is prefill/math",),
    ),
    ("no decode worker", LORA, do.lose_worker, "static.serving", ("there is no decode worker",)),
    (
        "remote code in a worker",
        LORA,
        do.set_option("decode", "--trust-remote-code", ""),
        "static.serving",
        ("decode: --trust-remote-code is not allowed",),
    ),
    (
        "a decode worker that reads prompts",
        LORA,
        do.set_option("decode", "--kv-transfer-config", '{"kv_load_failure_policy": "recompute"}'),
        "static.serving",
        ("kv_load_failure_policy is recompute",),
    ),
    (
        "a launch file that cannot be read",
        LORA,
        do.set_file("serving/launch.json", b'{"schema": 1, "workers": 3}'),
        "static.serving",
        ("launch.json is not a launch spec",),
    ),
]


@pytest.mark.parametrize(
    ("kind", "sabotage", "names", "said"),
    [pytest.param(*case, id=name) for name, *case in SEALED],
)
def test_a_wrong_module_fails_the_check_that_names_it(
    kind: Kind, sabotage: do.Sabotage, names: str, said: tuple[str, ...], copy: Bundles
) -> None:
    folder = copy(kind)
    sabotage(folder)
    do.seal(folder)
    assert_failed(checks_of(folder), names, *said)


# What happened to the files after the export.
UNSEALED: list[tuple[str, do.Sabotage, str, str]] = [
    ("tensor", do.flip_byte("decode/model.safetensors"), "static.files", "decode/model.saf"),
    ("tokenizer", do.flip_byte("tokenizer/tokenizer.json", 0.5), "static.files", "tokenizer.json"),
    ("config", do.set_config("decode", head_dim=16), "static.files", "decode/config.json"),
    ("truncated", do.truncate("base/model.safetensors"), "static.files", "base/model.saf"),
    ("missing", do.lose_launch_file, "static.listing", "serving/launch.json: listed and missing"),
    ("missing shard", do.lose_shard("base"), "static.listing", "base/model.safetensors: listed"),
    ("added", do.set_file("decode/.DS_Store"), "static.listing", ".DS_Store: not in the manifest"),
    ("pickle", do.add_pickle("prefill/math/adapter_model.bin"), "static.code", "a pickle"),
    ("link", do.leave_by_link(), "static.paths", "a link that leaves"),
    ("file outside", do.list_file_outside, "static.paths", "'../outside.json': leaves"),
]


@pytest.mark.parametrize(
    ("sabotage", "name", "said"), [pytest.param(*case, id=name) for name, *case in UNSEALED]
)
def test_a_bundle_that_was_changed_is_noticed(
    sabotage: do.Sabotage, name: str, said: str, copy: Bundles
) -> None:
    folder = copy(LORA)
    sabotage(folder)
    assert_failed(checks_of(folder), name, said)


def test_a_changed_manifest_is_not_read(copy: Bundles) -> None:
    folder = copy(LORA)
    content = (folder / "bundle.json").read_text()
    (folder / "bundle.json").write_text(content.replace('"layers": 2', '"layers": 3'))
    with pytest.raises(IncompatibleError, match="was changed after it was written"):
        read_bundle(folder)


def test_what_comes_later_is_no_stranger(copy: Bundles) -> None:
    folder = copy(LORA)
    (folder / "records/verdict").mkdir(parents=True)
    (folder / "records/verdict.json").write_text("{}")
    (folder / "records/verdict/prompts.jsonl").write_text("{}")
    assert names_of(checks_of(folder), Outcome.FAILED) == []


def test_nothing_is_read_through_a_path_that_leaves(copy: Bundles) -> None:
    folder = copy(LORA)
    do.seal(folder, decode_path="../elsewhere")
    checks = checks_of(folder)
    assert names_of(checks, Outcome.PASSED) == []
    assert checks["static.decode.tensors"].message == (
        "not looked at, because static.decode.config did not pass"
    )


def test_what_follows_from_a_failure_is_unchecked(copy: Bundles) -> None:
    folder = copy(LORA)
    (folder / "base/config.json").write_text("{")
    do.seal(folder)
    checks = checks_of(folder)
    assert names_of(checks, Outcome.FAILED) == ["static.base_model.config"]
    assert names_of(checks, Outcome.UNCHECKED) == [
        *("static.base_model.tensors", "static.base_model.kv_layout"),
        *("static.kv_layout.math", "static.lora.math"),
        *("static.kv_layout.code", "static.lora.code"),
        *("static.cache_dtype", "static.lengths"),
    ]


def test_without_a_record_nobody_knows_what_a_module_was_tuned_for(copy: Bundles) -> None:
    folder = copy(LORA)
    do.lose_record(folder)
    do.set_entry(system=None)(folder)
    checks = checks_of(folder)
    assert names_of(checks, Outcome.FAILED) == []
    unchecked = names_of(checks, Outcome.UNCHECKED)
    assert unchecked == ["static.record.math", "static.base.math", "static.system.math"]
    assert "only the numeric level can tell" in checks["static.base.math"].message


def test_a_base_under_other_file_names_cannot_be_compared(copy: Bundles) -> None:
    folder = copy(LORA)
    do.record_anew(folder, base={"sha256": {"base.gguf": "0" * 64}})
    do.seal(folder)
    check = checks_of(folder)["static.base.math"]
    assert (check.outcome, "base.gguf" in check.message) == (Outcome.UNCHECKED, True)


def test_without_a_launch_file_serving_is_unchecked(copy: Bundles) -> None:
    folder = copy(LORA)
    do.lose_launch_file(folder)
    do.seal(folder)
    checks = checks_of(folder)
    assert names_of(checks, Outcome.FAILED) == []
    assert names_of(checks, Outcome.UNCHECKED) == ["static.serving"]


def test_a_check_is_left_out_by_name(copy: Bundles) -> None:
    folder = copy(LORA)
    do.flip_byte("decode/model.safetensors")(folder)
    checks = checks_of(folder, "static.files")
    assert names_of(checks, Outcome.FAILED) == []
    assert names_of(checks, Outcome.SKIPPED) == ["static.files"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"max_tokens": "many"}, "max_tokens: 'many' is no int"),
        ({"max_tokens": 0}, "max_tokens: 0 is no number of tokens"),
        ({"decode_path": None}, "decode_path: None is no str"),
        ({"files": {"decode/config.json": 3}}, "files: decode/config.json: no digest"),
        ({"kv_layout": {"layers": 2}}, "kv_layout: kv_heads is missing"),
        (
            {"prefill": (PrefillModule("math", "m", "ia3", "sun", "n-1"),)},
            "module 'ia3' is none of",
        ),
        ({"prefill": ()}, "prefill: no module is named"),
    ],
)
def test_a_manifest_with_impossible_values_is_refused(
    changes: dict[str, Any], said: str, copy: Bundles
) -> None:
    folder = copy(LORA)
    do.seal(folder, **changes)
    with pytest.raises(IncompatibleError, match="is not a bundle's manifest") as caught:
        Subject.from_bundle(read_bundle(folder))
    assert said in str(caught.value)


# Anything in them, and each of them whole, is replaced by what does not belong there.
FILES = {
    LORA: (
        *("decode/config.json", "decode/tokenizer.json", "decode/tokenizer_config.json"),
        *("base/config.json", "prefill/math/adapter_config.json"),
        *("prefill/math/records/tuning.json", "serving/launch.json"),
    ),
    FULL: ("prefill/math/config.json", "prefill/math/tokenizer.json"),
}
NONSENSE: tuple[Any, ...] = (None, -1, "x", [{}], {"a": [None]})
RANDOM_CHANGES = 24


def with_nonsense(value: Any, rng: random.Random) -> Any:
    """A copy with one entry, at a random depth, replaced."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.1:
        return rng.choice(NONSENSE)
    key: Any = rng.choice([*value] if isinstance(value, dict) else range(len(value)))
    changed: Any = copy_of(value)
    changed[key] = with_nonsense(value[key], rng)
    return changed


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, names in FILES.items() for name in names], ids=str
)
def test_nonsense_in_a_file_never_ends_in_a_traceback(kind: Kind, name: str, copy: Bundles) -> None:
    folder, rng = copy(kind), random.Random(name)
    good = json.loads((folder / name).read_text())
    for _ in range(RANDOM_CHANGES):
        write_json(folder / name, with_nonsense(good, rng))
        assert checks_of(folder, "static.files")
    texts = [json.dumps(value).encode() for value in NONSENSE]
    for text in (*texts, b"", b"{", b"\xff\xfe", b"[" * 100_000):
        (folder / name).write_bytes(text)
        assert names_of(checks_of(folder, "static.files"), Outcome.FAILED)


def pair(folder: Path, *, base: bool = True) -> dict[str, Check]:
    subject = Subject.from_pair(
        folder / "prefill/math", folder / "decode", folder / "base" if base else None
    )
    return by_name(static_checks(subject))


@pytest.mark.parametrize("kind", [LORA, FULL], ids=str)
def test_a_pair_needs_no_manifest(kind: Kind, good: Bundles) -> None:
    checks = pair(good(kind), base=kind.module == "lora")
    assert names_of(checks, Outcome.PASSED) == [*checks]
    assert {"static.kv_layout.prefill", "static.base.prefill"} <= checks.keys()
    assert not {"static.files", "static.serving", "static.lengths"} & checks.keys()


@pytest.mark.parametrize(
    ("kind", "sabotage", "name", "said"),
    [
        (FULL, do.other_module(num_key_value_heads=1), "static.kv_layout.prefill", "kv_heads: 1"),
        (FULL, do.reorder_special_tokens(do.MATH), "static.tokenizer.prefill", "<|im_start|>"),
        (FULL, do.other_chat_template(do.MATH), "static.chat_template.prefill", "part at"),
        (LORA, do.adapter_of_another_base, "static.lora.prefill", "fits no layer"),
        (LORA, do.set_record(system="full-ft"), "static.system.prefill", "naive"),
        (
            LORA,
            do.set_record(base={"sha256": OTHER_DIGEST}),
            "static.base.prefill",
            "tuned from ffffffffffff",
        ),
        (
            LORA,
            do.set_tokenizer_config("decode", auto_map={"AutoTokenizer": ["t.T", None]}),
            "static.code",
            "auto_map",
        ),
    ],
    ids=["KV heads", "special tokens", "chat template", "adapter", "full-ft", "base", "auto_map"],
)
def test_a_pair_that_does_not_belong_together_is_told(
    kind: Kind, sabotage: do.Sabotage, name: str, said: str, copy: Bundles
) -> None:
    folder = copy(kind)
    sabotage(folder)
    assert_failed(pair(folder, base=kind.module == "lora"), name, said)


def test_a_pair_without_its_base_cannot_be_checked_whole(good: Bundles) -> None:
    checks = pair(good(LORA), base=False)
    unchecked = names_of(checks, Outcome.UNCHECKED)
    assert unchecked == ["static.kv_layout.prefill", "static.lora.prefill"]
    assert names_of(checks, Outcome.FAILED) == []


def test_a_pairs_boundary_is_its_records(copy: Bundles) -> None:
    folder = copy(LORA)
    do.record_anew(folder, boundary="n")
    modules = (folder / "prefill/math", folder / "decode", folder / "base")
    assert Subject.from_pair(*modules).boundary == "n"
    do.lose_record(folder)
    assert Subject.from_pair(*modules).boundary == "n-1"


# An 8B model by shapes alone: files as long as real ones, their values a hole in the file.
EIGHT_B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
W4_G128 = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {"weights": {"num_bits": 4, "group_size": 128, "symmetric": False}}
    },
}
SHARDS = 4
LORA_RANK = 16
DTYPE_OF = {".weight_packed": "I32", ".weight_zero_point": "I32", ".weight_shape": "I64"}
ITEM_BYTES = {"I32": 4, "I64": 8, "BF16": 2}


def write_sparse(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file as long as it says, its values a hole."""
    header, end = {}, 0
    for name, shape in shapes.items():
        dtype = DTYPE_OF.get(Path(name).suffix, "BF16")
        begin, end = end, end + prod(shape) * ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with path.open("r+b") as stream:
        stream.truncate(8 + len(text) + end)


def write_sharded(folder: Path, config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
    folder.mkdir(parents=True)
    write_json(folder / "config.json", config)
    weight_map: dict[str, str] = {}
    for number in range(SHARDS):
        own = dict([*shapes.items()][number::SHARDS])
        file = f"model-{number + 1:05}-of-{SHARDS:05}.safetensors"
        write_sparse(folder / file, own)
        weight_map |= dict.fromkeys(own, file)
    write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})


def write_large_tokenizer(folder: Path, *, older: bool) -> None:
    """128,000 tokens and 127,744 merges; `older` writes the same merges as texts."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {f"t{number:06}": number for number in range(128_000)}
    pairs = [[f"t{number % 256:06}", f"t{number:06}"] for number in range(256, 128_000)]
    tokenizer = {
        "version": "1.0",
        "added_tokens": [{"id": 128_000, "content": "<|end|>", "special": True}],
        "model": {
            "type": "BPE",
            "vocab": vocabulary,
            "merges": [" ".join(pair) for pair in pairs] if older else pairs,
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def eight_b_bundle(folder: Path) -> Path:
    expected = expected_tensors(EIGHT_B)
    write_sharded(folder / "base", EIGHT_B, expected.shapes)
    config = EIGHT_B | {"quantization_config": W4_G128}
    scheme = scheme_of(config)
    assert scheme is not None
    shapes = dict(expected.shapes)
    adapter: dict[str, tuple[int, ...]] = {}
    for name in sorted(expected.linears - {"lm_head"}):
        weight = shapes.pop(f"{name}.weight")
        shapes |= packed_shapes(name, weight, scheme)
        adapter[f"base_model.model.{name}.lora_A.weight"] = (LORA_RANK, weight[1])
        adapter[f"base_model.model.{name}.lora_B.weight"] = (weight[0], LORA_RANK)
    write_sharded(folder / "decode", config, shapes)
    prefill = folder / "prefill/math"
    prefill.mkdir(parents=True)
    write_sparse(prefill / "adapter_model.safetensors", adapter)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = {"peft_type": "LORA", "r": LORA_RANK, "lora_alpha": 32, "target_modules": targets}
    write_json(prefill / "adapter_config.json", lora)
    digests = {f"model-{number:05}-of-00004.safetensors": "0" * 64 for number in (1, 2, 3, 4)}
    write_tuning_record(prefill, "lora", digests, files={"adapter_model.safetensors": "0" * 64})
    for name in ("tokenizer", "base", "decode"):
        write_large_tokenizer(folder / name, older=name == "base")
    finish(folder, "lora", digests, tasks=["math"], rank=LORA_RANK, max_tokens=8192, digests=False)
    return folder


def test_an_8b_bundle_is_checked_within_two_seconds(tmp_path: Path) -> None:
    folder = eight_b_bundle(tmp_path / "bundle")
    assert sum(path.stat().st_size for path in folder.rglob("*.safetensors")) > 20e9
    started = time.process_time()
    checks = checks_of(folder, "static.files")
    seconds = time.process_time() - started
    assert names_of(checks, Outcome.PASSED) == [name for name in checks if name != "static.files"]
    assert seconds < 2.0
    do.set_config("decode", num_key_value_heads=4)(folder)
    assert names_of(checks_of(folder, "static.files"), Outcome.FAILED) == [
        "static.decode.tensors",
        "static.decode.kv_layout",
    ]
