# SPDX-License-Identifier: Apache-2.0
"""Write weights that llm-compressor may have offloaded, and that ranks may share."""

from typing import Any

from compressed_tensors.offload import OffloadCache, update_offload_parameter
from compressed_tensors.offload.cache import DeviceCache
from torch import Tensor, nn

from nm_permute_plugin.pruning import ranks


def write_once(module: nn.Module, name: str, value: Tensor) -> None:
    """
    Store a parameter's new value; what lies in memory that ranks share, on one of them.

    Every rank calls it with the same value, and has read the old one before.

    :param module: offloaded or not
    :param name: of its parameter
    """
    cache: Any = module._parameters
    own = not isinstance(cache, OffloadCache) or isinstance(cache, DeviceCache)
    if own or ranks.count() == 1:
        update_offload_parameter(module, name, value)
        return
    ranks.wait()  # for all to have read it
    if ranks.is_first():
        update_offload_parameter(module, name, value)
    else:
        # What was fetched to a rank's own device is its own.
        fetched = cache.keep_onloaded_values.get(cache.offloaded_values[name])
        if fetched is not None:
            fetched.copy_(value)
    ranks.wait()
