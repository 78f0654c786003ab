# SPDX-License-Identifier: Apache-2.0
"""``nm-permute verify`` ends with 1 for whatever is not as it should be, and says why."""

import json
from pathlib import Path

import pytest
from commands import assert_one_error, nm_permute, prune

SPARSE = "14 of them sparse as they must be, no fault"


@pytest.mark.usefixtures("ready")
def test_what_prune_leaves_is_good_until_it_is_changed(tmp_path: Path) -> None:
    assert prune(tmp_path, "--text", tmp_path / "text.txt").exit_code == 0
    out = tmp_path / "out"
    for options in ([], ["--pattern", "2:4"]):
        result = nm_permute("verify", out, *options)
        assert result.exit_code == 0, result.output
        assert result.stdout.splitlines()[-1] == f"{out}: 16 matrices, {SPARSE}"
        assert "no checksums" not in result.output
        assert len(result.stdout.splitlines()) == 1
    whole = nm_permute("verify", out, "--table").stdout.splitlines()
    assert len(whole) == 2 + 16 + 1
    assert "up_proj" in "".join(whole)
    text = ["--text", tmp_path / "text.txt", "--sequence-length", 32, "--device", "cpu"]
    assert nm_permute("evaluate", out, *text, "--card").exit_code == 0
    (out / "more.txt").write_text("more")
    assert nm_permute("verify", out).exit_code == 0
    (out / "config.json").write_text((out / "config.json").read_text() + "\n")
    result = nm_permute("verify", out)
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("fault: config.json: is not the file that was written with")
    assert_one_error(nm_permute("evaluate", out, *text), "config.json: is not the file")
    assert_one_error(nm_permute("convert", out, tmp_path / "x"), "config.json: is not")
    (out / "nm_permute" / "checksums.json").unlink()
    result = nm_permute("verify", out)
    assert result.exit_code == 0
    assert f"{out} has no checksums" in result.stdout
    assert nm_permute("evaluate", out, *text).exit_code == 0


def test_a_dense_model_is_not_2_4(tiny_checkpoint) -> None:
    dense = tiny_checkpoint()
    result = nm_permute("verify", dense)
    assert result.exit_code == 0
    assert "none of which has to be sparse (--pattern 2:4" in result.stdout
    result = nm_permute("verify", dense, "--pattern", "2:4")
    assert result.exit_code == 1
    lines = result.stderr.splitlines()
    assert len(lines) == 14
    assert all(": is not 2:4: row 0, channels 0..3 hold" in line for line in lines)
    assert "model.layers.1.mlp.up_proj" in result.stderr
    assert "no fault" not in result.output
    assert len(result.stdout.splitlines()) >= 2 + 14  # the faulty ones alone
    assert "lm_head" not in result.stdout


def test_what_is_no_folder_is_one_line(tmp_path: Path) -> None:
    gone, file = tmp_path / "gone", tmp_path / "file"
    file.write_text("x")
    assert_one_error(
        nm_permute("verify", gone), f"{gone} does not exist; give a folder$"
    )
    assert_one_error(nm_permute("verify", file), f"{file} is a file; give the")
    assert_one_error(
        nm_permute("verify", "org/no-name"),
        "org/no-name does not exist; .*fetch it .*: hf download org/no-name",
    )


@pytest.mark.usefixtures("ready")
@pytest.mark.parametrize("name", [None, "compression_config"], ids=["gone", "renamed"])
def test_a_config_that_forgot_is_refused_by_every_command(
    tmp_path: Path, name: str | None
) -> None:
    assert prune(tmp_path, "--text", tmp_path / "text.txt").exit_code == 0
    out = tmp_path / "out"
    config = json.loads((out / "config.json").read_text())
    block = config.pop("quantization_config")
    (out / "config.json").write_text(
        json.dumps(config | ({name: block} if name else {}))
    )
    (out / "nm_permute" / "checksums.json").unlink()
    result = nm_permute("verify", out)
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    stored = (
        "the 14 matrices that are stored as sparse-24-bitmask: take the config.json"
    )
    assert ("call it quantization_config" if name else stored) in line
    text = ["--text", tmp_path / "text.txt", "--sequence-length", 32, "--device", "cpu"]
    assert_one_error(
        nm_permute("evaluate", out, *text), "stored sparse, and config.json does not"
    )
    result = nm_permute("convert", out, tmp_path / "dense-again", "--format", "dense")
    assert result.exit_code == 0, result.output
    assert nm_permute("verify", tmp_path / "dense-again").exit_code == 0
