# SPDX-License-Identifier: Apache-2.0
"""See whether a name can be that of a model, without importing what would load it."""

import re
from pathlib import Path

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
"""A name that transformers may look up on the Hugging Face hub: ``ORGANISATION/NAME``."""


def must_be_model(name: str | Path) -> None:
    """
    See that a name is the folder of a model, or may be a model of the hub.

    :raises FileNotFoundError: if it is neither
    """
    if (Path(name) / "config.json").is_file():
        return
    if (Path(name) / "adapter_config.json").is_file():
        raise FileNotFoundError(
            f"{name} holds a PEFT adapter and no model: load it on its base model, save "
            "what merge_and_unload() returns, and give that folder"
        )
    if Path(name).exists():
        raise FileNotFoundError(
            f"{name} holds no checkpoint (no config.json); give the folder that "
            "save_pretrained wrote"
        )
    if not HUB_NAME.fullmatch(str(name)):
        raise FileNotFoundError(
            f"{name} does not exist; give a model's folder, or its name on the Hugging "
            "Face hub as ORGANISATION/NAME"
        )


def must_be_folder(folder: Path) -> None:
    """
    See that there is a folder, for what reads nothing from the hub.

    :raises FileNotFoundError: if there is none
    """
    if folder.is_dir():
        return
    if folder.exists():
        raise FileNotFoundError(f"{folder} is a file; give the checkpoint's folder")
    hub = ""
    if HUB_NAME.fullmatch(str(folder)):
        hub = f", or fetch it from the Hugging Face hub first: hf download {folder}"
    raise FileNotFoundError(f"{folder} does not exist; give a folder{hub}")
