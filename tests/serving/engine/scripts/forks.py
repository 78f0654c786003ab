# SPDX-License-Identifier: Apache-2.0
"""
Runs scripts in forks of this process, which has imported vLLM once for all of them.

Usage, by the interpreter that has vLLM::

    python forks.py [COVERAGE_DATA_FILE]

Each line of stdin is a job as JSON: ``script``, a path; ``words``, its arguments;
``environment``, variables to set; ``stdout`` and ``stderr``, files for what it prints;
``timeout``, seconds. For each a line of stdout tells the exit status, negative if a signal
ended it.
"""

import gc
import json
import os
import runpy
import signal
import sys


def become(job):
    """Make this process one that an interpreter has just started for a script."""
    for path, descriptor in ((job["stdout"], 1), (job["stderr"], 2)):
        with open(path, "w") as file:
            os.dup2(file.fileno(), descriptor)
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    os.environ.update(job["environment"])
    signal.alarm(job["timeout"])
    sys.argv = [job["script"], *job["words"]]


def traced(data_file):
    """Start coverage as ``coverage run --parallel-mode`` does; returns what ends it."""
    from coverage import Coverage

    package = ["nm_permute_plugin"]
    coverage = Coverage(data_file=data_file, data_suffix=True, source=package)
    coverage.start()

    def end():
        coverage.stop()
        coverage.save()

    return end


def main(data_file=None):
    statuses = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM says while it is imported
    import vllm.v1.worker.cpu_worker  # noqa: F401
    from vllm import LLM  # noqa: F401

    # Every engine collects garbage many times: not all that was imported, each time.
    gc.collect()
    gc.freeze()
    gc.unfreeze = lambda: None
    for line in sys.stdin:
        job = json.loads(line)
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            statuses.close()
            become(job)
            end = traced(data_file) if data_file else lambda: None
            try:
                runpy.run_path(job["script"], run_name="__main__")
            finally:
                end()
            return
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), file=statuses, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
