"""How results are drawn."""

from __future__ import annotations

import pytest
import torch

from transect.probes.draw import heatmap, lines


@pytest.mark.parametrize(
    "places, kind", [(["0.1%", "1%", "50%"], "category"), (["0", "1", "2-3"], "category"), ([0.1, 1.0, 50.0], None)]
)
def test_words_stand_at_equal_distances_and_numbers_at_their_own(places, kind):
    figure = lines("", "", {"a": [3.0, 2.0, 1.0]}, x=places, xlabel="", ylabel="").figure
    assert figure.layout.xaxis.type == kind
    assert list(figure.data[0].x) == places


def test_few_whole_numbers_have_a_tick_each_and_many_have_not():
    few, many = (lines("", "", {"a": [1.0] * count}, xlabel="", ylabel="").figure for count in (8, 80))
    assert few.layout.xaxis.dtick == 1 and many.layout.xaxis.dtick is None


def test_what_is_not_finite_is_a_gap():
    table = torch.tensor([[1.0, float("nan")], [float("inf"), 2.0]])
    shown = heatmap("", "", table, xlabel="", ylabel="").figure.data[0].z
    assert [list(row) for row in shown] == [[1, None], [None, 2]]


def test_more_lines_than_colours_are_told_apart_by_a_scale_and_few_are_named():
    few, many = (
        lines("t", "n", {str(i): [i, i + 1] for i in range(count)}, xlabel="x", ylabel="y") for count in (8, 30)
    )
    assert all(line.mode == "lines+markers" and line.showlegend is None for line in few.figure.data)
    assert len({line.line.color for line in many.figure.data}) == 30
    assert [line.name for line in many.figure.data if line.showlegend] == ["0", "7", "14", "22", "29"]
