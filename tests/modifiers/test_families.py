# SPDX-License-Identifier: Apache-2.0
"""Models of other families go the whole way through oneshot, or are refused early."""

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from llmcompressor.modeling.moe.linearize import linearize_moe
from loguru import logger
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from nm_permute_plugin.checkpoint.plan import experts_of
from nm_permute_plugin.checkpoint.saved_names import saved_names
from nm_permute_plugin.checkpoint.verify import verify
from nm_permute_plugin.checkpoint.writer import convert
from nm_permute_plugin.modifiers import LearnablePermutationModifier as Modifier
from nm_permute_plugin.specs.conv1d import is_linear, weight_of

sys.path.insert(0, str(Path(__file__).parents[1] / "specs"))  # for the zoo
from zoo import ZOO, logits_of, tiny  # noqa: E402

CASES = {case.id: case.values for case in ZOO}
VISUAL = ["lm_head", "re:.*visual.*"]

Run = Callable[..., PreTrainedModel]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A factory: the model of the zoo after oneshot, and saved to ``out``."""

    def of(case: str, modifier: Modifier) -> PreTrainedModel:
        from datasets import Dataset
        from llmcompressor import oneshot

        name, config, options = CASES[case]
        model = tiny(name, config, options, torch.float32)
        make_channels_matter(model)
        folder = tmp_path / "dense"
        model.save_pretrained(folder)
        words = transformers.PreTrainedTokenizerFast(
            tokenizer_object=tiny_tokenizer(), pad_token="w00", unk_token="w00"
        )
        words.save_pretrained(folder)
        generator = torch.Generator().manual_seed(3)
        rows = torch.randint(3, 40, (12, 32), generator=generator).tolist()
        return oneshot(
            model=type(model).from_pretrained(folder),
            tokenizer=words,
            recipe=[modifier],
            dataset=Dataset.from_dict({"input_ids": rows}),
            max_seq_length=32,
            num_calibration_samples=len(rows),
            shuffle_calibration_samples=False,
            output_dir=str(tmp_path / "out"),
        )

    return of


def make_channels_matter(model: PreTrainedModel) -> None:
    """Strong channels beside strong ones: another order then loses far less."""
    with torch.no_grad():
        for module in filter(is_linear, model.modules()):
            weight = weight_of(module)
            weight.mul_(torch.linspace(3, -3, weight.shape[1]).exp())


def tiny_tokenizer() -> object:
    from tokenizers import Tokenizer, models

    words = {f"w{i:02}": i for i in range(48)}
    return Tokenizer(models.WordLevel(words, unk_token="w00"))


def assert_reloads(model: PreTrainedModel, folder: Path) -> None:
    """What is read back gives the logits of its dense form, bit for bit, and the old."""
    tokens = torch.arange(3, 30)[None]
    convert(folder, folder.parent / "plain", "dense")
    found, plain = (
        logits_of(type(model).from_pretrained(path), tokens)
        for path in (folder, folder.parent / "plain")
    )
    expected = logits_of(copy.deepcopy(model), tokens)
    assert torch.equal(found, plain)
    if experts_of(name for name, _ in model.named_modules()):
        # one expert after the other in memory, all packed where they are read back
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    else:
        assert torch.equal(found, expected)


HEAD = ["lm_head"]
FAMILIES = [
    ("llama-gqa", HEAD),
    ("mistral-mqa", HEAD),
    ("qwen2-gqa", HEAD),
    ("qwen3-nine-heads", HEAD),
    ("gemma2-mha-tied", HEAD),
    ("gemma3-mqa", HEAD),
    ("phi3-gqa", HEAD),
    ("smollm3-gqa", HEAD),
    ("olmo2-gqa", HEAD),
    ("granite-gqa", HEAD),
    ("cohereforcausallm", HEAD),
    ("cohere2-gqa", HEAD),
    ("stablelm-gqa", HEAD),
    ("starcoder2-mha-tied", HEAD),
    ("gpt-neox", HEAD),
    ("falcon-one-value", HEAD),
    ("falcon-grouped", HEAD),
    ("falcon-alibi", HEAD),
    ("gpt2-tied", HEAD),
    ("gpt2-three-heads", HEAD),
    ("opt-tied", HEAD),
    ("opt-350m", HEAD),
    ("qwen2moe-one-dense-layer", [*HEAD, "re:.*shared_expert_gate"]),
    ("qwen3moe-gqa", HEAD),
    ("mixtral-gqa", HEAD),
    ("qwen2-vl", VISUAL),
    ("qwen2.5-vl", VISUAL),
]


@pytest.mark.parametrize("method", ["search", "learned"])
@pytest.mark.parametrize(
    ("case", "ignore"), [pytest.param(*values, id=values[0]) for values in FAMILIES]
)
def test_a_family_is_ordered_pruned_and_reloaded(
    run: Run, tmp_path: Path, case: str, ignore: list[str], method: str
) -> None:
    options: dict[str, object] = {"search": {"rounds": 2}}
    if method == "learned":
        options |= {"learn": {"steps": 2}, "validation": {"every": 1}}
    modifier = Modifier(method=method, ignore=ignore, **options)
    pruned = run(case, modifier)
    perms = modifier.record.perms
    assert {name.split(".")[0] for name in perms} == {"residual", "hidden", "value"}
    moved = [name for name, p in perms.items() if not torch.equal(p, p.sort().values)]
    assert {"residual", "hidden"} <= {name.split(".")[0] for name in moved}
    assert modifier.record.fold_error < 1e-4  # 4.3e-5 at most, in float32
    dense = [
        name
        for name, module in pruned.named_modules()
        if is_linear(module) and float((module.weight == 0).float().mean()) < 0.5
    ]
    left = ("lm_head", "visual", "shared_expert_gate")
    assert [name for name in dense if not any(part in name for part in left)] == []
    assert verify(tmp_path / "out").good
    assert_reloads(pruned, tmp_path / "out")


@pytest.mark.parametrize(
    "case", ["llama-mha-tied", "gpt-neox-three-heads-tied", "falcon-one-value"]
)
def test_a_table_of_embeddings_is_no_linear_that_stays_dense(
    run: Run, tmp_path: Path, case: str
) -> None:
    run(case, Modifier(method="identity"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    block = config["quantization_config"]["sparsity_config"]
    assert (block["targets"], block["ignore"]) == (["Linear"], ["lm_head"])
    assert verify(tmp_path / "out").good


def test_conv1d_is_pruned_along_its_inputs_and_stored_dense(
    run: Run, tmp_path: Path
) -> None:
    recover = {
        "stages": ["rescale", "blocks", "end_to_end"],
        "blocks": {"epochs": 1},
        "end_to_end": {"steps": 2},
    }
    modifier = Modifier(
        method="search",
        search={"rounds": 2},
        recover=recover,
        validation={"every": 1},
    )
    pruned = run("gpt2-tied", modifier)
    layer = pruned.transformer.h[1]
    conv1d = [layer.attn.c_attn, layer.attn.c_proj, layer.mlp.c_fc, layer.mlp.c_proj]
    for module in conv1d:
        kept = (weight_of(module) != 0).unflatten(-1, (-1, 4)).sum(-1)
        assert kept.eq(2).all()
        assert module.weight.shape[0] == weight_of(module).shape[1]
    report = verify(tmp_path / "out")
    assert report.good
    assert [row.module for row in report.rows if row.promised] == [
        f"transformer.h.{i}.{name}"
        for i in range(2)
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "8 of them store their weight as [in, out] (Conv1D)" in card
    assert "stored dense, zeros included: Conv1D stores [in, out]" in card


@pytest.mark.parametrize(
    ("case", "module", "place"),
    [
        ("gpt2-tied", "transformer.h.1.mlp.c_fc", (slice(4, 7), 5)),
        ("qwen3moe-gqa", "model.layers.1.mlp.experts.2.up_proj", (5, slice(4, 7))),
    ],
    ids=["Conv1D", "expert"],
)
def test_a_pattern_that_is_stored_dense_and_lost_is_found(
    run: Run, tmp_path: Path, case: str, module: str, place: tuple
) -> None:
    run(case, Modifier(method="identity", format="dense"))
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    tensors[f"{module}.weight"][place] = 1.0
    save_file(tensors, file, {"format": "pt"})
    (file.parent / "nm_permute" / "checksums.json").unlink()  # finds any change
    (fault,) = verify(tmp_path / "out").faults
    assert fault.tensor == module
    assert fault.message.startswith("is not 2:4: row 5, channels 4..7 hold")


def test_experts_are_saved_under_the_names_of_their_checkpoints(
    run: Run, tmp_path: Path
) -> None:
    run("mixtral-gqa", Modifier(method="identity", format="dense"))
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        names = {name for name in file.keys() if ".experts.0.w" in name}  # noqa: SIM118
    expert = "model.layers.{}.block_sparse_moe.experts.0.w{}.weight"
    assert names == {expert.format(i, w) for i in range(2) for w in (1, 2, 3)}
    assert verify(tmp_path / "out").good


def test_experts_that_would_not_come_back_are_refused(tmp_path: Path) -> None:
    name, config, options = CASES["mixtral-gqa"]
    model = linearize_moe(tiny(name, config, options, torch.float32))
    with pytest.raises(ValueError, match="come back random"):
        saved_names(model, ["model.layers.0.mlp.experts.0.up_proj"])


@pytest.mark.parametrize("format", ["sparse-24-bitmask", "sparse-bitmask", "auto"])
@pytest.mark.parametrize("case", ["qwen2moe-gqa", "qwen3moe-gqa", "mixtral-gqa"])
def test_experts_are_stored_sparse(
    run: Run, tmp_path: Path, case: str, format: str
) -> None:
    ignore = ["lm_head"] + ["re:.*shared_expert_gate"] * case.startswith("qwen2")
    pruned = run(case, Modifier(method="identity", ignore=ignore, format=format))
    report = verify(tmp_path / "out")
    assert report.good
    promised = [row for row in report.rows if row.promised]
    experts = [row for row in promised if ".experts." in row.module]
    assert len(experts) == 2 * 4 * 3
    expected = "sparse-24-bitmask" if format == "auto" else format
    assert {row.format for row in promised} == {expected}
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("vllm serve" in card) == (format != "sparse-bitmask")
    assert ("experts are served sparse" in card) == (format != "sparse-bitmask")
    assert_reloads(pruned, tmp_path / "out")


@pytest.mark.parametrize("format", ["auto", "sparse-bitmask"])
def test_4of8_goes_the_whole_way(
    run: Run, tmp_path: Path, assert_exactly, format: str
) -> None:
    steps = {"learn": {"steps": 2}, "validation": {"every": 1}, "search": {"rounds": 2}}
    recover = {"recover": ["rescale"], "mask_structure": "4:8"}
    modifier = Modifier(format=format, **steps, **recover)
    pruned = run("llama-mha-tied", modifier)
    assert_exactly(pruned, "4:8")
    report = verify(tmp_path / "out")
    assert report.good
    stored = {row.format for row in report.rows if row.promised}
    assert stored == {"dense" if format == "auto" else format}
    assert_reloads(pruned, tmp_path / "out")


def test_experts_have_orders_of_their_own(run: Run) -> None:
    modifier = Modifier(method="search", search={"rounds": 2})
    run("qwen3moe-gqa", modifier)
    experts = {f"hidden.{i}.{e}" for i in range(2) for e in range(4)}
    assert set(modifier.record.perms) == experts | {"residual", "value.0", "value.1"}


REFUSED = [
    pytest.param(
        "gpt2-tied",
        {"format": "sparse-24-bitmask"},
        r"sparse-24-bitmask cannot hold transformer\.h\.0\.attn\.c_attn: it is a Conv1D",
        id="sparse Conv1D",
    ),
]


@pytest.mark.parametrize(("case", "fields", "message"), REFUSED)
def test_what_cannot_be_pruned_is_refused_before_the_work(
    run: Run, tmp_path: Path, case: str, fields: dict[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(case, Modifier(method="search", **fields))
    assert not (tmp_path / "out").exists()


def test_the_log_lists_what_orders_every_linear(run: Run) -> None:
    lines: list[str] = []
    sink = logger.add(lambda message: lines.append(str(message)), format="{message}")
    try:
        fields = {"method": "search", "search": {"rounds": 2}, "spaces": ["hidden"]}
        run(
            "opt-350m",
            Modifier(ignore=[], **fields, targets=["re:.*(fc2|project_.*)$"]),
        )
    finally:
        logger.remove(sink)
    said = "".join(lines).splitlines()
    assert [line for line in said if "the inputs of" in line] == [
        "residual (32 channels) could permute, but is left out, the inputs of "
        "model.decoder.project_out",
        "hidden.{0-1} (48 channels) permutes the inputs of model.decoder.layers.{0-1}.fc2",
        "no space permutes the inputs of model.decoder.project_in: the spec keeps them in "
        "their places (embedding)",
    ]
