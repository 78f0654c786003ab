# SPDX-License-Identifier: Apache-2.0
"""The modifier's fields round-trip and are checked; its life in ``oneshot``."""

from pathlib import Path

import pytest
import torch
import yaml
from helpers import ours, wanda
from llmcompressor.core import active_session
from transformers import AutoModelForCausalLM, OlmoConfig, OlmoForCausalLM

from nm_permute_plugin.checkpoint.record import read_record
from nm_permute_plugin.modifiers import LearnablePermutationModifier as Modifier
from nm_permute_plugin.specs.architectures import LLAMA

SEARCH = ours(method="search")


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


def assert_untouched(model: torch.nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = weights_of(model)
    assert [
        n for n, tensor in before.items() if not torch.equal(after[n], tensor)
    ] == []


@pytest.mark.parametrize("method", ["identity", "search", "learned"])
def test_the_record_tells_what_was_done(tiny_checkpoint, run_oneshot, method) -> None:
    learn = {"learn": {"steps": 2}, "validation": {"every": 1}}
    modifier = Modifier(method=method, **(learn if method == "learned" else {}))
    assert modifier.record is None
    run_oneshot(tiny_checkpoint(), [modifier])
    record = modifier.record
    before, after = record.retained
    assert 0.5 < before <= after < 1
    if method == "identity":
        assert record.perms == {}
        assert record.fold_error == 0
        assert before == after
    else:
        assert set(record.perms) == {
            "residual", "hidden.0", "hidden.1", "value.0", "value.1"
        }  # fmt: skip
        assert 0 < record.fold_error < 1e-5
    expected = {
        "identity": [],
        "search": [("round", look) for look in range(0, 15, 3)],
        "learned": [("step", 0), ("step", 1), ("step", 2)],
    }
    assert [next(iter(look.items())) for look in record.history] == expected[method]


def test_a_recovery_is_on_record(
    tiny_checkpoint, run_oneshot, assert_exactly, tmp_path: Path
) -> None:
    stages = ["rescale", "blocks", "end_to_end"]
    recover = {"stages": stages, "blocks": {"window": 2}, "end_to_end": {"steps": 5}}
    modifier = Modifier(method="search", recover=recover)
    assert_exactly(run_oneshot(tiny_checkpoint(), [modifier], tmp_path / "out"))
    record = modifier.record
    assert [stage.stage for stage in record.recovered] == stages
    steps = [look["step"] for look in record.recovered[2].history]
    assert steps == [0, 5]
    assert [look["layer"] for look in record.recovered[1].history] == [0]
    told = read_record(tmp_path / "out")[1]["recovered"]
    assert [stage["validation"] for stage in told] == [
        list(stage.validation) for stage in record.recovered
    ]
    assert [stage["kept"] for stage in told] == [
        stage.kept for stage in record.recovered
    ]


def test_only_the_named_spaces_are_ordered(tiny_checkpoint, run_oneshot) -> None:
    modifier = Modifier(method="search", spaces=["value"])
    run_oneshot(tiny_checkpoint(), [modifier])
    assert set(modifier.record.perms) == {"value.0", "value.1"}


def test_targets_and_ignore_choose_the_linears(
    tiny_checkpoint, run_oneshot, assert_exactly
) -> None:
    modifier = Modifier(
        method="search",
        targets=["re:.*_proj$", "lm_head"],
        ignore=["re:.*(attn|up_proj)"],
    )
    model = run_oneshot(tiny_checkpoint(), [modifier])
    dense = [
        f"model.layers.{i}.{name}"
        for i in (0, 1)
        for name in ("mlp.up_proj", *(f"self_attn.{x}_proj" for x in "qkvo"))
    ]
    assert_exactly(model, dense=tuple(dense))


def test_the_order_of_the_whole_pass_is_repeated_by_its_seed(
    tiny_checkpoint, run_oneshot
) -> None:
    folder = tiny_checkpoint()
    fields = {"learn": {"steps": 4}, "validation": {"every": 1}}
    modifiers = [Modifier(seed=seed, **fields) for seed in (3, 3, 4)]
    first, again, _ = (weights_of(run_oneshot(folder, [of])) for of in modifiers)
    assert [name for name in first if not torch.equal(first[name], again[name])] == []
    histories = [modifier.record.history for modifier in modifiers]
    assert histories[0] == histories[1] != histories[2]


def test_two_modifiers_in_one_pass_are_refused(tiny_checkpoint, run_oneshot) -> None:
    folder = tiny_checkpoint()
    model = AutoModelForCausalLM.from_pretrained(folder)
    before = weights_of(model)
    with pytest.raises(ValueError, match="WandaPruningModifier would share one"):
        run_oneshot(folder, SEARCH + wanda(), model=model, pipeline="sequential")
    assert_untouched(model, before)


def test_alone_the_sequential_pipeline_does_the_same(
    tiny_checkpoint, run_oneshot, assert_exactly
) -> None:
    folder = tiny_checkpoint()
    alone = run_oneshot(folder, SEARCH, pipeline="sequential")
    assert_exactly(alone)
    assert_untouched(alone, weights_of(run_oneshot(folder, SEARCH)))


def test_a_run_that_never_calibrates_is_refused_at_its_end() -> None:
    with pytest.raises(RuntimeError, match="never ran"):
        Modifier().on_finalize(active_session().state)


def test_nothing_hangs_on_the_model_afterwards(tiny_checkpoint, run_oneshot) -> None:
    model = run_oneshot(tiny_checkpoint(), [Modifier(learn={"steps": 1})])
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    assert sum(hooks) == 0
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.fixture
def olmo(tiny_checkpoint) -> Path:
    """The folder of a model whose class has no spec; its norms have no weights."""
    folder = tiny_checkpoint(name="olmo")
    config = OlmoConfig(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        OlmoForCausalLM(config).save_pretrained(folder)
    return folder


def test_an_unknown_architecture_is_refused(olmo: Path, run_oneshot) -> None:
    with pytest.raises(NotImplementedError, match="OlmoForCausalLM.*`spec: FILE`"):
        run_oneshot(olmo, SEARCH)


@pytest.mark.parametrize("in_a_file", [False, True], ids=["lines", "file"])
def test_a_spec_from_yaml_makes_an_architecture_known(
    olmo: Path, run_oneshot, assert_exactly, tmp_path: Path, in_a_file: bool
) -> None:
    spec = {
        line: words
        for line, words in LLAMA.items()
        if "norm" not in line and not line.endswith("?")
    }
    file = tmp_path / "spec.yaml"
    file.write_text(yaml.safe_dump(spec))
    given = str(file) if in_a_file else spec
    model = run_oneshot(olmo, ours(method="search", spec=given))
    assert type(model).__name__ == "OlmoForCausalLM"
    assert_exactly(model)


MATCHES = {
    "a target": ({"targets": ["re:nothing"]}, "'re:nothing' matches no module"),
    "a second target": (
        {"targets": ["Linear", "Conv9d"]},
        "`targets`: 'Conv9d' ",
    ),
    "an ignore": ({"ignore": ["lm_haed"]}, "'lm_haed' matches no.*'lm_head'"),
    "a second ignore": (
        {"ignore": ["lm_head", "re:x$"]},
        "`ignore`: 're:x\\$' matches no",
    ),
    "no linear": ({"targets": ["re:.*embed.*"]}, "embed_tokens is a Embedding; only"),
    "all ignored": ({"ignore": ["Linear"]}, "takes away all that `targets`"),
    "a pattern too wide": ({"mask_structure": "2:16"}, "M=16"),
    "a spec without a line": (
        {"spec": {"model.norm.weight": "residual"}},
        "is claimed by no line of the permutation spec",
    ),
}


@pytest.mark.parametrize(("fields", "message"), MATCHES.values(), ids=MATCHES)
def test_what_does_not_fit_the_model_is_refused(
    tiny_checkpoint, run_oneshot, fields: dict[str, object], message: str
) -> None:
    folder = tiny_checkpoint()
    model = AutoModelForCausalLM.from_pretrained(folder)
    before = weights_of(model)
    with pytest.raises(ValueError, match=message):
        run_oneshot(folder, [Modifier(method="search", **fields)], model=model)
    assert_untouched(model, before)


def test_a_default_ignore_may_match_nothing(tiny_checkpoint, run_oneshot) -> None:
    # A base model without a head would be refused by its default otherwise.
    modifier = Modifier(method="search")
    assert modifier.ignore == ("lm_head",)
    run_oneshot(tiny_checkpoint(tie_word_embeddings=True), [modifier])
    assert modifier.record.fold_error < 1e-5


def test_a_model_that_is_sparse_already_is_refused(
    tiny_checkpoint, run_oneshot, tmp_path: Path
) -> None:
    run_oneshot(tiny_checkpoint(), SEARCH, tmp_path / "sparse")
    with pytest.raises(ValueError, match="q_proj is sparse already: 50% of its"):
        run_oneshot(tmp_path / "sparse", SEARCH)


CALIBRATION = {
    "too few tokens": ([[1, 2, 3]] * 5, "holds 15 tokens in 5 rows; at least 256"),
    "one row": ([list(range(48)) * 6], "has 1 row; at least 2"),
    "an unknown token": (
        [list(range(48))] * 11 + [[1, 48, 2]],
        "token 48, but the model knows only 48 tokens",
    ),
}


@pytest.mark.parametrize(("rows", "message"), CALIBRATION.values(), ids=CALIBRATION)
def test_bad_calibration_data_is_refused(
    tiny_checkpoint, run_oneshot, rows: list[list[int]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run_oneshot(tiny_checkpoint(), SEARCH, rows=rows, max_seq_length=512)


def test_missing_calibration_data_is_refused(tiny_checkpoint, run_oneshot) -> None:
    # Without text no method runs: the fold is measured on text too.
    with pytest.raises(ValueError, match="no calibration data.*--images FOLDER"):
        run_oneshot(tiny_checkpoint(), SEARCH, dataset=None)


def test_activations_that_are_not_finite_are_refused(
    tiny_checkpoint, run_oneshot
) -> None:
    folder = tiny_checkpoint()
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[3] = float("nan")
    with pytest.raises(ValueError, match=r"enter model\.layers\.0\.self_attn\.q_proj"):
        run_oneshot(folder, SEARCH, model=model)


WRONG = {
    "a norm that does not move": {"model.norm.weight": "_"},
    "rows of q and k that rotate": {
        "model.layers.{i}.self_attn.{q,k}_proj.weight": None,
        "model.layers.{i}.self_attn.q_proj.weight": "value.{i}:heads residual",
        "model.layers.{i}.self_attn.k_proj.weight": "value.{i} residual",
    },
    "a gate without its up": {
        "model.layers.{i}.mlp.{gate,up}_proj.weight": None,
        "model.layers.{i}.mlp.gate_proj.weight": "hidden.{i} residual",
        "model.layers.{i}.mlp.up_proj.weight": "_ residual",
    },
}


@pytest.mark.parametrize("changes", WRONG.values(), ids=WRONG)
def test_a_spec_that_changes_the_function_is_undone_and_refused(
    tiny_checkpoint, run_oneshot, changes: dict[str, str | None]
) -> None:
    spec = {line: words for line, words in (LLAMA | changes).items() if words}
    folder = tiny_checkpoint()
    model = AutoModelForCausalLM.from_pretrained(folder)
    before = weights_of(model)
    with pytest.raises(RuntimeError, match="the permutation spec is wrong: in float64"):
        run_oneshot(folder, [Modifier(method="search", spec=spec)], model=model)
    assert_untouched(model, before)
