# SPDX-License-Identifier: Apache-2.0
"""A checkpoint of ``oneshot`` is whole or not there, whenever its save is killed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("killed_saves.py")


@pytest.mark.slow
def test_a_killed_save_leaves_all_or_nothing(tiny_checkpoint, tmp_path: Path) -> None:
    tiny_checkpoint()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(SCRIPT), str(tmp_path), "4"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["changes"] > 20
    for end in found["ends"]:
        now, later = end["found"]
        assert later in ("before", "after"), end
        # between two renames, an older checkpoint has another name until the next run
        assert now == later or end["there"] == "older" and now == "gone", end
        assert end["beside"] == [], end
    tokenizer = json.loads(
        (tmp_path / "place" / "whole" / "tokenizer_config.json").read_text()
    )
    assert tokenizer["model_max_length"] == 77  # the one that was given


def test_a_tokenizer_that_cannot_be_saved_leaves_nothing(
    tiny_checkpoint, run_oneshot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import PreTrainedTokenizerFast

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    recipe = (
        "prune_stage:\n  permutation_modifiers:\n    LearnablePermutationModifier:\n"
        "      method: identity\n      batch_size: 4\n"
    )
    dense, out = tiny_checkpoint(), tmp_path / "out"
    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", fail)
    with pytest.raises(OSError, match="No space left"):
        run_oneshot(dense, recipe, out)
    assert not out.exists()
    shutil.rmtree(dense)
    assert list(tmp_path.iterdir()) == []
