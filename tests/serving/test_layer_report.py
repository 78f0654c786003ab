# SPDX-License-Identifier: Apache-2.0
"""How layers are served is logged once, when all are loaded."""

from nm_permute_plugin.serving.layer_report import LayerReport


def logged(reasons: dict[str, str | None]) -> tuple[list[str], list[str]]:
    """What a report on layers warns and informs of."""
    warned, informed = [], []
    report = LayerReport(warned.append, informed.append)
    for name in reasons:
        report.expect(name)
    for name, reason in reasons.items():
        assert (warned, informed) == ([], [])
        report.note(name, reason)
    return warned, informed


def test_layers_that_stay_dense_are_warned_of_once_for_each_reason() -> None:
    warned, informed = logged({"a": "small", "b": None, "c": "odd", "d": "small"})
    assert warned == [
        "2 of 4 2:4 layers are served dense, from a to d: small",
        "1 of 4 2:4 layers are served dense, c: odd",
    ]
    assert informed == ["1 of 4 2:4 layers are served sparse"]


def test_where_all_are_sparse_nothing_is_warned_of() -> None:
    assert logged({"a": None}) == ([], ["1 of 1 2:4 layers are served sparse"])
