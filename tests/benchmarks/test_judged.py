# SPDX-License-Identifier: Apache-2.0
"""Fidelity and HellaSwag over seeds: means, standard errors, paired differences."""

import math

from judged import HEAD, judged_table


def result(method: str, seed: int, acc_norm: str | None, divergence: float) -> dict:
    shares = {"divergence": divergence, "agreement": 0.75, "flips": 0.125}
    answers = {"hellaswag": {"acc": acc_norm, "acc_norm": acc_norm}} if acc_norm else {}
    return {"method": method, "seed": seed, **shares, **answers}


def record(*results: dict, dense: str | None = "1100") -> dict:
    answers = None if dense is None else {"acc": dense, "acc_norm": dense}
    return {"dense_hellaswag": answers, "results": list(results)}


def test_errors_are_over_items_and_over_seeds() -> None:
    runs = [result("learned", 0, "1100", 0.5), result("learned", 1, "0110", 0.7)]
    lines = judged_table(record(result("wanda", 0, "1000", 1.0), *runs)).splitlines()
    assert lines[0] == f"| {' | '.join(HEAD)} |"
    # Items are right in 1, 1, 0, 0 cases: the deviation is sqrt(1/3), of four items.
    half = f"{math.sqrt(1 / 3) / 2:.2%}"
    assert (
        lines[2] == f"| dense |  |  |  |  | 50.00% ± {half} | 50.00% ± {half} |  |  |"
    )
    quarter = f"25.00% ± {0.5 / 2:.2%}"
    assert lines[3] == (
        f"| wanda | 1 | 1.0000 | 75.00% | 12.50% | {quarter} | {quarter} | "
        f"-25.00% ± {0.5 / 2:.2%} | 25.00% |"
    )
    # Means over the two seeds: 0.5, 1, 0.5, 0; against the dense model -0.5, 0, 0.5, 0.
    mean = f"50.00% ± {math.sqrt(0.5 / 3) / 2:.2%}"
    assert lines[4] == (
        f"| learned | 2 | 0.6000 ± 0.1000 | 75.00% ± 0.00% | 12.50% ± 0.00% | {mean} | "
        f"{mean} | +0.00% ± {math.sqrt(0.5 / 3) / 2:.2%} | 25.00% |"
    )


def test_what_was_not_measured_is_left_out() -> None:
    only = record(result("wanda", 0, None, 1.0), dense=None)
    assert judged_table(only).splitlines()[2:] == [
        "| wanda | 1 | 1.0000 | 75.00% | 12.50% |  |  |  |  |"
    ]
    older = {"results": [{"method": "wanda", "seed": 0, "perplexity": 9.0}]}
    assert judged_table(older) == ""
